"""Unusable data files and checkpoints are refused before any training, with the file and the reason."""

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.errors import CheckpointError
from energy_flow.training.module import EnergyFlowModule
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
def test_mismatched_data(program: Program, case: str) -> None:
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
    """Unpickling this object would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(trained: Outcome) -> Path:
    return trained.folder / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_corrupt_checkpoints(program: Program, checkpoint: Path, name: str) -> None:
    whole = checkpoint.read_bytes()
    corrupt = program.folder / "corrupt.ckpt"
    for content in (b"", b"not a checkpoint\n" * 9, whole[:100], whole[: len(whole) // 2], whole[:-30]):
        corrupt.write_bytes(content)
        message = program.refused(f"ckpt_path={corrupt}", program=name)
        assert f"ckpt_path = {corrupt}" in message
        assert "corrupt, or no checkpoint" in message


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Flip one bit."""
    corrupt = bytearray(content)
    corrupt[rng.randrange(len(corrupt))] ^= 1 << rng.randrange(8)
    return bytes(corrupt)


def restored(content: bytes, path: Path) -> EnergyFlowModule | None:
    """The module of a checkpoint's bytes; None if the checkpoint is refused."""
    path.write_bytes(content)
    try:
        return compatibility.restore(EnergyFlowModule, checkpoints.load(path), path)
    except CheckpointError:
        return None


def same_weights(module: EnergyFlowModule, whole: dict[str, Any]) -> bool:
    return all(torch.equal(value, whole["state_dict"][name]) for name, value in module.state_dict().items())


def test_corrupt_bytes_are_found(checkpoint: Path, tmp_path: Path) -> None:
    """A flipped bit is found anywhere in the file, even in weights, where torch itself checks nothing."""
    rng, whole = random.Random(0), checkpoint.read_bytes()
    loaded = torch.load(checkpoint, weights_only=True)
    found = [restored(flipped(whole, rng), tmp_path / "corrupt.ckpt") for _ in range(150)]
    assert all(module is None or same_weights(module, loaded) for module in found), "other weights were loaded"
    assert sum(module is None for module in found) > 100
    for length in rng.sample(range(len(whole)), 30):
        assert restored(whole[:length], tmp_path / "corrupt.ckpt") is None


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_contents_of_a_pickle(checkpoint: Path, tmp_path: Path) -> None:
    """The checksum is valid, but the bytes are corrupt: readable contents are checked before use."""
    rng, archive = random.Random(0), zipfile.ZipFile(checkpoint)
    (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
    outcomes = []
    for _ in range(150):
        repacked = io.BytesIO()
        with zipfile.ZipFile(repacked, "w") as target:
            for name in archive.namelist():
                content = archive.read(name)
                target.writestr(name, flipped(content, rng) if name == pickled else content)
        outcomes.append(restored(repacked.getvalue(), tmp_path / "corrupt.ckpt"))
    assert 10 < sum(module is None for module in outcomes) < 140


def without(weights: dict[str, Any], end: str) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if not name.endswith(end)}


WEIGHTS = {
    "missing": (lambda w: without(w, "cell_value"), ("map_in.cell_value: None in the checkpoint, [16, 4] here",)),
    "unexpected": (lambda w: {**w, "more": torch.ones(2)}, ("more: [2] in the checkpoint, None here",)),
    "shape": (lambda w: {**w, "processor.map_in.cell_value": torch.ones(9, 4)}, ("[9, 4] in the checkpoint",)),
    "none": (lambda w: {}, ("processor.skip_gain", "and 17 more")),
}


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_another_model(program: Program, checkpoint: Path, case: str, name: str) -> None:
    change, parts = WEIGHTS[case]
    whole, path = torch.load(checkpoint, weights_only=True), program.folder / "weights.ckpt"
    torch.save({**whole, "state_dict": change(whole["state_dict"])}, path)
    message = program.refused(f"ckpt_path={path}", program=name)
    for part in (f"ckpt_path = {path}: its weights are not those of the model", *parts):
        assert part in message


CONTENTS = {
    "hyper_parameters.lattice": {"hyper_parameters": {"lattice": 3}},
    "hyper_parameters.dim": {"hyper_parameters": {"dim": "16"}},
    "energy_flow.embedding_dim": {"energy_flow": {"embedding_dim": None}},
    "energy_flow.data_fingerprint": {"energy_flow": {"data_fingerprint": [1, 2]}},
    "energy_flow.config": {"energy_flow": {"config": "config"}},
    "state_dict.weight": {"state_dict": {"weight": [1.0]}},
}


@pytest.mark.parametrize("where", CONTENTS)
def test_contents_of_another_type(program: Program, checkpoint: Path, where: str) -> None:
    whole, path = torch.load(checkpoint, weights_only=True), program.folder / "contents.ckpt"
    torch.save({**whole, **{part: {**whole[part], **change} for part, change in CONTENTS[where].items()}}, path)
    for name in ("train", "evaluate"):
        assert f"not a checkpoint of energy_flow ({where}: " in program.refused(f"ckpt_path={path}", program=name)


def test_invalid_settings_in_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    whole, path = torch.load(checkpoint, weights_only=True), tmp_path / "settings.ckpt"
    for key, value, part in (("width", -1, "lattice.width = -1"), ("width", 2**62, ""), ("dpeth", 3, "lattice.dpeth")):
        lattice = {**whole["hyper_parameters"]["lattice"], key: value}
        torch.save({**whole, "hyper_parameters": {**whole["hyper_parameters"], "lattice": lattice}}, path)
        with pytest.raises(CheckpointError, match=f"describe no model: {part}"):
            compatibility.restore(EnergyFlowModule, checkpoints.load(path), path)


@pytest.mark.parametrize("name", ["train", "evaluate"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_runs_no_code(program: Program, checkpoint: Path, name: str) -> None:
    gadget, trap = program.folder / "gadget.ckpt", program.folder / "trap"
    for write in (lambda: gadget.write_bytes(pickle.dumps(Gadget(trap))), lambda: torch.save(Gadget(trap), gadget)):
        write()
        assert "corrupt, or no checkpoint" in program.refused(f"ckpt_path={gadget}", program=name)
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Gadget(trap)}, gadget)
    assert "corrupt, or no checkpoint" in program.refused(f"ckpt_path={gadget}", program=name)
    assert not trap.exists()


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_checkpoints_of_other_programs(program: Program, name: str) -> None:
    path = program.folder / "other.ckpt"
    for saved in ({"state_dict": {"weight": torch.ones(2)}}, [1, 2], torch.ones(3)):
        torch.save(saved, path)
        assert "not a checkpoint of energy_flow" in program.refused(f"ckpt_path={path}", program=name)
    assert "is a folder; give a checkpoint in it" in program.refused(f"ckpt_path={program.folder}", program=name)
    assert "there is no such file" in program.refused(f"ckpt_path={program.folder}/none.ckpt", program=name)


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
