"""A section from a file builds classes of known packages alone; the user's own section builds any class."""

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from energy_flow import targets
from energy_flow.errors import ConfigError
from energy_flow.targets import TRUST, build

RELU = {"_target_": "torch.nn.ReLU"}
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
# Each of these would make the folder `trap`, or read the environment.
TRAPS: dict[str, Any] = {
    "function": {"_target_": "os.system", "command": "mkdir trap"},
    "eval": {"_target_": "builtins.eval", "_args_": ["__import__('os').mkdir('trap')"]},
    "class": {"_target_": "subprocess.Popen", "args": "mkdir trap"},
    "through a module of the list": {"_target_": "energy_flow.training.losses.functional.partial", "func": "print"},
    "a class that a module of the list imports": {"_target_": "energy_flow.checkpoints.io.AtomicCheckpointIO"},
    "a logger, which opens a connection": {
        "_target_": "energy_flow.training.csv_logger.ResumableCSVLogger",
        "save_dir": "ftp://localhost:1/x",
    },
    "a callback, which opens a connection": {
        "_target_": "energy_flow.training.callbacks.best_checkpoint.BestCheckpoint",
        "dirpath": "ftp://localhost:1/x",
    },
    "a prefix": {"_target_": "torch.nn_of_mine.Module"},
    "a module that runs when imported": {"_target_": "evil.Part"},
    "a function of the list": {"_target_": "torch.nn.init.ones_", "tensor": 3},
    "a function of ours": {"_target_": "energy_flow.comparison.jobs.read_jobs", "folder": "."},
    "a function of a part's module": {"_target_": "energy_flow.core.maps.image_channels", "embedding_dim": 3},
    "nested": {**RELU, "inplace": {"_target_": "evil.Part"}},
    "nested in a list": {"_target_": "torch.nn.ModuleList", "modules": [RELU, {"_target_": "evil.Part"}]},
    "nested in a section": {**RELU, "inplace": {"x": {"y": [{"_target_": "evil.Part"}]}}},
    "nested arguments": {**RELU, "_args_": [{"_target_": "os.mkdir", "path": "trap"}]},
    "partial": {**RELU, "_partial_": True},
    "recursive": {**RELU, "_recursive_": False},
    "number": {"_target_": 3},
    "nothing": {"_target_": ""},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the module `evil`, which leaves a mark when it is imported, and the module `mine`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('trap')\nclass Part: pass\n")
    monkeypatch.delenv(TRUST, raising=False)
    return tmp_path


@pytest.mark.parametrize("case", TRAPS)
def test_a_file_builds_nothing_else(folder: Path, case: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.x") as caught:
        build(TRAPS[case], "model.x")
    assert not (folder / "trap").exists()
    assert "\n" not in str(caught.value)


def test_the_trap_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with targets.from_user():
        build({"_target_": "evil.Part"}, "model.x")
    monkeypatch.delitem(sys.modules, "evil")
    assert (folder / "trap").exists()


def test_the_refusal_names_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "trusted_later.py").write_text("class Part: pass\n")
    with pytest.raises(ConfigError, match=f"none of its code was run.*{TRUST}=my_package"):
        build({"_target_": "trusted_later.Part"}, "model.x")
    monkeypatch.setenv(TRUST, "other,trusted_later")
    assert type(build({"_target_": "trusted_later.Part"}, "model.x")).__name__ == "Part"


def test_a_file_builds_classes_of_known_packages() -> None:
    built = build({"_target_": "torch.nn.ModuleList", "modules": [RELU, LINEAR]}, "model.x")
    assert [type(module) for module in built] == [nn.ReLU, nn.Linear]
    assert build({"_target_": "datetime.timedelta", "minutes": 5}, "x") == datetime.timedelta(minutes=5)


def test_the_user_builds_any_class_also_as_an_argument(folder: Path) -> None:
    (folder / "of_user.py").write_text(
        "class Part:\n    def __init__(self, inner, size): self.inner, self.size = inner, size\n"
        "def make(size): return Part(None, size)\n"
    )
    section = {"_target_": "of_user.Part", "inner": [{"_target_": "of_user.make", "size": 1}]}
    with targets.from_user():
        part = build(section, "model.x", {"size": 3, "unused": 4})
        with targets.from_file(), pytest.raises(ConfigError, match="comes from a file"):
            build(section, "model.x", {"size": 3})
    assert (part.size, part.inner[0].size) == (3, 1)
    with pytest.raises(ConfigError, match="comes from a file"):
        build(section, "model.x", {"size": 3})


def test_the_users_trust_does_not_reach_files_that_a_class_loads(folder: Path) -> None:
    (folder / "loads.py").write_text(
        "from energy_flow.targets import build\n"
        "class Part:\n    def __init__(self): build({'_target_': 'evil.Part'}, 'file')\n"
    )
    with targets.from_user(), pytest.raises(ConfigError, match=r"file\._target_ = evil\.Part: refused"):
        build({"_target_": "loads.Part"}, "model.x")
    assert not (folder / "trap").exists()


def test_the_trust_ends_with_an_error() -> None:
    with pytest.raises(KeyError), targets.from_user():
        raise KeyError
    with pytest.raises(ConfigError, match="comes from a file"):
        build({"_target_": "os.getcwd"}, "x")


@pytest.fixture
def _own() -> Iterator[None]:
    with targets.from_user():
        yield


@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, r"x = 3: must be a section with a _target_"),
        ({"a": 1}, r"must be a section with a _target_"),
        ({**LINEAR, "bais": True}, r"x\.bais: unknown key; did you mean bias\?"),
        ({"_target_": "torch.nn.Linear", "in_features": 2}, r"x\.out_features: torch\.nn\.Linear needs this argument"),
        ({**LINEAR, "bias": "yes"}, r"x\.bias = 'yes': should be a valid boolean"),
        ({"_target_": "nowhere.Part"}, r"x\._target_ = nowhere\.Part: there is no such class: No module named"),
        ({"_target_": "torch.nn.Linaer"}, r"there is no such class"),
        ({"_target_": "Linear"}, r"there is no such class"),
        ({"_target_": "torch.nn.modules"}, r"is not a class"),
        ({"_target_": "datetime.timedelta", "minuets": 5}, r"^x: .*minuets"),
        ({**LINEAR, "_partial_": True}, r"x\._partial_: unknown key; of Hydra's own keys only _target_"),
    ],
)
def test_a_wrong_section(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(entry, "x")


@pytest.mark.usefixtures("_own")
def test_annotations_that_only_a_type_checker_resolves(folder: Path) -> None:
    (folder / "like_wandb.py").write_text(
        "from typing import TYPE_CHECKING, Any, Optional, Union\n"
        "if TYPE_CHECKING:\n    from nowhere import Run\n"
        "class Logger:\n"
        "    def __init__(self, name: Optional[str] = None, experiment: Union['Run', 'Disabled', None] = None,\n"
        "                 offline: bool = False, betas: tuple[float, float] = (0.9, 0.99), **kwargs: Any) -> None:\n"
        "        self.name, self.betas, self.more = name, betas, kwargs\n"
    )
    entry = {"_target_": "like_wandb.Logger", "name": "run", "betas": [0.9, 0.95], "experiment": None, "tags": ["a"]}
    logger = build(entry, "logger.x")
    assert (logger.name, logger.betas, logger.more) == ("run", [0.9, 0.95], {"tags": ["a"]})
    with pytest.raises(ConfigError, match=r"logger\.x\.offline = 3: should be a valid boolean"):
        build({**entry, "offline": 3}, "logger.x")
    with pytest.raises(ConfigError, match=r"logger\.x\.betas = \[0\.9\]: should be a valid tuple"):
        build({**entry, "betas": [0.9]}, "logger.x")


@pytest.mark.usefixtures("_own")
def test_errors_of_a_constructor(folder: Path) -> None:
    """Their type is named: the message of a KeyError is a name alone. Too little memory is no fault of a config."""
    (folder / "failing.py").write_text(
        "import torch\n"
        "def missing(): return {}['width']\n"
        "def memory(): raise MemoryError('host')\n"
        "def device_memory(): raise torch.OutOfMemoryError('device')\n"
    )
    with pytest.raises(ConfigError, match=r"^x: KeyError: 'width'$"):
        build({"_target_": "failing.missing"}, "x")
    with pytest.raises(MemoryError, match="host"):
        build({"_target_": "failing.memory"}, "x")
    with pytest.raises(torch.OutOfMemoryError, match="device"):
        build({"_target_": "failing.device_memory"}, "x")
