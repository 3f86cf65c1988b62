"""The log file of a run, and warnings that its programs silence."""

import logging
import sys
import warnings


class RunLog(logging.FileHandler):
    """A log file that reports once when it can't be written (a full disk), and lets the run continue."""

    _reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._reported:
            self._reported = True
            print(f"{self.baseFilename}: {error.strerror}: entries are missing from the log from here on")


def filter_warnings(*, resuming: bool = False) -> None:
    """Silence Lightning's warnings about choices that were made on purpose."""
    if resuming:  # in its own folder, or in a new one (see BestCheckpoint)
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        warnings.filterwarnings("ignore", message="The dirpath has changed")
    # Whole batches of embeddings come from memory or a mapped file: workers would only copy them again.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 uses a function for trees that torch >= 2.12 deprecates.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Lightning prints advertisements and its list of devices at level INFO.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
