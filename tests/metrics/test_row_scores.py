"""The values of every test row: where they come from, the file that keeps them."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from energy_flow.comparison.baselines import run_baselines
from energy_flow.config import compose
from energy_flow.data import EnergyDataModule
from energy_flow.errors import DataError
from energy_flow.metrics.retrieval import ranks
from energy_flow.metrics.row_scores import RowScores, read_row_scores, write_row_scores
from energy_flow.metrics.task import REGRESSION, RETRIEVAL, TASKS, squared_errors
from energy_flow.training.callbacks.keep_row_scores import KeepRowScores
from tests.comparison.test_baselines import ERRORS, SETTINGS, rotation, three_splits
from tests.helpers import SMALLEST_MARGIN
from tests.training.test_module import TINY, make_module, make_rows

ROWS = RowScores("rank", "abc", {"ridge": torch.tensor([1.0, 4.5]).double(), "model": torch.tensor([2.0, 1]).double()})


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metrics_are_those_of_the_rows() -> None:
    prediction, target = numbers(20, 5, seed=1), numbers(20, 5, seed=2)
    rank, error = RETRIEVAL.rows(prediction, target), REGRESSION.rows(prediction, target)
    assert torch.equal(rank, ranks(prediction, target))
    assert RETRIEVAL.measure(prediction, target)["mrr"] == pytest.approx((1 / rank).mean().item())
    assert RETRIEVAL.metrics(prediction, target, torch.full((20,), 2.0).double())["mrr"] == 0.5, "not ranked twice"
    assert error.dtype == torch.float64
    assert error[3].item() == pytest.approx((prediction[3] - target[3]).square().mean().item(), rel=1e-6)
    assert REGRESSION.measure(prediction, target)["mse"] == pytest.approx(error.mean().item())
    assert [task.row_measure for task in TASKS] == ["rank", "mse"]


def test_baselines_have_rows() -> None:
    train, val, test = three_splits(rotation(6))
    found = run_baselines(train, val, test, **SETTINGS)
    assert list(found.rows) == list(found.metrics)
    assert torch.equal(found.rows["identity"], ranks(*test))
    for name, rank in found.rows.items():
        assert (1 / rank).mean().item() == pytest.approx(found.metrics[name]["mrr"]), name
    found = run_baselines(train, val, test, **ERRORS)
    assert torch.equal(found.rows["identity"], squared_errors(*test))


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "test_rows.safetensors"
    write_row_scores(path, ROWS)
    found = read_row_scores(path)
    assert (found.measure, found.fingerprint, list(found.values)) == ("rank", "abc", ["model", "ridge"])
    assert all(torch.equal(found.values[name], ROWS.values[name]) for name in found.values)
    write_row_scores(path, found.beside({"mean": torch.ones(2).double()}))
    assert set(read_row_scores(path).values) == {"model", "ridge", "mean"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    with pytest.raises(DataError, match=r"rows.safetensors: no such file; a run writes it when"):
        read_row_scores(path)
    save_file({"model": torch.ones(3)}, path)
    with pytest.raises(DataError, match="holds no test rows of a run: no 'measure' in its metadata"):
        read_row_scores(path)
    write_row_scores(path, RowScores("mse", "abc", {"ridge": torch.ones(3).double()}))
    with pytest.raises(DataError, match="no 'model' in it"):
        read_row_scores(path)
    write_row_scores(path, ROWS)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole.replace(b"abc", b"abd"), b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.*Test the model anew"):
            read_row_scores(path)


@pytest.mark.parametrize(
    "bad", [torch.ones(2), torch.ones(3).double(), torch.ones(2, 1).double(), torch.ones(0).double()], ids=str
)
def test_rows_of_another_shape_are_not_written(bad: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows must be float64 \[N\] with the same N > 0 for all: .*mean torch.float"):
        write_row_scores(tmp_path / "rows.safetensors", ROWS.beside({"mean": bad}))
    assert list(tmp_path.iterdir()) == []


def run_test(path: Path, folder: Path, processes: int, **options: object) -> Path:
    """The file of a test on `path`; the rows come in batches of 6."""
    config = compose(*TINY, "data=files", f"data.test={path}", "data.eval_batch_size=6")
    kept = folder / f"{processes}.safetensors"
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_spawn" if processes > 1 else "auto",
        callbacks=[KeepRowScores(kept, "rank")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.test(make_module(), datamodule=EnergyDataModule.from_config(config), verbose=False)
    return kept


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """41 rows: with two processes one row is measured twice."""
    rows, path = make_rows(41), tmp_path / "pairs.safetensors"
    save_file({name: torch.stack([row[name] for row in rows]) for name in ("source", "target")}, path)
    return path


def test_the_rows_of_a_test_in_order(pairs: Path, tmp_path: Path) -> None:
    found = read_row_scores(run_test(pairs, tmp_path, 1))
    data = load_file(pairs)
    with torch.no_grad():
        prediction = make_module().eval()(data["source"]).embedding
    # The run has other batches, and so other rounding: no candidate may come near the own target.
    cosines = (
        functional.normalize(prediction.double(), dim=-1) @ functional.normalize(data["target"].double(), dim=-1).T
    )
    gaps = (cosines - cosines.diagonal()[:, None]).abs().fill_diagonal_(1)
    assert gaps.min() > SMALLEST_MARGIN
    expected = ranks(prediction, data["target"])
    assert torch.equal(found.values["model"], expected)


def test_a_limited_test_leaves_no_file(pairs: Path, tmp_path: Path) -> None:
    run_test(pairs, tmp_path, 1)
    assert not run_test(pairs, tmp_path, 1, limit_test_batches=2).exists()


@pytest.mark.slow
def test_two_processes_keep_the_rows_of_one(pairs: Path, tmp_path: Path) -> None:
    one, two = (read_row_scores(run_test(pairs, tmp_path, processes)) for processes in (1, 2))
    assert torch.equal(one.values["model"], two.values["model"])
    assert one.fingerprint == two.fingerprint
