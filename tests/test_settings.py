"""Annotations of third-party functions: the resolvable ones are checked."""

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
