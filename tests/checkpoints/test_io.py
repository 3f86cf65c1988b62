"""A checkpoint is written whole or not at all, and a loaded one is handed on once."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.checkpoints.io import AtomicCheckpointIO, LoadedCheckpoint
from energy_flow.errors import CheckpointError
from energy_flow.runs.folder import locked
from tests.checkpoints.test_strangers import saved

SMALL = {"global_step": 1, "weights": torch.ones(10)}
LARGE = {"global_step": 2, "weights": torch.ones(10_000)}


@contextmanager
def room(size: int) -> Iterator[None]:
    """Limit the size of files, which has the effect of a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def step(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_the_previous_checkpoint_stays(tmp_path: Path) -> None:
    io, last = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint(SMALL, last)
    assert list(last.parent.iterdir()) == [last]
    io.save_checkpoint(LARGE, last)
    assert (step(last), step(last.with_name("last-1.ckpt"))) == (2, 1)
    io.save_checkpoint(SMALL, last.with_name("best.ckpt"))
    io.save_checkpoint(LARGE, last.with_name("best.ckpt"))
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last-1.ckpt", "last.ckpt"]


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    io, last = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(SMALL, last)
    with room(20_000):
        io.save_checkpoint(LARGE, last)
    assert io.failed == {str(last): "File too large"}
    assert "the checkpoint of step 2 can't be written (File too large). Make room" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], "nothing half is left, and no room used up"
    assert step(last) == 1
    io.save_checkpoint(LARGE, last)
    assert io.failed == {}
    assert step(last) == 2


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 1, "it": lambda: None}, tmp_path / "last.ckpt")


def test_resuming_removes_leftovers(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("metrics.json.unfinished", "checkpoints/last.ckpt.unfinished", "checkpoints/last.ckpt"):
        (tmp_path / name).write_bytes(b"")
    with locked(tmp_path):
        assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["last.ckpt"]


@pytest.fixture
def checkpoint(tmp_path: Path, valid: dict[str, Any]) -> Path:
    path = tmp_path / "it.ckpt"
    path.write_bytes(saved({**valid, "global_step": 3}))
    return path


def test_a_loaded_checkpoint_is_handed_on_once(checkpoint: Path) -> None:
    loaded = LoadedCheckpoint(checkpoint)
    contents, io = loaded.contents, AtomicCheckpointIO(loaded)
    assert (loaded.path, loaded.step) == (checkpoint, 3)
    assert io.load_checkpoint(str(checkpoint)) is contents
    assert loaded.contents is None, "memory is free as soon as Lightning has used it"
    again = io.load_checkpoint(str(checkpoint))
    assert again is not contents
    assert again["global_step"] == 3


def test_a_loaded_checkpoint_whose_file_has_changed_is_read_again(checkpoint: Path) -> None:
    valid = torch.load(checkpoint, weights_only=True)
    io = AtomicCheckpointIO(LoadedCheckpoint(checkpoint))
    io.save_checkpoint({**valid, "global_step": 4}, checkpoint)
    assert io.load_checkpoint(checkpoint)["global_step"] == 4
    io = AtomicCheckpointIO(LoadedCheckpoint(checkpoint))
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="corrupt"):
        io.load_checkpoint(checkpoint)


def test_a_loaded_checkpoint_is_not_taken_for_another_file(checkpoint: Path) -> None:
    other, loaded = checkpoint.with_name("other.ckpt"), LoadedCheckpoint(checkpoint)
    AtomicCheckpointIO().save_checkpoint({**torch.load(checkpoint, weights_only=True), "global_step": 5}, other)
    io = AtomicCheckpointIO(loaded)
    assert io.load_checkpoint(other)["global_step"] == 5
    assert loaded.contents is None
