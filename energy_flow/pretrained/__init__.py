"""Trained models as one file each, used with torch alone; and the one that comes with the package."""

from energy_flow.pretrained.card import ModelCard
from energy_flow.pretrained.model import SHIPPED, EnergyFlowModel

__all__ = ["SHIPPED", "EnergyFlowModel", "ModelCard"]
