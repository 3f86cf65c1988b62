"""Which folder a run writes to: a new one, or that of a run that was killed and goes on."""

import fcntl
import logging
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

from energy_flow.atomic import UNFINISHED, write_whole
from energy_flow.checkpoints.format import beside, damage
from energy_flow.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

FINISHED = "finished"  # the file that says that a run has all its results
_TRACES = ("checkpoints/*.ckpt", "metrics.json", "tensorboard/events*", "csv/metrics.csv")
_START = ("resume", "ckpt_path")  # how a run is started, not what it trains
_locked: set[int] = set()  # descriptors


class RunFolder(Callback):
    """Before Hydra writes anything: with `resume=auto` finds the run that goes on, else refuses a folder that is used.

    A Hydra callback; Hydra turns errors of callbacks into warnings, so these end the program here.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "resume" not in config or not is_first_process():  # not training, or a process that another one started
            return
        try:
            if config.resume == "auto" and not _is_given(config, "hydra.run.dir"):
                self._go_on_with_the_newest(config)
            _check_use(Path(config.hydra.run.dir), config)
        except OmegaConfBaseException:
            return  # Hydra meets it next, and says so
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    def _go_on_with_the_newest(self, config: DictConfig) -> None:
        place = Path(config.paths.log_dir, config.task_name, "runs")
        found = unfinished_runs(place, config)
        if not found:
            print(f"resume = auto: no unfinished run with this config below {place}: a new one begins")
            return
        others = f", the newest of {len(found)} unfinished ones with this config" if len(found) > 1 else ""
        print(f"resume = auto: going on with {found[0]}{others}")
        with open_dict(config):
            config.hydra.run.dir = str(found[0])


def unfinished_runs(place: Path, config: DictConfig) -> list[Path]:
    """Runs with this config below a folder that have a checkpoint and not all their results; the newest first."""
    started = []
    for saved in place.glob("*/.hydra/config.yaml"):
        folder = saved.parent.parent
        unfinished = not (folder / FINISHED).exists() and any(folder.glob("checkpoints/*.ckpt"))
        if unfinished and not differing_keys(_load(saved), config):
            started.append((saved.stat().st_mtime, folder))
    return [folder for _, folder in sorted(started, reverse=True)]


def differing_keys(one: DictConfig, other: DictConfig) -> list[str]:
    """Keys whose resolved values differ, but for where a run writes and how it was started."""
    flat = [_flat("", _resolved(config)) for config in (one, other)]
    return [key for key in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(key, ...) != flat[1].get(key, ...)]


def is_first_process() -> bool:
    """Whether this is the process that writes; a launcher tells the others their number in the environment."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # not above: `check` doesn't need Lightning

    return getattr(rank_zero_only, "rank", 0) == 0


def is_finished(folder: Path) -> bool:
    """Whether a run has all its results."""
    return (folder / FINISHED).is_file()


def mark_finished(folder: Path) -> None:
    """Say that a run has all its results; on the first process."""
    if is_first_process():
        write_whole(folder / FINISHED, f"{datetime.now().isoformat(timespec='seconds')}\n".encode())


def mark_unfinished(folder: Path) -> None:
    """A run that had all its results trains on; on the first process."""
    if is_first_process():
        (folder / FINISHED).unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run's folder for this process alone, without what a killed one left half written.

    The lock dies with the process. Processes that another one started are let in.

    Raises:
        ConfigError: another process trains in it, or it can't be made.
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
    _locked.add(descriptor)
    try:
        for path in (*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"*/*{UNFINISHED}")):
            path.unlink()
        yield
    finally:
        _locked.discard(descriptor)
        os.close(descriptor)


def newest_whole(folder: Path) -> Path | None:
    """The checkpoint in a folder to go on from; None: there is none. Damaged ones are named, and left where they are.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    found = beside(folder / "any.ckpt")
    for path in found:
        reason = damage(path)
        if reason is None:
            return path
        log.warning("%s: damaged (%s), not used", path, reason)
    if found:
        raise CheckpointError(
            f"resume = auto: all checkpoints in {folder} are damaged ({', '.join(path.name for path in found)}). "
            "Remove them to begin anew"
        )
    return None


def _check_use(folder: Path, config: DictConfig) -> None:
    """See that a folder is new, or that its run is asked to go on and no other process does.

    Raises:
        ConfigError: it isn't.
    """
    if not any(path for trace in _TRACES for path in folder.glob(trace)):
        return
    ckpt_path = config.ckpt_path
    if config.resume == "auto":
        saved = folder / ".hydra" / "config.yaml"
        differing = differing_keys(_load(saved), config) if saved.is_file() else []
        if differing:
            raise ConfigError(
                f"hydra.run.dir = {folder}: its run has another config: {', '.join(differing[:5])} differ. Repeat its "
                "overrides, or give ckpt_path instead of resume=auto to go on with these"
            )
    elif ckpt_path is None or folder.resolve() not in Path(ckpt_path).expanduser().resolve().parents:
        raise ConfigError(
            f"hydra.run.dir = {folder}: holds a run, which would be overwritten. Go on with it by resume=auto, or "
            "give another folder"
        )
    os.close(_lock(folder))
    if config.resume == "auto" and (folder / ".hydra" / "config.yaml").is_file():
        with open_dict(config):
            config.hydra.output_subdir = None  # a kill while Hydra writes the same files again would leave half of them


def _lock(folder: Path) -> int:
    """Lock a folder; closing the descriptor gives it back."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"run folder {folder}: another process trains in it. Wait for it, or end it") from None
    return descriptor


def _forget_in_child() -> None:
    """Data workers must not hold a killed run's folder for as long as they take to notice."""
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def _is_given(config: DictConfig, key: str) -> bool:
    return any(word.lstrip("+").startswith(f"{key}=") for word in config.hydra.overrides.hydra)


def _load(path: Path) -> DictConfig:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def _resolved(config: DictConfig) -> dict[str, Any]:
    config = OmegaConf.create(
        {key: value for key, value in config.items_ex(resolve=False) if key not in ("hydra", *_START)}
    )
    config.paths = dict.fromkeys(config.get("paths", {}), "")
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _flat(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, item in value.items() for k, v in _flat(f"{key}.{name}" if key else name, item).items()}
    return {key: value}
