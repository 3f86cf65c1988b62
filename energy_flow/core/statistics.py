"""Statistics of one forward pass."""

from torch import Tensor

from energy_flow.core.energy_lattice import Landings
from energy_flow.core.history import Counts
from energy_flow.core.tensorized_flow_storage import FinishedFlows


def flow_statistics(landings: Landings, flows: FinishedFlows, mass: Tensor, counts: Counts) -> dict[str, Tensor]:
    """Scalars on the device: counts per sample, so that they don't depend on the batch size, and means.

    Means over landings are 0 where nothing landed, which is a fault of its own.

    Args:
        landings: [B, M].
        flows: the flows at the end of the rollout.
        mass: [B, S], sum of the deposit weights of each cell.
        counts: of the rollout.

    Returns:
        - `share_z0`, `share_zdepth`, `share_projected`: shares of all landings.
        - `steps`, `energy_mean`, `energy_std`: over all landings.
        - `created`, `landed`, `removed`, `spawned`, `overflow`: flows per sample.
        - `coverage`: share of the cells with a deposit.
        - `displacement`: mean length of a move, in normalised units.
        - `active_share`: moves made / (flows created * steps).
    """
    landed = landings.landed
    count = landed.sum().clamp(min=1)

    def mean(value: Tensor) -> Tensor:
        return (value.detach() * landed).sum() / count

    energy = landings.energy.detach()
    energy_mean = mean(energy.mean(-1))
    num_moves, num_steps = counts.num_moves, len(counts.by_step["active"]) - 1
    batch, num_cells = mass.shape
    num_created = flows.created.sum()
    return {
        "share_z0": mean(landings.plane == 0),
        "share_zdepth": mean(landings.plane == 1),
        "share_projected": mean(landings.projected),
        "steps": mean(landings.steps),
        "created": num_created / batch,
        "landed": landed.sum() / batch,
        "removed": counts.by_step["removed"][-1] / batch,
        "spawned": num_created / batch - num_cells,
        "overflow": flows.overflow.sum() / batch,
        "coverage": (mass > 0).to(mass.dtype).mean(),
        "displacement": counts.distance / num_moves.clamp(min=1),
        "energy_mean": energy_mean,
        "energy_std": mean((energy - energy_mean).square().mean(-1)).sqrt(),
        "active_share": num_moves / (num_created * max(num_steps, 1)),
    }
