"""Tiny runs of every program. The documents may name their files and tags."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.cli.helpers import TINY, Outcome, read_metrics, run_alone, write_pairs
from tests.training.runs import events

_NOT_TINY = (
    "callbacks.flow_monitor",
    "baselines.enabled",
    "trainer.max_epochs",
)  # these keep their defaults or are set below
_QUIET = "trainer.enable_progress_bar=false"
_LOGGED = (
    "lattice.spawn.enabled=true",
    "trainer.log_every_n_steps=1",
    "callbacks.memory_cleanup.interval=1",
    "callbacks.flow_monitor.every_n_epochs=1",
    "callbacks.flow_monitor.samples=1",
)
_SMALL = ("data.width=4", "data.height=4", "data.waves=4", "data.train=64", "data.val=16", "data.test=16")
_ONE = ("trainer.max_epochs=1",)
_BASELINES = ("baselines.enabled=true", "baselines.training.epochs=1")


@dataclass(frozen=True)
class Runs:
    """Files, tags and metrics of the runs."""

    folder: Path  # holds logs/
    tags: frozenset[str]  # of TensorBoard
    metrics: frozenset[str]  # names in metrics.json

    @property
    def paths(self) -> list[str]:
        """Every file and folder, relative to the folder of all."""
        return [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]


def make_runs(folder: Path) -> Runs:
    """Run a training, a sweep, transport, and the programs for trained models. This takes half a minute."""
    write_pairs(folder)
    data = ["data=files", *(f"data.{split}={split}.safetensors" for split in ("train", "val", "test"))]
    tiny = [f"{key}={value}" for key, value in TINY.items() if key not in _NOT_TINY]
    transport = [*(word for word in tiny if not word.startswith("data=")), *_SMALL]
    own = [*tiny, *data[1:], *_LOGGED]
    sweep = [*tiny, *data[1:], "baselines.enabled=false", "callbacks.flow_monitor=null", *_ONE, "lattice.depth=4,0"]
    with ThreadPoolExecutor(2) as pool:
        trained, swept, moved, checked = (
            pool.submit(run_alone, program, folder, words)
            for program, words in (
                ("train", [*own, *_BASELINES, "trainer.max_epochs=2"]),
                ("train", ["-m", *sweep]),
                ("train", ["experiment=transport", *transport, *_LOGGED[1:], *_ONE, "baselines.enabled=false"]),
                ("check", data),
            )
        )
        outcomes = {"train": trained.result(), "transport": moved.result(), "check": checked.result()}
        _assert_well(outcomes)
        assert swept.result().code == 1, "the sweep has a job that fails"
        checkpoints = trained.result().folder / "checkpoints"
        best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
        evaluated, compared, predicted = (
            pool.submit(run_alone, program, folder, [*words, *data])
            for program, words in (
                ("evaluate", [f"ckpt_path={best}", *_BASELINES, _QUIET]),
                ("evaluate", [f"ckpt_path=[{best},{last}]", *_BASELINES, _QUIET]),
                ("predict", [f"ckpt_path={best}", "input=test.safetensors", "k=3"]),
            )
        )
        outcomes = {"evaluate": evaluated.result(), "compare": compared.result(), "predict": predicted.result()}
        _assert_well(outcomes)
    return Runs(folder, _tags(folder), _metrics(folder))


def _assert_well(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        assert outcome.code == 0, f"{name}: {outcome.err}"


def _tags(folder: Path) -> frozenset[str]:
    found: set[str] = set()
    for run in folder.glob("logs/train/runs/*/tensorboard"):
        tags = events(run).Tags()
        found.update(*(tags[kind] for kind in ("scalars", "histograms", "images")))
    return frozenset(found)


def _metrics(folder: Path) -> frozenset[str]:
    return frozenset(name for file in folder.rglob("metrics.json") for name in read_metrics(file.parent))
