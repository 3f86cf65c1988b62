"""The log file of a run."""

import logging
import sys


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
