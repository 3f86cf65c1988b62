"""The plain PyTorch loop equals the framework, differences are found, and shares count the arithmetic of all steps."""

from contextlib import suppress
from typing import Any

import pytest
import torch

from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow_benchmarks import scaling, step, user_step
from energy_flow_benchmarks.findings import Row
from energy_flow_benchmarks.step import StepSettings, check, steps_of, usable_dtypes
from energy_flow_benchmarks.user_step import Recurrence, UserModel, gru_of, parameters_of
from energy_flow_benchmarks.workload import SizeSettings, Workload
from tests.benchmarks.training import tiny_size
from tests.helpers import GRADIENT_TOLERANCE, assert_near

CPU = torch.device("cpu")


def workload(**lattice: Any) -> Workload:
    size = tiny_size(lattice={"width": 4, "height": 3, **lattice}, model={"hidden_size": 8})
    return Workload.read(SizeSettings(**size), 6, CPU, seed=2)


def outcome(model: Any, parameters: dict[str, Any], embedding: torch.Tensor, cotangent: torch.Tensor) -> dict[str, Any]:
    out = model(embedding)
    found = torch.autograd.grad(out, list(parameters.values()), cotangent)
    return {"output": out, **dict(zip(parameters, found, strict=True))}


@pytest.mark.parametrize("ending", [False, True], ids=["no flow ends", "flows end"])
@pytest.mark.parametrize("recurrence", ["gru", "cells", "formula"])
def test_a_users_own_loop_is_a_flow_lattice(recurrence: Recurrence, ending: bool) -> None:
    movement = {"scale": 20.0 if ending else 1.0, "max_displacement": 0.6 if ending else 0.1}
    of = workload(movement=movement)
    processor = of.processor(engine="autograd").double()
    model = UserModel(of.processor().double(), recurrence)
    data = [value.double() for value in of.batch(3)]
    expected = outcome(lambda batch: processor(batch).embedding, dict(processor.named_parameters()), *data)
    assert (float(processor.last_output.statistics["active_share"]) < 1) == ending
    found = outcome(model, parameters_of(model), *data)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, GRADIENT_TOLERANCE, name)


def test_the_user_has_the_same_parameters_but_for_those_of_nn_gru() -> None:
    model = UserModel(workload().processor(), "gru")
    own, named = dict(model.processor.named_parameters()), parameters_of(model)
    replaced = {name for name in own if named[name] is not own[name]}
    assert replaced == {name for name in own if name.startswith("carrier.cells.")}
    assert all(torch.equal(own[name], named[name]) for name in own)
    assert len(list(gru_of(model.processor.carrier).parameters())) == len(replaced)


def test_all_variants_agree(nothing_compiles: None) -> None:
    check(workload().where_no_flow_ends(), batch=2)


@pytest.mark.slow
def test_compiled_variants_agree() -> None:
    check(workload().where_no_flow_ends(), batch=3)


@pytest.mark.parametrize("variant", [step.GRU, step.CELLS, step.COMPILED, step.TAPE, step.LEAN, step.CHUNKS])
@pytest.mark.parametrize("what", ["output", "gradient of carrier.cells.0.weight_hh"])
def test_a_variant_that_differs_is_found(
    nothing_compiles: None, monkeypatch: pytest.MonkeyPatch, variant: str, what: str
) -> None:
    plain = step._outcome

    def wrong(one: Any) -> dict[str, torch.Tensor]:
        found = plain(one)
        if one.parameters is wrong_step.parameters:
            found[what] = found[what] * 1.01
        return found

    of = workload().where_no_flow_ends()
    steps = steps_of(of, 2, "float32")
    wrong_step = steps[variant]()
    monkeypatch.setattr(step, "steps_of", lambda *_: {**steps, variant: lambda: wrong_step})
    monkeypatch.setattr(step, "_outcome", wrong)
    with pytest.raises(RuntimeError, match=f"{variant}: {what} differs"):
        check(of, 2)


def test_a_graph_is_for_a_gpu_and_compiled_tapes_for_a_cpu() -> None:
    names = list(steps_of(workload(), 2, "float32"))
    assert names[0] == step.EAGER
    assert step.GRAPHED not in names
    assert {step.TAPE_COMPILED, step.LEAN_COMPILED} < set(names)
    assert step.CHUNKS not in steps_of(workload(), 1, "float32")


def test_bf16_needs_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    dtypes, notes = usable_dtypes(["float32", "bfloat16"], CPU)
    assert (dtypes, len(notes)) == (["float32"], 1)
    assert "AMX" in notes[0]
    assert usable_dtypes(["float32"], CPU) == (["float32"], [])
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert usable_dtypes(["float32", "bfloat16"], CPU) == (["float32", "bfloat16"], [])


def test_references_are_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and the eager variants run in one piece and uncompiled, also where a setting `auto` chooses."""
    asked: list[dict[str, Any]] = []
    build = Workload.processor

    def recording(self: Workload, **rollout: Any) -> Any:
        asked.append(rollout)
        return build(self, **rollout)

    monkeypatch.setattr(Workload, "processor", recording)
    of = workload().where_no_flow_ends()
    step._expected(of, 2, "float32")
    steps_of(of, 2, "float32")[step.EAGER]()
    monkeypatch.setattr(scaling, "measure", lambda builds, *_: builds[scaling.EAGER]() and {})
    with suppress(KeyError):  # nothing was measured
        scaling._measure(of, 2, scaling.ScalingOnDevice(batches=[2], dtype="float32", repeats=1, min_seconds=0.0))
    assert asked == [{"engine": "autograd", "chunk": None, "compile": False}] * 3


def test_flows_that_end_early_end_the_benchmark() -> None:
    of = workload(movement={"scale": 20.0, "max_displacement": 0.6})
    with pytest.raises(RuntimeError, match="were active in all steps"):
        step._expected(of, 2, "float32")
    step._expected(of.where_no_flow_ends(), 2, "float32")


def test_arithmetic_of_a_step() -> None:
    size = SizeSettings(size="experiment")
    of = Workload.read(size, 6, CPU, seed=1)
    # 20 steps of 12,544 flows: [64 | 512] x 1536 and twice [512 | 512] x 1536, a multiply and an add, three times.
    assert of.arithmetic(16) == 3 * 20 * 12_544 * 2 * 1536 * (576 + 1024 + 1024)


def settings(**own: Any) -> StepSettings:
    cpu = {
        "sizes": [{**tiny_size(lattice={"width": 4, "height": 3}, model={"hidden_size": 8}), "batch": 2}],
        "dtypes": ["float32"],
        "check_samples": 2,
        "product": 16,
        "repeats": 1,
        "min_seconds": 0.0,
        **own,
    }
    return read(StepSettings, {"name": "step", "dim": 6, "cpu": cpu, "cuda": cpu}, "benchmark")


def of_steps(rows: list[Row]) -> dict[str, Row]:
    return {row.variant: row for row in rows if row.share is not None}


def test_findings(nothing_compiles: None) -> None:
    findings = step.run(settings(), CPU, 1, lambda _: None)
    products = [row for row in findings.rows if row.case == step.PRODUCT]
    assert [row.variant for row in products] == ["[16 x 16] · [16 x 16], fp32", "[24 x 8] · [8 x 24], fp32"]
    rows = of_steps(findings.rows)
    limit = rows.pop("arithmetic at the rate of 16³, fp32")
    arithmetic = 3 * 5 * 24 * 2 * 24 * (64 + 8 + 8 + 8)
    assert limit.seconds == pytest.approx(arithmetic * products[0].seconds / (2 * 16**3))
    assert limit.share == pytest.approx(1)
    assert list(rows) == [f"{name}, fp32" for name in steps_of(workload(), 2, "float32")]
    base = rows["eager, fp32"]
    for row in rows.values():
        assert row.size == 24
        assert row.peak_bytes is not None
        assert row.ratio == pytest.approx(base.seconds / row.seconds)
        assert row.share == pytest.approx(limit.seconds / row.seconds)
    assert len(findings.grids[1].lines) == len(rows)
    assert any("active share 100%" in note for note in findings.notes)


def test_a_step_of_another_output_ends_the_benchmark(nothing_compiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "check", lambda *_: None)
    plain = user_step.UserModel.forward
    monkeypatch.setattr(user_step.UserModel, "forward", lambda self, batch: plain(self, batch) * 1.2)
    with pytest.raises(RuntimeError, match=r"nn.GRU, fp32: output differs"):
        step.run(settings(), CPU, 1, lambda _: None)


@pytest.mark.parametrize(
    ("size", "parts"),
    [
        ({"size": "debgu"}, ("'debgu'", "did you mean debug?")),
        ({"size": "debug", "lattice": {"widht": 3}}, ("lattice.widht", "did you mean width?")),
        ({"size": "debug", "model": {"hidden_size": 0}}, ("model.hidden_size = 0", "greater than or equal to 1")),
    ],
)
def test_invalid_sizes(size: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Workload.read(SizeSettings(**size), 6, CPU, seed=1)
    for part in parts:
        assert part in str(error.value)


def test_a_preset_and_its_changes() -> None:
    of = Workload.read(SizeSettings(size="debug", lattice={"noise": {"std": 0.5}}), 6, CPU, seed=1)
    assert (of.lattice.width, of.model.hidden_size) == (20, 256)
    assert (of.lattice.noise.std, of.lattice.noise.z) == (0.5, False), "other keys stay"


def test_processors_of_a_workload_are_equal() -> None:
    first, second = (workload().processor(engine=engine).state_dict() for engine in ("autograd", "tape"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert int(first["optimizer_step"]) > workload().lattice.movement.warmup_steps
