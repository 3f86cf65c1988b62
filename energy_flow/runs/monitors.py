"""The metrics that callbacks monitor: check before training and at the first validation that they are measured."""

from collections.abc import Collection, Iterator
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from energy_flow.errors import ConfigError, NotFiniteError
from energy_flow.runs.instantiate import CONFIG_KEY
from energy_flow.settings import did_you_mean

# The metrics that the module logs at the end of a validation.
_SCORES = ("mrr", "recall@1", "recall@10", "recall@100", "median_rank", "cosine")
_LOSSES = ("loss", "contrastive", "cosine_loss", "mse", "surface")
VALIDATED = tuple(f"val/{name}" for name in (*_SCORES, *_LOSSES))

_OURS = ("energy_flow", "lightning")  # packages whose callbacks log no metrics in `val/...`


class CheckMetrics(Callback):
    """Check at the first validation that every monitored metric in `val/...` was logged.

    Args:
        optimized_metric: value of this config key.
    """

    def __init__(self, optimized_metric: str) -> None:
        self._optimized_metric = optimized_metric
        self._checked = False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._check_own(trainer)
        if self._checked:
            return
        self._checked = True
        logged = sorted(name for name in trainer.callback_metrics if name.startswith("val/"))
        for key, name in [("optimized_metric", self._optimized_metric), *_monitored(trainer)]:
            if name.startswith("val/") and name not in logged:
                raise ConfigError(
                    f"{key} = {name!r}: the first validation didn't log it. Log it with pl_module.log in every "
                    f"validation, at on_validation_epoch_end at the latest. It logged: {', '.join(logged)}"
                )

    def _check_own(self, trainer: Trainer) -> None:
        """Refuse NaN and Inf in a monitored metric of one's own, which would end the training without a word."""
        for key, name in [("optimized_metric", self._optimized_metric), *_monitored(trainer)]:
            value = trainer.callback_metrics.get(name)
            if name.startswith("val/") and name not in VALIDATED and value is not None and not value.isfinite():
                raise NotFiniteError(
                    f"{key} = {name!r}: it is {float(value)} at step {trainer.global_step}, and a number that isn't "
                    "finite picks no checkpoint. Mend the callback that logs it"
                )


def check_monitors(trainer: Trainer, optimized_metric: str, terms: Collection[str]) -> None:
    """Check before training that every monitored metric can be measured.

    Args:
        trainer: with all callbacks. Those of other packages may log metrics that nobody knows before.
        optimized_metric: value of this config key.
        terms: names of the loss terms of one's own.

    Raises:
        ConfigError: there is no such metric, or there are no validations.
    """
    known = [*VALIDATED, *(f"val/{name}" for name in terms)]
    complete = all(type(c).__module__.split(".")[0] in _OURS for c in trainer.callbacks)  # type: ignore[attr-defined]
    watched = list(_monitored(trainer))
    for key, name in [*watched, ("optimized_metric", optimized_metric)]:
        if complete and name not in known and name != "train/loss" and not name.startswith("val/flows/"):
            raise ConfigError(
                f"{key} = {name!r}: no such metric; {did_you_mean(name, known)}. A metric of your own needs a callback "
                "of your own that logs it"
            )
    waiting = {key.removesuffix(".monitor"): name for key, name in watched if name.startswith("val/")}
    if trainer.limit_val_batches == 0 and waiting:
        raise ConfigError(
            f"trainer.limit_val_batches = 0: {', '.join(sorted(set(waiting.values())))} would never be measured. "
            f"Validate, or leave out the callbacks that monitor it: {' '.join(f'{key}=null' for key in waiting)}"
        )


def _monitored(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Config key and metric of every callback that monitors one."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if isinstance(name, str):
            yield f"{getattr(callback, CONFIG_KEY, type(callback).__name__)}.monitor", name
