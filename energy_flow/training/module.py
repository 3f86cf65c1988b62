"""The LightningModule around the flow processor."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import Field
from torch import Tensor

from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.faults import FaultQueue
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor, ModelSettings
from energy_flow.core.host_copy import DelayedScalars
from energy_flow.core.rollout import RolloutSettings
from energy_flow.core.timing import PhaseTimer
from energy_flow.data.samples import Samples
from energy_flow.errors import ConfigError
from energy_flow.metrics.retrieval import AllTargets, ranks, retrieval_metrics
from energy_flow.metrics.task import squared_errors
from energy_flow.settings import Settings, did_you_mean, read
from energy_flow.training.callbacks.scalars import is_logging_batch, log_scalars, logging_step
from energy_flow.training.losses import (
    Candidates,
    LossSettings,
    Temperature,
    directions,
    embedding_losses,
    surface_loss,
    weighted,
)
from energy_flow.training.step_guard import SkippingAdamW, StepGuard, propagate_nonfinite

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor] | list[Tensor]
_CHUNK = 1024  # rows of an evaluation whose scores stand at a time
Rate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """AdamW with warm-up and cosine decay (config group `optimizer`)."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    betas: Annotated[list[Rate], Field(min_length=2, max_length=2)]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup_steps: Annotated[int, Field(ge=0)]
    final_lr: Annotated[float, Field(ge=0, le=1)]
    freeze: list[str]


class EnergyFlowModule(pl.LightningModule):
    """A flow lattice with its losses, metrics and optimiser.

    Batches are dicts with `source` and `target` [B, D] and, where noise is on, `row` int64 [B]; a pair
    (source, target) of a user's own loader works too.

    Args:
        dim: D, of the embeddings.
        lattice, model, loss, optimizer: the config sections of these names, as plain dicts. Without an optimizer (None)
            it can't be trained.
        seed: of the exploration noise.
        rollout: the config section of this name, how rollouts are computed: no property of the model, so it isn't
            saved with it. None: chosen from the device and the size.

    Raises:
        ConfigError: a section with an unknown key, a value out of range, or parts to freeze that aren't there or leave
            nothing to train.
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
        self._bank: Tensor | None = None  # directions of all training targets, where they are the candidates
        self.optimizer_settings = None if optimizer is None else read(OptimizerSettings, optimizer, "optimizer")
        lattice_settings = read(LatticeSettings, lattice, "lattice")
        self.processor = FlowProcessor(
            dim,
            lattice_settings,
            read(ModelSettings, model, "model"),
            seed,
            None if rollout is None else read(RolloutSettings, rollout, "rollout"),
        )
        if self.optimizer_settings is not None:
            self._freeze(self.optimizer_settings.freeze)
        self.phase_timer: PhaseTimer | None = None
        self.run_config: dict[str, Any] | None = None
        self.fingerprint: dict[str, str] = {}
        self._faults = FaultQueue(lattice_settings.capacity)
        self.guard = StepGuard()
        self.latest_loss: float | None = None  # for the progress bar, a few steps old
        self._scalars = DelayedScalars()
        self._seen: list[dict[str, Tensor]] = []
        self.test_rows: dict[str, Tensor] = {}  # of the last test: rank and mse of every row in order, float64 [N]
        self.all_targets: AllTargets | None = None  # for a test: more candidates, among which it ranks as well

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dim: int) -> Self:
        """The module of a config, such as `energy_flow.config.compose()` gives, for embeddings of dimension `dim`."""
        sections = ("lattice", "model", "loss", "optimizer", "seed", "rollout")
        return cls(dim, **{section: config[section] for section in sections})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:  # type: ignore[override]
        """The module of a checkpoint, as Lightning builds it; nothing in the file can run code.

        Raises:
            CheckpointError: missing, damaged, or not written by energy_flow.
        """
        checkpoint = checkpoints.load(checkpoint_path)
        if options.get("strict") is not False:  # which takes weights of other models
            compatibility.check_model(cls, checkpoint, checkpoint_path, options)
        return super().load_from_checkpoint(checkpoint_path, **{**options, "weights_only": True})

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def num_frozen(self) -> int:
        """Parameters that stay as they are, of `num_parameters`."""
        return sum(parameter.numel() for parameter in self.parameters() if not parameter.requires_grad)

    def _freeze(self, names: list[str]) -> None:
        parts = self.processor.trained_parts()
        for index, name in enumerate(names):
            if name not in parts:
                raise ConfigError(
                    f"optimizer.freeze[{index}] = {name!r}: no part with parameters; {did_you_mean(name, parts)}"
                )
            parts[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in self.processor.parameters()):
            raise ConfigError(f"optimizer.freeze = {names}: leaves nothing to train. Take a part out of it")

    def forward(self, source: Tensor, rows: Tensor | None = None, *, record_trajectories: bool = False) -> FlowOutput:
        """Embeddings [B, D] -> the flow lattice's output; `rows` and trajectories as in `FlowProcessor.forward`."""
        output: FlowOutput = self.processor(
            source, rows, record_trajectories=record_trajectories, timer=self.phase_timer
        )
        return output

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        source, target, rows = self._unpack(batch)
        output = self(source, rows)
        self._faults.put(output.faults)
        losses = self._losses(output, target, rows)
        loss = weighted(losses, self.loss)
        trained = {name: losses[name] for name, weight in self.loss.weights().items() if weight > 0}
        self.guard.see(source, target, rows, _made(output, trained, loss))
        # For callbacks, such as one that watches it. The loggers get theirs below: Lightning would wait for the device.
        self.log("train/loss", loss, logger=False)
        if is_logging_batch(self.trainer):
            scalars = {"train/loss": loss, **{f"train/{name}": value for name, value in trained.items()}}
            scalars |= {f"flows/{name}": value for name, value in output.statistics.items()}
            if self.loss.learn_temperature:
                scalars["train/temperature"] = torch.as_tensor(self.temperature())
            self._scalars.put(logging_step(self.trainer), scalars)
            log_scalars(self.trainer, {"train/skipped": float(self.guard.skipped)}, logging_step(self.trainer))
        # Anomaly mode looks for the operation that made a NaN: it must not be this one.
        return loss if torch.is_anomaly_enabled() else propagate_nonfinite(loss)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        sick = [samples for samples, _ in self._faults.take()]
        # What was judged a step ago is there by now: the flags of this step, queued after it, have been waited for.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scaling = scaler is not None and scaler.get_scale() > 1  # waits, as the scaler itself is about to
        bad = self.guard.judge(self.trainer.global_step, self.named_parameters(), sick, scaling=scaling)
        optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused optimisers read it on the device

    def on_fit_start(self) -> None:
        asked = self.loss.contrastive > 0 and self.loss.candidates == "bank"
        self._bank = self._all_targets() if asked else None

    def on_fit_end(self) -> None:
        self._bank = None

    def on_train_start(self) -> None:
        self.guard.start()
        self.processor.optimizer_step.fill_(self.trainer.global_step)
        self.fingerprint = getattr(self.trainer.datamodule, "fingerprint", {})  # type: ignore[attr-defined]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.write_scalars(wait=False)

    def on_train_epoch_end(self) -> None:
        self.guard.read()

    def on_train_end(self) -> None:
        self.write_scalars(wait=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.processor.optimizer_step.fill_(self.trainer.global_step)

    def on_validation_epoch_start(self) -> None:
        self._seen = []  # an evaluation that was interrupted left its part

    def on_test_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._look(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._look(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Output embeddings [B, D] of a batch; one without targets (a tensor, or a dict with `source`) will do."""
        source = batch if isinstance(batch, Tensor) else batch["source"] if isinstance(batch, Mapping) else batch[0]
        output = self(source.to(self.processor.dtype))
        self._faults.put(output.faults, batch.get("row") if isinstance(batch, Mapping) else None)
        self._faults.raise_all()
        return output.embedding

    def configure_optimizers(self) -> Any:
        settings = self.optimizer_settings
        if settings is None:
            raise ConfigError("optimizer = None: the module can't be trained; build it with a section `optimizer`")
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        decays = {name: p.ndim > 1 and not name.endswith("cell_value") for name, p in trained.items()}
        decayed = [p for name, p in trained.items() if decays[name]]
        rest = [p for name, p in trained.items() if not decays[name]]
        optimizer = SkippingAdamW(
            [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
        )
        total = self.trainer.estimated_stepping_batches
        if total == math.inf:
            raise ConfigError(
                "trainer.max_epochs = -1: the cosine decay needs to know where a run ends. "
                "Set trainer.max_epochs or trainer.max_steps"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(settings, step, int(total)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            # The tensors of the checkpoint are the module's own; a callback may save before the module's hook ran.
            self.processor.optimizer_step.fill_(self.trainer.global_step)
        checkpoint[checkpoints.KEY] = checkpoints.provenance(self.run_config, self.processor.dim, self.fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        config, fingerprint = checkpoints.origin(checkpoint)
        if self.run_config is None:  # a run that goes on has its own
            self.run_config = config
        self.fingerprint = fingerprint

    def write_scalars(self, *, wait: bool) -> None:
        """Log what has arrived from the device; with `wait`, all of it."""
        for step, scalars in self._scalars.take(wait=wait):
            self.latest_loss = scalars["train/loss"]
            log_scalars(self.trainer, scalars, step)

    def _losses(self, output: FlowOutput, target: Tensor, rows: Tensor | None) -> dict[str, Tensor]:
        """All losses of a training batch."""
        candidates = self._candidates(target, rows)
        losses = embedding_losses(output.embedding, target, self.temperature(), candidates)
        if self.loss.surface > 0:
            losses["surface"] = surface_loss(output.surface, self._target_surface(target))
        return losses

    def _candidates(self, target: Tensor, rows: Tensor | None) -> Candidates | None:
        """Of the contrastive loss: all training targets, or those of the batch, joined over all processes."""
        if self._bank is not None:
            if rows is None:
                raise ConfigError(
                    "loss.candidates = bank: batches have no 'row', which says which training target is a sample's "
                    "own; give dicts with 'source', 'target' and 'row', or set loss.candidates=batch"
                )
            return Candidates(self._bank, rows)
        if self.trainer.world_size > 1:
            return Candidates.of_rows(self._gather(target), self.global_rank * len(target), len(target))
        return None

    def _all_targets(self) -> Tensor:
        """Directions of all training targets on the module's device, [N, D]."""
        train = getattr(self.trainer.datamodule, "train", None)  # type: ignore[attr-defined]
        if not isinstance(train, Samples):
            raise ConfigError(
                "loss.candidates = bank: needs the training targets of an EnergyDataModule; "
                "train with trainer.fit(module, datamodule=...), or set loss.candidates=batch"
            )
        return directions(train.all()[1].to(self.device, self.processor.dtype))

    def _target_surface(self, target: Tensor) -> Tensor:
        with torch.no_grad():
            return self.processor.map_in(target)

    def _look(self, batch: Batch, stage: str) -> None:
        """Run an evaluation batch and keep what the metrics of the whole epoch need."""
        source, target, rows = self._unpack(batch)
        output = self(source, rows)
        self._faults.put(output.faults, rows)
        kept = {"prediction": output.embedding.to(target.dtype), "target": target}
        kept["surface"] = (output.surface - self._target_surface(target)).square().mean((1, 2)).float()
        if rows is not None:
            kept["row"] = rows
        self._seen.append(kept)
        flows = {f"{stage}/flows/{name}": value.float() for name, value in output.statistics.items()}
        self.log_dict(flows, on_epoch=True, batch_size=len(source), sync_dist=True)

    def _report(self, stage: str) -> None:
        """Metrics of an epoch: of one process's gathered, unpadded rows, however many processes looked."""
        self._faults.raise_all("the test data" if stage == "test" else "the validation data")
        seen, self._seen = self._seen, []
        if self.trainer.sanity_checking:
            return
        kept = {name: self._gather(torch.cat([part[name] for part in seen])) for name in seen[0]}
        kept = _in_order(kept)
        prediction, target = kept["prediction"], kept["target"]
        with torch.autocast(prediction.device.type, enabled=False):
            rank = ranks(prediction, target)
            metrics = retrieval_metrics(prediction, target, rank)
            losses = self._losses_of_all(prediction, target)
        if stage == "test":
            self.test_rows = {"rank": rank.cpu(), "mse": squared_errors(prediction, target).cpu()}
            if self.all_targets is not None:
                self.test_rows["rank_all"] = self.all_targets.ranks(prediction).cpu()
        losses["surface"] = kept["surface"].mean()
        for name, loss in losses.items():
            # The cosine itself is a metric already.
            metrics["cosine_loss" if name == "cosine" else name] = loss.item()
        metrics["loss"] = weighted(losses, self.loss).item()
        picking = getattr(self.trainer.checkpoint_callback, "monitor", None) or "val/mrr"
        for name, value in metrics.items():
            # The same on every process: `sync_dist` changes nothing, and Lightning need not ask for it.
            self.log(f"{stage}/{name}", value, prog_bar=f"{stage}/{name}" == picking, sync_dist=True)

    def _losses_of_all(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses over a whole split, every target a candidate; in chunks of rows, so that N x N never stands."""
        total: dict[str, Tensor] = {}
        for start in range(0, len(target), _CHUNK):
            rows = slice(start, start + _CHUNK)
            candidates = Candidates.of_rows(target, start, len(target[rows]))
            losses = embedding_losses(prediction[rows], target[rows], self.temperature(), candidates)
            for name, loss in losses.items():
                share = len(target[rows]) / len(target)
                total[name] = total.get(name, target.new_zeros(())) + share * loss
        return total

    def _unpack(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Source and target in the model's dtype (NumPy's float64 is common in users' own loaders), and rows."""
        dtype = self.processor.dtype
        if isinstance(batch, Mapping) and {"source", "target"} <= batch.keys():
            return batch["source"].to(dtype), batch["target"].to(dtype), batch.get("row")
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return batch[0].to(dtype), batch[1].to(dtype), None
        held = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f" of {len(batch)}"
        raise ConfigError(
            f"a batch is a {type(batch).__name__}{held}: give a dict with 'source' and 'target' (and 'row'), "
            "or a pair (source, target)"
        )

    def _gather(self, value: Tensor) -> Tensor:
        """All processes' values, joined along the first dimension."""
        if self.trainer.world_size == 1:
            return value
        gathered = self.all_gather(value)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


def _rate(settings: OptimizerSettings, step: int, total: int) -> float:
    """Linear warm-up to 1, then a half cosine down to `final_lr` at the last step."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    progress = min(1.0, (step - settings.warmup_steps) / max(1, total - settings.warmup_steps))
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def _made(output: FlowOutput, losses: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """What a training batch gave, from its beginning to its end."""
    parts = {
        "input surface (map in)": output.input_surface,
        "output surface (flows)": output.surface,
        "output embedding (map out)": output.embedding,
    }
    return {**parts, **{f"{name} loss": value for name, value in losses.items()}, "loss": loss}


def _in_order(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sorted by row, every row once: a distributed sampler pads with rows that occur twice."""
    if "row" not in kept:
        return kept
    row, order = kept["row"].sort(stable=True)
    order = order[torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])]
    return {name: value[order] for name, value in kept.items()}
