"""Steps whose numbers aren't finite don't reach the weights: found and skipped on the device, told a step later."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from energy_flow.atomic import write_whole
from energy_flow.core.energy_lattice import name_samples
from energy_flow.core.faults import name_rows
from energy_flow.core.host_copy import HostCopy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SeenBatch:
    """One batch of a step: what went in, and the norms of all that came of it, in the order it was made."""

    source: Tensor  # [B, D]
    target: Tensor  # [B, D]
    rows: Tensor | None  # int64 [B]
    names: list[str]  # of the Q quantities
    norms: Tensor  # [Q]

    def named(self, samples: list[int]) -> str:
        """Some of its samples, or all of them, by their rows where it has rows."""
        samples = samples or list(range(len(self.source)))
        return (
            name_samples(samples) if self.rows is None else name_rows(self.rows[samples].tolist(), "the training data")
        )


@dataclass(frozen=True)
class BadStep:
    """A step that was skipped."""

    step: int  # optimiser steps before it
    reason: str  # the first quantity that isn't finite
    where: str  # the samples it was found in, else all of the step
    batches: list[SeenBatch]

    def save(self, path: Path) -> None:
        """Write `source` and `target` [N, D] and, where batches have rows, `row` [N] of all batches as safetensors."""
        found = {name: torch.cat([getattr(batch, name) for batch in self.batches]) for name in ("source", "target")}
        rows = [batch.rows for batch in self.batches if batch.rows is not None]
        if rows:
            found["row"] = torch.cat(rows)
        content = {name: value.detach().cpu().contiguous() for name, value in found.items()}
        write_whole(path, save(content, metadata={"step": str(self.step), "reason": self.reason, "where": self.where}))


@dataclass(frozen=True)
class _Judged:
    step: int
    counts: bool  # whether a skip is a fault
    names: list[str]  # of the quantities of all batches, then of the gradients
    batches: list[SeenBatch]
    sick: list[list[int]]  # samples of each batch whose output isn't finite
    copy: HostCopy  # bad or not, then the quantities


class StepGuard:
    """Judges every step by its gradients, on the device; the host hears of it when the next step is judged.

    A loss that isn't finite is passed on to the gradients (`propagate_nonfinite`). Several processes share the
    gradients, so all decide the same, and nothing more need be sent.

    Attributes:
        limit: bad steps in a row after which no step is taken any more; None: however many.
        skipped: steps skipped so far.
        in_row: the last ones of them, one after the other, that count as faults.
        first: the first of these.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.skipped = 0
        self.in_row = 0
        self.first: BadStep | None = None
        self._batches: list[SeenBatch] = []
        self._judged: deque[_Judged] = deque()
        self._in_row: Tensor | None = None  # as `in_row`, on the device

    def start(self) -> None:
        """Forget what an earlier fit left; `skipped` goes on."""
        self.in_row, self.first, self._in_row = 0, None, None
        self._batches, self._judged = [], deque()

    def see(self, source: Tensor, target: Tensor, rows: Tensor | None, made: Mapping[str, Tensor]) -> None:
        """Take note of a batch of the next step.

        Args:
            source: [B, D]
            target: [B, D]
            rows: int64 [B]
            made: what was made of them, by name, in the order it was made.
        """
        quantities = {"source": source, "target": target, **made}
        self._batches.append(SeenBatch(source, target, rows, list(quantities), _norms(quantities.values())))

    def judge(
        self, step: int, parameters: Iterable[tuple[str, nn.Parameter]], sick: list[list[int]], *, scaling: bool
    ) -> Tensor:
        """Whether the optimiser must skip this step: 1 or 0, a float32 scalar on the device (its `found_inf`).

        Args:
            step: optimiser steps so far.
            parameters: by name, their gradients as they will be used, but not clipped.
            sick: of each batch since the last step the samples whose output isn't finite.
            scaling: whether a gradient scaler may still have been too large for float16; then it isn't a fault.
        """
        self.read()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        squares = _norms(gradients.values()).square()  # AdamW squares them: to be finite isn't enough
        bad = ~squares.isfinite().all()
        in_row = bad.new_zeros((), dtype=torch.int64) if self._in_row is None else self._in_row
        if self.limit is not None:
            # The host hears of the last one a step late: what is saved then is the state of before the first.
            bad = bad | (in_row >= self.limit)
        self._in_row = (in_row if scaling else in_row + 1) * bad
        batches, self._batches = self._batches, []
        names = [name for batch in batches for name in batch.names] + [f"gradient of {name}" for name in gradients]
        found = torch.cat([bad[None].double(), *(batch.norms.double() for batch in batches), squares.double()])
        self._judged.append(_Judged(step, not scaling, names, batches, sick, HostCopy(found)))
        return bad.float()

    def read(self) -> None:
        """Take note of what was judged so far, and log the steps that were skipped."""
        while self._judged:
            judged = self._judged.popleft()
            bad, *values = judged.copy.wait().tolist()
            if not bad:
                self.in_row, self.first = 0, None
            elif self.limit is None or self.in_row < self.limit:
                self._note(judged, values)

    def _note(self, judged: _Judged, values: list[float]) -> None:
        named = [batch.named(samples) for batch, samples in zip(judged.batches, judged.sick, strict=True) if samples]
        where = "; ".join(named or [batch.named([]) for batch in judged.batches])
        found = BadStep(judged.step, _reason(judged.names, values), where, judged.batches)
        self.skipped += 1
        if judged.counts:
            self.in_row += 1
            self.first = self.first or found
            log.warning("step %d skipped: %s (%s)", found.step, found.reason, found.where)
        else:
            log.info("step %d skipped by the gradient scaler: %s", found.step, found.reason)
        for batch in judged.batches:
            rows = None if batch.rows is None else batch.rows.tolist()
            log.info("rows of a batch of step %d: %s", found.step, rows)


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves weights, moments and its step count alone where its `found_inf` is 1, read on the device."""

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        super().__init__(params, **options, fused=True)
        # A gradient scaler leaves unscaling and skipping to fused optimisers, and Lightning clips no gradients then.
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Of a checkpoint whose optimiser was not fused, and couldn't skip.
        groups = [{**group, "fused": True} for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The same loss, but one that isn't finite gives gradients that aren't, too; an infinite one needn't."""
    return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), torch.nan)


def _norms(values: Iterable[Tensor]) -> Tensor:
    """The norm of each of Q tensors, [Q]: NaN or Inf where they hold one. Of order 2, much the fastest on a CPU."""
    tensors = [value.detach() for value in values]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype))


def _reason(names: list[str], values: list[float]) -> str:
    """The first quantity that isn't finite."""
    name, value = next((name, value) for name, value in zip(names, values, strict=True) if not math.isfinite(value))
    return f"{'NaN' if math.isnan(value) else 'Inf, or numbers too large to square,'} in the {name}"
