"""Errors that a user can mend: entry points print their message without a traceback, and exit with code 1."""


class EnergyFlowError(Exception):
    """Base of all errors whose message is written for the user."""


def brief(text: object, length: int = 200) -> str:
    """Shorten a text from a file, which may be of any length, for a message."""
    shown = str(text)
    return shown if len(shown) <= length else f"{shown[:length]}..."


class ConfigError(EnergyFlowError):
    """A configuration that can't work; the message has the value, the limit, the key and the remedy."""


class DataError(EnergyFlowError):
    """A data file that can't be used; the message has the file and, if it is about one, the row."""


class CheckpointError(EnergyFlowError):
    """A checkpoint that is corrupt or belongs to another architecture."""


class ExportError(EnergyFlowError):
    """A model that can't be exported, or an exported file that computes other numbers."""


class NoLandingError(EnergyFlowError, RuntimeError):
    """Samples of a batch without a single landing: their output would silently be zero."""


class NotFiniteError(EnergyFlowError, RuntimeError):
    """NaN or Inf in the output of a sample."""


class LostFlowError(EnergyFlowError, RuntimeError):
    """landings + removed != created: the rollout broke its own conservation law."""


class RecordingError(EnergyFlowError, RuntimeError):
    """Recording a CUDA graph failed; torch may no longer work in this process."""
