"""The LightningModule around the flow processor."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import torch
from torch import Tensor

from energy_flow import targets
from energy_flow.checkpoints import compatibility, weight_averaging
from energy_flow.checkpoints import format as checkpoints
from energy_flow.checkpoints.lightning_loops import get_logging_step, is_fitting
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.faults import FaultQueue
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.core.host_copy import DelayedScalars
from energy_flow.core.networks import ModelSettings
from energy_flow.core.rollout import RolloutSettings
from energy_flow.core.timing import PhaseTimer
from energy_flow.data.samples import Samples
from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow.training.batch import Batch, UnpackedBatch, context_for, convert, unpack_batch
from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars
from energy_flow.training.epoch_scores import EpochScores
from energy_flow.training.losses import (
    SHIPPED,
    Candidates,
    LossSettings,
    Temperature,
    directions,
    embedding_losses,
    surface_loss,
    weighted,
)
from energy_flow.training.optimizer import build_optimizer, build_schedule, freeze_parts, read_optimizer
from energy_flow.training.parts import LossTerms
from energy_flow.training.step_guard import StepGuard, propagate_nonfinite


class EnergyFlowModule(pl.LightningModule):
    """A flow lattice with its losses, metrics and optimiser.

    A batch is a dict with `source` and `target` [B, D] and, if noise is enabled, `row` int64 [B]. Its further entries
    reach the loss terms of `loss.terms`, and, if they are tensors [B, ...], a neuron with a method `sense`. A pair
    (source, target) from a custom loader works too.

    Args:
        dim: D, the embedding dimension.
        lattice, model, loss, optimizer: the config sections of these names, as plain dicts. With optimizer = None the
            module can't be trained.
        seed: of the exploration noise.
        rollout: the config section of this name: how rollouts are computed. It is no property of the model, so
            checkpoints don't contain it. None: chosen from the device and the size.

    Attributes:
        scores: outputs of the running evaluation epoch; None outside of an evaluation.
        latest_loss: the training loss for the progress bar, a few steps old.
        phase_timer: times the phases of the next forward pass; None: no timing.
        run_config: the config of the run, for checkpoints.
        fingerprint: sha256 of every split of the data, for checkpoints.

    Raises:
        ConfigError: a section has an unknown key or a value out of range; or a part to freeze doesn't exist; or
            nothing is left to train.
    """

    def __init__(
        self,
        dim: int,
        lattice: dict[str, Any],
        model: dict[str, Any],
        loss: dict[str, Any],
        optimizer: dict[str, Any] | None,
        seed: int,
        rollout: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        # Plain containers only, so that checkpoints load with `weights_only=True`.
        self.save_hyperparameters(logger=False, ignore=["rollout"])
        self.loss = read(LossSettings, loss, "loss")
        self.temperature = Temperature(self.loss)
        self._bank: Tensor | None = None  # directions [N, D] of all training targets, with loss.candidates = bank
        self.optimizer_settings = None if optimizer is None else read_optimizer(optimizer)
        self._from_user = targets.is_from_user()
        lattice_settings = read(LatticeSettings, lattice, "lattice")
        self.processor = FlowProcessor(
            dim,
            lattice_settings,
            read(ModelSettings, model, "model"),
            seed,
            None if rollout is None else read(RolloutSettings, rollout, "rollout"),
        )
        self.terms = LossTerms(self.loss, self.processor)
        if self.optimizer_settings is not None:
            freeze_parts(self.processor, self.optimizer_settings.freeze)
        self.phase_timer: PhaseTimer | None = None
        self.run_config: dict[str, Any] | None = None
        self.fingerprint: dict[str, str] = {}
        self._faults = FaultQueue(lattice_settings.capacity)
        self.guard = StepGuard()
        self.latest_loss: float | None = None
        self._scalars = DelayedScalars()
        self.scores: EpochScores | None = None
        self._steps_before, self._weights_before, self._swapped = 0, list[Tensor](), False  # by `on_validation_start`

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dim: int) -> Self:
        """Build the module of a config, such as `energy_flow.config.compose()`, for embeddings of dimension `dim`."""
        sections = ("lattice", "model", "loss", "optimizer", "seed", "rollout")
        return cls(dim, **{section: config[section] for section in sections})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """Load the module of a checkpoint with Lightning's loader. The file can't run code.

        Raises:
            CheckpointError: the file is missing or corrupt, or energy_flow didn't write it.
        """
        checkpoint = checkpoints.load(checkpoint_path)
        if options.get("strict") is not False:  # without `strict`, weights of other models are allowed
            compatibility.check_model(cls, checkpoint, checkpoint_path, options)
        with targets.from_file():
            return super().load_from_checkpoint(checkpoint_path, **{**options, "weights_only": True})

    @property
    def num_parameters(self) -> int:
        """Number of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_frozen(self) -> int:
        """Number of parameters that are not trained, of `num_parameters`."""
        return sum(parameter.numel() for parameter in self.parameters() if not parameter.requires_grad)

    def forward(self, source: Tensor, rows: Tensor | None = None, **options: Any) -> FlowOutput:
        """Run embeddings [B, D] through the flow lattice; see `FlowProcessor.forward` for the other arguments."""
        output: FlowOutput = self.processor(source, rows, timer=self.phase_timer, **options)
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        unpacked = self._unpack(batch)
        output = self(unpacked.source, unpacked.rows, context=unpacked.context_for(self.processor.neuron))
        self._faults.put(output.faults)
        losses = self._losses(output, unpacked)
        loss = weighted(losses, self.loss)
        trained = {name: losses[name] for name, weight in self.loss.weights().items() if weight > 0}
        if not loss.requires_grad:
            raise ConfigError(
                f"loss: the terms {', '.join(trained)} have no gradient: none depends on a trained part. Compute "
                "loss.terms from the output of the model, without .detach()"
            )
        quantities = _quantities(output, trained, loss)
        self.guard.record(unpacked.source, unpacked.target, unpacked.rows, quantities)
        # This log call is for callbacks. Loggers get their values below, because Lightning would wait for the device.
        self.log("train/loss", loss, logger=False)
        if is_logging_batch(self.trainer):
            scalars = {"train/loss": loss, **{f"train/{name}": value for name, value in trained.items()}}
            scalars |= {f"flows/{name}": value for name, value in output.statistics.items()}
            if self.loss.learn_temperature:
                scalars["train/temperature"] = torch.as_tensor(self.temperature())
            self._scalars.put(get_logging_step(self.trainer), scalars)
            log_scalars(self.trainer, {"train/skipped": float(self.guard.skipped)}, get_logging_step(self.trainer))
        # Anomaly mode names the operation that made a NaN, and that must not be `propagate_nonfinite`.
        return loss if torch.is_anomaly_enabled() else propagate_nonfinite(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        nonfinite = [samples for samples, _ in self._faults.take()]
        # `take` waited for this step's flags, so the device has also finished the check of the step before.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scaling = scaler is not None and scaler.get_scale() > 1  # waits for the device, as the scaler will anyway
        bad = self.guard.check(self.trainer.global_step, self.named_parameters(), nonfinite, scaling=scaling)
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused optimisers read it on the device

    def on_fit_start(self) -> None:
        if self.loss.contrastive > 0 and self.loss.candidates == "bank":
            train = getattr(self.trainer.datamodule, "train", None)  # type: ignore[attr-defined]
            if not isinstance(train, Samples):
                raise ConfigError(
                    "loss.candidates = bank: needs the training targets of an EnergyDataModule; "
                    "train with trainer.fit(module, datamodule=...), or set loss.candidates=batch"
                )
            self._bank = directions(train.all()[1].to(self.device, self.processor.dtype))

    def on_fit_end(self) -> None:
        self._bank = None

    def on_train_start(self) -> None:
        self.guard.start()
        self._set_steps()
        self._swapped = False
        self.fingerprint = getattr(self.trainer.datamodule, "fingerprint", {})  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.write_scalars(wait=False)

    def on_train_epoch_end(self) -> None:
        self.guard.read()

    def on_train_end(self) -> None:
        self._set_steps()  # a callback may have copied averages into all buffers
        self.write_scalars(wait=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._set_steps()

    def on_validation_start(self) -> None:
        self._steps_before = int(self.processor.optimizer_step)
        self._weights_before = weight_averaging.copy_weights(self)

    def on_validation_epoch_start(self) -> None:
        self.processor.set_optimizer_step(self._steps_before)  # a callback may have swapped in averages of all buffers
        self._swapped, self._weights_before = weight_averaging.are_swapped(self, self._weights_before), []
        self.scores = EpochScores(self.loss, self.temperature())

    def on_test_epoch_start(self) -> None:
        self.scores = EpochScores(self.loss, self.temperature())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluation_step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._swapped = False
        self._log_metrics("val", "the validation data")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", "the test data")

    def on_validation_end(self) -> None:
        self.scores = None  # callbacks have read them: Lightning calls their hook first

    on_test_end = on_validation_end

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Output embeddings [B, D] of a batch. Targets are optional: a tensor or a dict with `source` works too."""
        entries = batch if isinstance(batch, Mapping) else {"source": batch if isinstance(batch, Tensor) else batch[0]}
        entries = {name: convert(value, self.processor.dtype) for name, value in entries.items()}
        source = entries["source"].to(self.processor.dtype)
        output = self(source, context=context_for(self.processor.neuron, entries, len(source)))
        self._faults.put(output.faults, entries.get("row"))
        self._faults.raise_all()
        return output.embedding

    def configure_optimizers(self) -> Any:
        if self.optimizer_settings is None:
            raise ConfigError("optimizer = None: the module can't be trained; build it with a section `optimizer`")
        total_steps = self.trainer.estimated_stepping_batches
        with targets.from_user() if self._from_user else targets.from_file():
            optimizer = build_optimizer(self.optimizer_settings, self.named_parameters())
            schedule = build_schedule(self.optimizer_settings, optimizer, total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._set_steps()  # a callback may save before `on_train_batch_end`; the checkpoint shares this tensor
        weight_averaging.correct_saved(checkpoint, swapped=self._swapped)
        checkpoint[checkpoints.KEY] = checkpoints.provenance(self.run_config, self.processor.dim, self.fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weight_averaging.correct_loaded(checkpoint, self)
        config, fingerprint = checkpoints.origin(checkpoint)
        if self.run_config is None:  # a resumed run has its own config
            self.run_config = config
        self.fingerprint = fingerprint

    def write_scalars(self, *, wait: bool) -> None:
        """Log the scalars that have arrived from the device; with `wait`, wait for all of them."""
        for step, scalars in self._scalars.take(wait=wait):
            self.latest_loss = scalars["train/loss"]
            log_scalars(self.trainer, scalars, step)

    def _set_steps(self) -> None:
        """In a fit, set the count of the optimiser steps by which flows move."""
        if is_fitting(self):
            self.processor.set_optimizer_step(self.trainer.global_step)

    def _losses(self, output: FlowOutput, batch: UnpackedBatch) -> dict[str, Tensor]:
        """All loss terms of a training batch."""
        candidates = self._candidates(batch.target, batch.rows)
        losses = embedding_losses(output.embedding, batch.target, self.temperature(), candidates)
        if self.loss.surface > 0:
            losses["surface"] = surface_loss(output.surface, self._target_surface(batch.target))
        return {**losses, **self.terms(output, batch.entries())}

    def _candidates(self, target: Tensor, rows: Tensor | None) -> Candidates | None:
        """Candidates of the contrastive loss: all training targets, or the batch's, joined over all processes."""
        if self._bank is not None:
            if rows is None:
                raise ConfigError(
                    "loss.candidates = bank: batches have no 'row', the index of a sample's own target; "
                    "give dicts with 'source', 'target' and 'row', or set loss.candidates=batch"
                )
            return Candidates(self._bank, rows)
        if self.trainer.world_size > 1:
            return Candidates.of_rows(self._gather(target), self.global_rank * len(target), len(target))
        return None

    def _target_surface(self, target: Tensor) -> Tensor:
        with torch.no_grad():
            return self.processor.map_in(target)

    def _evaluation_step(self, batch: Batch, stage: str) -> None:
        """Run an evaluation batch and keep its outputs for the metrics of the epoch."""
        unpacked = self._unpack(batch)
        target, rows = unpacked.target, unpacked.rows
        output = self(unpacked.source, rows, context=unpacked.context_for(self.processor.neuron))
        self._faults.put(output.faults, rows)
        assert self.scores is not None
        terms = self.terms(output, unpacked.entries())
        self.scores.add(output.embedding, target, output.surface, self._target_surface(target), rows, terms)
        flows = {f"{stage}/flows/{name}": value.float() for name, value in output.statistics.items()}
        self.log_dict(flows, on_epoch=True, batch_size=len(target), sync_dist=True)

    def _log_metrics(self, stage: str, data: str) -> None:
        """Log the metrics of an evaluation epoch. Several processes give the same metrics as one."""
        self._faults.raise_all(data)
        if self.trainer.sanity_checking:
            return
        assert self.scores is not None
        self.scores.gather(self._gather)
        monitored = getattr(self.trainer.checkpoint_callback, "monitor", None) or "val/mrr"
        for name, value in self.scores.metrics().items():
            # All processes have the same value; `sync_dist` only avoids a warning of Lightning.
            self.log(f"{stage}/{name}", value, prog_bar=f"{stage}/{name}" == monitored, sync_dist=True)

    def _unpack(self, batch: Batch) -> UnpackedBatch:
        return unpack_batch(batch, self.processor.dtype)

    def _gather(self, value: Tensor) -> Tensor:
        """The values of all processes, joined along the first dimension."""
        if self.trainer.world_size == 1:
            return value
        gathered = self.all_gather(value)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


def _quantities(output: FlowOutput, losses: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Results of a training batch for the step guard, in the order of their computation."""
    parts = {
        "input surface (map in)": output.input_surface,
        "output surface (flows)": output.surface,
        "output embedding (map out)": output.embedding,
    }
    terms = {f"{name} loss" if name in SHIPPED else f"loss.terms.{name}": value for name, value in losses.items()}
    return {**parts, **terms, "loss": loss}
