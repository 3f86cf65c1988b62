"""Data files and checkpoints that can't be used end before any training, with a message that says which and why."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.helpers import DIM, Outcome, Program, write_pairs


def pairs(rows: int = 8, dim: int = DIM) -> dict[str, torch.Tensor]:
    return {"source": torch.randn(rows, dim), "target": torch.randn(rows, dim)}


def with_nan() -> dict[str, torch.Tensor]:
    broken = pairs()
    broken["target"][[2, 5], 3] = float("nan")
    return broken


DATA = {
    "lengths": ({**pairs(), "target": torch.randn(7, DIM)}, ("target has 7 rows, source 8",)),
    "widths": ({**pairs(), "target": torch.randn(8, 4)}, ("target has dimension 4, source 16",)),
    "dimension of another split": (pairs(dim=8), ("dimension 8", "data.train has 16")),
    "NaN": (with_nan(), ("target row 2 holds NaN", "2 of 8 rows")),
    "dtype": ({**pairs(), "target": torch.ones(8, DIM, dtype=torch.int64)}, ("target has dtype I64",)),
    "names": ({"embeddings": torch.ones(8, DIM)}, ("no source and no target", "holds embeddings")),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_do_not_fit(program: Program, case: str) -> None:
    tensors, parts = DATA[case]
    path = program.folder / "val.safetensors"
    save_file(tensors, path)
    message = program.refused()
    for part in ("data.val", str(path), *parts):
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"), [(None, "no such file"), (b"", "empty"), (b"word;0.1;0.2\n" * 50, "truncated")]
)
def test_data_files_missing_empty_and_text(program: Program, content: bytes | None, part: str) -> None:
    path = program.folder / "test.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = program.refused()
    assert f"data.test: {path}" in message
    assert part in message


@pytest.mark.parametrize("split", ["train", "test"])
def test_truncated_data_file(program: Program, split: str) -> None:
    path = program.folder / f"{split}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in program.refused()


def test_objects_instead_of_numbers(program: Program) -> None:
    np.save(program.folder / "objects.npy", np.array([{"a": 1}], dtype=object))
    message = program.refused("data.train=[objects.npy,objects.npy]")
    assert "Python objects" in message


class Gadget:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(trained: Outcome) -> Path:
    return trained.folder / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_damaged_checkpoints(program: Program, checkpoint: Path, name: str) -> None:
    whole = checkpoint.read_bytes()
    damaged = program.folder / "damaged.ckpt"
    for content in (b"", b"not a checkpoint\n" * 9, whole[:100], whole[: len(whole) // 2], whole[:-30]):
        damaged.write_bytes(content)
        message = program.refused(f"ckpt_path={damaged}", program=name)
        assert f"ckpt_path = {damaged}" in message
        assert "damaged, or no checkpoint" in message


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_runs_no_code(program: Program, checkpoint: Path, name: str) -> None:
    gadget, trap = program.folder / "gadget.ckpt", program.folder / "trap"
    for write in (lambda: gadget.write_bytes(pickle.dumps(Gadget(trap))), lambda: torch.save(Gadget(trap), gadget)):
        write()
        assert "damaged, or no checkpoint" in program.refused(f"ckpt_path={gadget}", program=name)
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Gadget(trap)}, gadget)
    assert "damaged, or no checkpoint" in program.refused(f"ckpt_path={gadget}", program=name)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_checkpoints_of_something_else(program: Program, name: str) -> None:
    path = program.folder / "other.ckpt"
    for saved in ({"state_dict": {"weight": torch.ones(2)}}, [1, 2], torch.ones(3)):
        torch.save(saved, path)
        assert "not a checkpoint of energy_flow" in program.refused(f"ckpt_path={path}", program=name)
    assert "no such file" in program.refused(f"ckpt_path={program.folder}", program=name)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_checkpoints_with_parts_missing(program: Program, checkpoint: Path, name: str) -> None:
    whole, path = torch.load(checkpoint, weights_only=True), program.folder / "parts.ckpt"
    for part in ("hyper_parameters", "energy_flow", "state_dict"):
        for broken in ({}, None):
            if (part, broken) == ("state_dict", {}):
                continue
            torch.save({**whole, part: broken}, path)
            assert "not a checkpoint of energy_flow" in program.refused(f"ckpt_path={path}", program=name)


def test_weights_alone_can_be_evaluated_but_not_trained_on(program: Program, checkpoint: Path) -> None:
    path = program.folder / "weights.ckpt"
    parts = ("optimizer_states", "lr_schedulers", "loops", "callbacks")
    torch.save({k: v for k, v in torch.load(checkpoint, weights_only=True).items() if k not in parts}, path)
    assert "weights only" in program.refused(f"ckpt_path={path}")
    assert program.evaluate(f"ckpt_path={path}").code == 0


def test_another_architecture_is_named(program: Program, checkpoint: Path) -> None:
    message = program.refused(f"ckpt_path={checkpoint}", "lattice.width=5", "model.hidden_size=9")
    assert "lattice.width: 4 in the checkpoint, 5 here" in message
    assert "model.hidden_size: 8 in the checkpoint, 9 here" in message
    assert "height" not in message


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_data_of_another_dimension(program: Program, checkpoint: Path, name: str) -> None:
    write_pairs(program.folder, dim=8)
    message = program.refused(f"ckpt_path={checkpoint}", program=name)
    assert "dimension" in message
    assert "16" in message
    assert "8" in message


def test_evaluation_needs_a_checkpoint_and_a_test_split(program: Program, checkpoint: Path) -> None:
    assert "ckpt_path" in program.refused(program="evaluate")
    assert "data.test = null" in program.refused(f"ckpt_path={checkpoint}", "data.test=null", program="evaluate")
