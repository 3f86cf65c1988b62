"""The arguments of the module, the written provenance and a whole checkpoint agree with the one schema."""

import errno
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.archive import read_archive
from energy_flow.checkpoints.format import Contents, HyperParameters, Provenance
from energy_flow.errors import CheckpointError
from energy_flow.runs.resume import newest_valid
from energy_flow.training.module import EnergyFlowModule
from tests.checkpoints.test_strangers import ARCHIVES, saved


def test_hyper_parameters_are_the_arguments_of_the_module() -> None:
    arguments = set(inspect.signature(EnergyFlowModule.__init__).parameters) - {"self", "rollout"}
    assert set(HyperParameters.model_fields) == arguments


def test_what_is_written_is_the_schema(valid: dict[str, Any]) -> None:
    assert set(valid["hyper_parameters"]) == set(HyperParameters.model_fields)
    assert set(checkpoints.provenance({"data": {}, "more": 1}, 4, {})) == set(Provenance.model_fields)
    assert checkpoints.provenance({"data": {}, "more": 1}, 4, {})["config"] == {"data": {}, "more": 1}
    names = {field.alias or name for name, field in Contents.model_fields.items()}
    assert set(valid) | {"global_step", "current_model_state"} == names  # the last one with averaged weights only


def test_an_outline_has_all_but_the_numbers(tmp_path: Path, valid: dict[str, Any]) -> None:
    path = tmp_path / "it.ckpt"
    path.write_bytes(saved({**valid, "global_step": 12}))
    outline, contents = read_archive(path, outline=True), read_archive(path)
    weights = outline.pop("state_dict")
    assert {name: value.shape for name, value in weights.items()} == {
        name: value.shape for name, value in contents.pop("state_dict").items()
    }
    assert {value.device.type for value in weights.values()} == {"meta"}
    assert outline == contents


def test_the_step_is_read_without_weights(
    tmp_path: Path,
    valid: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "it.ckpt"
    path.write_bytes(saved({**valid, "global_step": 12}))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    assert checkpoints.read_step(path) == 12


@pytest.mark.parametrize("case", ARCHIVES)
def test_no_step_is_read_from_a_forged_archive(tmp_path: Path, case: str) -> None:
    path = tmp_path / "it.ckpt"
    content, part = ARCHIVES[case]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=part):
        checkpoints.read_step(path)


def test_no_step_is_read_from_a_corrupt_file(tmp_path: Path, valid: dict[str, Any]) -> None:
    path, content = tmp_path / "it.ckpt", saved({**valid, "global_step": 12})
    record = content.index(valid["state_dict"]["processor.map_in.cell_value"].numpy().tobytes())
    for corrupt in (content[:-1], content[:record] + b"\x01" + content[record + 1 :], b""):
        path.write_bytes(corrupt)
        with pytest.raises(checkpoints.CorruptCheckpointError):
            checkpoints.read_step(path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (MemoryError("too large"), MemoryError),
    ],
)
def test_a_file_that_cannot_be_read_is_not_corrupt(
    tmp_path: Path, valid: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    """So `resume=auto` doesn't continue from the older checkpoint beside it."""
    newest, older = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    for path in (newest, older):
        path.write_bytes(saved({**valid, "global_step": 12}))

    def read(path: Path, *, outline: bool = False) -> Any:
        if path == newest:
            raise error
        return read_archive(path, outline=outline)

    monkeypatch.setattr(checkpoints, "read_archive", read)
    for use in (checkpoints.load, checkpoints.corruption, lambda path: newest_valid(path.parent)):
        with pytest.raises(raised) as caught:
            use(newest)
        assert not isinstance(caught.value, checkpoints.CorruptCheckpointError)
        assert raised is MemoryError or "last.ckpt: can't be read: " in str(caught.value)
    monkeypatch.setattr(checkpoints, "read_archive", read_archive)
    newest.write_bytes(b"corrupt")
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.path == older, "or the first half couldn't fail"
