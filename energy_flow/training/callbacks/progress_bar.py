"""A progress bar that doesn't wait for the device."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the latest training loss that the device has sent, a few steps old."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        loss = getattr(pl_module, "latest_loss", None)
        return metrics if loss is None else {"train/loss": f"{loss:.3f}", **metrics}
