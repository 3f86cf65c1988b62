"""Wrap a task in a Hydra application: plain config in, exit code out."""

import functools
import gc
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from energy_flow import config_reference, signals
from energy_flow.comparison.jobs import clear_error, write_error
from energy_flow.config import config_dir
from energy_flow.errors import ConfigError, EnergyFlowError
from energy_flow.runs.job import is_multirun, run_folder
from energy_flow.runs.messages import explain, file_of, mendable, message_lines, unwritable

log = logging.getLogger(__name__)

Task = Callable[[dict[str, Any]], Any]


# What Hydra raises for a config.
_HYDRAS = (HydraException, OmegaConfBaseException, ValueError)


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
            clear_error(run_folder())
            try:
                with _environment(_FULL_ERROR, asked):
                    return task(_plain(config))
            except (KeyboardInterrupt, SystemExit) as end:
                _end_run(end)
            except Exception as raised:
                error = mendable(raised)
                _say(error)
                if is_multirun():
                    write_error(run_folder(), error)
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
                    if asked == "1" or ours or not (isinstance(error, _HYDRAS) or file_of(error) or unwritable(error)):
                        raise
                    print(f"error: {explain(error, config_name)}", file=sys.stderr)
                    sys.exit(1)

        return main

    return decorate


def _reference(config_name: str) -> str:
    """The text of `--help`, with the options of the folder that `--config-dir` names."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    given = [Path(place.path.removeprefix("file://")) for place in places if place.provider == "command-line"]
    text = config_reference.help_text(config_name, [*given, Path(config_dir())])
    return text.replace("$", "$$")  # Hydra fills a string.Template with it


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
        write_error(run_folder(), KeyboardInterrupt(signals.name()))
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


def _plain(config: DictConfig) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing; give it a value: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {message_lines(error)[0]}") from error
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
