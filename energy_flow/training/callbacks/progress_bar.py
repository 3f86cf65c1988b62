"""A progress bar that doesn't make the device wait."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the training loss as it arrives from the device, a few steps late."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = getattr(pl_module, "latest_loss", None)
        return metrics if loss is None else {"train/loss": f"{loss:.3f}", **metrics}
