"""All training targets as candidates of the contrastive loss (loss.candidates = bank)."""

import torch
from torch import Tensor

from energy_flow.data.samples import Samples
from energy_flow.errors import ConfigError
from energy_flow.training.losses import Candidates, directions


def build_bank(datamodule: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The directions of all training targets, [N, D].

    Raises:
        ConfigError: the datamodule is no EnergyDataModule.
    """
    train = getattr(datamodule, "train", None)
    if not isinstance(train, Samples):
        raise ConfigError(
            "loss.candidates = bank: needs the training targets of an EnergyDataModule; "
            "train with trainer.fit(module, datamodule=...), or set loss.candidates=batch"
        )
    return directions(train.all()[1].to(device, dtype))


def bank_candidates(bank: Tensor, rows: Tensor | None) -> Candidates:
    """The candidates of a batch.

    Args:
        bank: of `build_bank`.
        rows: of the batch, int64 [B].

    Raises:
        ConfigError: the batch has no rows.
    """
    if rows is None:
        raise ConfigError(
            "loss.candidates = bank: batches have no 'row', the index of a sample's own target; "
            "give dicts with 'source', 'target' and 'row', or set loss.candidates=batch"
        )
    return Candidates(bank, rows)
