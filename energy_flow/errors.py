"""Errors that a user can mend: entry points print them as they are, without a traceback, and exit with code 1."""


class EnergyFlowError(Exception):
    """Base of all errors whose message is meant to be read by a user."""


def brief(text: object, length: int = 200) -> str:
    """What a message says of what stands in a file, which may be of any length."""
    shown = str(text)
    return shown if len(shown) <= length else f"{shown[:length]}..."


class ConfigError(EnergyFlowError):
    """A configuration that can't work: names the value, the limit, the key and the remedy."""


class DataError(EnergyFlowError):
    """A data file that can't be used: names the file and, where it has one, the row."""


class CheckpointError(EnergyFlowError):
    """A checkpoint that is damaged or belongs to another architecture."""


class NoLandingError(EnergyFlowError, RuntimeError):
    """Samples of a batch without a single landing: their output would be a silent zero."""


class NotFiniteError(EnergyFlowError, RuntimeError):
    """NaN or Inf in the output of a sample."""


class LostFlowError(EnergyFlowError, RuntimeError):
    """Landings + removed flows differ from created flows: the rollout broke its own conservation law."""


class RecordingError(EnergyFlowError, RuntimeError):
    """CUDA or torch didn't let a CUDA graph be recorded; torch may not be fit to go on in this process."""
