"""What the entry points share: where the configs are, and how errors reach the user."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from energy_flow.errors import EnergyFlowError

log = logging.getLogger(__name__)

Task = Callable[[dict[str, Any]], Any]


def config_dir() -> str:
    """The folder of the configs: inside an installed package, beside it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "conf"
    return str(packaged if packaged.is_dir() else package.parent / "conf")


def application(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Decorator: a task on a plain config becomes a Hydra application.

    Errors that a user can mend end the program with their message and exit code 1, without a traceback.
    """

    def decorate(task: Task) -> Callable[[], None]:
        def run(config: DictConfig) -> Any:
            try:
                plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                assert isinstance(plain, dict)
                return task({str(key): value for key, value in plain.items()})
            except (EnergyFlowError, OmegaConfBaseException) as error:
                log.debug("ended by an error of the user's", exc_info=True)
                sys.stdout.flush()
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)

        # Hydra names log file and job after the task's module.
        run.__name__ = task.__name__
        return hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(run)

    return decorate


def is_multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def quieten() -> None:
    """Silence what Lightning says of choices that were made on purpose."""
    # Embeddings are read in whole batches, from memory or a mapped file: workers would only copy them once more.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Its advertisements and device list come as info.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
