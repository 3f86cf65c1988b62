"""Annotations check the arguments of callbacks, in Python and in a config."""

from collections.abc import Iterator
from typing import Annotated, Any

import pytest
from pydantic import Field

from energy_flow import targets
from energy_flow.errors import ConfigError
from energy_flow.runs.instantiate import build_callbacks
from energy_flow.settings import Remedy, check_arguments
from energy_flow.training.callbacks.bad_steps import StopOnBadSteps
from energy_flow.training.callbacks.flow_monitor import FlowMonitor
from energy_flow.training.callbacks.last_checkpoint import LastCheckpoint
from energy_flow.training.callbacks.memory_cleanup import MemoryCleanup

# callback, good arguments, the wrong one, its value as the message shows it, the limit, the remedy
WRONG: list[tuple[type, dict[str, Any], str, Any, str, str]] = [
    (MemoryCleanup, {"interval": 25, "threshold": 0.6}, "interval", 0, "greater than or equal to 1", "null removes"),
    (MemoryCleanup, {"interval": 25, "threshold": 0.6}, "threshold", 2.0, "less than or equal to 0.666", "(0, 2/3]"),
    (MemoryCleanup, {"interval": 25, "threshold": 0.6}, "threshold", "a", "valid number", "(0, 2/3]"),
    (FlowMonitor, {"every_n_epochs": 1, "samples": 1, "max_flows": 1}, "samples", 0, "equal to 1", "null instead"),
    (LastCheckpoint, {"dirpath": "x", "every_seconds": 1.0}, "every_seconds", -1.0, "greater than 0", "inf saves"),
    (LastCheckpoint, {"dirpath": "x", "every_seconds": 1.0}, "dirpath", 3, "valid string", ""),
    (StopOnBadSteps, {"dirpath": "x", "max_bad_steps": 3}, "max_bad_steps", 0, "equal to 1", "null instead"),
]
SECTIONS = {
    MemoryCleanup: "memory_cleanup",
    FlowMonitor: "flow_monitor",
    LastCheckpoint: "last_checkpoint",
    StopOnBadSteps: "bad_steps",
}


@pytest.fixture(autouse=True)
def _own_config() -> Iterator[None]:
    """Callbacks are built of the user's own config alone."""
    with targets.from_user():
        yield


@pytest.mark.parametrize(("callback", "good", "name", "value", "limit", "remedy"), WRONG)
def test_a_wrong_argument(callback: type, good: dict[str, Any], name: str, value: Any, limit: str, remedy: str) -> None:
    section = SECTIONS[callback]
    target = f"{callback.__module__}.{callback.__qualname__}"
    with pytest.raises(ConfigError) as in_python:
        callback(**{**good, name: value})
    with pytest.raises(ConfigError) as in_config:
        build_callbacks({section: {"_target_": target, **good, name: value}})
    message = str(in_python.value)
    assert message.startswith(f"callbacks.{section}.{name} = {value!r}: ")
    assert limit in message
    assert remedy in message
    assert str(in_config.value) == message
    assert type(build_callbacks({section: {"_target_": target, **good}})[0]) is callback


def test_the_message_has_the_config_key() -> None:
    target = f"{MemoryCleanup.__module__}.MemoryCleanup"
    with pytest.raises(ConfigError, match=r"^callbacks\.mine\.interval = 0: "):
        build_callbacks({"mine": {"_target_": target, "interval": 0, "threshold": 0.5}})


def test_every_wrong_argument_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        FlowMonitor(0, samples=1, max_flows=-1)
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "callbacks.flow_monitor.every_n_epochs = 0",
        "callbacks.flow_monitor.max_flows = -1",
    ]


def test_arguments_without_an_annotation_and_sections_pass() -> None:
    def function(free, number: Annotated[int, Field(ge=1), Remedy("raise it")], part: int = 3) -> None:  # type: ignore[no-untyped-def]
        """Third-party code."""

    check_arguments(function, {"free": object(), "number": 1, "part": {"_target_": "a.B"}, "other": 1}, "key")
    with pytest.raises(ConfigError, match=r"^key\.number = 0: should be greater than or equal to 1; raise it$"):
        check_arguments(function, {"number": 0}, "key")
