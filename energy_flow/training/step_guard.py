"""Skip steps with NaN or Inf: the device finds and skips them, and the host logs them one step later."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from energy_flow.atomic import atomic_write
from energy_flow.core.energy_lattice import name_samples
from energy_flow.core.faults import name_rows
from energy_flow.core.host_copy import HostCopy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordedBatch:
    """One batch of a step: its inputs, and the norms of its quantities in the order of their computation."""

    source: Tensor  # [B, D]
    target: Tensor  # [B, D]
    rows: Tensor | None  # int64 [B]
    names: list[str]  # of the Q quantities
    norms: Tensor  # [Q]

    def describe(self, samples: list[int]) -> str:
        """Name these samples, by their rows if the batch has rows. An empty list means all samples."""
        samples = samples or list(range(len(self.source)))
        return (
            name_samples(samples) if self.rows is None else name_rows(self.rows[samples].tolist(), "the training data")
        )


@dataclass(frozen=True)
class BadStep:
    """A skipped step."""

    step: int  # optimiser steps before it
    reason: str  # the first quantity that isn't finite
    where: str  # its samples, or all samples of the step if they are unknown
    batches: list[RecordedBatch]

    def save(self, path: Path) -> None:
        """Write `source` and `target` [N, D] of all batches as safetensors, and `row` [N] if batches have rows."""
        content = {name: torch.cat([getattr(batch, name) for batch in self.batches]) for name in ("source", "target")}
        rows = [batch.rows for batch in self.batches if batch.rows is not None]
        if rows:
            content["row"] = torch.cat(rows)
        content = {name: value.detach().cpu().contiguous() for name, value in content.items()}
        atomic_write(path, save(content, metadata={"step": str(self.step), "reason": self.reason, "where": self.where}))


@dataclass(frozen=True)
class _CheckedStep:
    step: int
    is_fault: bool  # if it is skipped
    names: list[str]  # of the quantities of all batches, then of the gradients
    batches: list[RecordedBatch]
    nonfinite: list[list[int]]  # samples of each batch whose output isn't finite
    copy: HostCopy  # whether the step is bad, then the quantities


class StepGuard:
    """Check the gradients of every step on the device. The host reads the result when it checks the next step.

    A loss that isn't finite makes its gradients NaN (`propagate_nonfinite`). Several processes share their gradients,
    so they all decide the same and need no further communication.

    Attributes:
        limit: after so many bad steps in a row every further step is skipped. None: no limit.
        skipped: number of skipped steps.
        in_row: number of faults in a row, up to the last step.
        first: the first of the faults in a row.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self.skipped = 0
        self.in_row = 0
        self.first: BadStep | None = None
        self._batches: list[RecordedBatch] = []
        self._checked: deque[_CheckedStep] = deque()
        self._in_row: Tensor | None = None  # `in_row` on the device

    def start(self) -> None:
        """Reset everything but `skipped` before a fit."""
        self.in_row, self.first, self._in_row = 0, None, None
        self._batches, self._checked = [], deque()

    def record(self, source: Tensor, target: Tensor, rows: Tensor | None, results: Mapping[str, Tensor]) -> None:
        """Record a batch of the next step: source and target [B, D], rows int64 [B].

        `results` are tensors computed from the batch, by name, in the order of their computation.
        """
        quantities = {"source": source, "target": target, **results}
        self._batches.append(RecordedBatch(source, target, rows, list(quantities), _norms(quantities.values())))

    def check(
        self, step: int, parameters: Iterable[tuple[str, nn.Parameter]], nonfinite: list[list[int]], *, scaling: bool
    ) -> Tensor:
        """Decide whether the optimiser must skip this step.

        Args:
            step: optimiser steps so far.
            parameters: by name; their gradients before clipping.
            nonfinite: for each batch since the last step, the samples whose output isn't finite.
            scaling: whether a gradient scaler with a scale > 1 is in use. Then the scale may be too large for float16,
                and a bad step is no fault.

        Returns:
            The optimiser's `found_inf`: 1 to skip or 0, a float32 scalar on the device.
        """
        self.read()
        gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
        squares = _norms(gradients.values()).square()  # AdamW squares gradients, so the squares must be finite too
        bad = ~squares.isfinite().all()
        in_row = bad.new_zeros((), dtype=torch.int64) if self._in_row is None else self._in_row
        if self.limit is not None:
            # The host learns of the last bad step one step late. Skip that step too, so that a checkpoint saved then
            # has the state before the first bad step.
            bad = bad | (in_row >= self.limit)
        self._in_row = (in_row if scaling else in_row + 1) * bad
        batches, self._batches = self._batches, []
        names = [name for batch in batches for name in batch.names] + [f"gradient of {name}" for name in gradients]
        values = torch.cat([bad[None].double(), *(batch.norms.double() for batch in batches), squares.double()])
        self._checked.append(_CheckedStep(step, not scaling, names, batches, nonfinite, HostCopy(values)))
        return bad.float()

    def read(self) -> None:
        """Read the results of all checks so far, count the skipped steps and log them."""
        while self._checked:
            checked = self._checked.popleft()
            bad, *values = checked.copy.wait().tolist()
            if not bad:
                self.in_row, self.first = 0, None
            elif self.limit is None or self.in_row < self.limit:
                self._count(checked, values)

    def _count(self, checked: _CheckedStep, values: list[float]) -> None:
        samples = zip(checked.batches, checked.nonfinite, strict=True)
        known = [batch.describe(nonfinite) for batch, nonfinite in samples if nonfinite]
        where = "; ".join(known or [batch.describe([]) for batch in checked.batches])
        found = BadStep(checked.step, _reason(checked.names, values), where, checked.batches)
        self.skipped += 1
        if checked.is_fault:
            self.in_row += 1
            self.first = self.first or found
            log.warning("step %d skipped: %s (%s)", found.step, found.reason, found.where)
        else:
            log.info("step %d skipped by the gradient scaler: %s", found.step, found.reason)
        for batch in checked.batches:
            rows = None if batch.rows is None else batch.rows.tolist()
            log.info("rows of a batch of step %d: %s", found.step, rows)


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return the same loss, but make all gradients NaN if it isn't finite: an infinite loss may have finite ones."""
    return loss * torch.ones_like(loss).masked_fill(~loss.detach().isfinite(), torch.nan)


def _norms(values: Iterable[Tensor]) -> Tensor:
    """The 2-norm of each of Q tensors, [Q]: NaN or Inf if the tensor holds one. No other norm is as fast on a CPU."""
    tensors = [value.detach() for value in values]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype))


def _reason(names: list[str], values: list[float]) -> str:
    """Name the first quantity that isn't finite."""
    name, value = next((name, value) for name, value in zip(names, values, strict=True) if not math.isfinite(value))
    return f"{'NaN' if math.isnan(value) else 'Inf, or numbers too large to square,'} in the {name}"
