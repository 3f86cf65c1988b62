"""A class that a stranger's file names is neither built nor imported, by whatever road the file is read."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from energy_flow import targets
from energy_flow.atomic import digest
from energy_flow.errors import CheckpointError
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.training.module import EnergyFlowModule
from tests.cli.helpers import Outcome, Program

LSTM = "energy_flow.core.carriers.LSTMCarrier"
EVIL = {"_target_": "evil_of_strangers.Part"}
SECTIONS: dict[str, Any] = {
    "class": EVIL,
    "function": {"_target_": "os.system", "command": "mkdir trap"},
    "argument": {"_target_": LSTM, "hidden_size": EVIL, "num_layers": 1},
    "in a list": {"_target_": "torch.nn.ModuleList", "modules": [EVIL]},
}
PLACES = [
    ("model", "neuron"),
    ("model", "carrier"),
    ("model", "map_in"),
    ("model", "map_out"),
    ("lattice", "aggregation"),
]


@pytest.fixture(autouse=True)
def _trap(program: Program) -> None:
    """A module that makes the folder `trap` when it is imported."""
    program.patch.syspath_prepend(program.folder)
    program.patch.delenv(targets.TRUST, raising=False)
    program.patch.delitem(sys.modules, "evil_of_strangers", raising=False)
    (program.folder / "evil_of_strangers.py").write_text("import os\nos.mkdir('trap')\nclass Part: pass\n")


def forged(source: Path, target: Path, place: tuple[str, str], section: Any) -> Path:
    """A copy of a checkpoint that names a class, in its model and in the config of its run."""
    contents = torch.load(source, weights_only=True)
    group, key = place
    for config in (contents["hyper_parameters"], contents["energy_flow"]["config"]):
        config[group] = {**config[group], key: copy.deepcopy(section)}
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(contents, target)
    return target


def forged_card(target: Path, place: tuple[str, str], section: Any) -> Path:
    """A model's file whose card names a class, with the right digest."""
    EnergyFlowModel.from_pretrained().save_pretrained(target)
    weights = load_file(target)
    with target.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    card = json.loads(header["__metadata__"]["energy_flow"])
    card[place[0]][place[1]] = section
    text = json.dumps(card)
    save_file(weights, target, {"energy_flow": text, "sha256": digest(text, weights)})
    return target


def best(trained: Outcome) -> Path:
    return trained.folder / "checkpoints" / "best.ckpt"


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_python(program: Program, trained: Outcome, place: tuple[str, str], name: str) -> None:
    path = forged(best(trained), program.folder / "stranger.ckpt", place, SECTIONS[name])
    card = forged_card(program.folder / "stranger.safetensors", place, SECTIONS[name])
    loaders: list[tuple[Callable[[Path], Any], Path]] = [
        (EnergyFlowModel.from_checkpoint, path),
        (EnergyFlowModule.load_from_checkpoint, path),
        (lambda file: EnergyFlowModule.load_from_checkpoint(file, strict=False), path),
        (EnergyFlowModel.from_pretrained, card),
    ]
    for load, file in loaders:
        with pytest.raises((CheckpointError, targets.ConfigError), match="refused, none of its code was run"):
            load(file)
        with targets.from_user(), pytest.raises((CheckpointError, targets.ConfigError), match=f"{targets.TRUST}="):
            load(file)
    assert not (program.folder / "trap").exists()


def test_evaluate_and_predict(program: Program, trained: Outcome) -> None:
    path = forged(best(trained), program.folder / "stranger.ckpt", ("model", "carrier"), SECTIONS["argument"])
    card = forged_card(program.folder / "stranger.safetensors", ("lattice", "aggregation"), EVIL)
    for file in (path, card):
        message = program.refused(f"ckpt_path={file}", "row=0", program="predict")
        assert f"{targets.TRUST}=my_package" in message
    assert "none of its code was run" in program.refused(f"ckpt_path={path}", program="evaluate")
    assert "none of its code was run" in program.refused(f"ckpt_path=[{best(trained)},{path}]", program="evaluate")
    assert not (program.folder / "trap").exists()


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_training_from_a_strangers_checkpoint(program: Program, trained: Outcome, place: tuple[str, str]) -> None:
    path = forged(best(trained), program.folder / "stranger.ckpt", place, EVIL)
    message = program.refused(f"ckpt_path={path}")
    assert f"{'.'.join(place)}._target_: evil_of_strangers.Part in the checkpoint, None here" in message
    assert not (program.folder / "trap").exists()


def test_resume_auto_in_a_strangers_run_folder(program: Program) -> None:
    folder = program.train().folder
    last = folder / "checkpoints" / "last.ckpt"
    (folder / "finished").unlink()
    forged(last, last, ("model", "carrier"), EVIL)
    (folder / "checkpoints" / "best.ckpt").unlink()
    (folder / "checkpoints" / "last-1.ckpt").unlink(missing_ok=True)
    message = program.refused("resume=auto")
    assert "model.carrier._target_: evil_of_strangers.Part in the checkpoint, None here" in message
    saved = folder / ".hydra" / "config.yaml"
    config = yaml.safe_load(saved.read_text())
    config["model"]["carrier"] = EVIL
    config["callbacks"]["evil"] = EVIL
    saved.write_text(yaml.safe_dump(config))
    message = program.refused("resume=auto", f"hydra.run.dir={folder}")
    assert "its run has another config" in message
    other = program.train("resume=auto")
    assert (other.code, other.folder != folder) == (0, True)
    assert not (program.folder / "trap").exists()


def test_the_trap_works_where_the_user_names_it(program: Program) -> None:
    """The same section in an override is the user's own wish."""
    outcome = program.train(f"+model.carrier._target_={EVIL['_target_']}")
    program.patch.delitem(sys.modules, "evil_of_strangers", raising=False)
    assert outcome.code == 1
    assert "gives a Part, not a torch.nn.Module" in outcome.err
    assert (program.folder / "trap").exists()
