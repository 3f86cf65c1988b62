"""What the entry points share: Hydra around them, and how errors reach the user."""

import errno
import functools
import gc
import logging
import os
import re
import shlex
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from energy_flow import config_reference, signals
from energy_flow.config import config_dir
from energy_flow.errors import ConfigError, EnergyFlowError
from energy_flow.settings import did_you_mean
from energy_flow.training.sweep_jobs import clear_error, write_error

log = logging.getLogger(__name__)

Task = Callable[[dict[str, Any]], Any]

# What Hydra raises for a config.
_HYDRAS = (HydraException, OmegaConfBaseException, ValueError)

# Errors of a disk that can't be written, and what helps.
_UNWRITABLE = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room or have the quota raised",
    errno.EROFS: "Make it writable",
    errno.EACCES: "Change its rights",
    errno.EPERM: "Change its rights",
}

# Unless this is set Hydra prints its errors itself, with a traceback or with advice that is wrong here.
_FULL_ERROR = "HYDRA_FULL_ERROR"


def application(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorator: a task on a plain config becomes a Hydra application.

    Errors that a user can mend end the program with their message and exit code 1, without a traceback. A job of a
    sweep that fails, in whatever way, doesn't keep the others from running; the sweep ends with exit code 1 then. After
    Ctrl-C the exit code is 130, after SIGTERM 143. `HYDRA_FULL_ERROR=1` brings the tracebacks back.
    """

    def decorate(task: Task) -> Callable[[], None]:
        asked = os.environ.get(_FULL_ERROR)

        def run(config: DictConfig) -> Any:
            clear_error(_run_folder())
            try:
                with _environment(_FULL_ERROR, asked):
                    return task(_plain(config))
            except (KeyboardInterrupt, SystemExit) as end:
                _end_run(end)
            except Exception as raised:
                error = _mendable(raised)
                _say(error)
                if is_multirun():
                    write_error(_run_folder(), error)
                elif isinstance(error, EnergyFlowError):
                    sys.exit(1)
                else:
                    raise
            gc.collect()  # the frames of an error hold all that the job had; the next job needs the memory
            return None

        start = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(run)

        @functools.wraps(task)
        def main() -> None:
            if any(word.startswith("--e") for word in sys.argv[1:]):
                print(
                    "error: --experimental-rerun: reads a pickle, which could run code; repeat the overrides",
                    file=sys.stderr,
                )
                sys.exit(1)
            OmegaConf.register_new_resolver("config_reference", lambda: _reference(config_name), replace=True)
            with signals.handled(), _writers_raise():
                try:
                    with _environment(_FULL_ERROR, "1"):
                        start()
                except KeyboardInterrupt as end:  # before or after the run
                    _leave(end)
                except (*_HYDRAS, OSError) as error:
                    if signals.received() is not None:  # what composes a config makes an error of it
                        _leave(KeyboardInterrupt())
                    ours = any(frame.f_code is run.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))
                    if asked == "1" or ours or not (isinstance(error, _HYDRAS) or _file_of(error) or unwritable(error)):
                        raise
                    print(f"error: {_explain(error, config_name)}", file=sys.stderr)
                    sys.exit(1)

        return main

    return decorate


def _reference(config_name: str) -> str:
    """The text of `--help`, with the options of the folder that `--config-dir` names."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    given = [Path(place.path.removeprefix("file://")) for place in places if place.provider == "command-line"]
    text = config_reference.help_text(config_name, [*given, Path(config_dir())])
    return text.replace("$", "$$")  # Hydra fills a string.Template with it


def unwritable(error: BaseException | None) -> str | None:
    """If an error comes from a disk that can't be written: which file, why, and what helps."""
    while error is not None:
        of_a_file = isinstance(error, OSError) and (error.filename or error.errno not in (errno.EACCES, errno.EPERM))
        if isinstance(error, OSError) and error.errno in _UNWRITABLE and of_a_file:
            in_run = HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir")
            somewhere = _run_folder() if in_run else "the disk"
            remedy = f"{_UNWRITABLE[error.errno]} and repeat the command"
            return f"{error.filename or somewhere}: {error.strerror}. {remedy}"
        error = error.__cause__
    return None


def _mendable(error: Exception) -> Exception:
    """What an error is to the user."""
    found = None if isinstance(error, EnergyFlowError) else unwritable(error)
    return error if found is None else EnergyFlowError(found)


@contextmanager
def _writers_raise() -> Iterator[None]:
    """TensorBoard's thread leaves its error to whoever writes next or closes: Python needn't print it as well."""
    shown = threading.excepthook

    def show(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            shown(args)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = shown


def _say(error: Exception) -> None:
    """The message of an error that a user can mend, the traceback of another one where Python won't show it."""
    ours = isinstance(error, EnergyFlowError)
    log.info("ended by an error: %s", error, exc_info=not ours)
    log.debug("where it was found", exc_info=ours)
    sys.stdout.flush()
    if ours:
        which = f"job {HydraConfig.get().job.num}: " if is_multirun() else ""
        print("\n".join([f"error: {which}{error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    elif is_multirun():
        traceback.print_exception(error)


def _end_run(end: KeyboardInterrupt | SystemExit) -> NoReturn:
    """End the program, and with it the sweep, of whose end Hydra would tell its callbacks nothing."""
    if is_multirun():
        write_error(_run_folder(), KeyboardInterrupt(signals.name()))
        config: Any = HydraConfig.instance().cfg
        for callback in config.hydra.callbacks.values():
            with suppress(SystemExit):  # its exit code; ours says more
                hydra.utils.instantiate(callback).on_multirun_end(config=config)
    _leave(end)


def _leave(end: KeyboardInterrupt | SystemExit) -> NoReturn:
    if isinstance(end, SystemExit):  # by one who has said why
        raise end
    print(signals.name(), file=sys.stderr)
    sys.exit(signals.exit_code())


def _run_folder() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def command_to_go_on(checkpoint: Path) -> str:
    """The command line that continues an interrupted run, in its own folder."""
    config = HydraConfig.get()
    overrides = [o for o in config.overrides.task if not o.startswith(("ckpt_path=", "resume="))]
    paths = {"ckpt_path": str(checkpoint), "hydra.run.dir": config.runtime.output_dir}
    overrides += [f"{key}={_hydra_quoted(path)}" for key, path in paths.items()]
    return " ".join(["python -m energy_flow.train", *map(shlex.quote, overrides)])


def _hydra_quoted(value: str) -> str:
    """A value as Hydra's grammar reads it back, also with `=`, `,` or spaces in it."""
    return value if re.fullmatch(r"[\w/.+-]*", value) else '"' + value.replace('"', '\\"') + '"'


def is_multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def quieten(*, resuming: bool = False) -> None:
    """Silence what Lightning says of choices that were made on purpose."""
    if resuming:
        warnings.filterwarnings(
            "ignore", message="Checkpoint directory .* exists and is not empty"
        )  # in its own folder
        warnings.filterwarnings("ignore", message="The dirpath has changed")  # in a new one: see BestCheckpoint
    # Embeddings are read in whole batches, from memory or a mapped file: workers would only copy them once more.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks torch >= 2.12 about its trees in a way that torch will drop.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Its advertisements and device list come as info.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; give it a value: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_lines(error)[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """The environment variable has this value (None: isn't there) inside."""
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _explain(error: Exception, config_name: str) -> str:
    """A config that Hydra could not compose, or a folder that it could not make, in the words of other messages."""
    for of_file in (error, error.__cause__):
        if _file_of(of_file):
            return (
                f"paths.log_dir (or hydra.run.dir, hydra.sweep.dir): {of_file.filename}: can't be written "
                f"({of_file.strerror}). Give another folder: paths.log_dir=..."
            )
    found = unwritable(error)
    if found is not None:
        return found
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group} = {name}: no such option; {did_you_mean(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: can't be read as key=value ({_lines(error)[-2]}); quote special characters"
    if "Config group override must be a string" in str(error):
        return "a group is set to null or left without a name: name one of its options, or [] for none (logger=[])"
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return f"{unknown[1]}: unknown key; {_closest(unknown[1], config_name)}"
    return "\n".join(_lines(error)[:3])


def _file_of(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether it is of a file; Hydra has errors of this type without one."""
    return isinstance(error, OSError) and error.filename is not None


def _closest(key: str, config_name: str) -> str:
    """Did-you-mean for a key, by the default config and the names of the groups."""
    with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
        node: Any = hydra.compose(config_name)
    known = set(map(str, node))
    if config_name == "train":  # which takes every group but one
        known |= {path.name for path in Path(config_dir()).iterdir() if path.is_dir()} - {"benchmark"}
    for name in key.split("."):
        if not isinstance(node, DictConfig) or name not in node:
            return did_you_mean(name, known - {"_target_"})
        node = node[name]
        known = set(map(str, node)) if isinstance(node, DictConfig) else set()
    return "it is not in the groups that were chosen"


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
