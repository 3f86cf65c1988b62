"""Records of tensors: nested dataclasses, named tuples, dicts and plain values keep their place."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from energy_flow.core.tensors import held_bytes, map_tensors, tensors_of


class Pair(NamedTuple):
    left: Tensor
    right: Tensor | None


@dataclass(frozen=True)
class Inner:
    by_name: dict[str, Tensor]
    pair: Pair


@dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str
    several: list[Tensor]
    missing: Inner | None
    noisy: bool


def record(value: float, right: bool = True, **changes: Any) -> Outer:
    """Tensors of `value`, `value` + 1, ... in the order of the fields."""
    numbers = [torch.full((2,), value + number) for number in range(5)]
    pair = Pair(numbers[2], numbers[3] if right else None)
    fields = {"name": "a", "several": [numbers[4]], "missing": None, "noisy": True, **changes}
    return Outer(inner=Inner({"x": numbers[0], "y": numbers[1]}, pair), **fields)


def values(mapped: Any) -> list[float]:
    return [float(tensor.detach()[0]) for tensor in tensors_of(mapped)]


def test_tensors_are_listed_in_the_order_of_the_fields() -> None:
    assert values(record(10.0)) == [10.0, 11.0, 12.0, 13.0, 14.0]
    assert values(record(10.0, right=False)) == [10.0, 11.0, 12.0, 14.0]
    assert [tensors_of(value) for value in (None, 3, "a", {}, [])] == [[]] * 5
    lone = torch.ones(2)
    assert tensors_of(lone)[0] is lone


def test_mapping_keeps_types_names_and_plain_values() -> None:
    original = record(1.0, right=False)
    doubled = map_tensors(lambda tensor: 2 * tensor, original)
    assert values(doubled) == [2.0, 4.0, 6.0, 10.0]
    assert values(original) == [1.0, 2.0, 3.0, 5.0], "the original stays"
    assert isinstance(doubled, Outer)
    assert isinstance(doubled.inner.pair, Pair)
    assert list(doubled.inner.by_name) == ["x", "y"]
    assert isinstance(doubled.several, list)
    assert (doubled.name, doubled.missing, doubled.noisy, doubled.inner.pair.right) == ("a", None, True, None)


def test_several_records_are_mapped_tensor_by_tensor() -> None:
    summed = map_tensors(lambda *tensors: sum(tensors), record(1.0), record(10.0), record(100.0))
    assert values(summed) == [111.0, 114.0, 117.0, 120.0, 123.0]
    assert map_tensors(torch.add, None, None) is None
    mapped = map_tensors(torch.add, (torch.ones(2), 3), (torch.nn.Parameter(torch.ones(2)), 3))
    assert isinstance(mapped, tuple)
    assert values(mapped) == [2.0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (record(1.0, name="b"), "different values: 'a', 'b'"),
        (record(1.0, noisy=False), "different values: True, False"),
        (record(1.0, right=False), "different types: Tensor, NoneType"),
        (record(1.0, several=[]), r"different keys: \[0\], \[\]"),
        (record(1.0, several=()), "different types: list, tuple"),
        (record(1.0, missing=record(1.0).inner), "different types: NoneType, Inner"),
    ],
)
def test_records_of_different_structure_are_refused(other: Outer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        map_tensors(torch.add, record(1.0), other)


def test_bytes_of_a_shared_block_count_once() -> None:
    block = torch.zeros(100, dtype=torch.float64)
    assert held_bytes(None) == 0
    assert held_bytes({"whole": block, "part": [block[:10], block[50:]], "same": block}) == 800
    assert held_bytes({"part": block[:10], "other": torch.zeros(3, dtype=torch.uint8)}) == 803
