"""Text to embeddings: the one place that knows sentence-transformers."""

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
_COUNTED = 1024  # texts whose tokens stand at a time


class TextEncoder:
    """A sentence-transformers model whose rows are brought to length 1.

    Args:
        name: of the model on its hub, or a folder that holds one.
        device: as torch names it.

    Attributes:
        dim: D, of its embeddings.

    Raises:
        ConfigError: sentence-transformers isn't installed, or the model can't be loaded.
    """

    def __init__(self, name: str, device: str) -> None:
        self.name = name
        self._model = _load(name, device)
        self.dim = self.encode(["dimension"]).shape[1]

    def encode(self, texts: Sequence[str], batch_size: int = _BATCH_SIZE) -> NDArray[np.float32]:
        """Rows of length 1, [len(texts), D]; the model sees `batch_size` texts at a time.

        Raises:
            DataError: the model gives NaN, Inf or a row of zeros.
        """
        found = self._model.encode(
            list(texts), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        rows = np.asarray(found, dtype=np.float32)
        bad = np.flatnonzero(~(np.isfinite(rows).all(axis=1) & rows.any(axis=1)))
        if len(bad):
            raise DataError(
                f"encoder = {self.name}: gives NaN, Inf or a row of zeros for {texts[bad[0]]!r}; "
                "choose another encoder, or leave the text out"
            )
        return rows

    def num_cut(self, texts: Sequence[str]) -> int:
        """How many texts are longer than what the model reads; it leaves out their ends."""
        tokenizer, longest = self._model.tokenizer, self._model.max_seq_length
        if not (isinstance(longest, int) and hasattr(tokenizer, "model_max_length")):
            return 0  # not a tokenizer of the transformers library: such models read texts of any length
        count = 0
        for start in range(0, len(texts), _COUNTED):
            tokens = tokenizer(list(texts[start : start + _COUNTED]), truncation=False, verbose=False)["input_ids"]
            count += sum(len(token_ids) > longest for token_ids in tokens)
        return count


def _load(name: str, device: str) -> Any:
    library, place = _library(name), Path(name).expanduser()
    if (place.is_absolute() or name.startswith((".", "~"))) and not place.is_dir():
        raise ConfigError(f"encoder = {name}: there is no such folder. Give one that holds a model, or a name")
    try:
        if place.is_dir():
            return _from_disk(library, str(place), device)
        if _is_cached(library, name):
            try:
                return _from_disk(library, name, device)
            except (OSError, TypeError, ValueError) as error:  # files are missing: the hub has them
                log.info("encoder %s: not all of it is on this machine: %s", name, error)
        log.warning(
            "encoder %s isn't on this machine: asking the model hub (without a connection that takes a minute)", name
        )
        with _logger_quiet("huggingface_hub"):
            return library.SentenceTransformer(name, device=device)
    except Exception as error:  # of any type: the library reads files of others, and the net
        reason = (str(error).strip() or type(error).__name__).split("\n")[0][:300]
        raise ConfigError(
            f"encoder = {name}: can't be loaded ({reason}). Give a model of the hub, or a folder that holds one"
        ) from error


def _library(name: str) -> Any:
    try:
        return importlib.import_module("sentence_transformers")
    except ModuleNotFoundError as error:
        if error.name != "sentence_transformers":
            raise
        raise ConfigError(
            f"encoder = {name}: encoding text needs sentence-transformers, which isn't installed. Install it, the "
            "extra [text]: python -m pip install sentence-transformers"
        ) from error


def _is_cached(library: Any, name: str) -> bool:
    """Whether the hub's cache on this machine has the model's list of modules; without it others would be made up."""
    owned = name if "/" in name else f"sentence-transformers/{name}"  # as the library reads it
    return bool(library.util.is_sentence_transformer_model(owned, local_files_only=True))


def _from_disk(library: Any, name: str, device: str) -> Any:
    """Without the net: the library would ask it for every file, and without a connection try again for minutes."""
    bars = importlib.import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # it takes less than a second
    try:
        return library.SentenceTransformer(name, device=device, local_files_only=True)
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _logger_quiet(name: str) -> Iterator[None]:
    """Warnings aren't said: there are two for each of many tries, and the error at the end says it all."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
