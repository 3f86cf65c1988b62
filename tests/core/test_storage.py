"""Slots: who moves, who ends, who gets a child, and what the store remembers of each."""

import torch
from torch import Tensor

from energy_flow.core.history import History
from energy_flow.core.tensor_pool import TensorPool
from energy_flow.core.tensorized_flow_storage import Births, FlowState, FlowStatus, TensorizedFlowStorage

BATCH, CAPACITY, NUM_FLOWS = 2, 6, 3


def numbers(size: int, value: float = 0.0) -> Tensor:
    """Every slot and entry another number."""
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
    pool = TensorPool()
    for name, dtype in (("status", torch.uint8), ("steps", torch.int64), ("age", torch.int64)):
        pool.take(name, (BATCH, CAPACITY), dtype, torch.device("cpu")).fill_(3)
    for name in ("created", "overflow"):
        pool.take(name, (BATCH,), torch.int64, torch.device("cpu")).fill_(3)
    store = TensorizedFlowStorage(state(0.0), NUM_FLOWS, pool)
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
    assert torch.equal(store.where(FlowStatus.REACHED), mask((1, 2)))
    assert torch.equal(store.where(FlowStatus.REMOVED), mask((0, 1)))
    store.end(mask((1, 0)), FlowStatus.PROJECTED)
    flows = store.finished()
    assert torch.equal(flows.landed, mask((1, 0), (1, 2)))
    assert torch.equal(flows.removed, mask((0, 1)))


def test_finished_flows_keep_nothing_of_the_pool() -> None:
    store = storage()
    store.end(mask((1, 0)), FlowStatus.REMOVED)
    flows = store.finished()
    for buffer in (store.status, store.steps, store.created, store.overflow):
        buffer.fill_(0)
    assert torch.equal(flows.removed, mask((1, 0)))
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
    assert torch.equal(store.where(FlowStatus.FREE), mask((0, 5)))
    assert store.created.tolist() == [5, 6]
    assert store.overflow.tolist() == [0, 2]
    assert store.age[:, :NUM_FLOWS].tolist() == [[2] * 3] * 2, "parents keep their age"
    assert torch.equal(births.born, mask(*parents))
    assert lost(store) == 0


def test_what_children_take_over_and_give_back() -> None:
    """By index, with values and back: the three say the same."""
    born = mask((0, 3), (0, 4), (1, 5))
    parent = torch.full((BATCH, CAPACITY), 5)
    parent[0, 3], parent[0, 4], parent[1, 5] = 2, 2, 0
    births, memory = Births(born, parent), numbers(4)
    inherited = births.inherit(memory, memory)
    assert torch.equal(inherited[0, 3], memory[0, 2])
    assert torch.equal(inherited[1, 5], memory[1, 0])
    assert torch.equal(inherited[~born], memory[~born])
    assert torch.equal(memory.flatten(0, 1)[births.source()].view_as(memory), inherited)
    own, parents = births.bequeath(numbers(4, 1.0))
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
    assert int(store.where(FlowStatus.ACTIVE).sum()) == BATCH * NUM_FLOWS


def lost(store: TensorizedFlowStorage) -> int:
    """As the history of a rollout counts it that looks once, and whose active flows land."""
    history = History(keep_paths=False)
    history.look(store)
    store.end(store.where(FlowStatus.ACTIVE), FlowStatus.PROJECTED)
    return int(history.counts(store.finished()).lost)


def test_a_lost_flow_is_noticed() -> None:
    store = storage()
    assert lost(store) == 0
    store.end(mask((1, 0)), FlowStatus.FREE)
    assert lost(store) == 2, "where it was looked at, and at the end"


def test_a_flow_that_never_ends_is_lost() -> None:
    store, history = storage(), History(keep_paths=False)
    history.look(store)
    store.end(~mask((1, 0)) & store.where(FlowStatus.ACTIVE), FlowStatus.REMOVED)
    assert int(history.counts(store.finished()).lost) == 1
