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
from hydra.core.utils import env_override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from energy_flow import config_reference, signals
from energy_flow.comparison.jobs import clear_error, write_error
from energy_flow.config import config_dir
from energy_flow.errors import ConfigError, EnergyFlowError
from energy_flow.runs.job import is_multirun, run_folder
from energy_flow.runs.messages import explain, message_lines, user_error

log = logging.getLogger(__name__)

Task = Callable[[dict[str, Any]], Any]

_CONFIG_ERRORS = (HydraException, OmegaConfBaseException, ValueError, YAMLError)  # raised by Hydra for a config
_FULL_ERROR = "HYDRA_FULL_ERROR"  # unless it is 1 Hydra prints errors itself, with a traceback or with wrong advice
_RERUN = "--experimental-rerun"


def application(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorate a task on a plain config as a Hydra application.

    An error that the user can mend ends the program with its message and exit code 1, without a traceback. A failed job
    doesn't end the other jobs of a sweep; the sweep then ends with exit code 1. The exit code is 130 after Ctrl-C and
    143 after SIGTERM. `HYDRA_FULL_ERROR=1` shows all tracebacks.
    """

    def decorate(task: Task) -> Callable[[], None]:
        job = _Job(task)

        def run(config: DictConfig) -> Any:  # Hydra takes a plain function only
            return job(config)

        start = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(run)

        @functools.wraps(task)
        def main() -> None:
            _refuse_rerun(sys.argv[1:])
            job.full_error = os.environ.get(_FULL_ERROR, "0")
            OmegaConf.register_new_resolver("config_reference", lambda: _reference(config_name), replace=True)
            with signals.handled(), _quiet_writers(), env_override({_FULL_ERROR: "1"}):
                try:
                    start()
                except KeyboardInterrupt as end:  # before or after the task
                    _exit(end)
                except (*_CONFIG_ERRORS, OSError) as error:
                    _exit_with_explanation(error, job, config_name)

        return main

    return decorate


def _reference(config_name: str) -> str:
    """The text of `--help`, with the options of the folder that `--config-dir` names."""
    places = GlobalHydra.instance().config_loader().get_search_path().get_path()
    given = [Path(place.path.removeprefix("file://")) for place in places if place.provider == "command-line"]
    text = config_reference.help_text(config_name, [*given, Path(config_dir())])
    return text.replace("$", "$$")  # Hydra fills a string.Template with it


class _Job:
    """A task as Hydra calls it: with plain config, errors written and reported."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.full_error = "0"  # the user's value of HYDRA_FULL_ERROR
        self.raised: Exception | None = None  # the error that ended the task, if it is a fault of the program

    def __call__(self, config: DictConfig) -> Any:
        self.raised = None
        clear_error(run_folder())
        try:
            with env_override({_FULL_ERROR: self.full_error}):
                return self._task(_plain(config))
        except (KeyboardInterrupt, SystemExit) as end:
            _exit_sweep(end)
        except Exception as raised:
            error = user_error(raised)
            _report(error)
            if is_multirun():
                write_error(run_folder(), error)
            elif isinstance(error, EnergyFlowError):
                sys.exit(1)
            else:
                self.raised = raised
                raise
        gc.collect()  # the frames of an error hold all memory of the job; the next job needs it
        return None


def _refuse_rerun(words: list[str]) -> None:
    """Refuse to rerun a job, for which Hydra reads a pickle, which can run code. argparse takes abbreviations too."""
    flags = [word.partition("=")[0] for word in words]
    if any(len(flag) > len("--") and _RERUN.startswith(flag) for flag in flags):
        print(f"error: {_RERUN}: reads a pickle, which could run code; repeat the overrides instead", file=sys.stderr)
        sys.exit(1)


def _exit_with_explanation(error: Exception, job: _Job, config_name: str) -> NoReturn:
    """Exit with the explanation of an error that Hydra raised before or after the task; raise all others again."""
    if signals.received() is not None:  # Hydra makes an error of a signal that arrives while it composes a config
        _exit(KeyboardInterrupt())
    if job.full_error == "1" or error is job.raised:
        raise error
    explanation = explain(error, config_name)
    if explanation is None:
        raise error
    print(f"error: {explanation}", file=sys.stderr)
    sys.exit(1)


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Don't print the disk errors of TensorBoard's thread: it raises them in the next call as well."""
    shown = threading.excepthook

    def show(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            shown(args)

    threading.excepthook = show
    try:
        yield
    finally:
        threading.excepthook = shown


def _report(error: Exception) -> None:
    """Print the message of a user's error, or the traceback of another one where Python won't print it."""
    mendable = isinstance(error, EnergyFlowError)
    log.info("ended by an error: %s", error, exc_info=not mendable)
    log.debug("where it was raised", exc_info=mendable)
    sys.stdout.flush()
    if mendable:
        job = f"job {HydraConfig.get().job.num}: " if is_multirun() else ""
        print("\n".join([f"error: {job}{error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
    elif is_multirun():
        traceback.print_exception(error)


def _exit_sweep(end: KeyboardInterrupt | SystemExit) -> NoReturn:
    """Exit, and first call the sweep's `on_multirun_end` callbacks, which Hydra skips on SystemExit."""
    if is_multirun():
        write_error(run_folder(), KeyboardInterrupt(signals.name()))
        config: Any = HydraConfig.instance().cfg
        for callback in config.hydra.callbacks.values():
            with suppress(SystemExit):  # the exit code of `end` matters more
                hydra.utils.instantiate(callback).on_multirun_end(config=config)
    _exit(end)


def _exit(end: KeyboardInterrupt | SystemExit) -> NoReturn:
    if isinstance(end, SystemExit):  # its message has been printed
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
