"""Faults of a forward pass: flags on the device that become errors on the host."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.energy_lattice import name_samples, no_landing_message
from energy_flow.core.host_copy import HostCopy
from energy_flow.errors import LostFlowError, NoLandingError, NotFiniteError

log = logging.getLogger(__name__)

REMEDY = "If training diverged, lower optimizer.lr or trainer.gradient_clip_val; if not, look at these rows of the data"


@dataclass(frozen=True)
class Faults:
    """Flags and counts of one batch. They stay on the device until `FaultQueue` copies them."""

    no_landing: Tensor  # bool [B]
    not_finite: Tensor  # bool [B]: NaN or Inf in the output embedding
    lost: Tensor  # int64 scalar: created flows that neither landed nor were removed
    overflow: Tensor  # int64 scalar: children without a slot (logged, no error)
    needed: Tensor  # int64 scalar: slots per sample that would have held all children


class FaultQueue:
    """Copies the faults of every batch to the host, and raises them on request, e.g. before the optimiser steps.

    Args:
        capacity: M, the number of flows that a sample may create.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: list[tuple[HostCopy, Tensor | None]] = []
        self._most_needed = 0

    def put(self, faults: Faults, rows: Tensor | None = None) -> None:
        """Start to copy a batch's faults to the host; its data rows (int64 [B]) name its samples in messages."""
        counts = torch.stack([faults.lost, faults.overflow, faults.needed])
        found = torch.cat([counts, faults.no_landing.long(), faults.not_finite.long()])
        self._waiting.append((HostCopy(found), rows))

    def take(self) -> list[tuple[list[int], Tensor | None]]:
        """Wait for the copies, but not for work queued after them, and raise the faults that no step can skip.

        Returns:
            For each batch, the samples with NaN or Inf in their output, and its rows.

        Raises:
            NoLandingError: samples without a single landing.
            LostFlowError: a flow neither landed nor was removed.
        """
        waiting, self._waiting = self._waiting, []
        taken = []
        for copy, rows in waiting:
            lost, overflow, needed, *of_samples = copy.wait().tolist()
            batch = len(of_samples) // 2
            no_landing, not_finite = _marked(of_samples[:batch]), _marked(of_samples[batch:])
            if lost:
                raise LostFlowError(f"{lost} flows were lost: every created flow must land or be removed")
            if no_landing:
                raise NoLandingError(no_landing_message(no_landing))
            if overflow:
                self._warn(overflow, needed)
            taken.append((not_finite, rows))
        return taken

    def raise_all(self, of: str = "the data") -> None:
        """Raise all faults, also those that a training step could skip.

        Args:
            of: the data set of the rows, for the message.

        Raises:
            NoLandingError, LostFlowError: see `take`.
            NotFiniteError: samples with NaN or Inf in their output.
        """
        for samples, rows in self.take():
            if samples:
                named = name_samples(samples) if rows is None else name_rows(rows[samples].tolist(), of)
                raise NotFiniteError(f"NaN or Inf in the output of {len(samples)} samples ({named}). {REMEDY}")

    def _warn(self, overflow: int, needed: int) -> None:
        if needed < 1.5 * self._most_needed:
            return  # nearly the number of an earlier warning; flows/overflow has every batch's number
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
    """The first ten of some rows of a data set, for messages."""
    return f"rows {', '.join(map(str, rows[:10]))}{', ...' if len(rows) > 10 else ''} of {of}"


def _marked(flags: list[int]) -> list[int]:
    """The samples whose flag is set."""
    return [sample for sample, flag in enumerate(flags) if flag]
