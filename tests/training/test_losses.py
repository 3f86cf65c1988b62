"""Loss terms against explicit formulas, gradients, the joined batch of several processes, and settings."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from energy_flow.errors import ConfigError
from energy_flow.settings import read
from energy_flow.training.losses import (
    Candidates,
    LossSettings,
    directions,
    embedding_losses,
    surface_loss,
    weighted,
)

CONF = Path(__file__).parents[2] / "conf"
SECTION = {
    **{"cosine": 0.0, "mse": 0.0, "surface": 0.0, "contrastive": 1.0},
    **{"candidates": "batch", "temperature": 0.05, "learn_temperature": False},
}
TOLERANCE = 1e-12  # float64 rounding of sums of a few dozen terms of order 10


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def settings(**changes: Any) -> LossSettings:
    return read(LossSettings, {**SECTION, **changes}, "loss")


def by_hand(prediction: Tensor, target: Tensor, temperature: float) -> dict[str, float]:
    """The loss terms in plain Python, in a loop over samples."""
    p, t = prediction.tolist(), target.tolist()
    cosines = [[dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for b in t] for a in p]
    squares = [(x - y) ** 2 for a, b in zip(p, t, strict=True) for x, y in zip(a, b, strict=True)]
    entropies = [
        math.log(sum(math.exp(cosine / temperature) for cosine in row)) - row[i] / temperature
        for i, row in enumerate(cosines)
    ]
    return {
        "cosine": sum(1 - row[i] for i, row in enumerate(cosines)) / len(p),
        "mse": sum(squares) / len(squares),
        "contrastive": sum(entropies) / len(p),
    }


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_terms_are_the_formulas(temperature: float) -> None:
    prediction, target = numbers(5, 3, seed=1), numbers(5, 3, seed=2)
    losses = embedding_losses(prediction, target, temperature)
    expected = by_hand(prediction, target, temperature)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=TOLERANCE), name


def test_terms_of_a_perfect_prediction() -> None:
    target = torch.eye(4, dtype=torch.float64)
    losses = embedding_losses(target, target, 0.5)
    assert losses["cosine"].item() == pytest.approx(0, abs=TOLERANCE)
    assert losses["mse"].item() == 0
    assert losses["contrastive"].item() == pytest.approx(math.log(1 + 3 * math.exp(-2)), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["cosine", "mse", "contrastive"])
def test_gradients(name: str) -> None:
    prediction, target = numbers(4, 3, seed=3).requires_grad_(), numbers(4, 3, seed=4).requires_grad_()
    torch.autograd.gradcheck(lambda p, t: embedding_losses(p, t, 0.3)[name], (prediction, target))


def test_contrastive_gradient_with_joined_targets() -> None:
    prediction, targets = numbers(2, 3, seed=5).requires_grad_(), numbers(5, 3, seed=6)

    def contrastive(p: Tensor) -> Tensor:
        return embedding_losses(p, targets[3:5], 0.3, Candidates.of_rows(targets, 3, 2))["contrastive"]

    torch.autograd.gradcheck(contrastive, (prediction,))


def test_processes_together_are_one_process_with_the_joined_batch() -> None:
    processes, own = 3, 4
    prediction = numbers(processes * own, 6, seed=7).requires_grad_()
    target = numbers(processes * own, 6, seed=8)
    joined = embedding_losses(prediction, target, 0.1)
    parts = [
        embedding_losses(prediction[i : i + own], target[i : i + own], 0.1, Candidates.of_rows(target, i, own))
        for i in range(0, processes * own, own)
    ]
    for name, whole in joined.items():
        mean = torch.stack([part[name] for part in parts]).mean()
        assert mean.item() == pytest.approx(whole.item(), rel=TOLERANCE), name
        (expected,) = torch.autograd.grad(whole, prediction, retain_graph=True)
        (actual,) = torch.autograd.grad(mean, prediction, retain_graph=True)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=TOLERANCE)
    alone = embedding_losses(prediction[:own], target[:own], 0.1)["contrastive"]
    assert alone.item() < parts[0]["contrastive"].item() - 0.1  # targets of the other process are negatives


def test_candidates_in_any_order_and_number() -> None:
    """The loss is the cross entropy with the row of each prediction, even if two predictions share a row."""
    prediction, bank, own = numbers(3, 4, seed=14), numbers(7, 4, seed=15), torch.tensor([5, 0, 5])
    loss = embedding_losses(prediction, bank[own], 0.2, Candidates(directions(bank), own))["contrastive"]
    one_by_one = []
    for row, index in zip(prediction.tolist(), own.tolist(), strict=True):
        cosines = [dot(row, other) / math.sqrt(dot(row, row) * dot(other, other)) for other in bank.tolist()]
        one_by_one.append(math.log(sum(math.exp(c / 0.2) for c in cosines)) - cosines[index] / 0.2)
    assert loss.item() == pytest.approx(sum(one_by_one) / 3, rel=TOLERANCE)


@pytest.mark.parametrize(("shape", "own"), [((7,), (3,)), ((7, 4, 1), (3,)), ((7, 4), (3, 1)), ((7, 4), ())])
def test_candidates_of_another_shape(shape: tuple[int, ...], own: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[G, D\], own .* \[B\]"):
        Candidates(torch.zeros(shape), torch.zeros(own, dtype=torch.int64))


def test_the_temperature_gets_a_gradient() -> None:
    prediction, target = numbers(4, 3, seed=16), numbers(4, 3, seed=17)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: embedding_losses(prediction, target, t)["contrastive"], (temperature,))


@pytest.mark.parametrize("start", [-1, 3])
def test_rows_outside_of_the_targets(start: int) -> None:
    with pytest.raises(ValueError, match="4 targets"):
        Candidates.of_rows(numbers(4, 3, seed=9), start, 2)


def test_mismatched_candidates() -> None:
    target = numbers(4, 3, seed=9)
    for candidates in (Candidates.of_rows(target, 0, 3), Candidates.of_rows(numbers(4, 2, seed=9), 0, 4)):
        with pytest.raises(ValueError, match=r"must be \[G, D\] and \[B\]"):
            embedding_losses(target, target, 0.1, candidates)


def test_a_duplicate_target_has_no_gradient_at_the_optimum() -> None:
    """If the two copies have probability 1/2 each, the loss is log 2 and its gradient is 0."""
    target = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    prediction = target.clone().requires_grad_()
    loss = embedding_losses(prediction[:1], target[:1], 0.01, Candidates.of_rows(target, 0, 1))["contrastive"]
    assert loss.item() == pytest.approx(math.log(2), rel=TOLERANCE)
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().max() < TOLERANCE


def test_float32_under_autocast() -> None:
    prediction, target = numbers(6, 40, seed=10, dtype=torch.float32), numbers(6, 40, seed=11, dtype=torch.float32)
    expected = embedding_losses(prediction, target, 0.05)
    surface = surface_loss(prediction, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = embedding_losses(prediction, target, 0.05)
        assert torch.equal(surface_loss(prediction, target), surface)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert value.dtype == torch.float32
    half = embedding_losses(prediction.bfloat16(), target, 0.05)
    assert all(value.dtype == torch.float32 for value in half.values())


@pytest.mark.parametrize(("prediction", "target"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((4,), (4,))])
def test_mismatched_shapes(prediction: tuple[int, ...], target: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        embedding_losses(torch.ones(prediction), torch.ones(target), 0.1)
    with pytest.raises(ValueError, match="surface"):
        surface_loss(torch.ones(*prediction, 1), torch.ones(*target, 2))


def test_surface_loss_leaves_the_target_alone() -> None:
    surface, target = numbers(2, 3, 2, seed=12).requires_grad_(), numbers(2, 3, 2, seed=13).requires_grad_()
    loss = surface_loss(surface, target)
    expected = sum((a - b) ** 2 for a, b in zip(surface.flatten().tolist(), target.flatten().tolist(), strict=True))
    assert loss.item() == pytest.approx(expected / 12, rel=TOLERANCE)
    loss.backward()
    assert target.grad is None
    torch.testing.assert_close(surface.grad, (2 / 12 * (surface - target)).detach(), rtol=1e-12, atol=1e-14)


def test_weighted_sums_the_terms_with_a_weight() -> None:
    losses = {"cosine": torch.tensor(2.0), "mse": torch.tensor(math.nan), "contrastive": torch.tensor(10.0)}
    assert weighted(losses, settings(cosine=0.5, contrastive=0.25)).item() == 3.5
    with pytest.raises(KeyError, match="surface"):
        weighted(losses, settings(surface=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mse": -0.5}, r"loss\.mse = -0\.5: .*greater than or equal to 0"),
        ({"temperature": 0.0}, r"loss\.temperature = 0\.0: .*greater than 0"),
        ({"temperature": math.inf}, r"loss\.temperature = inf: .*finite"),
        ({"contrastive": math.nan}, r"loss\.contrastive = nan: "),
        ({"contrastive": 0.0}, r"loss\.cosine, .*all 0.*loss\.contrastive=1\.0"),
        ({"contrastive": 0.0, "surface": 2.0}, r"loss\.surface = 2\.0.*never trains the map out.*loss\.contrastive=1"),
        ({"candidates": "all"}, r"loss\.candidates = 'all': .*'batch' or 'bank'"),
        (
            {"contrastive": 0.0, "cosine": 1.0, "learn_temperature": True},
            r"loss\.learn_temperature = true.*no term has a temperature.*loss\.learn_temperature=false",
        ),
        ({"contrastiv": 1.0}, r"loss\.contrastiv: unknown key; did you mean contrastive"),
    ],
)
def test_invalid_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("default", {"cosine": 0.0, "mse": 0.0, "surface": 0.0, "contrastive": 1.0}),
        ("cosine", {"cosine": 1.0, "mse": 0.0, "surface": 0.0, "contrastive": 0.0}),
        ("in_batch", {"cosine": 0.0, "mse": 0.0, "surface": 0.0, "contrastive": 1.0}),
        ("combined", {"cosine": 0.1, "mse": 0.1, "surface": 0.1, "contrastive": 1.0}),
    ],
)
def test_configs(name: str, weights: dict[str, float]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        section = OmegaConf.to_container(compose(overrides=[f"+loss={name}"])["loss"])
    loss = read(LossSettings, section, "loss")
    assert loss.weights() == weights
    assert loss.temperature == 0.05
    assert loss.candidates == ("batch" if name == "in_batch" else "bank")
