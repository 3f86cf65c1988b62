"""Trained models, one file each. They need torch but neither Lightning nor Hydra. One is part of the package."""

from energy_flow.pretrained.card import ModelCard
from energy_flow.pretrained.model import SHIPPED, EnergyFlowModel

__all__ = ["SHIPPED", "EnergyFlowModel", "ModelCard"]
