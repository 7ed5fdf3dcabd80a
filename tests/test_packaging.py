"""What is built from the repository: nothing missing, no warning, links that work on the package index."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^Repository = "(.*)"$', PROJECT, re.MULTILINE)[1]
BUILD = (
    "import sys, setuptools.build_meta as b; out = sys.argv[1]; print(b.build_sdist(out)); print(b.build_wheel(out))"
)


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_the_links_of_the_readme_are_absolute_and_lead_somewhere():
    """The package index shows the README without the repository around it."""
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://"), link
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/")).is_file(), link


def test_every_link_of_the_project_is_in_its_repository():
    block = PROJECT.split("[project.urls]\n")[1].split("\n\n")[0]
    assert all(f'"{REPOSITORY}' in line for line in block.splitlines())
    assert len(block.splitlines()) >= 3


@pytest.mark.slow
def test_archives_hold_everything_and_are_built_without_a_warning(tmp_path):
    files, source, out = tracked(), tmp_path / "source", tmp_path / "out"
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    out.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, out], cwd=source, capture_output=True, text=True, check=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if re.search("warn", line, re.IGNORECASE)]
    assert [line for line in said if "byte-compiling is disabled" not in line] == []
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert [str(file) for file in files if str(file) not in names] == []
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        inside = set(built.namelist())
    assert [str(file) for file in files if file.parts[0] == "mlx_afm" and str(file) not in inside] == []
    _tests_run(archive, tmp_path / "unpacked")


def _tests_run(archive, folder):
    """Some quick tests, from the archive alone."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data") if sys.version_info >= (3, 12) else tar.extractall(folder)
    (root,) = folder.iterdir()
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_files.py",
        "tests/cli/test_docs.py",
    ]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
