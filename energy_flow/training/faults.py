"""Findings of a rollout on their way from the device to an error, without making the device wait."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from energy_flow.core.energy_lattice import no_landing_message
from energy_flow.core.flow_processor import Faults
from energy_flow.errors import LostFlowError, NoLandingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Flight:
    """One batch's findings on the way to the host: lost, overflow, needed, then no_landing of every sample."""

    numbers: Tensor  # int64 [3 + B] on the host; filled once `arrived`
    arrived: torch.cuda.Event | None


class FaultQueue:
    """Takes the faults of every batch and raises them when asked: before the optimiser steps, say.

    Args:
        capacity: M, flows that a sample may create.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._flights: list[_Flight] = []
        self._most_needed = 0

    def put(self, faults: Faults) -> None:
        """Start copying a batch's findings to the host."""
        counts = torch.stack([faults.lost, faults.overflow, faults.needed])
        numbers = torch.cat([counts, faults.no_landing.long()])
        if numbers.device.type != "cuda":
            self._flights.append(_Flight(numbers.cpu(), None))
            return
        on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        on_host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._flights.append(_Flight(on_host, arrived))

    def raise_all(self) -> None:
        """Wait for the copies (not for work queued after them) and raise what they say.

        Raises:
            NoLandingError: samples without a single landing.
            LostFlowError: a flow that neither landed nor was removed.
        """
        flights, self._flights = self._flights, []
        for flight in flights:
            if flight.arrived is not None:
                flight.arrived.synchronize()
            lost, overflow, needed, *no_landing = flight.numbers.tolist()
            if lost:
                raise LostFlowError(f"{lost} flows were lost: created flows must have landed or been removed")
            if any(no_landing):
                raise NoLandingError(no_landing_message([i for i, empty in enumerate(no_landing) if empty]))
            if overflow:
                self._warn(overflow, needed)

    def _warn(self, overflow: int, needed: int) -> None:
        if needed <= self._most_needed:
            return  # said before; every batch's number is in flows/overflow
        self._most_needed = needed
        log.warning(
            "overflow: %d children of this batch found no slot; a sample needed %d flows, "
            "lattice.max_flows_per_sample = %d. Raise it to %d, or raise lattice.spawn.threshold",
            overflow,
            needed,
            self._capacity,
            needed,
        )
