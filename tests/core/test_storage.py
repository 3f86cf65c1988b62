"""Slots: who moves, who ends, who gets a child, and what the store remembers of each."""

import torch

from energy_flow.core.tensorized_flow_storage import FlowState, FlowStatus, TensorizedFlowStorage, TensorPool

BATCH, CAPACITY, NUM_FLOWS = 2, 6, 3


def state(value: float) -> FlowState:
    """Every slot and entry another number."""

    def numbers(size: int) -> torch.Tensor:
        return torch.arange(BATCH * CAPACITY * size, dtype=torch.float64).view(BATCH, CAPACITY, size) + value

    return FlowState(numbers(3), numbers(2), (numbers(4), -numbers(4)))


def storage() -> TensorizedFlowStorage:
    return TensorizedFlowStorage(state(0.0), NUM_FLOWS, TensorPool())


def mask(*slots: tuple[int, int]) -> torch.Tensor:
    result = torch.zeros(BATCH, CAPACITY, dtype=torch.bool)
    for slot in slots:
        result[slot] = True
    return result


def test_only_active_flows_move_and_grow_older() -> None:
    store = storage()
    store.end(mask((0, 1)), FlowStatus.REMOVED)
    before = store.state
    store.advance(state(1000.0), reached=mask((0, 1), (1, 2), (1, 5)))
    moved = mask((0, 0), (0, 2), (1, 0), (1, 1), (1, 2))
    assert torch.equal(store.state.position, torch.where(moved[..., None], state(1000.0).position, before.position))
    assert torch.equal(store.state.energy, torch.where(moved[..., None], state(1000.0).energy, before.energy))
    assert torch.equal(store.steps, moved.long())
    assert torch.equal(store.age, moved.long())
    assert torch.equal(store.where(FlowStatus.REACHED), mask((1, 2)))
    assert torch.equal(store.where(FlowStatus.REMOVED), mask((0, 1)))
    assert torch.equal(store.landed, mask((1, 2)))


def test_children_take_slots_in_the_order_of_their_parents() -> None:
    store = storage()
    store.advance(state(0.0), reached=mask())
    store.advance(state(0.0), reached=mask())
    children = torch.tensor([[0, 1, 1, 0, 0, 0], [2, 0, 3, 0, 0, 0]])
    birthplace = state(500.0).position
    store.spawn(children, birthplace)
    parents = {(0, 3): 1, (0, 4): 2, (1, 3): 0, (1, 4): 0, (1, 5): 2}
    for (sample, slot), parent in parents.items():
        assert torch.equal(store.state.position[sample, slot], birthplace[sample, parent])
        assert torch.equal(store.state.energy[sample, slot], state(0.0).energy[sample, parent])
        for layer in range(2):
            assert torch.equal(store.state.hidden[layer][sample, slot], state(0.0).hidden[layer][sample, parent])
        assert (int(store.steps[sample, slot]), int(store.age[sample, slot])) == (2, 0)
    assert torch.equal(store.where(FlowStatus.FREE), mask((0, 5)))
    assert store.created.tolist() == [5, 6]
    assert store.overflow.tolist() == [0, 2]
    assert store.age[:, :NUM_FLOWS].tolist() == [[2] * 3] * 2, "parents keep their age"
    assert int(store.unaccounted()) == 0


def test_spawning_nothing_changes_nothing() -> None:
    store = storage()
    before = store.state
    store.spawn(torch.zeros(BATCH, CAPACITY, dtype=torch.int64), state(500.0).position)
    assert torch.equal(store.state.position, before.position)
    assert store.created.tolist() == [NUM_FLOWS] * BATCH
    assert int(store.where(FlowStatus.ACTIVE).sum()) == BATCH * NUM_FLOWS


def test_a_lost_flow_is_noticed() -> None:
    store = storage()
    store.end(mask((1, 0)), FlowStatus.FREE)
    assert int(store.unaccounted()) == 1
