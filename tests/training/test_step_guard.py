"""A step with NaN or Inf changes neither weights nor moments nor later steps."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from energy_flow.training.batch import UnpackedBatch
from energy_flow.training.module import EnergyFlowModule
from energy_flow.training.optimizer import SkippingAdamW
from energy_flow.training.step_guard import StepGuard, propagate_nonfinite
from tests.helpers import tensors_of
from tests.training.runs import scalars
from tests.training.runs import trainer as logging_trainer
from tests.training.test_module import LIVELY, make_loader, make_module, make_rows, make_trainer

NAN, INF = float("nan"), float("inf")
STEPS, BATCH = 6, 8
Inject = Callable[[EnergyFlowModule, int], None]  # makes the given optimiser step bad


def now(module: EnergyFlowModule) -> int:
    return module.trainer.global_step


def in_source(value: float, name: str = "source") -> Inject:
    def inject(module: EnergyFlowModule, step: int) -> None:
        original = module._unpack

        def unpack(batch: Any) -> UnpackedBatch:
            found = original(batch)
            changed = getattr(found, name).clone()
            if now(module) == step:
                changed[2, 3] = value
            return dataclasses.replace(found, **{name: changed})

        module._unpack = unpack  # type: ignore[method-assign]

    return inject


def in_activation(part: str, value: float) -> Inject:
    def inject(module: EnergyFlowModule, step: int) -> None:
        def corrupt(_: Any, inputs: Any, output: Tensor) -> Tensor:
            wrong = torch.zeros_like(output)
            wrong.view(-1)[5] = value
            return output + wrong if now(module) == step else output

        module.processor.trained_parts()[part].register_forward_hook(corrupt)

    return inject


def in_gradient(name: str, value: float) -> Inject:
    def inject(module: EnergyFlowModule, step: int) -> None:
        def corrupt(parameter: Tensor) -> None:
            if now(module) == step:
                assert parameter.grad is not None
                parameter.grad.view(-1)[0] = value

        module.get_parameter(name).register_post_accumulate_grad_hook(corrupt)

    return inject


def in_loss(module: EnergyFlowModule, step: int) -> None:
    """Make the loss Inf while its gradients stay finite."""
    original = module._losses

    def losses(*args: Any) -> dict[str, Tensor]:
        found = original(*args)
        if now(module) == step:
            found["contrastive"] = found["contrastive"] + INF
        return found

    module._losses = losses  # type: ignore[method-assign]


def skip_step(module: EnergyFlowModule, step: int) -> None:
    """Do not call the optimiser in this step."""
    original = module.optimizer_step

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        if now(module) == step:
            closure()  # Lightning requires it
        else:
            original(epoch, batch_idx, optimizer, closure)

    module.optimizer_step = optimizer_step  # type: ignore[method-assign]


FAULTS: dict[str, tuple[Inject, str]] = {
    "nan in source": (in_source(NAN), "NaN in the source (rows"),
    "inf in source": (in_source(INF), "Inf, or numbers too large to square, in the source (rows"),
    "nan in target": (in_source(NAN, "target"), "NaN in the target (rows"),
    "nan in map in": (in_activation("map_in", NAN), "NaN in the input surface (map in) (rows"),
    "inf in map in": (
        in_activation("map_in", INF),
        "Inf, or numbers too large to square, in the input surface (map in) (rows",
    ),
    "inf in map out": (
        in_activation("map_out", -INF),
        "Inf, or numbers too large to square, in the output embedding (map out) (rows",
    ),
    "inf in loss": (in_loss, "Inf, or numbers too large to square, in the contrastive loss (rows"),
    "nan in gradient": (in_gradient("processor.carrier.energy_head.bias", NAN), "NaN in the gradient of processor.c"),
    "inf in gradient": (
        in_gradient("processor.carrier.energy_head.bias", -INF),
        "Inf, or numbers too large to square, in the gradient of processor.c",
    ),
    # It is finite, but its square isn't: AdamW's second moment would be Inf, and the weight would never change again.
    "huge gradient": (
        in_gradient("processor.carrier.energy_head.bias", 1e20),
        "Inf, or numbers too large to square, in the gradient of processor.c",
    ),
}


def fit(inject: Inject, step: int, **options: Any) -> Trainer:
    """Run a short training with warm-up, decay and noise, and one bad step."""
    module = make_module(*LIVELY, "optimizer.lr=1.0e-2")
    inject(module, step)
    batches = STEPS * options.get("accumulate_grad_batches", 1)
    trainer = make_trainer(**options)
    trainer.fit(module, make_loader(BATCH * batches))
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """All state on which later steps depend."""
    optimizer, [schedule] = trainer.optimizers[0], trainer.lr_scheduler_configs
    return {
        **{name: value.clone() for name, value in trainer.lightning_module.state_dict().items()},
        **tensors_of(optimizer.state_dict()["state"], "optimizer"),
        "rates": torch.tensor([group["lr"] for group in optimizer.param_groups]),
        "schedule": torch.tensor(schedule.scheduler.last_epoch),
        "steps": torch.tensor(trainer.global_step),
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.isfinite().all(), name
        assert torch.equal(found[name], value), name


def messages_of_the_guard(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.endswith("step_guard")]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_step_changes_nothing(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    """Weights, moments and later steps have the same bits; schedule, noise and `global_step` count the step."""
    inject, reason = FAULTS[fault]
    expected = state(fit(skip_step, 2))
    with caplog.at_level(logging.WARNING, "energy_flow"):
        trainer = fit(inject, 2)
    found = state(trainer)
    assert_equal(found, expected)
    assert found["steps"] == found["schedule"] == found["processor.optimizer_step"] == STEPS
    counted = {float(value) for name, value in found.items() if name.endswith(".step")}
    assert counted == {STEPS - 1}, "the optimiser counts only the steps that it took"
    assert trainer.lightning_module.guard.skipped == 1
    [message] = messages_of_the_guard(caplog)
    assert message.startswith("step 2 skipped: ")
    assert reason in message


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 1.0},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 1.0},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("fault", ["nan in source", "inf in loss", "inf in gradient"])
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_a_bad_first_or_last_step_and_other_options(fault: str, step: int, options: dict[str, Any]) -> None:
    expected = state(fit(skip_step, step, **options))
    trainer = fit(FAULTS[fault][0], step, **options)
    found = state(trainer)
    if step == STEPS - 1:
        assert trainer.lightning_module.guard.skipped == 1, "found even without a following step"
    assert_equal(found, expected)


def test_without_the_guard_values_become_nonfinite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this, the test above would show nothing."""
    monkeypatch.setattr(EnergyFlowModule, "on_before_optimizer_step", lambda self, optimizer: self._faults.take())
    found = state(fit(FAULTS["nan in source"][0], 2, gradient_clip_val=1.0))
    assert not all(value.isfinite().all() for value in found.values())


def check_step_guard(value: float, device: str) -> None:
    """Put `value` among finite gradients of every shape. 1e20 is finite, but its square in float32 isn't."""
    for shape, dtype in (
        ((), torch.float32),
        ((3,), torch.float32),
        ((700, 1100), torch.float32),
        ((5,), torch.bfloat16),
    ):
        healthy, nonfinite = (torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for _ in range(2))
        healthy.grad, nonfinite.grad = torch.ones_like(healthy), torch.zeros_like(nonfinite)
        nonfinite.grad.view(-1)[-1] = value
        for named, bad in (({"healthy": healthy, "nonfinite": nonfinite}, 1), ({"healthy": healthy}, 0)):
            found = StepGuard().check(0, named.items(), [], scaling=False)
            assert (float(found), found.dtype, found.device) == (bad, torch.float32, nonfinite.device), shape


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e20])
def test_any_nonfinite_gradient_is_found(value: float) -> None:
    check_step_guard(value, "cpu")


def test_only_a_nonfinite_loss_changes_gradients() -> None:
    weight = torch.randn(5, requires_grad=True)
    for shift, finite in ((0.0, True), (INF, False), (NAN, False)):
        loss = weight.square().sum() + shift
        [plain] = torch.autograd.grad(loss, weight, retain_graph=True)
        [found] = torch.autograd.grad(propagate_nonfinite(loss), weight)
        assert torch.equal(found, plain) if finite else found.isnan().all()
        assert not finite or torch.equal(propagate_nonfinite(loss), loss)


def test_averaged_weights_skip_the_bad_step_too() -> None:
    found = []
    for inject in (skip_step, FAULTS["nan in source"][0]):
        average = EMAWeightAveraging(decay=0.5)
        fit(inject, 2, callbacks=[average])
        assert average._average_model is not None
        found.append({name: value.clone() for name, value in average._average_model.state_dict().items()})
    assert_equal(found[1], found[0])


def test_rows_of_every_accumulated_batch_are_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "energy_flow"):
        fit(FAULTS["nan in gradient"][0], 1, accumulate_grad_batches=2)
    messages = messages_of_the_guard(caplog)
    assert "(rows 16, 17, 18, 19, 20, 21, 22, 23 of the training data; rows 24, 25" in messages[0]
    assert messages[1] == f"rows of a batch of step 1: {list(range(16, 24))}"
    assert messages[2] == f"rows of a batch of step 1: {list(range(24, 32))}"


def test_the_count_is_logged(tmp_path: Path) -> None:
    module = make_module()
    in_source(NAN)(module, 1)
    logging_trainer(tmp_path).fit(module, make_loader(BATCH * STEPS))
    # The device checks a step; the host reads the result when it checks the next one.
    assert scalars(tmp_path)["train/skipped"] == [(step, float(step > 2)) for step in range(STEPS)]


def test_pairs_without_rows(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [(row["source"], row["target"]) for row in make_rows(24)]
    pairs[13] = (torch.full_like(pairs[0][0], NAN), pairs[13][1])
    module = make_module()
    make_trainer().fit(module, DataLoader(pairs, batch_size=8))  # type: ignore[arg-type]
    assert "step 1 skipped: NaN in the source (samples 5 of the batch)" in caplog.text


class Scales(Callback):
    """Keep the scale of the gradient scaler after every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.seen.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]


def fit_in_float16(inject: Inject | None, scale: float) -> tuple[EnergyFlowModule, list[float]]:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    module, scales = make_module("optimizer.lr=1.0e-2"), Scales()
    if inject:
        inject(module, 7)
    make_trainer(scales, plugins=[plugin], gradient_clip_val=1.0).fit(module, make_loader(BATCH * 10))
    return module, scales.seen


def test_the_search_of_a_gradient_scaler_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "energy_flow"):
        module, scales = fit_in_float16(None, 2.0**18)
    halved = sum(late < early for early, late in zip([2.0**18, *scales], scales, strict=False))
    assert 0 < halved < 10, "a test of nothing"
    assert (module.guard.skipped, module.guard.in_row) == (halved, 0)
    assert not messages_of_the_guard(caplog)
    assert {float(entry["step"]) for entry in module.optimizers().optimizer.state.values()} == {10.0 - halved}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_skip_at_scale_one_is_a_fault(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "energy_flow"):
        module, _ = fit_in_float16(in_loss, scale)
    assert module.guard.skipped == 1
    assert ["step 7 skipped: Inf, or numbers too large to square, in the contrastive loss" in caplog.text] == [
        scale == 1.0
    ]
    assert {float(entry["step"]) for entry in module.optimizers().optimizer.state.values()} == {9.0}
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_plain_adamw_state_can_be_resumed_and_skipped() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    before = torch.optim.AdamW([{"params": [weight]}])
    weight.grad = torch.ones(3)
    before.step()
    optimizer = SkippingAdamW([{"params": [weight]}])
    optimizer.load_state_dict(before.state_dict())
    for bad, step in ((1.0, 1), (0.0, 2)):
        held = weight.detach().clone()
        optimizer.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        optimizer.step()
        assert torch.equal(weight, held) == bool(bad)
        assert float(optimizer.state[weight]["step"]) == step


class InfiniteLossOnOne(Callback):
    """Make the loss Inf on the second process in the second step, with finite gradients."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            in_loss(pl_module, 1)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        found = {**pl_module.state_dict(), "skipped": torch.tensor(pl_module.guard.skipped)}
        torch.save(found, f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


@pytest.mark.slow
def test_all_processes_skip_the_same_steps(tmp_path: Path) -> None:
    options = {"devices": 2, "strategy": "ddp_spawn", "default_root_dir": tmp_path}
    make_trainer(InfiniteLossOnOne(), **options).fit(make_module(*LIVELY), make_loader(64))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["skipped"] == 1
    assert_equal(first, second)
