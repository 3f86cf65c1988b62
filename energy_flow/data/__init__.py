"""Pairs of embeddings: the embedded reverse dictionary, files of your own, and the loaders that feed training."""

from energy_flow.data.datamodule import DataSettings, EnergyDataModule
from energy_flow.data.pairs import PairDataset

__all__ = ["DataSettings", "EnergyDataModule", "PairDataset"]
