"""The log file of a run."""

import logging
import sys
import warnings


class RunLog(logging.FileHandler):
    """A log file. That it can't be written (a full disk) is said once and ends nothing."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._said:
            self._said = True
            print(f"{self.baseFilename}: {error.strerror}: the log has a gap from here on")


def filter_warnings(*, resuming: bool = False) -> None:
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
