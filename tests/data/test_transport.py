"""Travelling energies: formulas compared with slow loops, seed, borders, settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from energy_flow.core.energy_lattice import EnergyLattice, Landings
from energy_flow.data import EnergyDataModule, TransportSettings, read_data_settings
from energy_flow.errors import ConfigError
from tests.helpers import lattice_settings

SECTION: dict[str, Any] = {
    "name": "transport",
    "field": "rotation_swirl",
    "strength": 1.0,
    "contrast": 0.7,
    "width": 6,
    "height": 5,
    "waves": 4,
    "train": 7,
    "val": 4,
    "test": 3,
    "surface_seed": 2,
    "normalize": False,
    "batch_size": 3,
    "eval_batch_size": 4,
    "num_workers": 0,
    "timeout": 60.0,
    "seed": 1,
}


def settings(**changes: Any) -> TransportSettings:
    found = read_data_settings({**SECTION, **changes})
    assert isinstance(found, TransportSettings)
    return found


def slow_fold(value: float) -> float:
    """Reflect at -1 and 1, one crossing at a time."""
    while not -1 <= value <= 1:
        value = 2 - value if value > 1 else -2 - value
    return value


def slow_landing(field: str, strength: float, x: float, y: float, energy: float) -> tuple[float, float]:
    if field == "shear":
        return slow_fold(x + strength * (y / 2 + energy)), y
    angle = strength * energy
    new_x = math.cos(angle) * x - math.sin(angle) * y
    new_y = math.sin(angle) * x + math.cos(angle) * y
    vx, vy = x - 0.5, y + 0.25
    swirl = strength / 2 * math.exp(-2 * (vx * vx + vy * vy))
    return slow_fold(new_x - swirl * vy), slow_fold(new_y + swirl * vx)


def slow_target(
    source: list[float], field: str, strength: float, contrast: float, width: int, height: int
) -> list[float]:
    """A loop over flows and cells. The weight of a cell is the tent max(0, 1 - |distance in cells|) per axis."""
    energy_sum, share_sum, mass = ([0.0] * len(source) for _ in range(3))
    for index, energy in enumerate(source):
        x, y = 2 * (index % width) / (width - 1) - 1, 2 * (index // width) / (height - 1) - 1
        x, y = slow_landing(field, strength, x, y, energy)
        for cell in range(len(source)):
            over_x = abs((x + 1) * (width - 1) / 2 - cell % width)
            over_y = abs((y + 1) * (height - 1) / 2 - cell // width)
            weight = max(0.0, 1 - over_x) * max(0.0, 1 - over_y)
            mass[cell] += weight
            share_sum[cell] += weight * math.exp(contrast * abs(energy))
            energy_sum[cell] += weight * math.exp(contrast * abs(energy)) * energy
    return [e / (share + max(0.0, 1 - m)) for e, share, m in zip(energy_sum, share_sum, mass, strict=True)]


def slow_energy(coefficients: Tensor, x: float, y: float) -> float:
    waves, total = len(coefficients), 0.0
    for j in range(waves):
        for k in range(waves):
            wave = math.cos(j * math.pi * (x + 1) / 2) * math.cos(k * math.pi * (y + 1) / 2)
            total += float(coefficients[j, k]) * wave
    return math.tanh(total / (waves + 1))


@pytest.mark.parametrize("field", ["rotation_swirl", "shear"])
@pytest.mark.parametrize(("strength", "contrast"), [(0.7, 0.0), (3.0, 1.5)])
def test_targets_against_a_slow_loop(field: str, strength: float, contrast: float) -> None:
    """The larger strength crosses borders, some of them twice."""
    data = settings(field=field, strength=strength, contrast=contrast, width=5, height=7).open("train")
    source, target = data.all()
    for row in range(len(source)):
        expected = slow_target(source[row].tolist(), field, strength, contrast, 5, 7)
        assert target[row].tolist() == pytest.approx(expected, abs=2e-5)  # float32, places amplified by the cells


def test_sources_against_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(7, 4, 4, generator=generator)

    class Drawn:
        def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> Any:
            assert shape == drawn.shape
            return drawn.numpy()

    monkeypatch.setattr("numpy.random.default_rng", lambda seed: Drawn())
    source, _ = settings().open("train").all()
    for row, cell in ((0, 0), (1, 29), (3, 8), (6, 17)):
        x, y = 2 * (cell % 6) / 5 - 1, 2 * (cell // 6) / 4 - 1
        assert source[row, cell].item() == pytest.approx(slow_energy(drawn[row], x, y), abs=1e-6)


def test_levels_have_unit_variance() -> None:
    source, _ = settings(train=2000, width=16, height=16, waves=8).open("train").all()
    level = 2 * torch.atanh(source.double())
    assert source.abs().max() < 1
    # A centre at the border represents half a cell, in a corner a quarter.
    weight = torch.ones(16)
    weight[[0, -1]] = 0.5
    weight = torch.outer(weight, weight).flatten() / 15**2
    assert (level.square() * weight).sum(1).mean().item() == pytest.approx(1, abs=0.05)
    assert level.mean().item() == pytest.approx(0, abs=0.02)


def test_a_finer_plane_has_the_same_surfaces() -> None:
    """Every second cell centre of a plane with 2W - 1 cells is a cell centre of a plane with W cells."""
    coarse, _ = settings().open("train").all()
    fine, _ = settings(width=11, height=9).open("train").all()
    torch.testing.assert_close(fine.view(-1, 9, 11)[:, ::2, ::2].flatten(1), coarse, rtol=0, atol=1e-6)


def test_landings_beyond_a_border_are_reflected() -> None:
    shear = settings(field="shear", strength=1.0)
    energy = torch.zeros(1, 30)
    energy[0, 29] = 0.8  # the corner (1, 1): 1 + 1/2 + 0.8 = 2.3 -> -0.3
    energy[0, 0] = -0.25  # the corner (-1, -1): -1 - 1/2 - 0.25 = -1.75 -> -0.25
    landings = shear.landings(energy)
    torch.testing.assert_close(landings[0, 29], torch.tensor([-0.3, 1.0]))
    torch.testing.assert_close(landings[0, 0], torch.tensor([-0.25, -1.0]))
    everywhere = settings(strength=5.0).landings(settings(train=200).open("train").all()[0])
    assert everywhere.abs().max() <= 1


def test_the_displacement_depends_on_place_and_energy() -> None:
    for field in ("rotation_swirl", "shear"):
        travel = settings(field=field, strength=0.5)
        weak, strong = (travel.landings(torch.full((1, 30), energy)) for energy in (0.1, 0.6))
        start = settings(strength=1e-9).landings(torch.zeros(1, 30))
        assert (weak - strong).norm(dim=-1).mean() > 0.1, field
        assert (weak - start)[0].std(dim=0).norm() > 0.05, field


def test_a_flow_lattice_can_be_exact() -> None:
    """Flows keep their energies, stay on the input plane for 4 steps, and land at the true places."""
    data = settings(width=7, height=7, contrast=0.7)
    source, target = data.open("train").all()
    batch, cells = source.shape
    lattice = EnergyLattice(lattice_settings(width=7, height=7, depth=8), 1, torch.nn.Flatten())
    landings = Landings(
        landed=torch.ones(batch, cells, dtype=torch.bool),
        projected=torch.ones(batch, cells, dtype=torch.bool),
        xy=data.landings(source),
        plane=torch.zeros(batch, cells, dtype=torch.int64),
        distance=torch.ones(batch, cells),
        steps=torch.full((batch, cells), 4),
        energy=source[..., None],
    )
    torch.testing.assert_close(lattice.collect_completed_flows_direct(landings), target)


def test_the_same_seed_gives_the_same_data() -> None:
    first, again = settings().open("train"), settings(batch_size=2, seed=9, num_workers=1).open("train")
    for ours, theirs in zip(first.all(), again.all(), strict=True):
        assert torch.equal(ours, theirs)
    assert first.fingerprint == again.fingerprint
    more = settings(train=9).open("train")
    # More rows change the first ones only by rounding, because the matrix products have another shape.
    torch.testing.assert_close(more.all()[0][:7], first.all()[0], rtol=0, atol=1e-6)


def test_splits_and_seeds_differ() -> None:
    same = {"train": 50, "val": 50, "test": 50}
    splits = [settings(**same).open(split) for split in ("train", "val", "test")]
    splits.append(settings(**same, surface_seed=3).open("train"))
    sources = [split.all()[0] for split in splits]
    for index, source in enumerate(sources):
        for other in sources[:index]:
            closest = torch.cdist(source, other).min()
            assert closest > 0.1, "no row is in two splits"
    assert len({split.fingerprint for split in splits}) == 4


@pytest.mark.parametrize(
    "change",
    [{"field": "shear"}, {"strength": 1.1}, {"contrast": 0.8}, {"width": 7}, {"height": 6}, {"waves": 3}, {"train": 8}],
    ids=str,
)
def test_fingerprints_depend_on_the_settings_of_the_rows(change: dict[str, Any]) -> None:
    assert settings(**change).open("train").fingerprint != settings().open("train").fingerprint


def test_batches_have_the_form_of_other_data() -> None:
    data = EnergyDataModule(settings())
    data.setup("fit")
    assert data.dim == 30
    assert set(data.fingerprint) == {"train", "val", "test"}
    batches = list(data.train_dataloader())
    assert [len(batch["row"]) for batch in batches] == [3, 3], "the incomplete one is left out"
    source, target = data.splits()["train"].all()
    for batch in batches:
        assert batch["source"].dtype == batch["target"].dtype == torch.float32
        assert batch["row"].dtype == torch.int64
        assert torch.equal(batch["source"], source[batch["row"]])
        assert torch.equal(batch["target"], target[batch["row"]])
    assert [batch["row"].tolist() for batch in data.test_dataloader()] == [[0, 1, 2]]
    one = data.splits()["val"][3]
    assert one["source"].shape == (30,)
    assert one["row"].item() == 3


def test_returned_tensors_are_copies() -> None:
    dataset = settings().open("val")
    dataset.all()[0].zero_()
    dataset.__getitems__([0, 1])["target"].zero_()
    source, target = dataset.all()
    assert source.abs().min(dim=1).values.max() > 0
    assert target[:2].abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalize": True}, r"data\.normalize = true: .*lose it\. Set data\.normalize=false"),
        ({"waves": 6}, r"data\.waves = 6: 6 x 5 cells .* at most 5 waves\. Lower it"),
        ({"field": "swril"}, r"data\.field = 'swril'.*'rotation_swirl' or 'shear'"),
        ({"strength": 0.0}, r"data\.strength = 0\.0: .*greater than 0"),
        ({"strength": math.nan}, r"data\.strength = nan"),
        ({"contrast": -0.1}, r"data\.contrast = -0\.1: .*greater than or equal to 0"),
        ({"contrast": math.inf}, r"data\.contrast = inf: .*finite"),
        ({"width": 1}, r"data\.width = 1: .*greater than or equal to 2"),
        ({"test": 1}, r"data\.test = 1: .*greater than or equal to 2"),
        ({"train": "train.npz"}, r"data\.train = 'train\.npz': .*integer"),
        ({"surface_seed": -1}, r"data\.surface_seed = -1"),
        ({"wave": 3}, r"data\.wave: unknown key; did you mean waves"),
        ({"name": "transprot"}, r"data\.name = 'transprot': must be one of reverse_dictionary, files, transport"),
        ({"name": ["transport"]}, r"data\.name = \['transport'\]"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)
