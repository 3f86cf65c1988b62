"""Lattices of every shipped part against the flow-by-flow reference: outputs, landings, counts, all gradients."""

from typing import Any

import pytest

from tests.helpers import Case, check_case

SPAWN = {"spawn.enabled": True, "spawn.threshold": 0.3, "max_steps": 4, "max_flows_per_sample": 14}
CARRIERS = {
    "lstm": {"_target_": "energy_flow.core.carriers.LSTMCarrier", "hidden_size": 5, "num_layers": 2},
    "mgu": {"_target_": "energy_flow.core.carriers.MGUCarrier", "hidden_size": 5, "num_layers": 2},
    "mlp": {"_target_": "energy_flow.core.carriers.MLPCarrier", "hidden_size": 5, "num_layers": 2},
    "attention": {"_target_": "energy_flow.core.carriers.AttentionCarrier", "hidden_size": 6, "num_heads": 2},
}
LOCAL_FIELD = {
    "_target_": "energy_flow.core.local_field.LocalFieldNeuron",
    "channels": 3,
    "kernel_size": 3,
    "num_layers": 2,
}
CONV = {
    "map_in": {"_target_": "energy_flow.core.maps.ConvMapIn", "hidden": 3, "kernel_size": 3},
    "map_out": {"_target_": "energy_flow.core.maps.ConvMapOut", "hidden": 3, "kernel_size": 3},
}
AGGREGATIONS = ["SoftmaxAggregation", "MeanAggregation", "SumAggregation"]


def check(lattice: dict[str, Any], model: dict[str, Any], *expect: str, **changes: Any) -> None:
    check_case(Case(lattice, {"energy_dim": 2, **model}, batch=2, expect=expect, **changes))


@pytest.mark.parametrize(
    ("name", "displacement", "seed"), [("lstm", 1.0, 2), ("mgu", 1.0, 2), ("mlp", 1.0, 2), ("attention", 0.7, 4)]
)
def test_carriers(name: str, displacement: float, seed: int) -> None:
    check(SPAWN, {"carrier": CARRIERS[name]}, "spawned", "projected", displacement=displacement, seed=seed)


@pytest.mark.parametrize(("width", "height", "seed"), [(3, 2, 3), (1, 4, 2), (1, 1, 2)])
def test_local_field(width: int, height: int, seed: int) -> None:
    lattice = {**SPAWN, "width": width, "height": height}
    check(lattice, {"neuron": LOCAL_FIELD}, "spawned", "projected", "reflected", seed=seed)


def test_maps_by_convolution() -> None:
    check({"width": 5, "height": 1}, CONV, "projected")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("deposit", ["bilinear", "nearest"])
def test_aggregations(aggregation: str, deposit: str) -> None:
    entry = {"_target_": f"energy_flow.core.aggregation.{aggregation}"}
    check({"aggregation": entry, "deposit": deposit}, {}, "projected", "shared_cells")


@pytest.mark.parametrize("rollout", [{}, {"chunk": 1}, {"engine": "autograd"}], ids=["auto", "chunks", "autograd"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_all_parts_together(carrier: str, aggregation: str, rollout: dict[str, Any]) -> None:
    entry = {"_target_": f"energy_flow.core.aggregation.{aggregation}"}
    lattice = {**SPAWN, "width": 5, "height": 1, "aggregation": entry}
    model = {"neuron": LOCAL_FIELD, "carrier": CARRIERS[carrier], **CONV}
    check(lattice, model, "spawned", "projected", rollout=rollout)
