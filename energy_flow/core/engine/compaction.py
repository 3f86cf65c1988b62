"""How many of the slots are at work: what leaving out flows that have ended would save, watched without waiting."""

from energy_flow.core.history import Counts
from energy_flow.core.host_copy import HostCopy

# Measured with bf16 on an H100: at 0.55 leaving out saves 4% of 100,352 flows' time and costs 6% of 12,544 flows'.
_LOW, _HIGH = 0.5, 0.6


class Activity:
    """Mean share of the slots that move in a step, of some batch before."""

    def __init__(self) -> None:
        self._low = False
        self._under_way: HostCopy | None = None

    def put(self, counts: Counts, num_slots: int) -> None:
        """Start copying a batch's share to the host, unless another's is still on its way."""
        if self._under_way is None:
            num_steps = len(counts.by_step["active"]) - 1
            self._under_way = HostCopy(counts.num_moves / (num_slots * num_steps))

    def is_low(self) -> bool:
        """Whether few enough were active in the last batch whose share has arrived."""
        if self._under_way is not None and self._under_way.ready:
            share, self._under_way = float(self._under_way.wait()), None
            self._low = share < (_HIGH if self._low else _LOW)
        return self._low
