"""No silent zeros: a sample without a landing is an error, and wrong settings are refused with their key."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.rollout import RolloutSettings
from energy_flow.errors import ConfigError, NoLandingError
from energy_flow.settings import read
from tests.helpers import DIM, Case, lattice_settings, model_settings

# Weak flows and a strict filter: all flows are removed in the first step.
ALL_REMOVED = Case({"filter.enabled": True, "filter.min_displacement": 50.0}, displacement=0.1)


def test_samples_without_a_landing_raise_when_collected() -> None:
    processor = ALL_REMOVED.processor()
    landings = processor(ALL_REMOVED.embedding()).landings
    for collect in (
        processor.lattice.collect_completed_flows_surface_direct,
        processor.lattice.collect_completed_flows_direct,
    ):
        with pytest.raises(NoLandingError, match=r"0, 1, 2\b.*lattice\.filter"):
            collect(landings)
    assert issubclass(NoLandingError, RuntimeError)


def test_only_the_samples_without_a_landing_are_named() -> None:
    case = Case(batch=4)
    processor = case.processor()
    landings = processor(case.embedding()).landings
    processor.lattice.collect_completed_flows_direct(landings)
    landed = landings.landed.clone()
    landed[[1, 3]] = False
    with pytest.raises(NoLandingError, match=r"1, 3\b") as caught:
        processor.lattice.collect_completed_flows_direct(dataclasses.replace(landings, landed=landed))
    assert "0" not in str(caught.value).split("(")[1].split(")")[0]


def test_forward_flags_samples_without_a_landing() -> None:
    output = ALL_REMOVED.processor()(ALL_REMOVED.embedding())
    assert output.faults.no_landing.dtype == torch.bool
    assert output.faults.no_landing.tolist() == [True] * 3
    assert output.statistics["removed"] == output.statistics["created"] == 6
    assert int(output.faults.lost) == 0
    assert all(torch.isfinite(value.double()) for value in output.statistics.values())
    assert Case().processor()(Case().embedding()).faults.no_landing.tolist() == [False] * 3


def test_collection_equals_forward() -> None:
    case = Case({"spawn.enabled": True})
    processor = case.processor()
    output = processor(case.embedding())
    lattice = processor.lattice
    assert torch.equal(lattice.collect_completed_flows_surface_direct(output.landings), output.surface)
    assert torch.equal(lattice.collect_completed_flows_direct(output.landings), output.embedding)


@pytest.mark.parametrize(("residual_energy", "energy", "steps"), [(False, 1.0, 3), (True, 1e3, 99)])
def test_slots_that_did_not_land_are_not_collected(residual_energy: bool, energy: float, steps: int) -> None:
    """Whatever values they have. With tanh, energies are at most 1."""
    case = Case(
        {"filter.enabled": True, "filter.min_displacement": 0.45},
        {"residual_energy": residual_energy},
        displacement=0.7,
    )
    processor = case.processor()
    landings = processor(case.embedding()).landings
    assert (~landings.landed).any()
    nowhere = ~landings.landed[..., None]
    garbled = dataclasses.replace(
        landings,
        energy=torch.where(nowhere, energy, landings.energy),
        xy=torch.where(nowhere, 0.1, landings.xy),
        steps=torch.where(nowhere[..., 0], steps, landings.steps),
    )
    collect = processor.lattice.collect_completed_flows_surface_direct
    torch.testing.assert_close(collect(garbled), collect(landings), rtol=0, atol=1e-14)


def test_collection_without_tensorised_storage() -> None:
    case = Case()
    processor = case.processor()
    landings = processor(case.embedding()).landings
    processor.lattice.tensorized_storage_enabled = False
    for collect in (
        processor.lattice.collect_completed_flows_surface_direct,
        processor.lattice.collect_completed_flows_direct,
    ):
        with pytest.raises(RuntimeError, match="tensorized_storage_enabled"):
            collect(landings)


def test_a_torch_without_scatter_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    processor = case.processor()
    landings = processor(case.embedding()).landings
    collect = processor.lattice.collect_completed_flows_surface_direct
    with monkeypatch.context() as patch:
        patch.setattr(torch, "Tensor", object)
        with pytest.raises(RuntimeError, match="scatter_reduce"):
            collect(landings)


def test_noise_needs_rows() -> None:
    case = Case({"noise.std": 0.1}, training=True)
    processor = case.processor()
    with pytest.raises(ConfigError, match=r"lattice\.noise\.std.*row"):
        processor(case.embedding())
    processor.eval()(case.embedding())


@pytest.mark.parametrize("shape", [(3, DIM + 1), (DIM,), (2, 3, DIM), (0, DIM), (0, DIM + 1)])
def test_embeddings_of_another_shape(shape: tuple[int, ...]) -> None:
    """An empty batch is refused too: it has no flows."""
    with pytest.raises(ConfigError, match=rf"shape {re.escape(str(list(shape)))}: .*\[batch, {DIM}\]"):
        Case().processor()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"width": 0}, "lattice.width = 0"),
        ({"height": -1}, "lattice.height = -1"),
        ({"depth": 0}, "lattice.depth = 0"),
        ({"depth": 2.5}, "lattice.depth = 2.5"),
        ({"depth": "6"}, "lattice.depth = "),
        ({"depth": True}, "lattice.depth = "),
        ({"max_steps": -1}, "lattice.max_steps = -1"),
        ({"max_flows_per_sample": 5}, "lattice.max_flows_per_sample = 5"),
        ({"deposit": "linear"}, "lattice.deposit = "),
        ({"movement__scale": -1.0}, "lattice.movement.scale = -1.0"),
        ({"movement__scale": float("nan")}, "lattice.movement.scale = "),
        ({"movement__warmup_steps": -1}, "lattice.movement.warmup_steps = -1"),
        ({"movement__decay_steps": -1}, "lattice.movement.decay_steps = -1"),
        ({"movement__final_scale": -0.1}, "lattice.movement.final_scale = -0.1"),
        ({"movement__max_displacement": 0.0}, "lattice.movement.max_displacement = 0.0"),
        ({"movement__max_displacement": float("inf")}, "lattice.movement.max_displacement = "),
        ({"noise__std": -0.1}, "lattice.noise.std = -0.1"),
        ({"spawn__threshold": 0.0}, "lattice.spawn.threshold = 0.0"),
        ({"spawn__max_spawn_per_step": 0}, "lattice.spawn.max_spawn_per_step = 0"),
        ({"filter__min_displacement": -1.0}, "lattice.filter.min_displacement = -1.0"),
        ({"convergence__threshold": 1.5}, "lattice.convergence.threshold = 1.5"),
        ({"convergence__min_steps": -1}, "lattice.convergence.min_steps = -1"),
        ({"convergence__patience": 0}, "lattice.convergence.patience = 0"),
        ({"tensorized_storage_enabled": False}, "lattice.tensorized_storage_enabled"),
        (
            {"spawn__enabled": True, "filter__enabled": True, "filter__min_displacement": 0.3},
            "lattice.filter.min_displacement = 0.3",
        ),
    ],
    ids=str,
)
def test_settings_out_of_range(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        lattice_settings(**changes)
    assert key in str(caught.value)


@pytest.mark.parametrize("key", ["energy_dim", "features", "hidden_size", "num_layers", "map_hidden"])
def test_model_settings_out_of_range(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = 0"):
        model_settings(**{key: 0})


def test_capacity_and_steps_have_their_defaults() -> None:
    for changes, steps, capacity in (
        ({}, 3, 6),
        ({"depth": 7}, 3, 6),
        ({"depth": 1}, 0, 6),
        ({"max_steps": 9}, 9, 6),
        ({"spawn__enabled": True}, 3, 12),
        ({"spawn__enabled": True, "max_flows_per_sample": 7}, 3, 7),
    ):
        settings = lattice_settings(**changes)
        output = FlowProcessor(DIM, settings, model_settings(), seed=0)(torch.randn(2, DIM))
        assert output.by_step["created"].shape == (steps + 1,)
        assert output.landings.landed.shape == (2, capacity)


def test_filter_below_the_spawn_threshold_is_fine() -> None:
    lattice_settings(spawn__enabled=True, filter__enabled=True, filter__min_displacement=0.29)
    lattice_settings(filter__enabled=True, filter__min_displacement=5.0)  # no flow spawns


@pytest.mark.parametrize("changes", [{"recompute": True}, {"compaction": True}, {"cuda_graph": True}], ids=str)
def test_settings_of_the_tape_are_refused_for_plain_autograd(changes: dict[str, Any]) -> None:
    plain = RolloutSettings.automatic().model_dump() | {"engine": "autograd", "compile": False, "chunk": None}
    assert read(RolloutSettings, plain, "rollout").engine == "autograd"
    ((key, value),) = changes.items()
    with pytest.raises(ConfigError, match=rf"rollout\.{key} = {str(value).lower()}: .* Set rollout\.engine=auto"):
        read(RolloutSettings, plain | changes, "rollout")
