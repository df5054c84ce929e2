"""Pinned folders: what is mounted is saved into and left where it is."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from folders import adapter, contents, furnish, furnished, partials, rank_of


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Mount something at a path until the test ends; skips the test where that is not allowed."""
    mounted: list[Path] = []

    def run(*what: str | Path, at: Path) -> None:
        if shutil.which("mount") is None or subprocess.run(["mount", *what, at], capture_output=True).returncode:
            pytest.skip("this process may not mount")
        mounted.append(at)

    yield run
    for at in reversed(mounted):
        subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point_is_saved_into(tmp_path: Path, mount: Callable[..., None], kind: str) -> None:
    volume, source = tmp_path / "place" / "volume", tmp_path / "source"
    volume.mkdir(parents=True)
    source.mkdir()
    mount(*(["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", source]), at=volume)
    own = furnish(volume)
    for rank in (2, 5):
        adapter(rank).save_pretrained(volume)
        assert rank_of(volume) == rank
    assert own.items() <= contents(volume).items() and not partials(volume.parent)


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_what_is_mounted_below_the_folder_is_left_alone(tmp_path: Path, mount: Callable[..., None], kind: str) -> None:
    saved = furnished(tmp_path)
    source, below = saved.parent / "source", saved / "logs" / "a volume"
    source.mkdir()
    below.mkdir()
    mount(*(["-t", "tmpfs", "none"] if kind == "tmpfs" else ["--bind", source]), at=below)
    adapter(5).save_pretrained(saved)
    (below / "precious").write_bytes(b"mine")
    adapter(2).save_pretrained(saved)
    assert rank_of(saved) == 2 and (below / "precious").read_bytes() == b"mine"
    assert not partials(saved.parent)
