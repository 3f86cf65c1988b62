"""Evaluation from the command line: several models in one table, both galleries, intervals, errors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from energy_flow.metrics.retrieval import ranks
from energy_flow.metrics.row_scores import read_row_scores
from energy_flow.pretrained import EnergyFlowModel
from tests.cli.helpers import DIM, SIZES, Outcome, Program, write_pairs
from tests.cli.test_transport import rows_of_table

FITTED = ("baselines.enabled=true", "baselines.training.epochs=1")
METRICS = ("mrr", "recall@10", "median_rank", "cosine", "contrastive", "flows/created")


@pytest.fixture
def best(trained: Outcome) -> Path:
    return trained.folder / "checkpoints" / "best.ckpt"


@pytest.fixture
def other(best: Path, tmp_path: Path) -> Path:
    """A file of `save_pretrained`, with the same architecture, other weights and no loss."""
    model = EnergyFlowModel.from_checkpoint(best)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_several_models_give_the_results_of_single_ones(program: Program, best: Path, other: Path) -> None:
    both = program.evaluate(f"ckpt_path=[{best},{other}]", *FITTED)
    assert (both.code, both.err) == (0, "")
    found = both.metrics()
    alone = [program.evaluate(f"ckpt_path={path}").metrics() for path in (best, other)]
    for key, single in zip(("best", "other"), alone, strict=True):
        assert {f"{key}/{m}": found[f"model/{key}/{m}"] for m in METRICS} == {
            f"{key}/{m}": single[f"test/{m}"] for m in METRICS
        }
        assert found[f"model_all/{key}/mrr"] == single["test_all/mrr"]
    for metric in METRICS:
        assert found[f"test/{metric}"] == pytest.approx(sum(single[f"test/{metric}"] for single in alone) / 2)
    assert alone[0]["test/mrr"] != alone[1]["test/mrr"]
    first = program.evaluate(f"ckpt_path={best}", *FITTED).metrics()
    assert found["baseline/mlp/mrr"] == first["baseline/mlp/mrr"], "fitted with the first model's size and loss"
    assert found["baseline_all/ridge/mrr"] == first["baseline_all/ridge/mrr"]
    table = rows_of_table(both.out.split("How sure")[0].split("Test: among all 128 targets (train, val, test)")[0])
    assert list(table)[:3] == ["best", "other", "mean of 2"]
    assert table["other"][4] == f"{alone[1]['test/mrr']:.3f}"
    assert "nearest targets" not in both.out


def test_row_scores_of_each_model_are_kept(program: Program, best: Path, other: Path) -> None:
    outcome = program.evaluate(f"ckpt_path=[{best},{other}]", *FITTED)
    found = outcome.metrics()
    for key in ("best", "other"):
        for suffix in ("", "_all"):
            rows = read_row_scores(outcome.folder / f"test{suffix}_rows_{key}.safetensors").values
            assert (1 / rows["model"]).mean().item() == pytest.approx(found[f"model{suffix}/{key}/mrr"])
            assert (1 / rows["ridge"]).mean().item() == pytest.approx(found[f"baseline{suffix}/ridge/mrr"])
            assert found[f"model{suffix}/{key}/mrr_low"] < found[f"model{suffix}/{key}/mrr"]
    difference = found["model/other/mrr"] - found["model/best/mrr"]
    assert found["difference/other/best/mrr"] == pytest.approx(difference, abs=1e-6)


def test_ranks_among_all_targets(program: Program, best: Path) -> None:
    outcome = program.evaluate(f"ckpt_path={best}", *FITTED)
    assert outcome.metrics()["test_all/candidates"] == sum(SIZES.values())
    near = read_row_scores(outcome.folder / "test_rows.safetensors").values
    wide = read_row_scores(outcome.folder / "test_all_rows.safetensors").values
    assert set(near) == set(wide) > {"model", "identity", "mlp"}
    for name, rank in near.items():
        assert (wide[name] >= rank).all(), name
    assert (wide["identity"] > near["identity"]).any()
    splits = {split: load_file(program.folder / f"{split}.safetensors") for split in SIZES}
    targets = torch.cat([splits[split]["target"] for split in ("test", "train", "val")])
    assert torch.equal(wide["identity"], ranks(splits["test"]["source"], targets))


def test_a_test_split_alone(program: Program, best: Path) -> None:
    outcome = program.evaluate(f"ckpt_path={best}", "data.train=null", "data.val=null", "baselines.enabled=true")
    assert outcome.code == 0
    assert "ridge: left out, needs data.train to fit" in outcome.out
    assert "among all 32 targets (test)" in outcome.out
    metrics = outcome.metrics()
    assert metrics["test_all/mrr"] == pytest.approx(metrics["test/mrr"])
    assert metrics["difference/model/identity/mrr_low"] < metrics["difference/model/identity/mrr_high"]


def test_regression_has_intervals_and_no_gallery(program: Program, best: Path, other: Path) -> None:
    outcome = program.evaluate(f"ckpt_path=[{best},{other}]", "optimized_metric=val/mse", *FITTED)
    found = outcome.metrics()
    assert found["test/mse_low"] < found["test/mse"] < found["test/mse_high"]
    assert not [key for key in found if "_all" in key]
    assert found["difference/best/ridge/mse"] == pytest.approx(found["model/best/mse"] - found["baseline/ridge/mse"])
    assert "among" not in outcome.out
    assert not list(outcome.folder.glob("*_all_*"))


def test_a_limited_test_has_no_intervals(program: Program, best: Path) -> None:
    outcome = program.evaluate(f"ckpt_path={best}", "+trainer.limit_test_batches=2", "data.eval_batch_size=5")
    assert outcome.code == 0
    assert "no test_rows.safetensors: the test was limited" in outcome.out
    assert "How sure" not in outcome.out
    assert not [key for key in outcome.metrics() if "_all" in key or key.endswith("_low")]
    assert "trainer.limit_test_batches = 0" in program.refused(
        f"ckpt_path={best}", "+trainer.limit_test_batches=0", program="evaluate"
    )


def test_metrics_are_kept_if_baselines_fail(program: Program, best: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("energy_flow.runs.results.run_baselines", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        program.evaluate(f"ckpt_path={best}", *FITTED)
    [written] = (program.folder / "logs").rglob("metrics.json")
    assert json.loads(written.read_text())["test/mrr"] > 0


def test_each_error_names_its_file(program: Program, best: Path, other: Path) -> None:
    def refused(*paths: Path, **changes: str) -> str:
        given = f"ckpt_path=[{','.join(map(str, paths))}]"
        return program.refused(given, *(f"data.{key}={value}" for key, value in changes.items()), program="evaluate")

    assert f"ckpt_path = {best}: given twice" in refused(best, other, best)
    assert "at least 1 item" in refused()
    missing, damaged = program.folder / "none.safetensors", program.folder / "damaged.safetensors"
    assert f"ckpt_path = {missing}: there is no such file" in refused(best, missing)
    damaged.write_bytes(other.read_bytes()[:-9])
    assert f"ckpt_path = {damaged}: damaged" in refused(best, damaged)
    save_file({"weight": torch.ones(2)}, damaged)
    assert f"ckpt_path = {damaged}: not a model of energy_flow" in refused(best, damaged)
    assert f"ckpt_path = {best}: the model was trained with true" in refused(best, other, normalize="false")
    small = program.folder / "small"
    small.mkdir()
    write_pairs(small, dim=8)
    run = Program(small, program.capture, program.patch).train("trainer.max_steps=1")
    another = run.folder / "checkpoints" / "best.ckpt"
    message = refused(best, another)
    assert f"ckpt_path = {another}: takes embeddings of dimension 8, the data have {DIM}" in message


def test_an_old_checkpoint_without_an_optimiser_key(program: Program, best: Path) -> None:
    checkpoint, old = torch.load(best, weights_only=True), program.folder / "old.ckpt"
    del checkpoint["hyper_parameters"]["optimizer"]["betas"]
    torch.save(checkpoint, old)
    found = program.evaluate(f"ckpt_path=[{best},{old}]").metrics()
    assert found["model/old/mrr"] == found["model/best/mrr"]


def test_models_of_other_sizes_and_losses(program: Program, best: Path) -> None:
    run = program.train("lattice.width=3", "model.hidden_size=5", "loss=cosine", f"hydra.run.dir={program.folder}/wide")
    outcome = program.evaluate(f"ckpt_path=[{best},{run.folder}/checkpoints/best.ckpt]")
    assert (outcome.code, outcome.err) == (0, "")
    found, name = outcome.metrics(), best.parents[1].name
    assert found[f"model/{name}/params"] != found["model/wide/params"] == run.metrics()["params"]
    assert found["model/wide/mrr"] == pytest.approx(run.metrics()["test/mrr"])
    assert f"not the data that {name} was trained with: train, val, test" in outcome.out
    assert "not the data that wide" not in outcome.out
