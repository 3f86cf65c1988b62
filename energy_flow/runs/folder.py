"""Choose and lock the folder of a training run: a new one, or the folder of a killed run that resumes.

Training needs a POSIX system (Linux or macOS): the lock is `flock`, which ends with its process, also after SIGKILL.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from energy_flow.atomic import UNFINISHED, atomic_write
from energy_flow.errors import ConfigError
from energy_flow.settings import flatten

try:
    import fcntl
except ImportError:  # Windows: everything but training works
    fcntl = None  # type: ignore[assignment]

FINISHED = "finished"  # the file that marks a run with all its results
_TRACES = ("checkpoints/*.ckpt", "metrics.json", "tensorboard/events*", "csv/metrics.csv")  # of a run in a folder
_START = ("resume", "ckpt_path")  # keys of the way a run starts, which don't change the training
_locks: set[int] = set()  # open file descriptors


class RunFolder(Callback):
    """Choose the folder before Hydra writes anything: find the run to resume, or refuse a folder that is in use.

    A Hydra callback. Hydra turns the errors of callbacks into warnings, so this one exits itself.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "resume" not in config or not is_first_process():  # no training, or a process that another one started
            return
        try:
            given = any(word.lstrip("+").startswith("hydra.run.dir=") for word in config.hydra.overrides.hydra)
            if config.resume == "auto" and not given:
                self._resume_newest(config)
            _check_use(Path(config.hydra.run.dir), config)
        except OmegaConfBaseException:
            return  # Hydra meets the same error next, and reports it
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def _resume_newest(self, config: DictConfig) -> None:
        parent = Path(config.paths.log_dir, config.task_name, "runs")
        found = unfinished_runs(parent, config)
        if not found:
            print(f"resume = auto: no unfinished run with this config in {parent}: starting a new one")
            return
        others = f", the newest of {len(found)} unfinished runs with this config" if len(found) > 1 else ""
        print(f"resume = auto: resuming {found[0]}{others}")
        with open_dict(config):
            config.hydra.run.dir = str(found[0])


def unfinished_runs(parent: Path, config: DictConfig) -> list[Path]:
    """Run folders in `parent` with this config that have a checkpoint and not all their results; the newest first."""
    started = []
    for saved in parent.glob("*/.hydra/config.yaml"):
        folder = saved.parent.parent
        unfinished = not (folder / FINISHED).exists() and any(folder.glob("checkpoints/*.ckpt"))
        if unfinished and not _differing_keys(saved, config):
            started.append((saved.stat().st_mtime, folder))
    return [folder for _, folder in sorted(started, reverse=True)]


def _differing_keys(saved: Path, config: DictConfig) -> list[str]:
    """Keys whose resolved values differ from a saved config, except for the paths of a run and the way it starts.

    A missing key counts as null: a run of an older version lacks newer keys.
    """
    one, other = _resolved(OmegaConf.load(saved)), _resolved(config)
    return [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]


def is_first_process() -> bool:
    """Whether this is the process that writes; launchers number the others in their environment."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # not above: `check` doesn't need Lightning

    return getattr(rank_zero_only, "rank", 0) == 0


def is_finished(folder: Path) -> bool:
    """Whether a run has all its results."""
    return (folder / FINISHED).is_file()


def mark_finished(folder: Path) -> None:
    """Mark a run that has all its results; on the first process."""
    if is_first_process():
        atomic_write(folder / FINISHED, f"{datetime.now().isoformat(timespec='seconds')}\n")


def mark_unfinished(folder: Path) -> None:
    """Remove the mark of a finished run that trains longer; on the first process."""
    if is_first_process():
        (folder / FINISHED).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for this process and those that it starts; remove the half-written files of a killed one.

    Raises:
        ConfigError: another process trains in it, it can't be made, or the system isn't POSIX.
    """
    if not is_first_process():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"paths.output_dir = {folder}: can't be written ({error.strerror}). Give another folder"
        ) from error
    descriptor = _lock(folder)
    _locks.add(descriptor)
    try:
        for path in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"*/*{UNFINISHED}")):
            path.unlink()
        yield
    finally:
        _locks.discard(descriptor)
        os.close(descriptor)


def _check_use(folder: Path, config: DictConfig) -> None:
    """Raise a ConfigError unless a folder is new, or its run is to resume and no other process trains in it."""
    if not any(path for trace in _TRACES for path in folder.glob(trace)):
        return
    ckpt_path, saved = config.ckpt_path, folder / ".hydra" / "config.yaml"
    if config.resume == "auto":
        differing = _differing_keys(saved, config) if saved.is_file() else []
        if differing:
            raise ConfigError(
                f"hydra.run.dir = {folder}: its run has another config, these keys differ: {', '.join(differing[:5])}. "
                "Repeat its overrides; or, to continue with the new ones, give ckpt_path instead of resume=auto"
            )
    elif ckpt_path is None or folder.resolve() not in Path(ckpt_path).expanduser().resolve().parents:
        raise ConfigError(
            f"hydra.run.dir = {folder}: holds a run, which would be overwritten. Continue it with resume=auto, or "
            "give another folder"
        )
    os.close(_lock(folder))
    if config.resume == "auto" and saved.is_file():
        with open_dict(config):
            config.hydra.output_subdir = None  # Hydra would write the same files again, and a kill leave half of them


def _lock(folder: Path) -> int:
    """Lock a folder; closing the returned descriptor unlocks it."""
    if fcntl is None:
        raise ConfigError(
            "training runs on Linux and macOS only, because it locks its run folder the POSIX way. On Windows use WSL"
        )
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"run folder {folder}: another process trains in it. Wait for it, or end it") from None
    return descriptor


def _unlock_in_child() -> None:
    """Close the copies of a forked data worker: it would keep the folder of a killed run locked until it ends."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):  # POSIX
    os.register_at_fork(after_in_child=_unlock_in_child)


def _resolved(config: Any) -> dict[str, Any]:
    """Resolved values by their dotted keys, without those that a config may differ in."""
    config = OmegaConf.masked_copy(config, [key for key in config if key not in ("hydra", *_START)])
    config.paths = dict.fromkeys(config.get("paths", {}), "")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return flatten(plain)
