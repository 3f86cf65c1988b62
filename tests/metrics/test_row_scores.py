"""Row scores of tasks and baselines, and their file."""

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

SCORES = RowScores(
    "rank", "abc", {"ridge": torch.tensor([1.0, 4.5]).double(), "model": torch.tensor([2.0, 1]).double()}
)


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metrics_are_computed_from_row_scores() -> None:
    prediction, target = numbers(20, 5, seed=1), numbers(20, 5, seed=2)
    rank, error = RETRIEVAL.row_scores(prediction, target), REGRESSION.row_scores(prediction, target)
    assert torch.equal(rank, ranks(prediction, target))
    assert RETRIEVAL.measure(prediction, target)["mrr"] == pytest.approx((1 / rank).mean().item())
    assert RETRIEVAL.metrics(prediction, target, torch.full((20,), 2.0).double())["mrr"] == 0.5, "not ranked twice"
    assert error.dtype == torch.float64
    assert error[3].item() == pytest.approx((prediction[3] - target[3]).square().mean().item(), rel=1e-6)
    assert REGRESSION.measure(prediction, target)["mse"] == pytest.approx(error.mean().item())
    assert [task.row_measure for task in TASKS] == ["rank", "mse"]


def test_baselines_have_row_scores() -> None:
    train, val, test = three_splits(rotation(6))
    found = run_baselines(train, val, test, **SETTINGS)
    assert list(found.row_scores) == list(found.metrics)
    assert torch.equal(found.row_scores["identity"], ranks(*test))
    for name, rank in found.row_scores.items():
        assert (1 / rank).mean().item() == pytest.approx(found.metrics[name]["mrr"]), name
    found = run_baselines(train, val, test, **ERRORS)
    assert torch.equal(found.row_scores["identity"], squared_errors(*test))


def test_written_scores_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "test_rows.safetensors"
    write_row_scores(path, SCORES)
    found = read_row_scores(path)
    assert (found.measure, found.fingerprint, list(found.values)) == ("rank", "abc", ["model", "ridge"])
    assert all(torch.equal(found.values[name], SCORES.values[name]) for name in found.values)
    write_row_scores(path, found.with_methods({"mean": torch.ones(2).double()}))
    assert set(read_row_scores(path).values) == {"model", "ridge", "mean"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    with pytest.raises(DataError, match=r"rows.safetensors: no such file. A run writes it if"):
        read_row_scores(path)
    save_file({"model": torch.ones(3)}, path)
    with pytest.raises(DataError, match="not a file of row scores: its metadata have no 'measure'"):
        read_row_scores(path)
    write_row_scores(path, RowScores("mse", "abc", {"ridge": torch.ones(3).double()}))
    with pytest.raises(DataError, match="it has no 'model'"):
        read_row_scores(path)
    write_row_scores(path, SCORES)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], whole.replace(b"abc", b"abd"), b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged.*Test the model again"):
            read_row_scores(path)


@pytest.mark.parametrize(
    "bad", [torch.ones(2), torch.ones(3).double(), torch.ones(2, 1).double(), torch.ones(0).double()], ids=str
)
def test_scores_of_another_shape_are_not_written(bad: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row scores must be float64 \[N\] with the same N > 0 .*mean torch.float"):
        write_row_scores(tmp_path / "rows.safetensors", SCORES.with_methods({"mean": bad}))
    assert list(tmp_path.iterdir()) == []


def run_test(path: Path, folder: Path, processes: int, **options: object) -> Path:
    """Test on the file `path` in batches of 6. Returns the file of row scores."""
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
    """41 rows: with an odd number, two processes measure one row twice."""
    rows, path = make_rows(41), tmp_path / "pairs.safetensors"
    save_file({name: torch.stack([row[name] for row in rows]) for name in ("source", "target")}, path)
    return path


def test_the_rows_of_a_test_in_order(pairs: Path, tmp_path: Path) -> None:
    found = read_row_scores(run_test(pairs, tmp_path, 1))
    data = load_file(pairs)
    with torch.no_grad():
        prediction = make_module().eval()(data["source"]).embedding
    # The run has other batches and so other rounding. No candidate may be close to the true target.
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
