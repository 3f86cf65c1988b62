"""Settings, splits, loaders, and the order of rows under Lightning: shuffled, resumed, distributed."""

import logging
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from energy_flow.data import EnergyDataModule, read_data_settings
from energy_flow.data.sampling import epoch_sampler
from energy_flow.errors import ConfigError, DataError

CONF = Path(__file__).parents[2] / "conf"


def config(group="files", **changes):
    """The settings of `data=<group>` with some changes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(overrides=["+seed=3", f"+data={group}"])
    return read_data_settings({**OmegaConf.to_container(composed, resolve=True)["data"], **changes})


def pairs(path, rows=45, dim=4, seed=0):
    random = np.random.default_rng(seed)
    np.savez(path, source=random.normal(size=(rows, dim)), target=random.normal(size=(rows, dim)))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {split: pairs(tmp_path / f"{split}.npz", seed=i) for i, split in enumerate(("train", "val", "test"))}


def rows(loader):
    return [batch["row"].tolist() for batch in loader]


def test_the_embedded_dictionary(caplog):
    data = EnergyDataModule(config("reverse_dictionary"))
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert [len(split) for split in (data.train, data.val, data.test)] == [16000, 1000, 1000]
    assert data.dim == 768
    for side in data.train.all():
        torch.testing.assert_close(side.norm(dim=1), torch.ones(16000))
    assert data.val.names[:2] == ["simply", "wince"]
    assert [len(fingerprint) for fingerprint in data.fingerprint.values()] == [64, 64, 64]
    assert len(set(data.fingerprint.values())) == 3
    assert "16,000 pairs of dimension 768, stored as int8 with row scales, L2-normalised" in caplog.text
    assert len(caplog.records) == 3


def test_the_embedded_dictionary_keeps_its_retrieval_ranks():
    data = EnergyDataModule(config("reverse_dictionary"))
    data.setup("test")
    source, target = data.test.all()
    scores = source @ target.T
    best = (scores.diagonal()[:, None] >= scores).all(dim=1).float().mean()
    assert best.item() == pytest.approx(0.331, abs=0.002)  # published R@1 of the identity


def test_splits_are_checked_once_and_fingerprints_kept(files):
    data = EnergyDataModule(config(**files))
    data.setup("fit")
    train = data.train
    data.setup("test")
    assert data.train is train


@pytest.mark.parametrize(
    ("stage", "given", "missing"),
    [
        ("fit", ["train"], "val"),
        ("fit", ["val", "test"], "train"),
        ("validate", ["train"], "val"),
        ("test", ["train", "val"], "test"),
    ],
)
def test_a_stage_without_its_files(files, stage, given, missing):
    data = EnergyDataModule(config(**{split: files[split] for split in given}))
    with pytest.raises(ConfigError, match=rf"data\.{missing} = null: {stage} needs it; give data\.{missing}=PATH"):
        data.setup(stage)


def test_optional_splits(files):
    data = EnergyDataModule(config(train=files["train"], val=files["val"]))
    data.setup("fit")
    assert data.test is None
    with pytest.raises(ConfigError, match=r"data\.test = null"):
        data.test_dataloader()
    only_test = EnergyDataModule(config(test=files["test"]))
    only_test.setup("test")
    assert list(only_test.fingerprint) == ["test"]
    assert only_test.dim == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"data\.train = null: data=files needs files"),
        ({"name": "reverse_dictionary", "val": "x.npz"}, r"data\.val = 'x\.npz'.*set data=files"),
        ({"test": "x", "batch_size": 0}, r"data\.batch_size = 0: .*greater than or equal to 1"),
        ({"test": "x", "eval_batch_size": 0}, r"data\.eval_batch_size = 0"),
        ({"test": "x", "num_workers": -1}, r"data\.num_workers = -1"),
        ({"test": "x", "dimension": 0}, r"data\.dimension = 0"),
        ({"test": ["a.npy"]}, r"data\.test = \['a\.npy'\]: .*at least 2 items"),
        ({"test": "x", "batchsize": 3}, r"data\.batchsize: unknown key; did you mean batch_size"),
        ({"name": "other", "test": "x"}, r"data\.name = 'other'"),
    ],
)
def test_invalid_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_dimensions_must_agree(files, tmp_path):
    other = pairs(tmp_path / "other.npz", dim=5)
    with pytest.raises(DataError, match=r"data\.val: .*other\.npz: dimension 5, but data\.train has 4"):
        EnergyDataModule(config(train=files["train"], val=other)).setup("fit")
    with pytest.raises(DataError, match=r"dimension 4, but data\.dimension = 768; set data\.dimension=4"):
        EnergyDataModule(config(**files, dimension=768)).setup("fit")
    EnergyDataModule(config(**files, dimension=4)).setup("fit")


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8] * 5), (45, [45]), (100, [45]), (44, [44])])
def test_training_leaves_out_the_last_incomplete_batch_unless_it_is_the_only_one(files, batch_size, sizes):
    data = EnergyDataModule(config(**files, batch_size=batch_size))
    data.setup("fit")
    loader = data.train_dataloader()
    assert [len(batch) for batch in rows(loader)] == sizes
    assert len(loader) == len(sizes)


def test_evaluation_reads_every_row_in_order(files):
    data = EnergyDataModule(config(**files, eval_batch_size=20))
    data.setup("fit")
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert rows(loader) == [[*range(20)], [*range(20, 40)], [*range(40, 45)]]


def test_the_order_depends_on_seed_and_epoch(files):
    def order(seed, epoch):
        data = EnergyDataModule(config(**files, seed=seed))
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [row for batch in rows(loader) for row in batch]

    assert order(1, 2) == order(1, 2)
    assert sorted(order(1, 2)) == list(range(45))
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_loading_leaves_the_global_random_state_alone(files):
    data = EnergyDataModule(config(**files))
    data.setup("fit")
    before = torch.get_rng_state()
    rows(data.train_dataloader())
    rows(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_together_have_the_batches_of_one(num_processes):
    dataset = range(45)
    alone = list(epoch_sampler(dataset, 5, 4 * num_processes, 1, 0))
    shares = [list(epoch_sampler(dataset, 5, 4, num_processes, process)) for process in range(num_processes)]
    for start in range(0, 44 // num_processes - 4, 4):
        joined = {row for share in shares for row in share[start : start + 4]}
        assert joined == set(alone[start * num_processes : (start + 4) * num_processes])


class Recorder(lightning.LightningModule):
    """Records the rows of each training epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, batch, batch_idx):
        self.seen.setdefault(self.current_epoch, []).append(batch["row"].tolist())
        return self.weight * batch["source"].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_end(self):
        folder = Path(self.trainer.default_root_dir)
        torch.save(self.seen, folder / f"seen_{self.global_rank}.pt")


def fit(files, folder, *, epochs=4, workers=0, resume=None, callbacks=(), batch_size=8, **trainer):
    recorder = Recorder()
    lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=list(callbacks),
        default_root_dir=folder,
        **trainer,
    ).fit(
        recorder,
        datamodule=EnergyDataModule(config(**files, num_workers=workers, batch_size=batch_size)),
        ckpt_path=resume,
    )
    return recorder.seen


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_resumed_epochs_have_the_rows_of_an_uninterrupted_run(files, tmp_path, workers, limit):
    straight = fit(files, tmp_path, workers=workers, limit_train_batches=limit)
    assert len({str(seen) for seen in straight.values()}) == 4
    save = ModelCheckpoint(tmp_path, save_last=True)
    first = fit(files, tmp_path, epochs=2, workers=workers, limit_train_batches=limit, callbacks=[save])
    second = fit(files, tmp_path, workers=workers, limit_train_batches=limit, resume=tmp_path / "last.ckpt")
    assert sorted(second) == [2, 3]
    assert first | second == straight


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_interrupted_within_an_epoch_continues_with_the_next_batch(files, tmp_path, workers):
    save = ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1, filename="{step}")
    straight = fit(files, tmp_path, workers=workers, callbacks=[save])
    resumed = fit(files, tmp_path, workers=workers, resume=tmp_path / "step=8.ckpt")
    assert resumed == {1: straight[1][3:], 2: straight[2], 3: straight[3]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_on_the_joined_batches_of_one(files, tmp_path):
    alone = fit(files, tmp_path, epochs=2, batch_size=8)
    fit(files, tmp_path, epochs=2, batch_size=4, devices=2, strategy="ddp_spawn")
    shares = [torch.load(tmp_path / f"seen_{rank}.pt") for rank in range(2)]
    for epoch, batches in alone.items():
        joined = [sorted(a + b) for a, b in zip(shares[0][epoch], shares[1][epoch], strict=True)]
        assert joined == [sorted(batch) for batch in batches]
