"""Findings of a rollout, from the device to an error."""

import logging

import torch

from energy_flow.core.energy_lattice import no_landing_message
from energy_flow.core.flow_processor import Faults
from energy_flow.errors import LostFlowError, NoLandingError
from energy_flow.training.host_copy import HostCopy

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
        self._copies.append(HostCopy(torch.cat([counts, faults.no_landing.long()])))

    def raise_all(self) -> None:
        """Wait for the copies (not for work queued after them) and raise what they say.

        Raises:
            NoLandingError: samples without a single landing.
            LostFlowError: a flow that neither landed nor was removed.
        """
        copies, self._copies = self._copies, []
        for copy in copies:
            lost, overflow, needed, *no_landing = copy.wait().tolist()
            if lost:
                raise LostFlowError(f"{lost} flows were lost: created flows must have landed or been removed")
            if any(no_landing):
                raise NoLandingError(no_landing_message([i for i, empty in enumerate(no_landing) if empty]))
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
