"""Loss, optimizer, metric and data of one's own: a package and a config folder of a user, through the command line."""

import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch

from tests.cli.helpers import Outcome, Program

PACKAGE = '''
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader


class Huber(nn.Module):
    def __init__(self, delta: float):
        super().__init__()
        self.delta = delta

    def forward(self, output, batch):
        return nn.functional.huber_loss(output.embedding, batch["target"], delta=self.delta)


class LargestError(Callback):
    """Logs `val/largest_error`."""

    def on_validation_epoch_start(self, trainer, pl_module):
        self.errors = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        output = pl_module(batch["source"], batch.get("row"))
        self.errors.append((output.embedding - batch["target"]).abs().max())

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/largest_error", torch.stack(self.errors).max())


class Silent(Callback):
    """Logs nothing."""


class Rotation(LightningDataModule):
    """A rotation of random directions, with a weight per row."""

    def __init__(self, rows: int, batch_size: int = 16, test: bool = True):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def _loader(self, seed, shuffle=False):
        generator = torch.Generator().manual_seed(seed)
        source = torch.randn(self.rows, 16, generator=generator)
        rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
        rows = [{"source": s, "target": t, "importance": s[0] ** 2} for s, t in zip(source, source @ rotation)]
        return DataLoader(rows, batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(1, shuffle=True)

    def val_dataloader(self):
        return self._loader(2)


class TestedRotation(Rotation):
    dim = 16

    def test_dataloader(self):
        return self._loader(3)


class Weighted(nn.Module):
    def forward(self, output, batch):
        return (batch["importance"][:, None] * (output.embedding - batch["target"]) ** 2).mean()


class Signs(torch.optim.Optimizer):
    """Steps by the sign of the gradient."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class NoValidation(LightningDataModule):
    def train_dataloader(self):
        return []


class Surface(Rotation):
    """Wrong shape."""

    def _loader(self, seed, shuffle=False):
        return DataLoader([{"source": torch.ones(2, 2), "target": torch.ones(2, 2)}] * 4)
'''

CONF = {
    "loss/huber.yaml": """
        defaults: [mse, _self_]
        mse: 0.0
        terms:
          huber: {_target_: own_package.Huber, weight: 2.0, delta: 0.1}
        """,
    "optimizer/signs.yaml": """
        _target_: own_package.Signs
        lr: 0.001
        schedule: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 2}
        freeze: [neuron]
        """,
    "callbacks/largest.yaml": """
        defaults: [default, _self_]
        largest: {_target_: own_package.LargestError}
        """,
    "data/rotation.yaml": """
        _target_: own_package.TestedRotation
        rows: 40
        batch_size: 16
        """,
}


@pytest.fixture
def own(program: Program) -> Iterator[Program]:
    (program.folder / "own_package.py").write_text(PACKAGE)
    for name, content in CONF.items():
        path = program.folder / "own_conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
    program.patch.syspath_prepend(str(program.folder))
    yield program
    sys.modules.pop("own_package", None)


def train(own: Program, *words: str) -> Outcome:
    return own.train(*words, f"--config-dir={own.folder / 'own_conf'}")


def refused(own: Program, *words: str, name: str = "train") -> str:
    message = own.refused(*words, f"--config-dir={own.folder / 'own_conf'}", program=name)
    return " ".join(message.split())


def test_a_loss(own: Program) -> None:
    outcome = train(own, "loss=huber", "optimized_metric=val/mse", "baselines.enabled=true")
    assert outcome.code == 0, outcome.err
    assert "only loss.terms.huber would train it" in " ".join(outcome.out.split())
    metrics = outcome.metrics()
    assert metrics["test/loss"] == pytest.approx(2 * metrics["test/huber"], rel=1e-6)


def test_a_metric_picks_the_best_checkpoint(own: Program) -> None:
    words = ("callbacks=largest", "optimized_metric=val/largest_error", "optimized_mode=min", "trainer.max_epochs=3")
    outcome = train(own, *words)
    assert outcome.code == 0, outcome.err
    best = torch.load(outcome.folder / "checkpoints" / "best.ckpt", weights_only=True)
    saved = next(state for name, state in best["callbacks"].items() if "BestCheckpoint" in name)
    assert saved["monitor"] == "val/largest_error"
    assert outcome.metrics()["val/largest_error"] <= float(saved["current_score"])


def test_a_metric_that_never_came(own: Program) -> None:
    words = ("optimized_metric=val/largest", "optimized_mode=min", "+callbacks.own._target_=own_package.Silent")
    outcome = train(own, *words)
    assert outcome.code == 1
    assert "optimized_metric = 'val/largest': the first validation didn't log it" in outcome.err
    assert "val/mrr" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_metric_that_is_not_finite(own: Program) -> None:
    """Early stopping would end the run at it without a word."""
    (own.folder / "own_nan.py").write_text(
        "from lightning.pytorch import Callback\n\n\nclass Nan(Callback):\n"
        "    def on_validation_epoch_end(self, trainer, pl_module):\n"
        "        pl_module.log('val/own', float('nan'))\n"
    )
    words = ("optimized_metric=val/own", "optimized_mode=min", "+callbacks.own._target_=own_nan.Nan")
    outcome = train(own, *words)
    assert outcome.code == 1
    assert "= 'val/own': it is nan at step" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("optimized_metric=val/own",), "must be one of val/mrr"),
        (("optimized_metric=val/own",), "for another one set optimized_mode, min or max"),
        (("optimized_metric=val/own", "optimized_mode=min"), "= 'val/own': no such metric"),
        (("optimized_metric=test/own", "optimized_mode=min"), "must be measured in a validation"),
        (("optimized_mode=min",), "val/mrr is best at its max. Leave it null"),
    ],
)
def test_a_metric_that_cannot_come(own: Program, words: tuple[str, ...], message: str) -> None:
    assert message in refused(own, *words)


def test_a_loss_can_be_optimised(own: Program) -> None:
    outcome = train(own, "optimized_metric=val/loss", "optimized_mode=min")
    assert outcome.code == 0, outcome.err
    assert outcome.metrics()["val/loss"] > 0


DATA = ("data=rotation", "loss.candidates=batch", "baselines.enabled=true")


def test_data(own: Program) -> None:
    """Train, test and resume with a data module; what needs whole splits is left out in words."""
    outcome = train(own, *DATA)
    assert outcome.code == 0, outcome.err
    out = " ".join(outcome.out.split())
    assert "data own_package.TestedRotation: batches of dimension 16" in out
    assert "baselines: left out, data._target_ gives batches, and they need whole splits" in out
    assert outcome.metrics()["test/mrr"] > 0
    assert not list(outcome.folder.glob("*.safetensors"))
    last = outcome.folder / "checkpoints" / "last.ckpt"
    resumed = train(own, *DATA, f"ckpt_path={last}", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert "resuming from step 3" in resumed.out
    assert "data._target_: its train_dataloader has no state_dict" in resumed.err + resumed.out
    of_files = own.evaluate(f"ckpt_path={last}")
    assert of_files.code == 0, of_files.err


def test_data_without_a_dimension_or_a_test(own: Program) -> None:
    outcome = train(own, *DATA, "data._target_=own_package.Rotation")
    assert outcome.code == 0, outcome.err
    assert "no test: data._target_ has no test_dataloader" in " ".join(outcome.out.split())


def test_further_entries_reach_the_loss(own: Program) -> None:
    outcome = train(own, *DATA, "+loss.terms.weighted._target_=own_package.Weighted")
    assert outcome.code == 0, outcome.err
    assert outcome.metrics()["test/weighted"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("loss.candidates=bank",), "loss.candidates = bank: needs all training targets at once"),
        (("data._target_=own_package.Huber", "+data.delta=1.0", "~data.rows"), "not a LightningDataModule"),
        (("data._target_=own_package.NoValidation", "~data.rows"), "has no method val_dataloader. Add it"),
        (("data._target_=own_package.Surface",), "has a source of shape [1, 2, 2]: must be a dict"),
        (("data._target_=own_package.Missing",), "there is no such class"),
    ],
)
def test_data_that_cannot_work(own: Program, words: tuple[str, ...], message: str) -> None:
    given = {word.split("=")[0] for word in words}
    rest = [word for word in DATA if word.split("=")[0] not in given]
    assert message in refused(own, *rest, *words)


@pytest.mark.parametrize("name", ["evaluate", "check", "predict"])
def test_other_programs_read_files(own: Program, name: str) -> None:
    words = ["data=rotation"] if name == "check" else ["data=rotation", "ckpt_path=any.ckpt"]
    message = refused(own, *words, name=name)
    if name == "check":
        assert "a data module of one's own gives batches, which only training reads. Give files" in message


def test_one_data_set_drawn_once_per_epoch(own: Program) -> None:
    """Reading the dimension from the first batch leaves no trace in the random numbers."""
    first, second = (
        train(own, *DATA, f"data._target_=own_package.{name}", "test=false").metrics()["val/mrr"]
        for name in ("Rotation", "TestedRotation")
    )
    assert first == second


def test_an_optimizer(own: Program) -> None:
    outcome = train(own, "optimizer=signs")
    assert outcome.code == 0, outcome.err
    last = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-5)
    resumed = train(own, "optimizer=signs", f"ckpt_path={outcome.folder}/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert resumed.code == 0, resumed.err
    assert own.train("optimizer=sgd").code == 0
    other = own.train("optimizer=sgd", f"ckpt_path={outcome.folder}/checkpoints/last.ckpt")
    assert "its optimiser keeps its settings" in other.err
