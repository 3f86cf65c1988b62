"""A config builds only callbacks and loggers of known packages."""

from pathlib import Path
from typing import Any

import pytest

from energy_flow.errors import ConfigError
from energy_flow.runs.instantiate import TRUST, build_all

STOPPING = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/mrr"}
LOGGER = "lightning.pytorch.loggers.CSVLogger"
TARGETS: dict[str, Any] = {
    "function": {"_target_": "os.system", "command": "mkdir trap"},
    "eval": {"_target_": "builtins.eval", "_args_": ["__import__('os').mkdir('trap')"]},
    "class": {"_target_": "subprocess.Popen", "args": "mkdir trap"},
    "through a module of the list": {
        "_target_": "lightning.pytorch.callbacks.timer.logging.FileHandler",
        "filename": "trap",
    },
    "a prefix": {"_target_": "lightning.pytorch.callbacks_of_mine.Callback"},
    "a module that runs when imported": {"_target_": "evil.Callback"},
    "function of ours": {"_target_": "energy_flow.comparison.jobs.read_jobs", "folder": "."},
    "nested": {**STOPPING, "mode": {"_target_": "os.system", "command": "mkdir trap"}},
    "nested in a list": {
        "_target_": LOGGER,
        "save_dir": [{"_target_": "builtins.exec", "_args_": ["open('trap', 'w')"]}],
    },
    "nested twice": {**STOPPING, "mode": {"x": {"_target_": "pathlib.Path.mkdir", "_args_": ["trap"]}}},
    "nested arguments": {**STOPPING, "_args_": [{"_target_": "os.mkdir", "path": "trap"}]},
    "partial": {**STOPPING, "_partial_": True},
    "nested partial": {**STOPPING, "mode": {"_partial_": True, "_target_": "os.mkdir", "path": "trap"}},
    "recursive": {**STOPPING, "_recursive_": False},
    "resolver": {**STOPPING, "monitor": "${oc.env:SECRET}"},
    "resolver in a list": {"_target_": LOGGER, "save_dir": ["${oc.decode:${oc.env:SECRET}}"]},
    "number": {"_target_": 3},
}


@pytest.mark.parametrize("case", TARGETS)
def test_configs_build_callbacks_and_loggers_alone(tmp_path: Path, monkeypatch: Any, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SECRET", "not-to-be-read")
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('trap')\nclass Callback: pass\n")
    with pytest.raises(ConfigError, match=r"callbacks\.x") as caught:
        build_all({"x": TARGETS[case]}, "callbacks")
    assert "not-to-be-read" not in str(caught.value)
    assert not (tmp_path / "trap").exists()


def test_what_may_be_built(tmp_path: Path, monkeypatch: Any) -> None:
    every = {"_target_": "datetime.timedelta", "minutes": 5}
    saver = {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "train_time_interval": every}
    monitor = {"_target_": "energy_flow.training.callbacks.memory_monitor.MemoryMonitor"}
    built = build_all({"stopping": STOPPING, "saver": saver, "monitor": monitor, "none": None}, "callbacks")
    assert [type(callback).__name__ for callback in built] == ["EarlyStopping", "ModelCheckpoint", "MemoryMonitor"]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_mine.py").write_text("import lightning.pytorch as pl\nclass Mine(pl.Callback): pass\n")
    entry = {"mine": {"_target_": "of_mine.Mine"}}
    with pytest.raises(ConfigError, match=f"{TRUST}=my_package"):
        build_all(entry, "callbacks")
    monkeypatch.setenv(TRUST, "other,of_mine")
    (mine,) = build_all(entry, "callbacks")
    assert type(mine).__name__ == "Mine"
