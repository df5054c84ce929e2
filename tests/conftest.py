"""Shared by all tests: quiet libraries, a fixed seed, a text form of graphs."""

import gc
import os
import re
import shutil
import sys
import weakref
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers.utils import logging

from lorafx.serving import early_calls

logging.set_verbosity_error()
# The symbolic shapes of every capture, while they live, and torch's caches of what it found out about them.
SHAPES, CACHES = weakref.WeakSet(), [each for each in vars(ShapeEnv).values() if hasattr(each, "cache_clear")]

SLOW_FILE = re.compile(r"^pytestmark = \[?pytest\.mark\.slow\b", re.MULTILINE)


def pytest_addoption(parser):
    parser.addoption("--models-page", help="write what served each model of the zoo to this file")


def pytest_ignore_collect(collection_path, config):
    """In the quick part, files that are slow as a whole are not even imported: what they import takes seconds."""
    quick = config.option.markexpr == "not slow" and collection_path.match("test_*.py")
    return True if quick and SLOW_FILE.search(collection_path.read_text()) else None


@pytest.hookimpl(tryfirst=True)  # before xdist puts groups into names
def pytest_collection_modifyitems(items):
    """Tests that share a model, and the graphs captured of it, run on one worker (`--dist loadgroup`)."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if shared := params.get("pair") or params.get("ran"):
            item.add_marker(pytest.mark.xdist_group(f"{item.module.__name__} {shared}"))


def pytest_collection_finish():
    """What was imported stays: Python's collector need not look at it each time, nor after every 700 new objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)


def pytest_terminal_summary(terminalreporter, config):
    """`make models`: docs/models.md, from what tests/peft/test_zoo.py recorded of each entry."""
    page = config.getoption("--models-page")
    reports = [report for group in ("passed", "failed") for report in terminalreporter.stats.get(group, [])]
    rows = [value for report in reports for name, value in report.user_properties if name == "zoo"]
    if page and rows:
        import models_page

        models_page.write(Path(page), rows)


@pytest.fixture(autouse=True, scope="session")
def graphs_at_once():
    """Tests are about graphs, from the first call on; those of early calls say so (`early`)."""
    early_calls.REPEATS = 0


@pytest.fixture
def early(monkeypatch):
    """Calls of a kind are served without a graph three times."""
    monkeypatch.setattr(early_calls, "REPEATS", 3)


@pytest.fixture
def as_shipped(monkeypatch):
    """Calls are served without a graph as often as users have it."""
    monkeypatch.setattr(early_calls, "REPEATS", 100)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def noted():
    """Each capture's symbolic shapes are in `SHAPES`."""

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        SHAPES.add(self)

    real, ShapeEnv.__init__ = ShapeEnv.__init__, init
    yield
    ShapeEnv.__init__ = real


@pytest.fixture(autouse=True)
def forgotten(noted):
    """Let what a test captured go.

    torch caches what it computes of symbolic shapes by the shapes, and the shapes keep their fake tensors, which keep
    the shapes where Python's collector does not see it. Without this, garbage collection takes most of a long run.
    """
    yield
    for shapes in SHAPES:
        shapes.tracked_fakes = []
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def small_chunks(monkeypatch):
    """A fused loss in chunks of 4 rows, 2 of them in float32 at a time."""
    module = sys.modules["lorafx.ops.linear_cross_entropy"]  # the package has the function under this name
    monkeypatch.setattr(module, "ROWS_ON_CPU", 4)
    monkeypatch.setattr(module, "_CHUNK", 22)
    monkeypatch.setattr(module, "_TILE_ON_CPU", 22)


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory):
    from checkpoints import adapted

    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(tmp_path, saved_once):
    """A folder with a good adapter, the test's own."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))
