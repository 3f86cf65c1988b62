"""Pairs of embeddings to train on: from the embedded reverse dictionary, from own files, or generated.

Names are imported on first use: programs that only read data need neither Lightning nor the lattice.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from energy_flow.data.datamodule import EnergyDataModule
    from energy_flow.data.files import FileSettings
    from energy_flow.data.kinds import read_data_settings
    from energy_flow.data.own import OwnData, RunData, build_data
    from energy_flow.data.pairs import PairDataset
    from energy_flow.data.transport import TransportDataset, TransportSettings

__all__ = [
    "EnergyDataModule",
    "FileSettings",
    "OwnData",
    "PairDataset",
    "RunData",
    "TransportDataset",
    "TransportSettings",
    "build_data",
    "read_data_settings",
]

_MODULES = {
    "EnergyDataModule": "datamodule",
    "FileSettings": "files",
    "OwnData": "own",
    "PairDataset": "pairs",
    "RunData": "own",
    "TransportDataset": "transport",
    "TransportSettings": "transport",
    "build_data": "own",
    "read_data_settings": "kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
