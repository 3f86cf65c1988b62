"""Findings of a rollout, from the device to an error."""

import logging

import torch

from energy_flow.core.energy_lattice import name_samples, no_landing_message
from energy_flow.core.flow_processor import Faults
from energy_flow.core.host_copy import HostCopy
from energy_flow.errors import LostFlowError, NoLandingError, NotFiniteError

log = logging.getLogger(__name__)


class FaultQueue:
    """Takes the faults of every batch and raises them when asked: before the optimiser steps, say.

    Args:
        capacity: M, flows that a sample may create.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._copies: list[HostCopy] = []
        self._most_needed = 0

    def put(self, faults: Faults) -> None:
        """Start copying a batch's findings to the host."""
        counts = torch.stack([faults.lost, faults.overflow, faults.needed])
        self._copies.append(HostCopy(torch.cat([counts, faults.no_landing.long(), faults.not_finite.long()])))

    def raise_all(self) -> None:
        """Wait for the copies (not for work queued after them) and raise what they say.

        Raises:
            NoLandingError: samples without a single landing.
            NotFiniteError: samples with NaN or Inf in their output.
            LostFlowError: a flow that neither landed nor was removed.
        """
        copies, self._copies = self._copies, []
        for copy in copies:
            lost, overflow, needed, *of_samples = copy.wait().tolist()
            batch = len(of_samples) // 2
            no_landing, not_finite = _marked(of_samples[:batch]), _marked(of_samples[batch:])
            if lost:
                raise LostFlowError(f"{lost} flows were lost: created flows must have landed or been removed")
            if no_landing:
                raise NoLandingError(no_landing_message(no_landing))
            if not_finite:
                raise NotFiniteError(
                    f"NaN or Inf in the output of {len(not_finite)} samples ({name_samples(not_finite)}). If training "
                    "diverged, lower optimizer.lr or trainer.gradient_clip_val; if not, look at these rows of the data"
                )
            if overflow:
                self._warn(overflow, needed)

    def _warn(self, overflow: int, needed: int) -> None:
        if needed < 1.5 * self._most_needed:
            return  # said before, nearly; every batch's number is in flows/overflow
        self._most_needed = needed
        log.warning(
            "overflow: %d children of this batch found no slot; a sample needed %d flows, "
            "lattice.max_flows_per_sample = %d. Raise it to %d, or raise lattice.spawn.threshold",
            overflow,
            needed,
            self._capacity,
            needed,
        )


def _marked(flags: list[int]) -> list[int]:
    return [sample for sample, flag in enumerate(flags) if flag]
