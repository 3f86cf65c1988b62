"""`energy_flow.check`: its tables, its file, its exit code, its imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from energy_flow.check import main
from tests.cli.helpers import DIM, Program, environment, words


def report(folder: Path) -> dict:
    (path,) = (folder / "logs").rglob("check.json")
    return json.loads(path.read_text())


def test_good_data(program: Program) -> None:
    outcome = program.check()
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("train", "float32", "constant columns", "Rows shared between splits", "GB/s"):
        assert part in outcome.out
    assert outcome.out.endswith("training would accept these data\n")
    found = report(program.folder)
    assert found["fine"] is True
    assert found["num_bytes"] == 2 * (64 + 32 + 32) * DIM * 4
    assert {name: split["rows"] for name, split in found["splits"].items()} == {"train": 64, "val": 32, "test": 32}


def test_unusable_data(program: Program) -> None:
    path = program.folder / "val.safetensors"
    pairs = load_file(path)
    pairs["target"][5, 3] = float("nan")
    pairs["source"][[1, 2]] = 0
    save_file(pairs, path)
    outcome = program.check()
    assert outcome.code == 1
    heading, source, target = outcome.err.splitlines()
    assert heading == "error: training would refuse these data:"
    assert f"data.val: {path}: source row 1 holds only zeros" in source
    assert "target row 5 holds NaN or Inf" in target
    assert report(program.folder)["fine"] is False
    assert source.strip() in program.refused()  # the message of training


def test_leaks_are_warnings_here_and_in_training(program: Program) -> None:
    train, test = (load_file(program.folder / f"{split}.safetensors") for split in ("train", "test"))
    test["source"][:3] = train["source"][10:13]
    save_file(test, program.folder / "test.safetensors")
    outcome = program.check()
    assert outcome.code == 0
    warning = "data.test: 3 of 32 sources are also in data.train (0 of them with the same target): row 0 is row 10"
    assert f"warning: {warning}" in outcome.out
    trained = program.train("test=false", "+trainer.limit_train_batches=1")
    assert trained.code == 0
    assert warning in next(trained.folder.glob("*.log")).read_text()


def test_missing_files_and_generated_data(program: Program) -> None:
    outcome = program.check("data.val=null", "data.test=nope.safetensors")
    assert outcome.code == 1
    assert "data.val = null: fit needs it" in outcome.err
    assert "data.test: " in outcome.err
    assert "no such file" in outcome.err
    sizes = ("data.train=20", "data.val=20", "data.test=20")
    made = program.check("data=transport", *sizes)
    assert (made.code, made.err) == (0, "")


def test_unknown_keys_are_named(program: Program) -> None:
    assert "data.trian" in program.refused("data.trian=x", program="check")


@pytest.mark.parametrize(
    "flag",
    [("--experimental-rerun", "config.pickle"), ("--experimental-rerun=config.pickle",), ("--e", "config.pickle")],
)
def test_pickles_of_hydra_are_refused(
    program: Program, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, flag: tuple[str, ...]
) -> None:
    torch.save([], program.folder / "config.pickle")
    monkeypatch.setattr(sys, "argv", ["check", *flag])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "reads a pickle, which could run code" in capfd.readouterr().err


def test_it_imports_neither_training_nor_the_lattice(program: Program) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "energy_flow.check", *words("check", program.folder, ())]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "energy_flow.data.inspection" in imported
    heavy = ("energy_flow.training", "energy_flow.core", "energy_flow.ops", "lightning", "matplotlib")
    assert [name for name in imported if name.startswith(heavy)] == []
