"""experiment=transport from the command line: training, table of errors, evaluation on another lattice."""

import csv

import pytest
import torch

from tests.cli.helpers import Outcome, Program, run_alone
from tests.training.runs import events, scalars

DATA = (
    "data.width=6",
    "data.height=5",
    "data.waves=3",
    "data.train=96",
    "data.val=20",
    "data.test=20",
)
TINY = (
    "experiment=transport",
    *DATA,
    "data.batch_size=32",
    "lattice.depth=4",
    "model.features=4",
    "model.hidden_size=6",
    "trainer.max_epochs=3",
    "trainer.enable_progress_bar=false",
    "baselines.training.epochs=2",
    "baselines.training.learning_rates=[0.001,0.01]",
    "baselines.training.weight_decays=[0.0]",
    "baselines.large=10",
    "logger=[tensorboard,csv]",
)
BASELINES = ("identity", "mean", "ridge", "mlp", "residual_mlp", "mlp_large")


@pytest.fixture(scope="session")
def transported(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One finished run in a subprocess, without data files."""
    return run_alone("train", tmp_path_factory.mktemp("transported"), TINY, check=True)


def rows_of_table(out: str) -> dict[str, list[str]]:
    """Name of the method -> the cells of its row."""
    lines = [line.strip("│ ").split("│") for line in out.splitlines() if line.startswith("│")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_is_of_errors(transported: Outcome) -> None:
    assert transported.err == ""
    assert "Test: errors" in transported.out
    table, metrics = rows_of_table(transported.out), transported.metrics()
    assert list(table) == ["flow lattice", *BASELINES]
    for name, (mse, cosine) in table.items():
        key = "test" if name == "flow lattice" else f"baseline/{name}"
        assert float(mse) == pytest.approx(metrics[f"{key}/mse"], rel=5e-3)
        assert float(cosine) == pytest.approx(metrics[f"{key}/cosine"], abs=5e-4)
    assert "R@1" not in transported.out
    assert "nearest targets" not in transported.out
    for part in ("96 train, 20 val, 20 test pairs of dimension 30", "weight decay 0 (val MSE"):
        assert part in transported.out


def test_the_lowest_error_picks_the_checkpoint(transported: Outcome) -> None:
    curve = [value for _, value in scalars(transported.folder / "tensorboard")["val/mse"]]
    assert len(curve) == 3
    assert transported.metrics()["val/mse"] == pytest.approx(min(curve))
    checkpoint = torch.load(transported.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["epoch"] == curve.index(min(curve))


def test_the_fields_are_drawn(transported: Outcome) -> None:
    images = events(transported.folder / "tensorboard").Tags()["images"]
    assert {"field/0", "field/1", "trajectories/0"} <= set(images)


def checkpoint_of(outcome: Outcome) -> str:
    return f"ckpt_path={outcome.folder}/checkpoints/best.ckpt"


def test_evaluation_finds_the_same(program: Program, transported: Outcome) -> None:
    outcome = program.evaluate(checkpoint_of(transported), "data=transport", *DATA)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.metrics()["test/mse"] == pytest.approx(transported.metrics()["test/mse"])
    assert "not the data" not in outcome.out
    assert list(rows_of_table(outcome.out)) == ["flow lattice"]


FINER = ("data=transport", "data.width=11", "data.height=9", *DATA[2:])


def test_evaluation_on_a_finer_lattice(program: Program, transported: Outcome) -> None:
    size = ("lattice.width=11", "lattice.height=9")
    outcome = program.evaluate(checkpoint_of(transported), *FINER, *size)
    assert (outcome.code, outcome.err) == (0, "")
    metrics = outcome.metrics()
    assert metrics["test/flows/created"] == 99
    assert metrics["params"] == transported.metrics()["params"]
    assert 0.2 < metrics["test/mse"] / transported.metrics()["test/mse"] < 5


def test_another_size_of_data_names_the_remedy(program: Program, transported: Outcome) -> None:
    message = program.refused(checkpoint_of(transported), *FINER, program="evaluate")
    assert "takes embeddings of dimension 30, the data have 99" in message
    assert "lattice.width=W lattice.height=H" in message
    message = program.refused(checkpoint_of(transported), *FINER, "lattice.width=11", program="evaluate")
    assert "dimension 99 must be surfaces" in message
    assert "11 x 5 x 1 = 55 numbers" in message


def test_learned_maps_stay_on_their_lattice(program: Program, trained: Outcome) -> None:
    message = program.refused(checkpoint_of(trained), "lattice.width=8", program="evaluate")
    assert "lattice.width = 8" in message
    assert "leave lattice.width and lattice.height null" in message


REFUSED = [
    ("data.normalize=true", "data.normalize = true", "data.normalize=false"),
    ("data.waves=7", "data.waves = 7", "raise data.width"),
    ("data.field=spiral", "data.field = 'spiral'", "'rotation_swirl' or 'shear'"),
    ("lattice.width=4", "model.maps = identity", "Set lattice.width and lattice.height"),
    ("model.map_hidden=3", "model.map_hidden = 3", "model.map_hidden=null"),
    ("lattice.max_steps=0", "lattice.max_steps = 0", "Set lattice.max_steps=1"),
    ("optimized_metric=val/mes", "optimized_metric = 'val/mes'", "val/mse"),
    ("baselines.large=0", "baselines.large = 0", "greater than or equal to 1"),
    ("baselines.training.learning_rates=[]", "baselines.training.learning_rates = []", "at least 1 item"),
    ("+baselines.training.layers=2", "baselines.training.layers", "known: epochs"),
]


@pytest.mark.parametrize(("override", "names", "remedy"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(program: Program, override: str, names: str, remedy: str) -> None:
    own = ("lattice.width=6", "lattice.height=5", "lattice.max_steps=2", "data=transport")
    kept = [word for word in (*TINY, *own) if word.split("=")[0] != override.split("=")[0]]
    message = program.refused(*kept, override)
    assert names in message
    assert remedy in message


def test_the_metric_sets_the_direction_of_callbacks(program: Program) -> None:
    config = program.train("optimized_metric=val/mse", "--cfg", "job", "--resolve")
    assert config.out.count("mode: min") == 2
    config = program.train("--cfg", "job", "--resolve")
    assert config.out.count("mode: max") == 2


def test_errors_of_your_own_files(program: Program) -> None:
    outcome = program.train("optimized_metric=val/mse", "loss=mse", "data.normalize=false", "logger=csv")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(rows_of_table(outcome.out)) == ["flow lattice"]
    assert outcome.metrics()["val/mse"] > 0


@pytest.mark.slow
def test_a_sweep_shows_errors(program: Program) -> None:
    outcome = program.train("seed=1,2", "optimized_metric=val/mse", "loss=mse", multirun=True)
    assert (outcome.code, outcome.err) == (0, "")
    (table,) = (program.folder / "logs").rglob("summary.md")
    assert table.read_text().startswith("| job | overrides | val/mse | test/mse | test/cosine | fit_seconds |")
    (written,) = (program.folder / "logs").rglob("summary.csv")
    assert len(list(csv.DictReader(written.open()))) == 2
