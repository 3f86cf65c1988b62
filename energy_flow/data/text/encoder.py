"""Encode text as embeddings; the only module that uses sentence-transformers."""

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from energy_flow.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_BATCH_SIZE = 32
_COUNTED = 1024  # texts whose tokens are in memory at a time


class TextEncoder:
    """A sentence-transformers model with embeddings of length 1.

    Args:
        name: of a model on the model hub, or the path of a folder with a model.
        device: name of a torch device.

    Attributes:
        dim: D, the embedding dimension.

    Raises:
        ConfigError: sentence-transformers is not installed, or the model can't be loaded.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self._model = _load(name, device)
        self.dim = self.encode(["dimension"]).shape[1]

    def encode(self, texts: Sequence[str], batch_size: int = _BATCH_SIZE) -> NDArray[np.float32]:
        """Encode texts as rows of length 1, [len(texts), D], in batches of `batch_size`.

        Raises:
            DataError: the model returns NaN, Inf or a row of zeros.
        """
        found = self._model.encode(
            list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        rows = np.asarray(found, dtype=np.float32)
        bad = np.flatnonzero(~(np.isfinite(rows).all(axis=1) & rows.any(axis=1)))
        if len(bad):
            raise DataError(
                f"encoder = {self.name}: returns NaN, Inf or a row of zeros for {texts[bad[0]]!r}; "
                "choose another encoder, or remove the text"
            )
        return rows

    def num_cut(self, texts: Sequence[str]) -> int:
        """Count the texts that are longer than the model's maximum; the model ignores their ends."""
        tokenizer, longest = self._model.tokenizer, self._model.max_seq_length
        if not (isinstance(longest, int) and hasattr(tokenizer, "model_max_length")):
            return 0  # no tokenizer of the transformers library: such models read texts of any length
        count = 0
        for start in range(0, len(texts), _COUNTED):
            tokens = tokenizer(list(texts[start : start + _COUNTED]), truncation=False, verbose=False)["input_ids"]
            count += sum(len(token_ids) > longest for token_ids in tokens)
        return count


def _load(name: str, device: str) -> Any:
    library, place = _library(name), Path(name).expanduser()
    if (place.is_absolute() or name.startswith((".", "~"))) and not place.is_dir():
        raise ConfigError(f"encoder = {name}: no such folder. Give a folder with a model, or the name of a model")
    try:
        if place.is_dir():
            return _from_disk(library, str(place), device)
        if _is_cached(library, name):
            try:
                return _from_disk(library, name, device)
            except (OSError, TypeError, ValueError) as error:  # files are missing: get them from the hub
                log.info("encoder %s: some files are not on this machine: %s", name, error)
        log.warning(
            "encoder %s is not on this machine: asking the model hub (this takes a minute without a connection)", name
        )
        with _logger_quiet("huggingface_hub"):
            return library.SentenceTransformer(name, device=device)
    except Exception as error:  # any type: the library reads unknown files and the network
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise ConfigError(
            f"encoder = {name}: can't be loaded ({reason}). Give a model of the hub, or a folder with a model"
        ) from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module("sentence_transformers")
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise ConfigError(
            f"encoder = {name}: encoding text needs sentence-transformers, which is not installed. Install it, or the "
            "extra [text]: python -m pip install sentence-transformers"
        ) from error


def _is_cached(library: Any, name: str) -> bool:
    """Whether the local cache has the model's list of modules; without it the library would make up modules."""
    full_name = name if "/" in name else f"sentence-transformers/{name}"  # the library's rule
    return bool(library.util.is_sentence_transformer_model(full_name, local_files_only=True))


def _from_disk(library: Any, name: str, device: str) -> Any:
    """Load without network: the library would ask for every file, and retry for minutes without a connection."""
    bars = importlib.import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # loading takes less than a second
    try:
        return library.SentenceTransformer(name, device=device, local_files_only=True)
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _logger_quiet(name: str) -> Iterator[None]:
    """Hide a logger's warnings: every retry logs two, and the final error has the reason."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
