"""The share of slots that move, measured without waiting: skipping ended flows pays only where it is low."""

from energy_flow.core.history import Counts
from energy_flow.core.host_copy import HostCopy

# Measured with bf16 on an H100: at a share of 0.55, skipping saves 4% of the time of 100,352 flows, and costs 6% of
# that of 12,544 flows.
_LOW, _HIGH = 0.5, 0.6


class Activity:
    """The mean share of slots that move in a step, in one of the last batches."""

    def __init__(self) -> None:
        self._low = False
        self._under_way: HostCopy | None = None

    def put(self, counts: Counts, num_slots: int) -> None:
        """Start to copy a batch's share to the host, unless another copy is under way."""
        if self._under_way is None:
            num_steps = len(counts.by_step["active"]) - 1
            self._under_way = HostCopy(counts.num_moves / (num_slots * num_steps))

    def is_low(self) -> bool:
        """Whether the last share that has arrived is low. Once low, it must rise above the higher limit."""
        if self._under_way is not None and self._under_way.ready:
            share, self._under_way = float(self._under_way.wait()), None
            self._low = share < (_HIGH if self._low else _LOW)
        return self._low
