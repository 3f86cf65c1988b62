"""Histograms and figures of the flows of a few samples, always the same ones, for TensorBoard."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.geometry import Deposit
from energy_flow.data import TransportSettings
from energy_flow.settings import Remedy, checked_arguments
from energy_flow.training.batch import UnpackedBatch, unpack_batch
from energy_flow.viz import (
    field_figure,
    group_figure,
    landing_figure,
    population_figure,
    render,
    surface_figure,
    trajectory_figure,
)

log = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=1), Remedy("null instead of the section removes the callback")]


class FlowMonitor(Callback):
    """Draw the flows of the first validation samples.

    It runs after the validation of every `every_n_epochs`-th epoch, and once more at the end of training. The processor
    gets the first `samples` rows of the first validation batch, in evaluation mode and without gradients.

    Every TensorBoard logger gets histograms (`flow_values/*`) and figures: `surfaces/*`, `landings/*`, `groups/*`,
    `trajectories/*`, `population`, and `field/*` if the true landings are known. Their step is that of the validation
    metrics.

    It does nothing without a TensorBoard logger, in the sanity check, and on processes other than the first.

    Args:
        every_n_epochs: at least 1.
        samples: rows to draw, at least 1; fewer if the batch has fewer.
        max_flows: paths to draw per sample, at least 1.

    Raises:
        ConfigError: a value is out of range; names its key.
    """

    @checked_arguments("callbacks.flow_monitor")
    def __init__(self, every_n_epochs: Count, samples: Count, max_flows: Count) -> None:
        self._every_n_epochs, self._samples, self._max_flows = every_n_epochs, samples, max_flows
        self._batch: UnpackedBatch | None = None
        self._drawn_epoch: int | None = None
        self._drawn_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"drawn_epoch": self._drawn_epoch, "drawn_step": self._drawn_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._drawn_epoch, self._drawn_step = state_dict["drawn_epoch"], state_dict["drawn_step"]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._batch is None and batch_idx == 0 and dataloader_idx == 0 and _writers(trainer):
            self._batch = _first_rows(unpack_batch(batch, pl_module.processor.dtype), self._samples)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        epoch = trainer.current_epoch
        if (epoch + 1) % self._every_n_epochs == 0 and epoch != self._drawn_epoch:
            self._drawn_epoch = epoch
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._drawn_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: Any) -> None:
        writers = _writers(trainer)
        if not writers:
            return
        if self._batch is None:
            log.info("there was no validation batch, so there are no flows to draw")
            return
        self._drawn_step = trainer.global_step
        batch, processor = self._batch, pl_module.processor
        with _evaluating(processor), torch.no_grad(), trainer.precision_plugin.forward_context():
            output = processor(batch.source, batch.rows, context=batch.context, record_trajectories=True)
        histograms = _histograms(output)
        lattice = processor.settings
        figures = _figures(output, lattice.width, lattice.height, lattice.deposit, self._max_flows)
        images = {tag: render(figure) for tag, figure in figures}
        images |= {tag: render(figure) for tag, figure in self._fields(trainer, processor, output)}
        step = max(0, trainer.global_step - 1)  # the step just done, as for the validation metrics
        for writer in writers:
            for tag, values in histograms.items():
                writer.add_histogram(tag, values, step)
            for tag, image in images.items():
                writer.add_image(tag, image, step, dataformats="HWC")

    def _fields(self, trainer: Trainer, processor: FlowProcessor, output: FlowOutput) -> Iterator[tuple[str, Figure]]:
        """Figures of the true landings, if the data know them and every flow belongs to one cell."""
        data = getattr(trainer.datamodule, "settings", None)  # type: ignore[attr-defined]
        if not isinstance(data, TransportSettings) or processor.model.maps != "identity":
            return
        if output.trajectories is None or processor.settings.spawn.enabled:
            return
        landings = data.landings(output.input_surface.flatten(1))
        for sample in range(len(landings)):
            yield f"field/{sample}", field_figure(output.trajectories, landings, sample, self._max_flows)


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _first_rows(batch: UnpackedBatch, samples: int) -> UnpackedBatch:
    """Copy the first rows of a batch."""

    def first(value: Tensor) -> Tensor:
        return value[:samples].clone()

    # Validation runs in inference mode. A copy made in that mode can't be used outside of it.
    with torch.inference_mode(False):
        rows = None if batch.rows is None else first(batch.rows)
        context = {name: first(value) for name, value in batch.context.items()}
        return UnpackedBatch(first(batch.source), first(batch.target), rows, context)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, then restore the mode of every submodule: some may stay in evaluation mode."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


def _histograms(output: FlowOutput) -> dict[str, Tensor]:
    """Finite values of all flows that landed (or moved). Empty histograms are left out, because they have no range."""
    landings, landed = output.landings, output.landings.landed
    towards = landings.plane * 2 - 1  # -1 for z0, +1 for zdepth
    values = {
        "flow_values/x": landings.xy[..., 0][landed],
        "flow_values/y": landings.xy[..., 1][landed],
        "flow_values/z": (towards * (1 - landings.distance))[landed],
        "flow_values/energy": landings.energy[landed].flatten(),
    }
    if output.trajectories is not None:
        moved = output.trajectories.active[:-1]
        values["flow_values/displacement"] = output.trajectories.displacement[moved]
    finite = {tag: value[value.isfinite()].float().cpu() for tag, value in values.items()}
    broken = [tag for tag, value in values.items() if finite[tag].numel() < value.numel()]
    if broken:
        log.warning("histograms leave out values that are not finite: %s", ", ".join(broken))
    return {tag: value for tag, value in finite.items() if value.numel()}


def _figures(
    output: FlowOutput, width: int, height: int, deposit: Deposit, max_flows: int
) -> Iterator[tuple[str, Figure]]:
    """Yield one figure at a time, so that each can be freed before the next one is drawn."""
    yield "surfaces/input", surface_figure(output.input_surface, width, height, "Input surface")
    yield "surfaces/output", surface_figure(output.surface, width, height, "Output surface")
    yield "population", population_figure(output.by_step)
    for sample in range(output.surface.shape[0]):
        yield f"landings/{sample}", landing_figure(output.landings, sample, width, height)
        yield f"groups/{sample}", group_figure(output.landings, sample, width, height, deposit)
        if output.trajectories is not None:
            yield f"trajectories/{sample}", trajectory_figure(output.trajectories, sample, max_flows)
