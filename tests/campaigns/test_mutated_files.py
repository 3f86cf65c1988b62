"""The campaigns in their short form, the failures that they must find, and headers of any structure."""

import json
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.errors import EnergyFlowError
from energy_flow.training.module import EnergyFlowModule
from tests.campaigns import mutated_files
from tests.campaigns.mutated_files import Outcome, campaign, load_data, prepare
from tests.campaigns.seeds import model_seeds


@pytest.fixture(autouse=True)
def _watched() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    prepare()
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [("data", 1000), ("checkpoints", 150)])
def test_files_load_correctly_or_are_refused(tmp_path: Path, kind: str, count: int) -> None:
    found = campaign(kind, count, tmp_path)
    assert found.failures == []
    assert found.loaded + found.refused == count
    assert found.loaded > count // 30  # otherwise the test reaches only the first checks
    assert found.refused > count // 2


def raises(error: BaseException) -> Any:
    def load(path: Path) -> None:
        raise error

    return load


FAILURES = {
    "another error": (raises(KeyError("x")), "KeyError"),
    "a message of a megabyte": (raises(EnergyFlowError("x" * 2**20)), "an unhelpful message"),
    "a message without the file": (raises(EnergyFlowError("bad")), "an unhelpful message"),
    "a hang": (lambda path: time.sleep(30), "hung for 1 s"),
    "memory": (lambda path: torch.ones(1 << 24).sum(), "memory grew"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_campaign_finds_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    load, part = FAILURES[case]
    monkeypatch.setattr(mutated_files, "load_data", load)
    monkeypatch.setattr(mutated_files, "SECONDS", 1)
    if case == "memory":
        peaks = iter([0, *[2 << 30] * 4])
        monkeypatch.setattr(mutated_files, "_peak", lambda: next(peaks))
    found: Outcome = campaign("data", 1, tmp_path)
    (failure,) = found.failures
    assert failure.startswith("data:0 (")
    assert part in failure


def test_the_same_number_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, bytes]] = []
    monkeypatch.setattr(mutated_files, "load_data", lambda path: loaded.append((path.name, path.read_bytes())))
    campaign("data", 12, tmp_path)
    campaign("data", 1, tmp_path, first=11)
    assert loaded[11] == loaded[12]


def check_brief(error: EnergyFlowError) -> None:
    assert len(str(error)) < 5000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F64", "I64", "F8_E5M2"]) | JSON,
        "shape": st.lists(st.integers(0, 6) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(0, 200) | st.integers(), min_size=2, max_size=2) | JSON,
    }
)
HEADER = st.dictionaries(
    st.sampled_from(["source", "target", "source_scale", "target_scale", "__metadata__", "../x"]), ENTRY | JSON
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(header=HEADER | JSON, size=st.integers(0, 200))
def test_safetensors_headers_of_any_structure(tmp_path: Path, header: Any, size: int) -> None:
    text, path = json.dumps(header).encode(), tmp_path / "pairs.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x3c" * size)
    try:
        load_data(path)
    except EnergyFlowError as error:
        check_brief(error)


@FEW
@given(
    section=st.sampled_from(["lattice", "model", "loss", "optimizer", "seed", "dim", "energy_flow", "callbacks"]),
    value=JSON,
)
def test_settings_of_any_structure(tmp_path: Path, section: str, value: Any) -> None:
    path = tmp_path / "it.ckpt"
    if not path.is_file():
        path.write_bytes(model_seeds(tmp_path)[0].content)
        torch.save(torch.load(tmp_path / "model.ckpt", weights_only=True), path)
    whole = torch.load(path, weights_only=True)
    (whole if section in whole else whole["hyper_parameters"])[section] = value
    changed = tmp_path / "changed.ckpt"
    torch.save(whole, changed)
    try:
        module = compatibility.restore(EnergyFlowModule, checkpoints.load(changed), changed)
    except EnergyFlowError as error:
        check_brief(error)
    else:
        assert torch.equal(module.state_dict()["processor.skip_gain"], whole["state_dict"]["processor.skip_gain"])
