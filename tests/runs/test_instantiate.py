"""The groups `callbacks` and `logger` give callbacks and loggers, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from energy_flow import targets
from energy_flow.errors import ConfigError
from energy_flow.runs.instantiate import build_callbacks, build_loggers

STOPPING = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/mrr"}
MONITOR = {"_target_": "energy_flow.training.callbacks.memory_monitor.MemoryMonitor"}


@pytest.fixture(autouse=True)
def _own_config() -> Any:
    with targets.from_user():
        yield


def test_callbacks_of_energy_flow_of_lightning_and_of_the_user(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_mine.py").write_text("import lightning.pytorch as pl\nclass Mine(pl.Callback): pass\n")
    every = {"_target_": "datetime.timedelta", "minutes": 5}
    saver = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "train_time_interval": every}
    mine = {"_target_": "of_mine.Mine"}
    built = build_callbacks({"stopping": STOPPING, "saver": saver, "monitor": MONITOR, "none": None, "mine": mine})
    names = [type(callback).__name__ for callback in built]
    assert names == ["EarlyStopping", "ModelCheckpoint", "MemoryMonitor", "Mine"]
    assert [callback.config_key for callback in built] == [
        f"callbacks.{name}" for name in ("stopping", "saver", "monitor", "mine")
    ]


def test_no_section() -> None:
    assert build_callbacks(None) == []
    assert build_loggers(None, None) == []


@pytest.mark.parametrize("entry", [3, {"monitor": "val/mrr"}])
def test_an_entry_without_a_class(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.x = .*must be a section with a _target_, or null"):
        build_callbacks({"x": entry})


def test_a_class_of_another_kind(tmp_path: Path) -> None:
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"callbacks\.x\._target_ = .*CSVLogger: gives a CSVLogger, no Callback"):
        build_callbacks({"x": logger})
    with pytest.raises(ConfigError, match=r"logger\.x\._target_ = .*EarlyStopping: gives a EarlyStopping, no Logger"):
        build_loggers({"x": STOPPING}, None)


def test_a_value_is_text_and_is_not_resolved(monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET", "not-to-be-read")
    (stopping,) = build_callbacks({"x": {**STOPPING, "monitor": "${oc.env:SECRET}"}})
    assert isinstance(stopping, EarlyStopping)
    assert stopping.monitor == "${oc.env:SECRET}"


def test_only_loggers_that_append_get_the_step_to_purge_from(tmp_path: Path) -> None:
    other = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    own = {"_target_": "energy_flow.training.csv_logger.ResumableCSVLogger", "save_dir": str(tmp_path)}
    loggers = build_loggers({"own": {**own, "name": "csv", "version": ""}, "other": other}, 5)
    assert [getattr(logger, "_purge_step", None) for logger in loggers] == [5, None]
    assert isinstance(loggers[1], CSVLogger)
