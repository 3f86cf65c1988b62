"""An invalid config is refused before any training. The message has value, limit, key and remedy."""

import pytest
import torch

from tests.cli.helpers import Program, check_message, files_of_runs, spawn, write_pairs

UNKNOWN = [
    ("lattice.dpeth=3", "lattice.dpeth", "did you mean depth?"),
    ("+lattice.dpeth=3", "lattice.dpeth", "did you mean depth?"),
    ("lattice.movment.scale=3", "lattice.movment.scale", "did you mean movement?"),
    ("+lattice.movement.scael=3", "lattice.movement.scael", "did you mean scale?"),
    ("+foo=1", "foo", "known: baselines"),
    ("+trainer.max_epoch=3", "trainer.max_epoch", "did you mean max_epochs?"),
    ("+trainer.callbacks=[]", "trainer.callbacks", "the group `callbacks`"),
    ("+callbacks.early_stopping.patiance=3", "callbacks.early_stopping.patiance", "did you mean patience?"),
    ("+callbacks.foo=1", "callbacks.foo = 1", "_target_"),
    (
        "callbacks.early_stopping._target_=nope.Nope",
        "callbacks.early_stopping._target_ = nope.Nope",
        "there is no such class",
    ),
    ("model.carrier=lstm", "model.carrier = 'lstm'", "give model/carrier=lstm"),
    ("model.carrier.hiden_size=3", "model.carrier.hiden_size", "mean hidden_size?"),
    ("model.carrier.hidden_size=3", "model.carrier.hidden_size", "model/carrier=OPTION"),
    ("model/carrier=lsmt", "model/carrier = lsmt", "did you mean lstm?"),
    ("+data.x=1", "data.x", "known: batch_size"),
    ("+model.x=1", "model.x", "known: carrier"),
    ("size=smal", "size = smal", "did you mean small?"),
    ("sizee=small", "sizee", "did you mean size?"),
    ("nosuchgroup=x", "nosuchgroup", "known: ablation, baselines"),
    ("logger=nope", "logger = nope", "known: csv, tensorboard"),
    ("lattice=null", "a group is set to null", "name one of its options"),
    ("lattice.depth", "lattice.depth", "key=value"),
    ("lattice.depth=[1", "lattice.depth=[1", "key=value"),
    ("~nope", "nope", "does not exist"),
    ("task_name=${nope}", "nope", "not found"),
]

VALUES = [
    ("lattice.depth=0", "lattice.depth = 0", "greater than or equal to 1"),
    ("lattice.depth=abc", "lattice.depth = 'abc'", "integer"),
    ("lattice.depth=1.5", "lattice.depth = 1.5", "integer"),
    ("lattice.depth=null", "lattice.depth = null", "integer"),
    ("lattice.depth=", "lattice.depth = ''", "integer"),
    ("lattice.movement=3", "lattice.movement = 3", "keys scale, warmup_steps"),
    ("lattice.noise.std=-1", "lattice.noise.std = -1", "greater than or equal to 0"),
    ("lattice.noise.std=nan", "lattice.noise.std = nan", "finite"),
    ("lattice.deposit=foo", "lattice.deposit = 'foo'", "'bilinear' or 'nearest'"),
    ("lattice.max_flows_per_sample=3", "lattice.max_flows_per_sample = 3", "16 or more"),
    ("lattice.tensorized_storage_enabled=false", "tensorized_storage_enabled = False", "_enabled=true"),
    ("data.batch_size=0", "data.batch_size = 0", "greater than or equal to 1"),
    ("data.dimension=7", "data.dimension = 7", "data.dimension=16"),
    ("data.train=3", "data.train = 3", "a valid string, or"),
    ("data.train=null", "data.train = null", "data.train=PATH"),
    ("data.val=null", "data.val = null", "data.val=PATH"),
    ("rollout.engine=graph", "rollout.engine = 'graph'", "'auto', 'autograd' or 'tape'"),
    ("rollout.chunk=0", "rollout.chunk = 0", "'auto', or should be greater than or equal to 1"),
    ("rollout.compile=maybe", "rollout.compile = 'maybe'", "'auto'"),
    ("+rollout.chnuk=3", "rollout.chnuk", "did you mean chunk?"),
    ("optimizer.lr=-1", "optimizer.lr = -1", "greater than 0"),
    ("optimizer.lr=abc", "optimizer.lr = 'abc'", "number"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas[1] = 1.5", "less than 1"),
    ("trainer.max_epochs=-5", "trainer.max_epochs = -5", "greater than or equal to 1, or should be -1"),
    ("trainer.max_epochs=abc", "trainer.max_epochs = 'abc'", "integer"),
    ("trainer.max_epochs=-1", "trainer.max_epochs = -1", "where a run ends"),
    ("trainer.max_epochs=null", "trainer.max_epochs = null", "where a run ends"),
    ("trainer.precision=bf17", "trainer.precision = 'bf17'", "'bf16-mixed'"),
    ("trainer.precision=bf16-true", "trainer.precision = 'bf16-true'", "'bf16-mixed'"),
    ("trainer.devices=abc", "devices=abc", "int > 0"),
    ("trainer.accelerator=foo", "accelerator=foo", "Available names"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val = -1", "greater than or equal to 0"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval = 0", "greater than"),
    ("trainer.val_check_interval=100", "trainer.val_check_interval = 100", "an epoch has 4 batches"),
    ("+trainer.limit_val_batches=0", "limit_val_batches = 0", "callbacks.early_stopping=null"),
    ("+trainer.limit_train_batches=0", "trainer.limit_train_batches = 0", "no batch to train on"),
    ("+trainer.limit_train_batches=1.5", "1.5", "[0.0, 1.0]"),
    ("+trainer.min_epochs=abc", "trainer.min_epochs = 'abc'", "integer"),
    ("+trainer.inference_mode=abc", "trainer.inference_mode = 'abc'", "boolean"),
    ("trainer.strategy=nope", "strategy='nope'", "ddp"),
    ("seed=-1", "seed = -1", "greater than or equal to 0"),
    ("seed=abc", "seed = 'abc'", "integer"),
    ("loss.temperature=0", "loss.temperature = 0", "greater than 0"),
    ("loss.contrastive=0", "loss.contrastive are all 0", "loss.contrastive=1.0"),
    ("baselines=3", "a group is set to", "name one of its options"),
    ("baselines.training.epochs=0", "baselines.training.epochs = 0", "greater than or equal to 1"),
    ("test=maybe", "test = 'maybe'", "boolean"),
    ("callbacks.memory_cleanup.threshold=2", "callbacks.memory_cleanup.threshold = 2", "less than or equal to 0.6667"),
    ("callbacks.early_stopping.patience=abc", "callbacks.early_stopping.patience = 'abc'", "integer"),
    ("+callbacks.checkpoint.save_top_k=no", "callbacks.checkpoint.save_top_k = 'no'", "integer"),
    ("callbacks.early_stopping.patience=-1", "patience = -1", "must be at least 1"),
    ("callbacks.early_stopping.patience=0", "patience = 0", "must be at least 1"),
    ("callbacks.early_stopping.mode=foo", "callbacks.early_stopping", "min, max"),
    ("callbacks.early_stopping.monitor=val/mr", "callbacks.early_stopping.monitor = 'val/mr'", "did you mean val/mrr?"),
    ("optimized_metric=val/nope", "optimized_metric = 'val/nope'", "val/mrr"),
    ("ckpt_path=nope.ckpt", "ckpt_path = nope.ckpt", "no such file"),
]


@pytest.mark.parametrize(("override", "names", "remedy"), UNKNOWN + VALUES, ids=lambda value: value[:40])
def test_refused(program: Program, override: str, names: str, remedy: str) -> None:
    message = program.refused(override)
    assert names in message
    assert remedy in message


def test_rules_over_several_keys(program: Program) -> None:
    spawning = ("lattice.spawn.enabled=true", "lattice.filter.enabled=true")
    message = program.refused(*spawning, "lattice.filter.min_displacement=0.5")
    assert "lattice.filter.min_displacement = 0.5" in message
    assert "lattice.spawn.threshold = 0.1" in message
    message = program.refused("lattice.spawn.enabled=true", "lattice.max_flows_per_sample=15")
    assert "lattice.max_flows_per_sample = 15" in message
    two = program.refused("lattice.depth=0", "lattice.width=0")
    assert "lattice.depth = 0" in two
    assert "lattice.width = 0" in two


def test_the_users_value_is_shown_in_full(program: Program) -> None:
    rules = ("lattice.spawn.enabled=true", "lattice.filter.enabled=true", "lattice.spawn.threshold=0.1")
    message = program.refused(*rules, "lattice.filter.min_displacement=0.10000001")
    assert "lattice.filter.min_displacement = 0.10000001" in message


def test_the_remedy_for_a_metric_that_is_never_measured(program: Program) -> None:
    """The message names every callback that monitors the metric."""
    unmeasured = "+trainer.limit_val_batches=0"
    message = program.refused(unmeasured)
    assert "val/mrr would never be measured" in message
    remedy = [word for word in message.split() if word.endswith("=null")]
    assert sorted(remedy) == ["callbacks.checkpoint=null", "callbacks.early_stopping=null"]
    outcome = program.train(unmeasured, *remedy)
    assert (outcome.code, outcome.err) == (0, "")
    assert (outcome.folder / "checkpoints" / "last.ckpt").is_file()
    assert "callbacks.early_stopping=null" not in program.refused(unmeasured, "callbacks.early_stopping=null")


FOLDERS = [
    ("paths.log_dir={}/logs", "paths.log_dir", "Not a directory"),
    ("hydra.run.dir={}", "hydra.run.dir", "File exists"),
    ("paths.output_dir={}", "paths.output_dir = ", "File exists"),
    ("callbacks.checkpoint.dirpath={}/deeper", "callbacks.checkpoint.dirpath = ", "Not a directory"),
    ("callbacks.last_checkpoint.dirpath={}", "callbacks.last_checkpoint.dirpath = ", "File exists"),
    ("logger.tensorboard.save_dir={}/deeper", "logger.tensorboard.save_dir = ", "Not a directory"),
]


@pytest.mark.parametrize(("override", "key", "reason"), FOLDERS, ids=[row[0] for row in FOLDERS])
def test_unwritable_folders(program: Program, override: str, key: str, reason: str) -> None:
    """A file has the name of the folder, so even the superuser can't make the folder."""
    way = program.folder / "file"
    way.write_text("")
    message = program.refused(override.format(way))
    for part in (key, str(way), reason, "Give another folder"):
        assert part in message


def test_an_unwritable_sweep_folder(program: Program) -> None:
    way = program.folder / "file"
    way.write_text("")
    outcome = program.train("seed=1,2", f"paths.log_dir={way}", multirun=True)
    assert outcome.code == 1
    check_message(outcome.err)
    assert str(way) in outcome.err


def test_keys_of_other_options(program: Program) -> None:
    message = program.refused("logger=csv", "logger.tensorboard.prefix=x")
    assert "logger.tensorboard" in message


def test_a_config_file_that_is_not_yaml(program: Program) -> None:
    (program.folder / "mine" / "experiment").mkdir(parents=True)
    (program.folder / "mine" / "experiment" / "broken.yaml").write_text("lattice: [")
    message = program.refused("experiment=broken", f"hydra.searchpath=[{program.folder / 'mine'}]")
    assert "not valid YAML" in message
    assert "broken.yaml" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("override", ["trainer.accelerator=gpu", "trainer=gpu", "trainer=ddp"])
def test_a_missing_device(program: Program, override: str) -> None:
    message = program.refused(override)
    assert "accelerator=gpu" in message
    assert "trainer.accelerator=auto" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_half_precision_without_a_gpu_is_not_replaced_silently(program: Program) -> None:
    outcome = program.train("trainer.precision=16-mixed")
    assert outcome.code == 1
    assert "trainer.precision=bf16-mixed works" in outcome.err


def test_a_sweep_of_jobs_of_several_processes(program: Program) -> None:
    several = ("trainer.devices=2", "trainer.accelerator=cpu", "trainer.strategy=ddp")
    outcome = program.train("seed=1,2", *several, multirun=True)
    assert outcome.code == 1
    assert outcome.err.count(": trainer.devices: a multirun can't start several processes per job") == 2
    assert not list((program.folder / "logs").rglob("*.ckpt"))


def test_the_log_has_the_reason_too(program: Program) -> None:
    program.refused("lattice.depth=0")
    (log,) = (program.folder / "logs").rglob("train.log")
    assert "lattice.depth = 0" in log.read_text()


def test_training_needs_a_posix_system(program: Program) -> None:
    program.patch.setattr("energy_flow.runs.folder.fcntl", None)  # as on Windows
    message = program.refused()
    assert "training runs on Linux and macOS only" in message
    assert "On Windows use WSL" in message


def test_a_bug_keeps_its_traceback(program: Program) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("a bug")

    program.patch.setattr("energy_flow.train.build_trainer", broken)
    with pytest.raises(ValueError, match="a bug"):
        program.train()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program_name", "override", "part"),
    [
        ("train", "lattice.dpeth=3", "did you mean depth?"),
        ("train", "lattice.depth=0", "lattice.depth = 0"),
        ("train", "data.train=nope.safetensors", "no such file"),
        ("evaluate", "ckpt_path=nope.ckpt", "no such file"),
        ("evaluate", "trainer=cpu", "ckpt_path: missing"),
    ],
)
def test_in_a_separate_process(tmp_path, program_name: str, override: str, part: str) -> None:
    write_pairs(tmp_path)
    outcome = spawn(program_name, tmp_path, override)
    assert outcome.code == 1
    check_message(outcome.err)
    assert part in outcome.err
    assert outcome.out == ""
    assert not files_of_runs(tmp_path)


@pytest.mark.slow
def test_tracebacks_on_demand(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pairs(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    outcome = spawn("train", tmp_path, "lattice.dpeth=3")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
