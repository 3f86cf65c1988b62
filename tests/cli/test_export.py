"""Exported files give the model's outputs for any batch size; what can't be exported is refused, and leaves no file."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from energy_flow import export
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.errors import ConfigError, ExportError
from energy_flow.export import Inference, export_model
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.settings import read
from tests.cli.helpers import DIM, Outcome, Program
from tests.helpers import LATTICE, MODEL, fill_parameters, section

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra [export]",
)
each_format = pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=needs_onnx)])


def part(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"energy_flow.core.{name}", **arguments}


# Together they have every shipped part and every rule. Changes to LATTICE and to MODEL, and the events that occur.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "rules": (
        {
            "spawn.enabled": True,
            "max_flows_per_sample": 9,
            "filter.enabled": True,
            "filter.min_displacement": 0.15,
            "convergence.enabled": True,
            "convergence.threshold": 0.3,
            "convergence.min_steps": 2,
            "movement.scale": 0.4,
            "spawn.threshold": 0.2,
            "deposit": "nearest",
        },
        {"num_layers": 2, "map_hidden": 7, "skip": True},
        ("spawned", "removed", "overflow"),
    ),
    "lstm, local field, mean": (
        {"aggregation": part("aggregation.MeanAggregation"), "max_steps": 2},
        {
            "carrier": part("carriers.LSTMCarrier", hidden_size=6, num_layers=2),
            "neuron": part("local_field.LocalFieldNeuron", channels=2, kernel_size=3, num_layers=2),
        },
        ("landed",),
    ),
    "attention, convolutions, sum": (
        {"aggregation": part("aggregation.SumAggregation"), "max_steps": 2},
        {
            "residual_energy": True,
            "energy_dim": 2,
            "carrier": part("carriers.AttentionCarrier", hidden_size=6, num_heads=2),
            "map_in": part("maps.ConvMapIn", hidden=2, kernel_size=3),
            "map_out": part("maps.ConvMapOut", hidden=2, kernel_size=3),
        },
        ("landed",),
    ),
    "minimal gated unit, identity": (
        {"max_steps": 1},
        {"maps": "identity", "carrier": part("carriers.MGUCarrier", hidden_size=6)},
        ("landed",),
    ),
    "no memory": ({"max_steps": 1}, {"carrier": part("carriers.MLPCarrier", hidden_size=6)}, ("landed",)),
    "no step": ({"max_steps": 0}, {}, ("landed",)),
}


def processor_of(lattice: dict[str, Any], model: dict[str, Any], dim: int = 6) -> FlowProcessor:
    new = dict.fromkeys(("carrier", "neuron", "map_in", "map_out"))
    processor = FlowProcessor(
        dim,
        read(LatticeSettings, section({**LATTICE, "aggregation": None}, lattice), "lattice"),
        read(ModelSettings, section({**MODEL, **new}, model), "model"),
        seed=2,
    )
    fill_parameters(processor, seed=2, displacement=1.0)
    return processor.eval()


def run_file(path: Path, source: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(source)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", source.shape[1]]
    return torch.from_numpy(session.run(["embedding"], {"source": source.numpy()})[0])


@each_format
@pytest.mark.parametrize("case", CASES)
def test_parts_and_rules(case: str, suffix: str, tmp_path: Path) -> None:
    lattice, model, events = CASES[case]
    processor, path = processor_of(lattice, model), tmp_path / f"model{suffix}"
    assert 0 <= export_model(processor, path) < 1e-3
    source = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        output = processor(source)
        for event in events:
            assert output.statistics[event] > 0
        torch.testing.assert_close(run_file(path, source), output.embedding, rtol=1e-4, atol=1e-4)


@each_format
def test_the_shipped_model(suffix: str, program: Program) -> None:
    outcome = program.export(f"output=model{suffix}")
    assert (outcome.code, outcome.err) == (0, "")
    assert "agree on batches of 1 and 17 rows" in outcome.out
    model = EnergyFlowModel.from_pretrained()
    for batch in (1, 2, 40):
        source = 3 * torch.randn(batch, model.card.dim)
        with torch.no_grad():
            expected = model(source)
        torch.testing.assert_close(run_file(program.folder / f"model{suffix}", source), expected, rtol=0, atol=1e-5)


def test_a_checkpoint(program: Program, trained: Outcome) -> None:
    checkpoint = trained.folder / "checkpoints" / "best.ckpt"
    assert program.export(f"ckpt_path={checkpoint}", "output=model.pt2").code == 0
    source = torch.randn(2, DIM)
    with torch.no_grad():
        expected = EnergyFlowModel.from_checkpoint(checkpoint)(source)
    torch.testing.assert_close(run_file(program.folder / "model.pt2", source), expected)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["output=model.pt"], "must end in .onnx or .pt2"),
        (["output=there/model.pt2"], "its folder is missing"),
        (["output=train.pt2"], "already exists"),
        (["output=model.pt2", "opset=18"], "Set opset=null"),
        (["output=model.pt2", "opset=7"], "opset = 7"),
    ],
)
def test_refused_settings(overrides: list[str], words: str, program: Program) -> None:
    (program.folder / "train.pt2").touch()
    assert words in program.refused(*overrides, program="export")


def test_without_the_extra(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_PACKAGES", ("not_installed",))
    message = program.refused(program="export")
    assert "needs not_installed, which the extra [export] installs" in message


@needs_onnx
def test_an_unknown_opset(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="opset = 99: the installed exporter can't write it"):
        export_model(processor_of({"max_steps": 0}, {}), tmp_path / "model.onnx", opset=99)
    assert not list(tmp_path.iterdir())


def test_a_file_with_other_numbers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = export._traced

    def trace_changed(inference: Inference) -> Any:
        changed = copy.deepcopy(inference)
        next(changed.processor.lattice.map_out.parameters()).mul_(1.001)
        return trace(changed)

    monkeypatch.setattr(export, "_traced", trace_changed)
    with pytest.raises(ExportError, match="computes other numbers than the model in 18 of 18 rows"):
        export_model(processor_of({"max_steps": 1}, {}), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


class Deciding(nn.Linear):
    """Chooses in Python by a value."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if float(input.detach().sum()) > 0 else -input


def test_a_part_that_cannot_be_traced(tmp_path: Path) -> None:
    processor = processor_of({"max_steps": 1}, {})
    processor.map_in = nn.Sequential(Deciding(6, 6), nn.Unflatten(1, (6, 1))).eval()
    with pytest.raises(ExportError, match=r"torch\.export can't trace the model"):
        export_model(processor, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        export_model(processor_of({}, {}).train(), tmp_path / "model.pt2")


def test_no_landing_is_nan(tmp_path: Path) -> None:
    processor = processor_of(
        {"filter.enabled": True, "filter.min_displacement": 5.0, "movement.max_displacement": 0.1}, {}
    )
    assert Inference(processor)(torch.randn(2, 6)).isnan().all()
    with pytest.raises(ExportError, match="can't be checked"):
        export_model(processor, tmp_path / "model.pt2")


def test_the_model_is_as_before(tmp_path: Path) -> None:
    processor, source = processor_of({"max_steps": 1}, {}), torch.randn(2, 6)
    before, settings = processor(source).embedding, processor.rollout_settings
    export_model(processor, tmp_path / "model.pt2")
    assert processor.rollout_settings is settings
    assert all(parameter.requires_grad for parameter in processor.parameters())
    assert torch.equal(processor(source).embedding, before)
