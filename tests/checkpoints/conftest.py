"""The contents of a valid checkpoint, for the tests of this folder."""

from typing import Any

import pytest

from energy_flow.checkpoints import format as checkpoints
from energy_flow.config import compose
from energy_flow.training.module import EnergyFlowModule

DIM = 8


@pytest.fixture(scope="module")
def valid() -> dict[str, Any]:
    """The contents of a checkpoint of a tiny model."""
    config = compose("lattice.width=3", "lattice.height=3", "model.hidden_size=4", "model.features=4")
    module = EnergyFlowModule.from_config(config, DIM)
    return {
        "pytorch-lightning_version": "2.6.0",
        checkpoints.KEY: checkpoints.provenance({"data": {"normalize": True}}, DIM, {}),
        "hyper_parameters": dict(module.hparams),
        "state_dict": dict(module.state_dict()),
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        "callbacks": {},
    }
