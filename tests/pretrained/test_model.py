"""A model in one file: equal numbers, no heavy imports, and clear errors for any contents."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import energy_flow
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.data import PairDataset
from energy_flow.data.files import EMBEDDED
from energy_flow.errors import CheckpointError, ConfigError, DataError, NotFiniteError
from energy_flow.metrics.retrieval import retrieval_metrics
from energy_flow.pretrained import SHIPPED, EnergyFlowModel, ModelCard, card
from energy_flow.pretrained.model import _ENCODERS
from energy_flow.settings import read
from tests.helpers import DIM, LATTICE, MODEL, fill_parameters, section

CARD: dict[str, Any] = {
    "format_version": 1,
    "version": energy_flow.__version__,
    "dim": DIM,
    "lattice": section(LATTICE, {"movement.warmup_steps": 7}),
    "model": MODEL,
    "seed": 3,
    "encoder": "some/encoder",
    "normalize": True,
    "metrics": {"test/mrr": 0.5},
    "data_fingerprint": {"train": "0a"},
}


def build(**changes: Any) -> EnergyFlowModel:
    model = EnergyFlowModel(read(ModelCard, CARD | changes, ""))
    fill_parameters(model, seed=1, displacement=1.0)
    model.processor.optimizer_step.fill_(3)  # the displacement scale is still warming up
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path: Path, described: dict[str, Any] | str, weights: dict[str, Tensor]) -> None:
    """Write a file with other contents and the right digest."""
    text = described if isinstance(described, str) else json.dumps(described)
    save_file(weights, path, {"energy_flow": text, "sha256": card.digest(text, weights)})


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        EnergyFlowModel.from_pretrained(path)
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


def test_a_saved_model_is_loaded_unchanged(saved: Path) -> None:
    model, source = build(), torch.randn(4, DIM)
    again = EnergyFlowModel.from_pretrained(saved)
    assert again.card == model.card
    assert not again.training
    assert torch.equal(again(source), model(source))
    assert again.processor.optimizer_step.item() == 3


def test_rows_are_prepared_as_in_training() -> None:
    source, raw = torch.randn(4, DIM), build(normalize=False)
    unit = torch.nn.functional.normalize(source, dim=1)
    for scale in (1.0, 1e30, 1e-30):
        torch.testing.assert_close(build()(source * scale), raw(unit))
    assert not torch.allclose(raw(2 * unit), raw(unit))
    torch.testing.assert_close(build()(source.double()), raw(unit))


def test_one_embedding_or_a_batch() -> None:
    model, source = build(), torch.randn(4, DIM)
    assert model(source).shape == (4, DIM)
    assert model(source[1]).shape == (DIM,)
    torch.testing.assert_close(model(source[1]), model(source)[1])
    for shape in ((2, DIM + 1), (DIM + 1,), (2, 2, DIM), (0, DIM), ()):
        with pytest.raises(ConfigError, match=f"the model takes .batch, {DIM}."):
            model(torch.ones(shape))


def test_it_can_be_trained_further(saved: Path) -> None:
    model = EnergyFlowModel.from_pretrained(saved).train()
    model(torch.randn(4, DIM)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_invalid_embeddings() -> None:
    source = torch.randn(5, DIM)
    source[1], source[3, 0] = 0, float("nan")
    with pytest.raises(DataError, match=r"source row 1 of 5 .* 2 of them do"):
        build()(source)
    with pytest.raises(DataError, match=r"source row 3 of 5 .* 1 of them do"):
        build(normalize=False)(source)


def test_an_invalid_output() -> None:
    model = build()
    with torch.no_grad():
        model.processor.lattice.map_out.network[0].bias.fill_(float("inf"))
    with pytest.raises(NotFiniteError, match="2 samples"):
        model(torch.randn(2, DIM))


def test_saving_in_half_precision(tmp_path: Path) -> None:
    model, source = build().half().float(), torch.randn(4, DIM)
    model.save_pretrained(tmp_path / "half.safetensors", torch.float16, {"test/mrr": 0.25})
    again = EnergyFlowModel.from_pretrained(tmp_path / "half.safetensors")
    assert torch.equal(again(source), model(source)), "rounded once, and not again"
    assert again.card.metrics == {"test/mrr": 0.25}
    assert load_file(tmp_path / "half.safetensors")["map_in.cell_value"].dtype == torch.float16


def test_unwritable_models(tmp_path: Path) -> None:
    model, path = build(), tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"can't be written .No such file"):
        model.save_pretrained(tmp_path / "nope" / "model.safetensors")
    with pytest.raises(CheckpointError, match="can't be written"):
        model.save_pretrained(tmp_path)
    model.processor.map_in.cell_value.data[0] = 1e6
    with pytest.raises(CheckpointError, match=r"map_in\.cell_value holds NaN or Inf as torch\.float16"):
        model.save_pretrained(path, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_damaged_bytes_are_found(saved: Path) -> None:
    """A change anywhere in the file is found, although safetensors has no checksum."""
    rng, whole = random.Random(0), saved.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        refused(saved)
    for length in (0, 5, *rng.sample(range(len(whole)), 20)):
        saved.write_bytes(whole[:length])
        refused(saved, "damaged, or no safetensors file")


def test_files_of_other_programs(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nope.safetensors", "there is no such file")
    refused(tmp_path, "is a folder; give the file in it")
    save_file({"weight": torch.ones(3)}, saved)
    refused(saved, "not a model of energy_flow", "save_pretrained")
    saved.write_text("hello")
    refused(saved, "damaged, or no safetensors file")


CARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "newer": (lambda c: c | {"format_version": 2}, ("has format_version 2", "reads 1", "Update energy_flow")),
    "no format": (lambda c: {}, ("damaged", "format_version None")),
    "no object": (lambda c: [c], ("damaged", "format_version None")),
    "no JSON": (lambda c: "{", ("damaged: its card isn't JSON",)),
    "unknown key": (
        lambda c: c | {"version": "9.9", "lattice": c["lattice"] | {"wormholes": 3}},
        ("written by energy_flow 9.9", "lattice.wormholes: unknown key", "Update energy_flow"),
    ),
    "value": (lambda c: c | {"lattice": c["lattice"] | {"width": 0}}, ("lattice.width = 0",)),
    "missing": (lambda c: {k: v for k, v in c.items() if k != "model"}, ("model: missing",)),
    "another size": (lambda c: c | {"dim": DIM + 1}, ("its weights are not those of the model", "in the checkpoint")),
    "huge": (lambda c: c | {"lattice": c["lattice"] | {"width": 2**62}}, ("its card describes no model",)),
    "large": (lambda c: c | {"lattice": c["lattice"] | {"width": 2**24}}, ("its weights are not those of the model",)),
}


@pytest.mark.parametrize("case", CARDS)
def test_unknown_cards(saved: Path, case: str) -> None:
    change, parts = CARDS[case]
    rewrite(saved, change(CARD), load_file(saved))
    refused(saved, *parts)


WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda w: {k: v for k, v in w.items() if k != "map_in.cell_value"}, "map_in.cell_value: None in"),
    "unexpected": (lambda w: w | {"more": torch.ones(2)}, "more: [2] in the checkpoint, None here"),
    "shape": (lambda w: w | {"map_in.cell_value": torch.ones(2, 1)}, "map_in.cell_value: [2, 1] in the checkpoint"),
    "dtype": (lambda w: w | {"map_in.cell_value": torch.ones(6, 1).bool()}, "map_in.cell_value is torch.bool"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_another_model(saved: Path, case: str) -> None:
    change, part = WEIGHTS[case]
    rewrite(saved, CARD, change(load_file(saved)))
    refused(saved, part)


SCRIPT = """
import sys
import energy_flow
assert "torch" not in sys.modules, "importing the package must stay light"
import torch
from energy_flow import EnergyFlowModel
for model in (EnergyFlowModel.from_pretrained(sys.argv[1]), EnergyFlowModel.from_checkpoint(sys.argv[2])):
    with torch.no_grad():
        assert model(torch.randn(2, model.card.dim)).shape == (2, model.card.dim)
    model.save_pretrained(sys.argv[1])
heavy = {"lightning", "pytorch_lightning", "hydra", "omegaconf", "matplotlib", "tensorboard"}
found = heavy & {name.split(".")[0] for name in sys.modules}
assert not found, found
"""


def write_checkpoint(path: Path, config: dict[str, Any] | None) -> FlowProcessor:
    """Write the parts of a training checkpoint that a model needs."""
    processor = build().processor
    saved = {
        "hyper_parameters": {**{key: CARD[key] for key in ("dim", "lattice", "model", "seed")}, "loss": {}},
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {f"processor.{name}": value for name, value in processor.state_dict().items()},
        "energy_flow": {"config": config, "embedding_dim": DIM, "data_fingerprint": {"train": "0a"}},
    }
    saved["hyper_parameters"]["optimizer"] = {}
    torch.save(saved, path)
    return processor


def test_neither_lightning_nor_hydra_is_needed(saved: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "best.ckpt", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, saved, tmp_path / "best.ckpt"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_from_a_checkpoint(tmp_path: Path) -> None:
    path, source = tmp_path / "best.ckpt", torch.nn.functional.normalize(torch.randn(4, DIM), dim=1)
    for config, encoder, normalize in (
        ({"data": {"name": "reverse_dictionary", "normalize": True}}, _ENCODERS["reverse_dictionary"], True),
        ({"data": {"name": "files", "normalize": False}}, None, False),
        (None, None, False),
    ):
        processor = write_checkpoint(path, config)
        model = EnergyFlowModel.from_checkpoint(path)
        torch.testing.assert_close(model(source), processor.eval()(source).embedding)
        assert (model.card.encoder, model.card.normalize) == (encoder, normalize)
        assert model.card.data_fingerprint == {"train": "0a"}
        assert EnergyFlowModel.from_checkpoint(path, "my/own").card.encoder == "my/own"
    with pytest.raises(CheckpointError, match="there is no such file"):
        EnergyFlowModel.from_checkpoint(tmp_path / "nope.ckpt")


def test_the_encoder_of_the_embedded_data() -> None:
    with safe_open(EMBEDDED / "test.safetensors", framework="numpy") as file:
        assert file.metadata()["encoder"] == _ENCODERS["reverse_dictionary"]


def test_the_shipped_model_reaches_the_metrics_of_its_card() -> None:
    model = EnergyFlowModel.from_pretrained()
    pairs = PairDataset(EMBEDDED / "test.safetensors", normalize=True, key="data.test")
    assert model.card.data_fingerprint["test"] == pairs.fingerprint
    source, target = pairs.all()
    with torch.no_grad():
        found = retrieval_metrics(torch.cat([model(rows) for rows in source.split(500)]), target)
    assert {f"test/{name}": value for name, value in found.items()} == pytest.approx(model.card.metrics, abs=2e-3)
    assert SHIPPED.stat().st_size < 6e6


def test_an_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'EnergyModel'"):
        _ = energy_flow.EnergyModel
