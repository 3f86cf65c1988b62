"""Annotations of third-party functions: the resolvable ones are checked."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional, Protocol, Union

import pytest
from pydantic import Field

from energy_flow.errors import ConfigError
from energy_flow.settings import annotations, check_arguments


class Unchecked(Protocol):
    """isinstance doesn't work with it."""


def function(
    resolved: int,
    text: "str",
    limited: Annotated[float, Field(gt=0)],
    missing: "Run",  # type: ignore[name-defined]  # noqa: F821
    union: Union["Run", None],  # type: ignore[name-defined]  # noqa: F821
    attribute: "Any.missing",  # type: ignore[name-defined]
    broken: "list[",  # type: ignore[syntax]  # noqa: F722
    protocol: Optional[Unchecked] = None,  # noqa: UP045
    free=None,  # type: ignore[no-untyped-def]
) -> "Run":  # type: ignore[name-defined]  # noqa: F821
    """Stands for a third-party constructor."""


def test_unresolvable_annotations_are_left_out() -> None:
    assert list(annotations(function)) == ["resolved", "text", "limited", "protocol"]


def test_the_others_are_still_checked() -> None:
    good = {"resolved": 1, "text": "a", "limited": 1.0, "missing": 3, "union": 3, "protocol": 3, "free": object()}
    check_arguments(function, good, "key")
    for name, value in (("resolved", "a"), ("text", 1), ("limited", 0.0)):
        with pytest.raises(ConfigError, match=rf"^key\.{name} = "):
            check_arguments(function, {**good, name: value}, "key")


def test_a_list_of_a_config_stands_for_a_tuple() -> None:
    def of_pairs(pair: tuple[int, int] | None, many: tuple[int, ...] = ()) -> None:
        """Third-party code."""

    check_arguments(of_pairs, {"pair": [1, 2], "many": [1, 2, 3]}, "key")
    with pytest.raises(ConfigError, match=r"key\.pair = \[1, 'a'\]"):
        check_arguments(of_pairs, {"pair": [1, "a"]}, "key")


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (Path, "folder/file", 3),
        (Path | None, None, 3),
        (Colour, "red", "blue"),
        (set[int], [1, 2], [1, "a"]),
        (list[tuple[int, int]], [[1, 2], [3, 4]], [[1, 2], [3]]),
        (dict[str, tuple[int, ...]] | list[tuple[str, float]], [["a", 1.0]], [["a"]]),
    ],
)
def test_types_that_a_config_writes_as_text_and_lists(annotation: Any, good: Any, bad: Any) -> None:
    def of_any(value: Any) -> None:
        """Third-party code."""

    of_any.__annotations__["value"] = annotation
    check_arguments(of_any, {"value": good}, "key")
    with pytest.raises(ConfigError, match=r"^key\.value = "):
        check_arguments(of_any, {"value": bad}, "key")
