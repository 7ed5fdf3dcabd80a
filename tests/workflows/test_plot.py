"""Loss curves as text, as SVG and, through a stand-in for matplotlib, as a picture."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from mlx_afm.errors import ConfigError, FormatError, MissingDependencyError
from mlx_afm.workflows.plot import plot, read_runs, text_plot


@pytest.fixture
def write_run(tmp_path):
    def write(name, train, valid=()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        events = [{"event": "start", "total_steps": 9}]
        events += [{"event": "train", "step": step, "loss": loss} for step, loss in train]
        events += [{"event": "eval", "step": step, "loss": loss} for step, loss in valid]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return folder

    return write


def test_one_run(write_run):
    run = write_run("a", [(10, 3.0), (20, None), (30, 2.0)], [(0, 4.0)])
    assert read_runs([run]) == {"training": [(10, 3.0), (30, 2.0)], "validation": [(0, 4.0)]}
    assert read_runs([run / "metrics.jsonl"]) == read_runs([run])


def test_several_runs_have_names(write_run):
    first, second = write_run("a", [(1, 3.0)]), write_run("b", [(1, 2.0)], [(1, 2.5)])
    assert list(read_runs([first, second])) == ["a training", "b training", "b validation"]
    third = write_run("x/a", [(1, 1.0)])
    assert list(read_runs([first, third])) == [f"{first} training", f"{third} training"]


def test_in_characters():
    text = text_plot({"one": [(0, 4.0), (5, 1.0), (10, 2.0)], "two": [(0, 3.0)]}, size=(11, 4))
    assert text.splitlines() == [
        "   4.000 |*",
        "         |o",
        "         |          *",
        "   1.000 |     *",
        "         +-----------",
        "          0        10",
        "* one: 2.0000 at step 10, lowest 1.0000 at step 5",
        "o two: 3.0000 at step 0",
    ]
    assert text_plot({"flat": [(3, 1.0)]}).count("*") == 2


def test_svg_needs_nothing(write_run, tmp_path):
    first, second = write_run("a & b", [(1, 3.0), (2, 1.0)]), write_run("c", [(1, 2.0)])
    text = plot([first, second], tmp_path / "loss.svg")
    root = ElementTree.fromstring((tmp_path / "loss.svg").read_text())
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a & b, c", "a & b training", "c training"} <= set(texts)
    assert sum(element.tag.endswith("polyline") for element in root.iter()) == 2
    assert text == plot([first, second])


class FakeAxes:
    def __init__(self):
        self.curves, self.settings = {}, {}

    def plot(self, steps, losses, label):
        self.curves[label] = (steps, losses)

    def set(self, **settings):
        self.settings = settings

    def grid(self, alpha): ...

    def legend(self): ...


@pytest.fixture
def matplotlib(monkeypatch):
    """A stand-in that writes a file and remembers the curves."""
    axes, module, pyplot = FakeAxes(), ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    figure = SimpleNamespace(savefig=lambda path, format, dpi: path.write_bytes(format.encode()))
    module.use, module.pyplot, module.axes, module.closed = lambda name: None, pyplot, axes, []
    pyplot.subplots, pyplot.close = lambda **settings: (figure, axes), module.closed.append
    monkeypatch.setitem(sys.modules, "matplotlib", module)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    return module


def test_a_picture_by_matplotlib(write_run, tmp_path, matplotlib):
    plot([write_run("a", [(1, 3.0), (2, 1.0)])], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == b"png"
    assert matplotlib.axes.curves == {"training": ([1, 2], [3.0, 1.0])}
    assert matplotlib.axes.settings["title"] == "a"
    assert len(matplotlib.closed) == 1


def test_without_matplotlib(write_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = write_run("a", [(1, 3.0)])
    with pytest.raises(MissingDependencyError, match=r"needs matplotlib.*ask for a \.svg"):
        plot([run], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
    with pytest.raises(ConfigError, match="unknown kind of picture"):
        plot([run], tmp_path / "loss.txt")


def test_nothing_to_draw(write_run, tmp_path):
    with pytest.raises(FormatError, match=r"metrics\.jsonl: no such file"):
        plot([tmp_path])
    with pytest.raises(FormatError, match="no losses yet"):
        plot([write_run("a", [])])
