"""The present code loads, evaluates and resumes runs of version 0.1.0."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from energy_flow.metrics.row_scores import read_row_scores
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.training.module import EnergyFlowModule
from tests.cli.helpers import Program, read_metrics

OLD = Path(__file__).parents[1] / "fixtures" / "runs_0_1"
BEST = OLD / "finished" / "checkpoints" / "best.ckpt"
# The command that made the runs. The helpers switch baselines off by default.
COMMAND = (*yaml.safe_load((OLD / "finished" / ".hydra" / "overrides.yaml").read_text()), "baselines.enabled=true")
# All of this is float32. Kernels for other processors (MKL_CBWR=COMPATIBLE, ATEN_CPU_CAPABILITY=default) move the final
# weights by 3e-8. The bound leaves room for other libraries; the six steps move weights by more than 1e-2.
ROUNDING = 1e-4


@pytest.fixture
def outputs() -> dict[str, Tensor]:
    """Fixed rows, and their outputs in version 0.1.0."""
    return load_file(OLD / "outputs.safetensors")


@pytest.fixture
def old_runs(program: Program) -> Path:
    """A copy of the data and of both runs in the default folders of the programs."""
    shutil.copytree(OLD / "data", program.folder / "data")
    runs = program.folder / "logs" / "train" / "runs"
    for name in ("finished", "interrupted"):
        shutil.copytree(OLD / name, runs / name)
    return runs


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the last checkpoint of a run."""
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=ROUNDING, atol=ROUNDING)


def test_a_checkpoint_loads_as_a_module(outputs: dict[str, Tensor]) -> None:
    module = EnergyFlowModule.load_from_checkpoint(BEST, map_location="cpu").eval()
    with torch.no_grad():
        near(module(outputs["source"]).embedding, outputs["module"])


def test_a_checkpoint_loads_as_a_model(outputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        near(EnergyFlowModel.from_checkpoint(BEST)(outputs["source"]), outputs["model"])


def test_the_shipped_weights_give_the_same_outputs(outputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        near(EnergyFlowModel.from_pretrained()(outputs["shipped_source"]), outputs["shipped"])


def test_a_checkpoint_is_evaluated(program: Program, old_runs: Path) -> None:
    splits = [word for word in COMMAND if word.startswith("data")]
    outcome = program.evaluate(f"ckpt_path={BEST}", *splits, "baselines.enabled=true", "baselines.training.epochs=1")
    assert (outcome.code, outcome.err) == (0, "")
    assert_same_results(outcome.folder, OLD / "finished")


def test_an_interrupted_run_resumes_and_ends_like_the_finished_one(program: Program, old_runs: Path) -> None:
    interrupted = old_runs / "interrupted"
    before = weights(interrupted)
    outcome = program.train(*COMMAND, "resume=auto")
    assert (outcome.code, outcome.err) == (0, "")
    assert f"resume = auto: resuming {interrupted}\n" in outcome.out
    assert f"resuming from step 6 of {interrupted / 'checkpoints' / 'last.ckpt'}" in outcome.out
    assert outcome.folder == interrupted
    assert (interrupted / "finished").is_file()
    after, expected = weights(interrupted), weights(OLD / "finished")
    assert after.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        near(after[name], value)
    # The six resumed steps change weights by much more than rounding.
    moved = [(expected[name] - value).abs().max().item() for name, value in before.items() if value.is_floating_point()]
    assert sum(change > 100 * ROUNDING for change in moved) > len(moved) / 2
    assert_same_results(interrupted, OLD / "finished")
    assert read_metrics(interrupted)["val/mrr"] == pytest.approx(read_metrics(OLD / "finished")["val/mrr"], rel=0.01)


def test_a_finished_run_is_left_alone(program: Program, old_runs: Path) -> None:
    before = contents(old_runs / "finished")
    outcome = program.train(*COMMAND, "resume=auto", f"hydra.run.dir={old_runs / 'finished'}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "finished already" in outcome.out
    assert {path: text for path, text in contents(old_runs / "finished").items() if path.suffix != ".log"} == before


def assert_same_results(folder: Path, expected: Path) -> None:
    """Check that the metrics and the ranks of the test rows are equal to rounding."""
    found, wanted = read_metrics(folder), read_metrics(expected)
    tested = {name for name in wanted if name.startswith(("test/", "baseline/"))}
    assert tested <= found.keys()
    for name in ("test/loss", "test/cosine", "test/mse", "test/flows/displacement", "baseline/ridge/cosine"):
        assert found[name] == pytest.approx(wanted[name], rel=10 * ROUNDING), name
    scores, old_scores = (read_row_scores(run / "test_rows.safetensors") for run in (folder, expected))
    assert scores.fingerprint == old_scores.fingerprint
    assert list(scores.values) == list(old_scores.values)
    # Two candidates that are equal to rounding may swap.
    assert ((scores.values["model"] - old_scores.values["model"]).abs() <= 1).all()
