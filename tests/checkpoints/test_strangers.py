"""Checkpoints and configs from strangers run no code and build no named class. Their sizes are checked first."""

import collections
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.comparison.jobs import read_jobs
from energy_flow.errors import CheckpointError
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.training.callbacks.best_checkpoint import BestCheckpoint
from energy_flow.training.module import EnergyFlowModule
from tests.checkpoints.conftest import DIM

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")


def saved(contents: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file, **options)
    return file.getvalue()


def repacked(
    content: bytes,
    change: Callable[[str, bytes], bytes] = lambda name, record: record,
    more: tuple[tuple[str, bytes], ...] = (),
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The archive of `path` with changed records."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w", compression) as target:
        for name in archive.namelist():
            target.writestr(name, change(name.partition("/")[2], archive.read(name)))
        for name, record in more:
            target.writestr(f"{archive.namelist()[0].partition('/')[0]}/{name}", record)
    return file.getvalue()


def refused(content: bytes, folder: Path, *parts: str) -> None:
    """Check that every loader refuses the file: training and evaluation, plain PyTorch, Lightning."""
    path = folder / "stranger.ckpt"
    path.write_bytes(content)
    for load in (checkpoints.load, EnergyFlowModel.from_checkpoint, EnergyFlowModule.load_from_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            load(path)
        assert str(caught.value).startswith(f"ckpt_path = {path}: ")
        assert str(caught.value).count("\n") < 4
        assert all(part in str(caught.value) for part in parts), caught.value


class Calls:
    """Unpickling this object calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def trap(path: Path) -> dict[str, Calls]:
    """Objects whose unpickling would make a folder."""
    code = f"__import__('os').mkdir({str(path)!r})"
    return {
        "os.mkdir": Calls(os.mkdir, str(path)),
        "os.system": Calls(os.system, f"mkdir {path}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "getattr": Calls(getattr, "text", "upper"),
        "torch.load": Calls(torch.load, str(path)),
        "bytearray": Calls(bytearray, 1 << 40),
        "torch.empty": Calls(torch.empty, 1 << 40),
        "OrderedDict of a gadget": Calls(collections.OrderedDict, [("a", Calls(os.mkdir, str(path)))]),
    }


GADGETS = list(trap(Path()))


@pytest.mark.parametrize("place", ["alone", "beside", "hyper_parameters", "config", "callbacks", "state_dict"])
@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_in_a_checkpoint(tmp_path: Path, valid: dict[str, Any], name: str, place: str) -> None:
    path = tmp_path / "trap"
    gadget = trap(path)[name]
    contents = {
        "alone": gadget,
        "beside": {**valid, "more": gadget},
        "config": {**valid, checkpoints.KEY: {**valid[checkpoints.KEY], "config": {"data": gadget}}},
    }
    refused(
        saved(contents.get(place) or {**valid, place: {**valid[place], "more": gadget}}), tmp_path, "corrupt, or no"
    )
    assert not path.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "trap"
    refused(pickle.dumps(Calls(os.mkdir, str(path)), protocol), tmp_path, "corrupt, or no checkpoint")
    refused(saved(Calls(os.mkdir, str(path)), _use_new_zipfile_serialization=False), tmp_path, "corrupt")
    assert not path.exists()


def test_an_honest_checkpoint_is_read(tmp_path: Path, valid: dict[str, Any]) -> None:
    path = tmp_path / "honest.ckpt"
    path.write_bytes(repacked(saved(valid)))  # the refusals below aren't of what `repacked` does anyway
    for load in (EnergyFlowModel.from_checkpoint, EnergyFlowModule.load_from_checkpoint):
        model = load(path)
        assert torch.equal(model.processor.state_dict()["skip_gain"], valid["state_dict"]["processor.skip_gain"])


def bomb(levels: int) -> list:
    found: list = ["ha"]
    for _ in range(levels):
        found = [found, found]
    return found


def wider(valid: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """Give every weight a shape that is larger than its storage."""
    weights = {name: torch.zeros(()).expand(shape) for name in valid["state_dict"]}
    return {**valid, "state_dict": weights}


def deep(levels: int) -> list:
    found: list = []
    for _ in range(levels):
        found = [found]
    return found


def circle() -> list:
    found: list = []
    found.append(found)
    return found


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list of lists of lists": (lambda w: {**w, "loops": {"x": bomb(40)}}, "more than 1,000,000 values"),
    "in the settings": (
        lambda w: {**w, "hyper_parameters": {**w["hyper_parameters"], "model": {"x": bomb(40)}}},
        "more than 1,000,000 values",
    ),
    "depth": (lambda w: {**w, "loops": {"x": deep(400)}}, "levels deep"),
    "a circle": (lambda w: {**w, "loops": {"x": circle()}}, "levels deep"),
    "strides of 0": (lambda w: wider(w, (1 << 20, 1 << 20)), "fewer numbers than that"),
    "layers": (
        lambda w: {
            **w,
            "hyper_parameters": {
                **w["hyper_parameters"],
                "model": {**w["hyper_parameters"]["model"], "num_layers": 10**9},
            },
        },
        "num_layers = 1000000000",
    ),
    "instantiator": (
        lambda w: {**w, "hyper_parameters": {**w["hyper_parameters"], "_instantiator": "os.system"}},
        "hyper_parameters._instantiator",
    ),
    "target": (
        lambda w: {**w, "hyper_parameters": {**w["hyper_parameters"], "_target_": "os.system"}},
        "hyper_parameters._target_",
    ),
    "a path out of the folder": (
        lambda w: {**w, "callbacks": {"ModelCheckpoint": {"best_k_models": {"/runs/1/../../home/best.ckpt": 1.0}}}},
        "leaves its folder",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_endless_huge_or_executable_contents(tmp_path: Path, valid: dict[str, Any], case: str) -> None:
    change, part = CONTENTS[case]
    path = tmp_path / "stranger.ckpt"
    path.write_bytes(saved(change(valid)))
    assert path.stat().st_size < 200_000
    with pytest.raises(CheckpointError, match=part):
        compatibility.restore(EnergyFlowModule, checkpoints.load(path), path)
    with pytest.raises(CheckpointError, match=part):
        EnergyFlowModule.load_from_checkpoint(path)


def pickled(before: bytes, after: bytes) -> Callable[[str, bytes], bytes]:
    def change(name: str, record: bytes) -> bytes:
        if name != "data.pkl":
            return record
        assert record.count(before) == 1, "the trick isn't played"
        return record.replace(before, after)

    return change


LONG = b"\x8a\x05" + (1 << 34).to_bytes(5, "little")  # 2^34 as a pickle opcode
FOUR = saved({"weight": torch.ones(4)})
SHARED = b"K\x00K\x04\x85"  # offset 0, shape (4,)
ARCHIVES = {
    "a storage longer than its record": (
        repacked(FOUR, pickled(b"K\x04t", LONG + b"t")),
        "its tensor needs 68719476736",
    ),
    "a shape larger than its storage": (
        repacked(FOUR, pickled(SHARED, b"K\x00" + LONG + b"\x85")),
        "larger than their",
    ),
    "an offset behind its storage": (repacked(FOUR, pickled(SHARED, LONG + b"K\x04\x85")), "larger than their"),
    "a record that isn't there": (repacked(FOUR, pickled(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009")), "holds None"),
    "packed records": (repacked(FOUR, compression=zipfile.ZIP_DEFLATED), "compressed or encrypted"),
    "the same name": (repacked(FOUR, more=(("VERSION", b"3\n"),)), "records of the same name"),
    "something in front": (b"#!/bin/sh\n" + FOUR, "in front of its records"),
    "no pickle": (repacked(FOUR).replace(b"data.pkl", b"data.pkx"), "has no data.pkl"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_forged_archives(tmp_path: Path, case: str) -> None:
    content, part = ARCHIVES[case]
    refused(content, tmp_path, part)


def test_a_huge_shape_is_found_even_if_it_is_dropped_again(tmp_path: Path) -> None:
    """A key that is written twice drops its first value. torch would allocate this value before."""
    contents = repacked(saved({"weight": torch.ones(4)}), pickled(SHARED, b"K\x00" + LONG + b"\x85"))
    twice = repacked(contents, pickled(b"s.", b"sX\x06\x00\x00\x00weightNs."))
    refused(twice, tmp_path, "larger than their")


def test_overlapping_records(tmp_path: Path) -> None:
    """Many records share the same bytes: the file is small, but reading it would never end."""
    content = saved({"weight": torch.ones(50_000)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(1, 40):
            copy = zipfile.ZipInfo(info.filename[:-1] + str(number))
            copy.header_offset, copy.CRC = info.header_offset, info.CRC
            copy.file_size = copy.compress_size = info.file_size
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True
    refused(file.getvalue(), tmp_path, "claims more bytes than it has")


def test_a_config_in_a_checkpoint_stays_text(tmp_path: Path, valid: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET", "not-to-be-read")
    config = {
        "data": {"normalize": True, "name": "${oc.env:SECRET}", "_target_": "os.system"},
        "callbacks": {"x": {"_target_": "os.system", "_args_": [f"mkdir {tmp_path}/trap"]}},
        "seed": "${oc.decode:${oc.env:SECRET}}",
    }
    path = tmp_path / "stranger.ckpt"
    path.write_bytes(saved({**valid, checkpoints.KEY: checkpoints.provenance(config, DIM, {})}))
    module = compatibility.restore(EnergyFlowModule, checkpoints.load(path), path)
    assert module.run_config == config
    model = EnergyFlowModel.from_checkpoint(path)
    model.save_pretrained(tmp_path / "model.safetensors")
    assert b"not-to-be-read" not in (tmp_path / "model.safetensors").read_bytes()[:4000]
    assert not (tmp_path / "trap").exists()


def test_the_best_checkpoint_is_searched_beside_the_last(tmp_path: Path) -> None:
    (tmp_path / "secret.ckpt").write_text("of somebody else")
    callback = BestCheckpoint(dirpath=tmp_path / "run")
    state = {**callback.state_dict(), "dirpath": "/elsewhere", "best_model_path": str(tmp_path / "secret.ckpt")}
    callback._folder = tmp_path / "sent"
    callback.load_state_dict(state)
    assert not (tmp_path / "run").exists()
    assert callback.best_model_path == ""


def test_a_run_folder_is_read_as_it_stands(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET", "not-to-be-read")
    hydra = tmp_path / "0" / ".hydra"
    hydra.mkdir(parents=True)
    (hydra / "config.yaml").write_text("seed: ${oc.decode:${oc.env:SECRET}}\n")
    (hydra / "overrides.yaml").write_text("- seed=${oc.env:SECRET}\n")
    (job,) = read_jobs(tmp_path)
    assert (job.seed, job.words) == (None, ("seed=${oc.env:SECRET}",))
    (hydra / "overrides.yaml").write_text("[]\n")  # a job is read once, unless it is run again
    (hydra / "config.yaml").write_text("seed: !!python/object/apply:os.mkdir [trap]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="could not determine a constructor"):
        read_jobs(tmp_path)
    assert not (tmp_path / "trap").exists()
