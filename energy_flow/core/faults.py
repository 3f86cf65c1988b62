"""Findings of a rollout, from the device to an error."""

import logging

import torch
from torch import Tensor

from energy_flow.core.energy_lattice import name_samples, no_landing_message
from energy_flow.core.flow_processor import Faults
from energy_flow.core.host_copy import HostCopy
from energy_flow.errors import LostFlowError, NoLandingError, NotFiniteError

log = logging.getLogger(__name__)

REMEDY = "If training diverged, lower optimizer.lr or trainer.gradient_clip_val; if not, look at these rows of the data"


class FaultQueue:
    """Takes the faults of every batch and raises them when asked: before the optimiser steps, say.

    Args:
        capacity: M, flows that a sample may create.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[tuple[HostCopy, Tensor | None]] = []
        self._most_needed = 0

    def put(self, faults: Faults, rows: Tensor | None = None) -> None:
        """Start copying a batch's findings to the host; its `rows`, int64 [B], name its samples where it has some."""
        counts = torch.stack([faults.lost, faults.overflow, faults.needed])
        found = torch.cat([counts, faults.no_landing.long(), faults.not_finite.long()])
        self._waiting.append((HostCopy(found), rows))

    def take(self) -> list[tuple[list[int], Tensor | None]]:
        """Wait for the copies (not for work queued after them) and raise what can't be skipped.

        Returns:
            Of each batch the samples with NaN or Inf in their output, and its rows.

        Raises:
            NoLandingError: samples without a single landing.
            LostFlowError: a flow that neither landed nor was removed.
        """
        waiting, self._waiting = self._waiting, []
        taken = []
        for copy, rows in waiting:
            lost, overflow, needed, *of_samples = copy.wait().tolist()
            batch = len(of_samples) // 2
            no_landing, not_finite = _marked(of_samples[:batch]), _marked(of_samples[batch:])
            if lost:
                raise LostFlowError(f"{lost} flows were lost: created flows must have landed or been removed")
            if no_landing:
                raise NoLandingError(no_landing_message(no_landing))
            if overflow:
                self._warn(overflow, needed)
            taken.append((not_finite, rows))
        return taken

    def raise_all(self, of: str = "the data") -> None:
        """As `take`, and raise also what could be skipped; `of` is what the rows are of.

        Raises:
            NoLandingError, LostFlowError: as `take`.
            NotFiniteError: samples with NaN or Inf in their output.
        """
        for samples, rows in self.take():
            if samples:
                named = name_samples(samples) if rows is None else name_rows(rows[samples].tolist(), of)
                raise NotFiniteError(f"NaN or Inf in the output of {len(samples)} samples ({named}). {REMEDY}")

    def _warn(self, overflow: int, needed: int) -> None:
        if needed < 1.5 * self._most_needed:
            return  # said before, nearly; every batch's number is in flows/overflow
        self._most_needed = needed
        log.warning(
            "overflow: %d children of this batch found no slot and were dropped; a sample needed %d flows, "
            "lattice.max_flows_per_sample = %d. Raise it to %d, or raise lattice.spawn.threshold",
            overflow,
            needed,
            self._capacity,
            needed,
        )


def name_rows(rows: list[int], of: str) -> str:
    """The first of some rows of the data, for messages."""
    return f"rows {', '.join(map(str, rows[:10]))}{', ...' if len(rows) > 10 else ''} of {of}"


def _marked(flags: list[int]) -> list[int]:
    return [sample for sample, flag in enumerate(flags) if flag]
