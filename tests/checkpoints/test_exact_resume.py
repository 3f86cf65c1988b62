"""Random streams continue at the same place, and an unfinished batch does not count."""

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from energy_flow.checkpoints.exact_resume import ExactResume
from energy_flow.errors import ConfigError
from energy_flow.training.callbacks.last_checkpoint import LastCheckpoint


def draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), torch.rand(3).tolist()]  # noqa: NPY002


def test_random_streams(tmp_path: Any) -> None:
    draw()
    torch.save(ExactResume().state_dict(), tmp_path / "state")
    expected = draw()
    assert draw() != expected
    again = ExactResume()
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again.on_train_start(cast(Trainer, SimpleNamespace(is_global_zero=True)), None)
    assert draw() == expected


@pytest.mark.parametrize("every_seconds", [0.0, -1.0, float("nan")])
def test_an_invalid_interval(every_seconds: float) -> None:
    with pytest.raises(
        ConfigError, match=r"callbacks.last_checkpoint.every_seconds = .*: should be greater than 0; inf saves"
    ):
        LastCheckpoint("here", every_seconds)
