"""Pairs to train on: the embedded reverse dictionary, files of your own, travelling energies; and their loaders."""

from energy_flow.data.datamodule import EnergyDataModule, FileSettings, read_data_settings
from energy_flow.data.pairs import PairDataset
from energy_flow.data.transport import TransportDataset, TransportSettings

__all__ = [
    "EnergyDataModule",
    "FileSettings",
    "PairDataset",
    "TransportDataset",
    "TransportSettings",
    "read_data_settings",
]
