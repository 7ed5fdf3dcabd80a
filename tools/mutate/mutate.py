"""Mutation tests of one package: changes one operator at a time and runs the tests that execute its line.

Run by hand, never in CI (README.md beside this file). Needs cosmic-ray, coverage and pytest-cov.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider
from coverage import CoverageData

ROOT = Path(__file__).parents[2]
# These two need arguments; a comparison by `is` in place of `==` says nothing about the tests.
SKIPPED = ("VariableReplacer", "VariableInserter", "_Is", "_IsNot")
IS = ("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is")
REWRITE = "ignore::pytest.PytestAssertRewriteWarning"  # a plugin was imported before
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", "-W", REWRITE]
# What the tests import and no mutant changes.
PRELOADED = ("datasets", "hypothesis", "mlx.core", "mlx_lm", "mlx_lm.utils", "numpy", "sentencepiece", "transformers")


@dataclass(frozen=True)
class Mutant:
    """One change: the `occurrence`-th place where `operator` applies in `module`."""

    module: str
    line: int
    operator: str
    occurrence: int


class _Annotations(ast.NodeTransformer):
    """Removes annotations: nothing reads them while the program runs."""

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)


def _meaning(code: str) -> str:
    return ast.dump(_Annotations().visit(ast.parse(code)))


def _operators() -> dict[str, type]:
    provider = OperatorProvider()
    names = [name for name in provider if name in IS or not name.endswith(SKIPPED)]
    return {name: provider[name] for name in names}


def find_mutants(root: Path, module: str, lines: set[int]) -> dict[tuple, list[Mutant]]:
    """Every possible mutant in `lines`, by its place in the module."""
    code = (root / module).read_text()
    # Frozen or not, with keywords or not: a dataclass guards against mistakes in the code and changes no result.
    lines = {line for line in lines if not code.splitlines()[line - 1].startswith("@dataclass")}
    nodes = list(ast_nodes(get_ast(code)))
    places: dict[tuple, list[Mutant]] = {}
    for name, operator in _operators().items():
        positions = [place for node in nodes for place in operator().mutation_positions(node)]
        for occurrence, place in enumerate(positions):
            if place[0][0] in lines:
                places.setdefault(place, []).append(Mutant(module, place[0][0], name, occurrence))
    return places


def mutated(root: Path, mutant: Mutant) -> str | None:
    """The module's code with the change; None where the change is none (an annotation, code that does not parse)."""
    code = (root / mutant.module).read_text()
    changed = mutate_code(code, _operators()[mutant.operator](), mutant.occurrence)
    try:
        return changed if changed and _meaning(changed) != _meaning(code) else None
    except SyntaxError:
        return None


def sample(root: Path, modules: dict[str, set[int]], count: int, seed: int) -> list[Mutant]:
    """`count` mutants: one in each module in turn, at a random place that had none yet."""
    order = random.Random(seed)
    places = {module: list(find_mutants(root, module, lines).values()) for module, lines in sorted(modules.items())}
    sizes = {module: len(found) for module, found in places.items()}
    for found in places.values():
        order.shuffle(found)
    chosen: list[Mutant] = []
    taken = dict.fromkeys(places, 0)
    while len(chosen) < count and any(places.values()):
        # The module that is furthest behind its share; small modules get their first mutant early.
        module = min((m for m in places if places[m]), key=lambda m: taken[m] / sizes[m])
        options = places[module].pop()
        order.shuffle(options)
        real = next((option for option in options if mutated(root, option)), None)
        if real:
            chosen.append(real)
            taken[module] += 1
    return chosen


def tests_of(data: CoverageData, path: str, line: int, directory: str) -> list[str]:
    """Tests that execute the line; those that execute the module if it runs on import; else the directory.

    The module's own test file comes first, then tests that execute few lines of the module.
    """
    by_line = data.contexts_by_lineno(path)
    contexts = set(by_line.get(line, [])) - {""}
    contexts = contexts or {context for found in by_line.values() for context in found} - {""}
    sizes = Counter(_function(context) for found in by_line.values() for context in found)
    files = {c.split("::")[0] for c in contexts if not c.endswith("|run")}  # a fixture that several tests share
    functions = {_function(c) for c in contexts}
    own = f"test_{Path(path).stem}.py"
    ordered = sorted(functions | files, key=lambda test: (own not in test, test in files, sizes[test], test))
    return [test for test in ordered if test in files or test.split("::")[0] not in files] or [directory]


def _function(context: str) -> str:
    """The test function of a context such as `tests/text/test_words.py::test_ids[bpe]|run`."""
    return context.rsplit("|", 1)[0].split("[")[0]


def run_tests(root: Path, tests: list[str], timeout: float) -> str:
    """`killed`, `survived` or `timeout`, from a fork: imports that do not change are done once."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)  # before an installed checkout, in subprocesses too
        sys.path[:0] = [str(root)]
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            code = pytest.main([*PYTEST, *tests])
        except BaseException:
            code = pytest.ExitCode.INTERNAL_ERROR
        os._exit(code)
    end = time.monotonic() + timeout
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout"
        time.sleep(0.05)
    return "survived" if status[1] == 0 else "killed"


def record_coverage(package: str, path: Path) -> None:
    """Runs all tests of a package and records which test executes which line."""
    arguments = [f"--cov=mlx_afm/{package}", "--cov-context=test", "--cov-report=", "-p", "pytest_cov"]
    command = [sys.executable, "-m", "pytest", *PYTEST, *arguments, f"tests/{package}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "COVERAGE_FILE": str(path)}, check=True)


def results(path: Path) -> list[dict]:
    """What a result file has so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(root: Path, coverage: Path, options: argparse.Namespace) -> None:
    """Runs the mutants that `options.out` does not have yet; `root` is a copy of the checkout."""
    data = CoverageData(str(coverage))
    data.read()
    measured = {str(Path(path).relative_to(ROOT)): path for path in data.measured_files()}
    lines = {module: set(data.lines(path) or ()) for module, path in measured.items()}
    done = {result["diff"] for result in results(options.out)}
    for mutant in sample(root, lines, options.count, options.seed):
        path, code = root / mutant.module, (root / mutant.module).read_text()
        changed = mutated(root, mutant) or code
        diff = "\n".join(difflib.unified_diff(code.splitlines(), changed.splitlines(), lineterm="", n=0))
        if diff in done:
            continue
        tests = tests_of(data, measured[mutant.module], mutant.line, f"tests/{options.package}")
        start = time.monotonic()
        path.write_text(changed)
        outcome = run_tests(root, tests, options.timeout)
        path.write_text(code)
        result = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1), "tests": tests, "diff": diff}
        with options.out.open("a") as out:
            out.write(json.dumps({**vars(mutant), **result}) + "\n")


def show(path: Path) -> None:
    """Prints the counts, and the changes that no test noticed."""
    print(dict(Counter(result["outcome"] for result in results(path))))
    for result in results(path):
        if result["outcome"] == "survived":
            print(result["module"], *result["diff"].splitlines()[2:], sep="\n")


def main() -> None:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", help="text, data, adapters, ...")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=15)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one mutant")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one for each mutant")
    parser.add_argument("--coverage", type=Path, help="recorded earlier with --cov-context=test in this checkout")
    parser.add_argument("--show", action="store_true", help="print the survivors in --out and run nothing")
    options = parser.parse_args()
    if options.show:
        show(options.out)
        return
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root, coverage = Path(folder, "checkout"), options.coverage or Path(folder, "coverage")
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache"))
        if not options.coverage:
            record_coverage(options.package, coverage)
        run(root, coverage, options)


if __name__ == "__main__":
    main()
