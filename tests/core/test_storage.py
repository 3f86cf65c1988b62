"""The store of flows: moving, ending, spawning, and the count of lost flows."""

import dataclasses

import torch
from torch import Tensor

from energy_flow.core.history import History
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import Births, FlowState, FlowStatus, TensorizedFlowStorage

BATCH, CAPACITY, NUM_FLOWS = 2, 6, 3


def numbers(size: int, value: float = 0.0) -> Tensor:
    """A different number in every slot and entry."""
    return torch.arange(BATCH * CAPACITY * size, dtype=torch.float64).view(BATCH, CAPACITY, size) + value


def state(value: float) -> FlowState:
    return FlowState(numbers(3, value), numbers(2, value))


def storage() -> TensorizedFlowStorage:
    return TensorizedFlowStorage(state(0.0), NUM_FLOWS, TensorPool())


def mask(*slots: tuple[int, int]) -> torch.Tensor:
    result = torch.zeros(BATCH, CAPACITY, dtype=torch.bool)
    for slot in slots:
        result[slot] = True
    return result


def test_a_store_starts_with_one_flow_per_cell_whatever_its_buffers_held() -> None:
    pool, device = TensorPool(), torch.device("cpu")
    pool.take("status", (BATCH, CAPACITY), torch.uint8, device).fill_(3)
    pool.take("steps, age", (2, BATCH, CAPACITY), torch.int64, device).fill_(3)
    pool.take("created, overflow", (2, BATCH), torch.int64, device).fill_(3)
    held = pool.nbytes
    store = TensorizedFlowStorage(state(0.0), NUM_FLOWS, pool)
    assert pool.nbytes == held, "the store uses these buffers"
    assert store.status.tolist() == [[FlowStatus.ACTIVE] * NUM_FLOWS + [FlowStatus.FREE] * 3] * BATCH
    assert store.created.tolist() == [NUM_FLOWS] * BATCH
    for counter in (store.steps, store.age, store.overflow):
        assert not counter.any()


def test_only_active_flows_grow_older() -> None:
    store = storage()
    store.end(mask((0, 1)), FlowStatus.REMOVED)
    store.advance(state(1000.0), reached=mask((1, 2)))
    assert torch.equal(store.state.position, state(1000.0).position)
    assert torch.equal(store.state.energy, state(1000.0).energy)
    moved = mask((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    assert torch.equal(store.steps, moved.long())
    assert torch.equal(store.age, moved.long())
    assert torch.equal(store.status == FlowStatus.REACHED, mask((1, 2)))
    assert torch.equal(store.status == FlowStatus.REMOVED, mask((0, 1)))


def test_projection_ends_the_active_flows_alone() -> None:
    store = storage()
    store.end(mask((0, 1)), FlowStatus.REMOVED)
    store.advance(state(1000.0), reached=mask((1, 2)))
    flows = store.project()
    assert torch.equal(flows.status == FlowStatus.PROJECTED, mask((0, 0), (0, 2), (1, 0), (1, 1)))
    assert torch.equal(flows.status == FlowStatus.REACHED, mask((1, 2)))
    assert torch.equal(flows.status == FlowStatus.REMOVED, mask((0, 1)))


def test_projected_flows_keep_nothing_of_the_pool() -> None:
    store = storage()
    store.end(mask((1, 0)), FlowStatus.REMOVED)
    flows = store.project()
    for buffer in (store.status, store.steps, store.created, store.overflow):
        buffer.fill_(0)
    assert torch.equal(flows.status == FlowStatus.REMOVED, mask((1, 0)))
    assert flows.created.tolist() == [NUM_FLOWS] * BATCH


def test_children_take_slots_in_the_order_of_their_parents() -> None:
    store = storage()
    store.advance(state(0.0), reached=mask())
    store.advance(state(0.0), reached=mask())
    children = torch.tensor([[0, 1, 1, 0, 0, 0], [2, 0, 3, 0, 0, 0]])
    birthplace = state(500.0).position
    births = store.spawn(children, birthplace)
    parents = {(0, 3): 1, (0, 4): 2, (1, 3): 0, (1, 4): 0, (1, 5): 2}
    for (sample, slot), parent in parents.items():
        assert torch.equal(store.state.position[sample, slot], birthplace[sample, parent])
        assert torch.equal(store.state.energy[sample, slot], state(0.0).energy[sample, parent])
        assert bool(births.born[sample, slot])
        assert int(births.parent[sample, slot]) == parent
        assert (int(store.steps[sample, slot]), int(store.age[sample, slot])) == (2, 0)
    assert torch.equal(store.status == FlowStatus.FREE, mask((0, 5)))
    assert store.created.tolist() == [5, 6]
    assert store.overflow.tolist() == [0, 2]
    assert store.age[:, :NUM_FLOWS].tolist() == [[2] * 3] * 2, "parents keep their age"
    assert torch.equal(births.born, mask(*parents))
    assert lost(store) == 0


def test_gathering_from_parents_by_value_and_by_index_agree() -> None:
    """And the gradient goes back to the same slots."""
    born = mask((0, 3), (0, 4), (1, 5))
    parent = torch.full((BATCH, CAPACITY), 5)
    parent[0, 3], parent[0, 4], parent[1, 5] = 2, 2, 0
    births, hidden = Births(born, parent), numbers(4)
    gathered = births.gather_from_parents(hidden, hidden)
    assert torch.equal(gathered[0, 3], hidden[0, 2])
    assert torch.equal(gathered[1, 5], hidden[1, 0])
    assert torch.equal(gathered[~born], hidden[~born])
    assert torch.equal(hidden.flatten(0, 1)[births.source()].view_as(hidden), gathered)
    own, parents = births.scatter_to_parents(numbers(4, 1.0))
    assert torch.equal(own, numbers(4, 1.0) * ~born[..., None])
    assert torch.equal(parents[0, 2], numbers(4, 1.0)[0, 3] + numbers(4, 1.0)[0, 4])
    assert torch.equal(parents[1, 0], numbers(4, 1.0)[1, 5])
    assert int((parents != 0).any(-1).sum()) == 2


def test_spawning_nothing_changes_nothing() -> None:
    store = storage()
    before = store.state
    store.spawn(torch.zeros(BATCH, CAPACITY, dtype=torch.int64), state(500.0).position)
    assert torch.equal(store.state.position, before.position)
    assert store.created.tolist() == [NUM_FLOWS] * BATCH
    assert int((store.status == FlowStatus.ACTIVE).sum()) == BATCH * NUM_FLOWS


def lost(store: TensorizedFlowStorage) -> int:
    """The lost flows of a rollout without a step."""
    history = History(store, keep_paths=False)
    return int(history.counts(store.project()).lost)


def test_a_lost_flow_is_counted() -> None:
    store = storage()
    assert lost(store) == 0
    store.end(mask((1, 0)), FlowStatus.FREE)
    assert lost(store) == 2, "once where it was recorded, once at the end"


def test_a_flow_that_never_ends_is_lost() -> None:
    store = storage()
    history = History(store, keep_paths=False)
    flows = store.project()
    unended = flows.status.masked_fill(mask((1, 0)), FlowStatus.ACTIVE)
    assert int(history.counts(flows).lost) == 0
    assert int(history.counts(dataclasses.replace(flows, status=unended)).lost) == 1
