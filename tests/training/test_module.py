"""The LightningModule: training, metrics and checkpoints."""

import gc
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from energy_flow.checkpoints import format as checkpoints
from energy_flow.config import compose
from energy_flow.core.energy_lattice import Landings
from energy_flow.core.rollout import RolloutSettings
from energy_flow.errors import ConfigError, NoLandingError, NotFiniteError
from energy_flow.metrics.retrieval import retrieval_metrics
from energy_flow.settings import read
from energy_flow.training.losses import embedding_losses
from energy_flow.training.module import EnergyFlowModule

DIM = 12
TINY = (
    "lattice.width=5",
    "lattice.height=4",
    "lattice.depth=6",
    "model.energy_dim=2",
    "model.features=6",
    "model.hidden_size=8",
    "model.skip=false",
    "loss.candidates=batch",  # the loaders here are lists of rows
    "loss.learn_temperature=false",
    "data.batch_size=8",
    "optimizer.warmup_steps=3",
)
LIVELY = (
    "lattice.movement.scale=0.5",
    "lattice.movement.warmup_steps=0",
    "lattice.noise.std=0.1",
    "lattice.spawn.enabled=true",
    "lattice.noise.z=true",
)


def make_module(*overrides: str) -> EnergyFlowModule:
    seed_everything(3, verbose=False)
    return EnergyFlowModule.from_config(compose(*TINY, *overrides), DIM)


def make_rows(num_rows: int) -> list[dict[str, Tensor]]:
    """A task that can be learned: a fixed rotation of random directions."""
    generator = torch.Generator().manual_seed(0)
    source = functional.normalize(torch.randn(num_rows, DIM, generator=generator), dim=-1)
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator)).Q
    target = source @ rotation
    return [
        {"source": s, "target": t, "row": torch.tensor(i)} for i, (s, t) in enumerate(zip(source, target, strict=True))
    ]


def make_loader(num_rows: int, batch_size: int = 8) -> DataLoader:
    return DataLoader(make_rows(num_rows), batch_size=batch_size)  # type: ignore[arg-type]


def make_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**defaults, **options})


class LossCurve(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))


class LiveTensors(Callback):
    """Number and bytes of all tensors alive after some batches."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.seen = at, {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.at:
            gc.collect()
            # Only plain tensors count, because compilers leave tensors without memory.
            alive = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter)]
            with_graph = sum(tensor.grad_fn is not None for tensor in alive)
            self.seen[batch_idx] = (len(alive), sum(tensor.nbytes for tensor in alive), with_graph)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("lattice.spawn.enabled=true", "lattice.noise.std=0.05")])
def test_memory_after_batch_50_is_memory_after_batch_3(overrides: tuple[str, ...]) -> None:
    seed_everything(0, verbose=False)
    config = compose("size=debug", "loss=in_batch", "model.hidden_size=16", *overrides)
    live = LiveTensors((2, 49))
    make_trainer(live, limit_train_batches=50, log_every_n_steps=1).fit(
        EnergyFlowModule.from_config(config, DIM), make_loader(400)
    )
    assert live.seen[49] == live.seen[2]


def test_a_sample_without_landing_ends_training_before_the_optimiser_steps() -> None:
    overrides = ("lattice.filter.enabled=true", "lattice.filter.min_displacement=100.0")
    module = make_module(*overrides)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(NoLandingError, match=r"8 samples without a single landing \(samples 0, 1"):
        make_trainer().fit(module, make_loader(16))
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_faults_of_every_accumulated_batch_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    original, calls = module.processor.lattice.landings, []

    def lose_the_second_batch(storage: Any) -> Landings:
        landings = original(storage)
        calls.append(1)
        if len(calls) == 2:
            landings.landed[3] = False
        return landings

    monkeypatch.setattr(module.processor.lattice, "landings", lose_the_second_batch)
    with pytest.raises(NoLandingError, match=r"1 samples without a single landing \(samples 3 "):
        make_trainer(accumulate_grad_batches=3).fit(module, make_loader(24))


def test_an_evaluation_with_nan_ends_and_names_the_row() -> None:
    rows = make_rows(16)
    rows[13]["source"] = torch.full((DIM,), torch.nan)
    loader = DataLoader(rows, batch_size=8)  # type: ignore[arg-type]
    for evaluate in (make_trainer().validate, make_trainer().test, make_trainer().predict):
        with pytest.raises(
            NotFiniteError, match=r"1 samples \(rows 13 of the (validation |test |)data\).*look at these rows"
        ):
            evaluate(make_module("lattice.spawn.enabled=true"), loader)
    pairs = [(row["source"], row["target"]) for row in rows]
    with pytest.raises(NotFiniteError, match=r"1 samples \(samples 5 of the batch\)"):
        make_trainer().validate(make_module(), DataLoader(pairs, batch_size=8))  # type: ignore[arg-type]


def test_a_checkpoint_within_an_epoch_knows_its_step(tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    make_trainer(Save()).fit(make_module(), make_loader(32))
    for step in range(1, 5):
        checkpoint = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert checkpoint["state_dict"]["processor.optimizer_step"] == step == checkpoint["global_step"]


def test_overflow_is_logged_with_the_needed_number_and_the_key(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ("lattice.spawn.enabled=true", "lattice.spawn.threshold=0.0001", "lattice.max_flows_per_sample=21")
    with caplog.at_level(logging.WARNING, "energy_flow"):
        make_trainer().fit(make_module(*overrides), make_loader(32))
    messages = [record.getMessage() for record in caplog.records if "overflow" in record.getMessage()]
    assert messages
    assert "lattice.max_flows_per_sample = 21. Raise it to" in messages[0]
    assert len(messages) < 4, "logged again only if more is needed than before"


def test_biases_norms_and_cell_values_are_not_decayed() -> None:
    module = make_module()
    make_trainer(max_steps=1).fit(module, make_loader(8))
    optimizer = module.optimizers()
    decayed, rest = optimizer.param_groups
    names = {parameter: name for name, parameter in module.named_parameters()}
    not_decayed = {names[parameter] for parameter in rest["params"]}
    assert rest["weight_decay"] == 0
    assert decayed["weight_decay"] == 0.01
    assert not_decayed == {name for name in names.values() if "bias" in name or "cell_value" in name}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


def test_the_rate_warms_up_and_decays_to_its_final_share() -> None:
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    make_trainer(Rates(), max_steps=11).fit(
        make_module("optimizer.lr=1.0e-2", "optimizer.final_lr=0.1"), make_loader(88)
    )
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[7] == pytest.approx(0.01 * 0.55)  # halfway between step 3 and step 11
    assert all(late < early for early, late in itertools.pairwise(rates[3:]))


def test_an_endless_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs = -1"):
        make_trainer(max_epochs=-1).fit(make_module(), make_loader(8))


def test_validation_metrics_are_those_of_the_whole_split() -> None:
    module, loader = make_module(), make_loader(30, batch_size=7)
    [reported] = make_trainer().validate(module, loader, verbose=False)
    rows = next(iter(make_loader(30, batch_size=30)))
    with torch.no_grad():
        output = module.eval()(rows["source"])
    expected = retrieval_metrics(output.embedding, rows["target"])
    losses = embedding_losses(output.embedding, rows["target"], module.loss.temperature)
    assert {name: reported[f"val/{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert reported["val/contrastive"] == pytest.approx(float(losses["contrastive"]), rel=1e-5)
    assert reported["val/cosine_loss"] == pytest.approx(float(losses["cosine"]), rel=1e-5)
    assert reported["val/loss"] == reported["val/contrastive"]
    assert reported["val/flows/landed"] > 0


def test_repeated_rows_count_once() -> None:
    module = make_module()
    once = make_trainer().validate(module, make_loader(20), verbose=False)[0]
    padded = [*make_rows(20), make_rows(20)[0], make_rows(20)[7]]
    twice = make_trainer().validate(module, DataLoader(padded, batch_size=11), verbose=False)[0]  # type: ignore[arg-type]
    assert twice["val/mrr"] == pytest.approx(once["val/mrr"], rel=1e-6)
    assert twice["val/loss"] == pytest.approx(once["val/loss"], rel=1e-5)


def test_a_custom_loader_of_pairs_and_predict() -> None:
    rows = make_rows(32)
    source, target = (torch.stack([row[name] for row in rows]) for name in ("source", "target"))
    loader = DataLoader(TensorDataset(source, target), batch_size=8)
    module, trainer = make_module(), make_trainer()
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["val/mrr"] > 0
    predicted = trainer.predict(module, DataLoader(TensorDataset(source), batch_size=8))
    assert predicted is not None
    assert torch.allclose(torch.cat(predicted), module.eval()(source).embedding, atol=1e-6)


def test_a_loader_of_float64_pairs_and_batches_without_targets() -> None:
    rows = make_rows(16)
    source, target = (torch.stack([row[name] for row in rows]).double() for name in ("source", "target"))
    make_trainer().fit(make_module(), DataLoader(TensorDataset(source, target), batch_size=8))
    bare = DataLoader([{"source": row["source"], "row": row["row"]} for row in rows], batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"a batch is a dict with source, row: give a dict with 'source' and"):
        make_trainer().fit(make_module(), bare)


def test_noise_without_rows_is_refused_with_the_remedy() -> None:
    rows = make_rows(8)
    loader = DataLoader(TensorDataset(*(torch.stack([r[n] for r in rows]) for n in ("source", "target"))), batch_size=8)
    with pytest.raises(ConfigError, match=r"lattice\.noise\.std = 0\.1.*'row'"):
        make_trainer().fit(make_module("lattice.noise.std=0.1"), loader)


def test_a_checkpoint_has_its_provenance_and_plain_types(tmp_path: Path) -> None:
    module = make_module(*LIVELY)
    module.run_config = {"seed": 3}
    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, make_loader(16))
    path = tmp_path / "module.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    info = checkpoint[checkpoints.KEY]
    assert info["config"] == {"seed": 3}
    assert info["embedding_dim"] == DIM
    assert info["data_fingerprint"] == {}
    assert info["versions"]["torch"] == str(torch.__version__)
    assert checkpoint["state_dict"]["processor.optimizer_step"] == 4
    again = EnergyFlowModule.load_from_checkpoint(path)
    source = torch.randn(3, DIM)
    assert torch.equal(again.eval()(source).embedding, module.eval()(source).embedding)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_geometry_and_energies_stay_in_float32(precision: str) -> None:
    dtypes: set[torch.dtype] = set()

    class Spy(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            landings = pl_module.processor.last_output.landings
            dtypes.update({landings.xy.dtype, landings.distance.dtype, landings.energy.dtype})

    make_trainer(Spy(), precision=precision, max_steps=2).fit(make_module(*LIVELY), make_loader(16))
    assert dtypes == {torch.float32}


def test_bf16_trains_like_float32() -> None:
    curves = {}
    for precision in ("32-true", "bf16-mixed"):
        curves[precision] = LossCurve()
        make_trainer(curves[precision], precision=precision, max_epochs=4).fit(make_module(), make_loader(64))
    assert curves["bf16-mixed"].losses[-1] == pytest.approx(curves["32-true"].losses[-1], rel=0.05)


def test_automatic_rollout_settings_equal_the_default_config() -> None:
    assert read(RolloutSettings, compose()["rollout"], "rollout") == RolloutSettings.automatic()


def test_training_needs_an_optimiser_section() -> None:
    config = {**compose(*TINY), "optimizer": None}
    module = EnergyFlowModule.from_config(config, DIM)
    with pytest.raises(ConfigError, match="optimizer = None: the module can't be trained"):
        module.configure_optimizers()
