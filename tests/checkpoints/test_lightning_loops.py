"""Test each assumption about Lightning's private names, and that no other module uses one."""

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import TrainerFn

from energy_flow.checkpoints import lightning_loops as loops
from energy_flow.checkpoints.io import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore")
PACKAGE = Path(loops.__file__).parents[1]


class Watch(Callback):
    """Record the value of a function at the end of every training batch."""

    def __init__(self, function: Callable[[Trainer], Any]) -> None:
        self.function, self.seen = function, []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append(self.function(trainer))


class Steps(Logger):
    """Record the steps of all metrics."""

    name, version = "steps", "0"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            self.steps.append(step)


class Logged(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("loss", output["loss"])
        return output


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(
        **{
            **quiet,
            "enable_model_summary": False,
            "accelerator": "cpu",
            "default_root_dir": folder,
            "max_epochs": 1,
            "limit_train_batches": 5,
            "limit_val_batches": 2,
            **options,
        }
    )


def watched(folder: Path, function: Callable[[Trainer], Any], **options: Any) -> list[Any]:
    watch = Watch(function)
    trainer(folder, callbacks=[watch], **options).fit(BoringModel())
    return watch.seen


def test_a_module_knows_whether_it_is_fitted() -> None:
    seen: list[bool] = []

    class Asked(BoringModel):
        def on_validation_start(self) -> None:
            seen.append(loops.is_fitting(self))

        def on_test_start(self) -> None:
            seen.append(loops.is_fitting(self))

    module = Asked()
    assert not loops.is_fitting(module), "it has no trainer"
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(module)
    trainer.validate(module)
    trainer.test(module)
    assert set(seen[:-2]) == {True}
    assert seen[-2:] == [False, False]


def test_cluster_environment(tmp_path: Path) -> None:
    assert isinstance(loops.cluster_environment(trainer(tmp_path)), LightningEnvironment)


def test_a_dumped_checkpoint_is_the_one_that_is_saved(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    it.fit(BoringModel())
    it.save_checkpoint(tmp_path / "it.ckpt")
    dumped, saved = loops.dump_checkpoint(it), torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert dumped.keys() == saved.keys()
    assert dumped["loops"] == saved["loops"]
    assert dumped["global_step"] == saved["global_step"] == 5


def test_the_logging_step(tmp_path: Path) -> None:
    logger = Steps()
    seen = watched(tmp_path, loops.get_logging_step, logger=logger, log_every_n_steps=1)
    assert seen == [0, 1, 2, 3, 4], "the step of the batch, which `global_step` has left behind"

    class Jump(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2:
                loops.set_logging_step(trainer, 70)

    logger = Steps()
    trainer(tmp_path, logger=logger, log_every_n_steps=1, callbacks=[Jump()]).fit(Logged())
    assert logger.steps == [0, 1, 70, 71, 72]


def test_an_optimiser_step(tmp_path: Path) -> None:
    seen = watched(tmp_path, loops.has_stepped, accumulate_grad_batches=2)
    assert seen == [False, True, False, True, True], "an epoch ends with a step"


def test_the_last_batch(tmp_path: Path) -> None:
    assert watched(tmp_path, loops.is_last_batch) == [False] * 4 + [True]
    assert watched(tmp_path, loops.is_last_batch, max_steps=2) == [False, True]


def test_a_validation_that_follows(tmp_path: Path) -> None:
    assert watched(tmp_path, loops.validates_next, val_check_interval=2) == [False, True, False, True, False]


def test_the_path_saved_last(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, "it")
    assert loops.last_saved_path(callback) == ""
    trainer(tmp_path, callbacks=[callback], enable_checkpointing=True).fit(BoringModel())
    assert loops.last_saved_path(callback) == str(tmp_path / "it.ckpt")


@pytest.mark.parametrize(
    ("strategy", "devices", "spawns", "script"),
    [("auto", 1, False, False), ("ddp_spawn", 2, True, False), ("ddp", 2, False, True)],
)
def test_launchers(tmp_path: Path, strategy: str, devices: int, spawns: bool, script: bool) -> None:
    it = trainer(tmp_path, strategy=strategy, devices=devices)
    assert callable(loops.kill_spawned_processes(it)) == spawns
    assert loops.launches_script(it) == script


def test_the_file_that_carries_weights_back(tmp_path: Path) -> None:
    it = trainer(tmp_path, strategy="ddp_spawn", devices=2)
    it.state.fn = TrainerFn.FITTING
    it.strategy.connect(BoringModel())
    output = it.strategy.launcher._collect_rank_zero_results(it, None)
    assert loops.carries_weights_back(output.weights_path)
    assert AtomicCheckpointIO().load_checkpoint(output.weights_path).keys() == BoringModel().state_dict().keys()


def test_the_counts_of_a_checkpoint(tmp_path: Path) -> None:
    it = trainer(tmp_path)
    it.fit(BoringModel())
    state = it.fit_loop.state_dict()
    for key, count in ((loops.TRAINING_BATCHES, 5), (loops.VALIDATION_BATCHES, 2)):
        for counts in (state[key]["total"], state[key]["current"]):
            assert {name: counts[name] for name in ("ready", "started", "processed", "completed")} == dict.fromkeys(
                ("ready", "started", "processed", "completed"), count
            )
        assert state[key]["is_last_batch"] is True


class Overriding(ModelCheckpoint):
    """Override the private methods that BestCheckpoint overrides, and record when Lightning calls them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[str] = []

    def _update_best_and_save(self, current: Any, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._update_best_and_save(current, trainer, monitor_candidates)
        self.calls.append("update")

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self.calls.append(f"remove {Path(filepath).name}")


class Falling(BoringModel):
    """A validation metric that improves in every epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("metric", 10.0 - self.trainer.current_epoch)


def test_the_overridden_methods_of_best_checkpoint(tmp_path: Path) -> None:
    callback = Overriding(tmp_path, "{epoch}", monitor="metric")
    trainer(tmp_path, callbacks=[callback], enable_checkpointing=True, max_epochs=2).fit(Falling())
    assert callback.calls == ["update", "remove epoch=0.ckpt", "update"], "the old one goes inside of an update"
    parameters = inspect.signature(ModelCheckpoint._update_best_and_save).parameters
    assert list(parameters) == ["self", "current", "trainer", "monitor_candidates"]


def test_the_private_parts_of_the_csv_logger(tmp_path: Path) -> None:
    assert CSVLogger(str(tmp_path))._experiment is None, "until it is first asked for"
    called = []

    class Writer(ExperimentWriter):
        def _check_log_dir_exists(self) -> None:
            called.append(self.metrics_file_path)

    Writer(str(tmp_path))
    assert called == [str(tmp_path / "metrics.csv")], "by the constructor"


# Class -> private names of its Lightning base that it must override or set.
OVERRIDDEN = {
    "BestCheckpoint": {"_update_best_and_save", "_remove_checkpoint"},
    "ResumableCSVLogger": {"_experiment"},
    "_Writer": {"_check_log_dir_exists"},
}
# Private names of torch that Lightning also has.
OTHERS = {"_version", "_dynamo", "_C", "_modules"}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "lightning_loops.py")


LIGHTNING = Path(lightning.__file__).parent
IN_LIGHTNING = {
    name for path in LIGHTNING.rglob("*.py") for name in re.findall(r"\b_[A-Za-z]\w*", path.read_text(encoding="utf-8"))
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the package itself defines or assigns."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return {name for name in found if is_private(name)}


def foreign(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private names of Lightning: imported names, and attributes that the package doesn't define itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in IN_LIGHTNING - own - OTHERS:
            yield node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if is_private(part))


def lightning_names(cls: type) -> set[str]:
    """Private names that the Lightning bases of a class define or set."""
    found = set()
    for base in cls.__mro__:
        if base.__module__.startswith("lightning."):
            found |= set(vars(base)) | own_names([ast.parse(inspect.getsource(inspect.getmodule(base)))])
    return found


TREES = {path: ast.parse(path.read_text()) for path in SOURCES}
OWN = own_names(list(TREES.values()))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_private_names(path: Path) -> None:
    assert list(foreign(TREES[path], OWN)) == []


def test_subclasses_override_no_more_than_they_must() -> None:
    found = {}
    for path, tree in TREES.items():
        if "lightning" not in path.read_text():
            continue
        module = importlib.import_module(".".join(["energy_flow", *path.relative_to(PACKAGE).with_suffix("").parts]))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            names = lightning_names(getattr(module, node.name, object))
            used = {
                inner.attr if isinstance(inner, ast.Attribute) else inner.name
                for inner in ast.walk(node)
                if isinstance(inner, ast.Attribute | ast.FunctionDef)
            }
            shared = {name for name in used & names if is_private(name)}
            if shared:
                found[node.name] = shared
    assert found == OVERRIDDEN


@pytest.mark.parametrize(
    "source",
    [
        "x = trainer.fit_loop._data_fetcher",
        "trainer.fit_loop.epoch_loop._batches_that_stepped = 3",
        "from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher",
        "from lightning.pytorch._graveyard import tpu",
    ],
)
def test_private_names_are_found(source: str) -> None:
    tree = ast.parse(source)
    assert len(list(foreign(tree, OWN | own_names([tree])))) == 1
