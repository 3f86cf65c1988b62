"""Train a flow lattice: python -m energy_flow.train [key=value ...]"""

import logging
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerStatus
from rich.console import Console

from energy_flow import cli
from energy_flow.data import DataSettings, EnergyDataModule
from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow.training import checkpoint as checkpoints
from energy_flow.training.building import build_all, build_trainer
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.run import (
    Results,
    TrainSettings,
    fit_baselines,
    refuse_multirun_of_processes,
    scalars,
    show_results,
    write_metrics,
)

log = logging.getLogger(__name__)
