import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from energy_flow.errors import ConfigError
from energy_flow.training.callbacks.flow_monitor import FlowMonitor, _histograms
from tests.training.runs import NO_WARNINGS, TinyModule, events, loader, trainer

pytestmark = NO_WARNINGS

HISTOGRAMS = {
    "flow_values/x",
    "flow_values/y",
    "flow_values/z",
    "flow_values/energy",
    "flow_values/displacement",
}


def images(samples: int) -> set[str]:
    each = {f"{kind}/{sample}" for kind in ("landings", "groups", "trajectories") for sample in range(samples)}
    return {"surfaces/input", "surfaces/output", "population", *each}


class Watched(TinyModule):
    """Record every pass of the processor that records trajectories."""

    def __init__(self, **lattice: Any) -> None:
        super().__init__(**lattice)
        self.passes: list[tuple[int, torch.Tensor, torch.Tensor, bool, bool]] = []
        self.processor.register_forward_pre_hook(self._watch, with_kwargs=True)

    def _watch(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs.get("record_trajectories"):
            step = self.trainer.global_step if self._trainer is not None else -1
            self.passes.append((step, args[0].clone(), args[1].clone(), module.training, torch.is_grad_enabled()))


def steps(folder: Path) -> set[int]:
    return {event.step for event in events(folder).Images("population")}


def test_histograms_and_pictures(tmp_path: Path) -> None:
    module, validation = Watched(), loader(2)
    trainer(tmp_path, FlowMonitor(1, samples=2, max_flows=4)).fit(module, loader(3), validation)
    tags = events(tmp_path).Tags()
    assert set(tags["histograms"]) == HISTOGRAMS
    assert set(tags["images"]) == images(2)
    assert steps(tmp_path) == {2}, "not in the sanity check, not again at the end"
    histogram = events(tmp_path).Histograms("flow_values/z")[0].histogram_value
    assert histogram.num == 2 * 6, "every flow of both samples"
    assert -1.0 <= histogram.min <= histogram.max <= 1.0
    ((_, source, rows, training, with_grad),) = module.passes
    assert torch.equal(source, next(iter(validation))["source"])
    assert rows.tolist() == [0, 1]
    assert (training, with_grad) == (False, False)


def test_every_second_epoch_and_the_last(tmp_path: Path) -> None:
    module = Watched()
    monitor = FlowMonitor(2, samples=1, max_flows=4)
    trainer(tmp_path, monitor, max_epochs=5).fit(module, loader(3), loader(1))
    assert steps(tmp_path) == {5, 11, 14}
    assert [step for step, *_ in module.passes] == [6, 12, 15]
    first, *others = [source for _, source, *_ in module.passes]
    assert first.shape[0] == 1
    assert all(torch.equal(first, other) for other in others), "always the same samples"


def test_once_per_epoch_however_often_it_is_validated(tmp_path: Path) -> None:
    module = Watched()
    trainer(tmp_path, FlowMonitor(1, 1, 4), val_check_interval=1).fit(module, loader(3), loader(1))
    assert [step for step, *_ in module.passes] == [1, 3]


def test_more_samples_than_in_the_batch(tmp_path: Path) -> None:
    trainer(tmp_path, FlowMonitor(1, samples=99, max_flows=4)).fit(TinyModule(), loader(1), loader(1))
    assert set(events(tmp_path).Tags()["images"]) == images(2)


def test_modes_of_submodules_are_restored(tmp_path: Path) -> None:
    module, monitor = Watched(), FlowMonitor(2, 1, 4)
    fitted = trainer(tmp_path, monitor, max_epochs=2)
    fitted.fit(module, loader(1), loader(1))
    module.processor.map_in.eval()
    modes = [child.training for child in module.modules()]
    assert set(modes) == {True, False}
    monitor._drawn_step = None
    monitor.on_train_end(fitted, module)
    assert [child.training for child in module.modules()] == modes
    assert [training for *_, training, _ in module.passes] == [False, False]


@pytest.mark.parametrize("logger", [False, "csv"])
def test_no_figures_without_tensorboard(tmp_path: Path, logger: Any) -> None:
    module = Watched()
    logger = CSVLogger(tmp_path) if logger == "csv" else False
    trainer(tmp_path, FlowMonitor(1, 1, 4), logger=logger).fit(module, loader(1), loader(1))
    assert module.passes == []


def test_no_figures_in_a_plain_validation(tmp_path: Path) -> None:
    module = Watched()
    trainer(tmp_path, FlowMonitor(1, 1, 4)).validate(module, loader(1), verbose=False)
    assert module.passes == []


def test_missing_validation_data_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Watched()
    with caplog.at_level("INFO", "energy_flow"):
        trainer(tmp_path, FlowMonitor(1, 1, 4)).fit(module, loader(1))
    assert module.passes == []
    assert "no validation batch" in caplog.text


def test_a_rollout_without_steps(tmp_path: Path) -> None:
    trainer(tmp_path, FlowMonitor(1, 1, 4)).fit(TinyModule(max_steps=0), loader(1), loader(1))
    tags = events(tmp_path).Tags()
    assert set(tags["histograms"]) == HISTOGRAMS - {"flow_values/displacement"}
    assert set(tags["images"]) == images(1)


def test_values_that_are_not_finite_are_left_out_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        output = TinyModule().processor(torch.randn(2, 5), record_trajectories=True)
    energy = torch.full_like(output.landings.energy, float("nan"))
    energy[0, 0] = 1.0
    broken = dataclasses.replace(output, landings=dataclasses.replace(output.landings, energy=energy))
    assert _histograms(broken)["flow_values/energy"].tolist() == [1.0]
    assert "not finite: flow_values/energy" in caplog.text


def test_final_z_is_where_the_flow_was_before_projection() -> None:
    with torch.no_grad():
        output = TinyModule(**{"movement.scale": 0.1}).processor(torch.randn(2, 5), record_trajectories=True)
    histograms = _histograms(output)
    assert output.landings.projected.all()
    # The final place is at most one displacement away from the place before the last step.
    assert output.trajectories is not None
    before = output.trajectories.position[-2, ..., 2].flatten()
    last_move = output.trajectories.displacement[-1].flatten()
    assert ((histograms["flow_values/z"] - before).abs() <= last_move + 1e-6).all()


@pytest.mark.parametrize("name", ["every_n_epochs", "samples", "max_flows"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_values_out_of_range(name: str, value: Any) -> None:
    values = {"every_n_epochs": 1, "samples": 1, "max_flows": 1, name: value}
    with pytest.raises(ConfigError, match=rf"callbacks\.flow_monitor\.{name} = "):
        FlowMonitor(**values)
