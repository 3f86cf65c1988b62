"""The files, output and return value of a run."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from energy_flow import train
from energy_flow.errors import ConfigError
from energy_flow.metrics.row_scores import read_row_scores
from energy_flow.runs.monitors import VALIDATED
from energy_flow.training.module import EnergyFlowModule
from tests.cli.helpers import DIM, Outcome, Program
from tests.training.runs import NO_WARNINGS, scalars

METRICS = ("mrr", "recall@1", "recall@10", "recall@100", "median_rank", "cosine")
BASELINES = ("identity", "mean", "ridge", "procrustes", "mlp", "mlp_cosine")


def test_the_run_folder(trained: Outcome) -> None:
    folder = trained.folder
    assert folder.parent.parent == folder.parents[2] / "train"
    for name in (".hydra/config.yaml", ".hydra/overrides.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    assert "pairs of dimension 16" in (folder / "train.log").read_text()
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    (metrics,) = (folder / "csv").rglob("metrics.csv")
    assert "val/mrr" in metrics.read_text()


def test_metrics_are_flat_finite_and_complete(trained: Outcome) -> None:
    metrics = trained.metrics()
    expected = {f"test/{name}" for name in (*METRICS, "loss")}
    expected |= {f"baseline/{baseline}/{name}" for baseline in BASELINES for name in METRICS}
    expected |= {"params", "fit_seconds", "val/mrr", "test/flows/coverage", "test/flows/share_projected"}
    assert expected <= metrics.keys()
    assert all(isinstance(value, float) and math.isfinite(value) for value in metrics.values())


def test_row_scores_agree_with_the_metrics(program: Program, trained: Outcome, trained_folder: Path) -> None:
    found, metrics = read_row_scores(trained.folder / "test_rows.safetensors"), trained.metrics()
    assert next(iter(found.values)) == "model"
    assert set(found.values) == {"model", *(name.split("/")[1] for name in metrics if name.startswith("baseline/"))}
    for name, rank in found.values.items():
        mrr = metrics["test/mrr" if name == "model" else f"baseline/{name}/mrr"]
        assert (1 / rank).mean().item() == pytest.approx(mrr), name
    checkpoint = torch.load(trained.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert found.fingerprint == checkpoint["energy_flow"]["data_fingerprint"]["test"]
    outcome = program.evaluate(
        f"ckpt_path={trained.folder}/checkpoints/best.ckpt", f"data.test={trained_folder}/test.safetensors"
    )
    again = read_row_scores(outcome.folder / "test_rows.safetensors")
    assert torch.equal(again.values["model"], found.values["model"])


def test_a_limited_test_says_that_rows_are_missing(program: Program) -> None:
    outcome = program.train("+trainer.limit_test_batches=2", "data.eval_batch_size=5")
    assert (outcome.code, outcome.err) == (0, "")
    assert "no test_rows.safetensors: the test was limited" in outcome.out


def test_errors_have_row_scores_too(program: Program) -> None:
    outcome = program.train(
        "optimized_metric=val/mse", "loss=mse", "baselines.enabled=true", "baselines.training.epochs=1"
    )
    found, metrics = read_row_scores(outcome.folder / "test_rows.safetensors"), outcome.metrics()
    assert found.measure == "mse"
    assert found.values["model"].mean().item() == pytest.approx(metrics["test/mse"], rel=1e-5)
    assert found.values["ridge"].mean().item() == pytest.approx(metrics["baseline/ridge/mse"])


def test_every_monitored_metric_is_measured(trained: Outcome) -> None:
    curves = scalars(trained.folder / "tensorboard")
    measured = {name for name in curves if name.startswith("val/") and not name.startswith("val/flows/")}
    assert measured == set(VALIDATED)


def test_nothing_on_stderr(trained: Outcome) -> None:
    assert trained.err == ""


def test_the_printed_output(trained: Outcome, trained_folder: Path) -> None:
    for part in ("flow lattice", *BASELINES, "median rank", "R@10", "3,377 parameters", "64 train, 32 val, 32 test"):
        assert part in trained.out, part
    assert f"tensorboard --logdir {trained_folder / 'logs'}" in trained.out
    shown = f"{trained.metrics()['test/mrr']:.3f}"
    (row,) = [line for line in trained.out.splitlines() if "│ flow lattice" in line]
    assert shown in row


def test_tensorboard_has_curves_and_hyperparameters(trained: Outcome) -> None:
    curves = scalars(trained.folder / "tensorboard")
    assert [step for step, _ in curves["val/mrr"]] == [3, 7]
    assert len(curves["train/loss"]) == 2, "one point per epoch of 4 batches"
    for name in ("test/mrr", "val/mrr", "params"):
        assert curves[f"result/{name}"] == [(8, pytest.approx(trained.metrics()[name]))]
    assert "hp_metric" not in curves


def test_the_checkpoint_needs_no_other_file(trained: Outcome) -> None:
    path = trained.folder / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    info = checkpoint["energy_flow"]
    assert info["embedding_dim"] == DIM
    assert info["config"]["lattice"]["width"] == 4
    assert set(info["data_fingerprint"]) == {"train", "val", "test"}
    assert info["versions"]["torch"] == str(torch.__version__)
    assert info["versions"]["lightning"] == lightning.__version__
    module = EnergyFlowModule.load_from_checkpoint(path)
    assert module.processor.dim == DIM
    assert module.fingerprint == info["data_fingerprint"]
    for name, value in module.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name]), name


def test_evaluation_finds_the_same(program: Program, trained: Outcome, trained_folder: Path) -> None:
    best, path = trained.metrics(), trained_folder / "test.safetensors"
    ckpt = f"ckpt_path={trained.folder}/checkpoints/best.ckpt"
    splits = [f"data.{split}={trained_folder / split}.safetensors" for split in ("train", "val", "test")]
    outcome = program.evaluate(ckpt, *splits, "baselines.enabled=true", "baselines.training.epochs=1")
    assert (outcome.code, outcome.err) == (0, "")
    found = outcome.metrics()
    same = {name for name in best if name.startswith(("test/", "baseline/", "params"))}
    assert {name: found[name] for name in same} == pytest.approx({name: best[name] for name in same})
    assert "not the data" not in outcome.out
    other = program.evaluate(ckpt, f"data.test={path}")
    assert "not the data that the checkpoint was trained with: train, val" in other.out


def test_the_best_value_is_returned(program: Program) -> None:
    returned = []

    def recorded(config: dict[str, Any], inner: Any = train.train) -> Any:
        returned.append(inner(config))
        return returned[-1]

    program.patch.setattr(train, "train", recorded)
    outcome = program.train("optimized_metric=val/cosine", "trainer.max_epochs=3")
    checkpoint = torch.load(outcome.folder / "checkpoints" / "best.ckpt", weights_only=True)
    states = [state for name, state in checkpoint["callbacks"].items() if name.startswith("BestCheckpoint")]
    (best,) = [float(state["best_model_score"]) for state in states if state["monitor"] == "val/cosine"]
    assert returned == [pytest.approx(best)]
    assert outcome.metrics()["val/cosine"] == pytest.approx(best)


@pytest.mark.parametrize(
    "overrides",
    [
        ("debug=fdr",),
        ("debug=limit", "baselines.enabled=true"),
        ("debug=profiler",),
        ("trainer.precision=bf16-mixed",),
        ("trainer.precision=64-true",),
        ("logger=csv",),
        ("logger=[]",),
        ("callbacks.early_stopping=null",),
        ("callbacks.early_stopping.monitor=val/median_rank", "callbacks.early_stopping.mode=min"),
        ("callbacks.early_stopping=null", "callbacks.checkpoint=null", "+trainer.limit_val_batches=0"),
        ("trainer.max_epochs=-1", "trainer.max_steps=4"),
        ("loss=combined",),
        ("loss=cosine", "size=debug", "lattice.depth=4", "model.num_layers=1", "data.batch_size=64"),
        ("lattice.spawn.enabled=true", "lattice.spawn.threshold=0.01", "lattice.noise.std=0.1", "lattice.max_steps=3"),
        ("lattice.max_steps=0",),
        ("data.num_workers=1",),
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)
def test_variants(program: Program, overrides: tuple[str, ...]) -> None:
    outcome = program.train(*overrides)
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert ("lattice.max_flows_per_sample = 32. Raise it" in outcome.out) == ("lattice.spawn.enabled=true" in overrides)
    assert all(value is not None for value in outcome.metrics().values())
    assert 0 < outcome.metrics()["test/mrr"] <= 1


def test_overfitting_two_batches_lowers_their_loss(program: Program) -> None:
    outcome = program.train("debug=overfit", "trainer.max_epochs=30", "optimizer.lr=0.01", "lattice.max_steps=2")
    losses = [value for _, value in scalars(outcome.folder / "tensorboard")["train/loss"]]
    assert losses[-1] < 0.2 * losses[0]


def test_the_profile_is_written(program: Program) -> None:
    outcome = program.train("debug=profiler")
    assert "run_training_batch" in (outcome.folder / "fit-profile.txt").read_text()


def test_without_a_test_split(program: Program) -> None:
    outcome = program.train("data.test=null", "baselines.enabled=true")
    assert (outcome.code, outcome.err) == (0, "")
    assert "no test: data.test is null" in outcome.out
    assert not [name for name in outcome.metrics() if name.startswith(("test/", "baseline/"))]
    assert "val/mrr" in outcome.metrics()
    assert "no test: test=false" in program.train("test=false").out


def test_the_folder_is_printed_when_a_run_fails(program: Program) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of memory, say")

    program.patch.setattr(EnergyFlowModule, "training_step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        program.train()
    assert "run folder: " in program.capture.readouterr().out


def test_help_and_config(program: Program) -> None:
    shown = program.train("--help")
    assert shown.code == 0
    for part in (
        "size: debug, experiment, optimized, small",
        "debug: anomaly, fdr",
        "python -m energy_flow.train",
        "ckpt_path=",
    ):
        assert part in shown.out, part
    config = program.train("--cfg", "job", "--resolve")
    assert config.code == 0
    assert "tensorized_storage_enabled: true" in config.out
    assert "monitor: val/mrr" in config.out


@pytest.mark.slow
def test_multirun(program: Program) -> None:
    outcome = program.train("lattice.depth=4,6", "seed=1,2", "paths.log_dir=relative", multirun=True)
    assert (outcome.code, outcome.err) == (0, "")
    (folder,) = (program.folder / "relative" / "train" / "multiruns").iterdir()
    for job in range(4):
        for name in ("checkpoints/best.ckpt", ".hydra/config.yaml", "metrics.json", "train.log"):
            assert (folder / str(job) / name).is_file(), name
    rows = list(csv.DictReader((folder / "summary.csv").open()))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    for job, row in enumerate(rows):
        assert float(row["test/mrr"]) == json.loads((folder / str(job) / "metrics.json").read_text())["test/mrr"]
    assert float(rows[0]["test/mrr"]) != float(rows[1]["test/mrr"])
    table = (folder / "summary.md").read_text()
    assert "| 3 | lattice.depth=6 seed=2 |" in table
    assert "Summary of 4 jobs" in outcome.out
    compared = list(csv.DictReader((folder / "comparison.csv").open()))
    assert [(row["method"], row["seeds"]) for row in compared] == [
        ("lattice.depth=4", "1 2"),
        ("lattice.depth=6", "1 2"),
    ]
    assert float(compared[1]["mrr"]) == pytest.approx((float(rows[2]["test/mrr"]) + float(rows[3]["test/mrr"])) / 2)
    assert "Comparison of 2 models" in outcome.out


@pytest.mark.slow
def test_ablations_with_baselines(program: Program) -> None:
    outcome = program.train(
        "experiment=ablation",
        "ablation=full,frozen_carrier",
        "seed=1,2",
        "baselines.enabled=true",
        "baselines.training.epochs=1",
        multirun=True,
    )
    assert (outcome.code, outcome.err) == (0, "")
    [path] = (program.folder / "logs").rglob("comparison.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["method"] for row in rows[:2]] == ["full", "frozen_carrier"]
    assert {"identity", "ridge", "linear"} <= {row["method"] for row in rows[2:]}
    assert all(row["difference_low"] for row in rows[1:])
    assert outcome.out.count("of them frozen") == 2


@pytest.mark.slow
def test_an_interrupted_sweep_has_its_comparison(program: Program) -> None:
    def stopped(config: dict[str, Any], inner: Any = train.train) -> Any:
        if config["lattice"]["depth"] == 8:
            raise KeyboardInterrupt
        return inner(config)

    program.patch.setattr(train, "train", stopped)
    outcome = program.train("lattice.depth=4,6,8,10", multirun=True)
    assert outcome.code == 130
    assert "Summary of 3 jobs" in outcome.out
    [path] = (program.folder / "logs").rglob("comparison.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["method"] for row in rows if row["mrr"]] == ["lattice.depth=4", "lattice.depth=6"]
    rows = list(csv.DictReader(path.with_name("summary.csv").open()))
    assert [row["error"] for row in rows] == ["", "", "interrupted"]


@pytest.mark.slow
def test_a_bad_job_does_not_end_the_sweep(program: Program) -> None:
    def broken(config: dict[str, Any], inner: Any = train.train) -> Any:
        if config["lattice"]["depth"] == 8:
            raise torch.OutOfMemoryError("out of memory\nby far")
        return inner(config)

    program.patch.setattr(train, "train", broken)
    outcome = program.train("lattice.depth=4,0,8,6", multirun=True)
    assert outcome.code == 1
    assert "error: job 1: lattice.depth = 0" in outcome.err
    assert outcome.err.count("Traceback") == 1, "of the one that a user can't mend"
    assert "2 of 4 jobs did not finish: 1, 2" in outcome.err
    assert "Summary of 4 jobs" in outcome.out
    (table,) = (program.folder / "logs").rglob("summary.md")
    rows = table.read_text().splitlines()[2:]
    assert [" - |" in row for row in rows] == [False, True, True, False]
    assert "| lattice.depth = 0" in rows[1]
    assert rows[2].endswith("| OutOfMemoryError: out of memory |")
    assert [row["error"] for row in csv.DictReader(table.with_name("summary.csv").open())][::3] == ["", ""]
    assert "Traceback" in (table.parent / "2" / "error.txt").read_text()
    (compared,) = (program.folder / "logs").rglob("comparison.md")
    assert "| lattice.depth=0 | 0 | - |" in compared.read_text()
    assert "missing: seed 1 (job 1)" in compared.read_text()
    assert len(list((program.folder / "logs").rglob("best.ckpt"))) == 2


@NO_WARNINGS
def test_a_custom_trainer_and_loader(trained: Outcome, tmp_path: Path) -> None:
    module = EnergyFlowModule.load_from_checkpoint(trained.folder / "checkpoints" / "best.ckpt")
    module.loss = module.loss.model_copy(update={"candidates": "batch"})  # pairs of its own know no rows
    before = {name: value.clone() for name, value in module.named_parameters()}
    pairs = TensorDataset(torch.randn(12, DIM), torch.randn(12, DIM))
    loader = DataLoader(pairs, batch_size=4)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, loader, loader)
    assert any(not torch.equal(value, before[name]) for name, value in module.named_parameters())
    assert 0 < float(trainer.callback_metrics["val/mrr"]) <= 1
    (tested,) = trainer.test(module, loader, verbose=False)
    assert "test/recall@1" in tested
    for given in (loader, DataLoader(pairs.tensors[0], batch_size=4)):
        predicted = torch.cat(trainer.predict(module, given))
        assert predicted.shape == (12, DIM)
        assert torch.isfinite(predicted).all()


@NO_WARNINGS
def test_a_batch_of_an_unknown_kind_is_refused(trained: Outcome, tmp_path: Path) -> None:
    module = EnergyFlowModule.load_from_checkpoint(trained.folder / "checkpoints" / "best.ckpt")
    module.loss = module.loss.model_copy(update={"candidates": "batch"})
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    with pytest.raises(ConfigError, match="a pair"):
        trainer.fit(module, DataLoader(torch.randn(4, DIM), batch_size=2))
