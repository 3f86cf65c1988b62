"""A replacement of sentence-transformers without a model. An embedding depends only on its text."""

import types
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def embedding(text: str, dim: int = 16) -> NDArray[np.float32]:
    """The embedding of a text, of length 1."""
    row = np.random.default_rng(zlib.crc32(text.encode())).normal(size=dim)
    return (row / np.linalg.norm(row)).astype(np.float32)


class Tokenizer:
    """One token per word."""

    model_max_length = 8

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert not options["truncation"]
        return {"input_ids": [[0] * len(text.split()) for text in texts]}


PREFIXES = ("stand/in-", "sentence-transformers/in-")


class Library(types.ModuleType):
    """The module. Its models have the names `stand/in-DIM` and `sentence-transformers/in-DIM`.

    Attributes:
        cached: whether models are on this machine.
        whole: whether a cached model is complete.
        asked_hub: whether a model was loaded without `local_files_only`.
        seen: every text that was encoded, in order.
        stop_after: number of texts before Ctrl-C.
        change: added to every row, before it is normalised.
    """

    def __init__(self) -> None:
        super().__init__("sentence_transformers")
        self.cached = self.whole = True
        self.asked_hub = False
        self.seen: list[str] = []
        self.stop_after: int | None = None
        self.change: float | NDArray[np.float32] = 0.0
        library = self

        class SentenceTransformer:
            tokenizer = Tokenizer()
            max_seq_length = Tokenizer.model_max_length

            def __init__(self, name: str, device: str, local_files_only: bool = False) -> None:
                library.asked_hub |= not local_files_only
                if local_files_only and not library.whole:
                    raise TypeError("a part is missing")
                if not name.startswith(PREFIXES):
                    raise OSError(f"{name} is not a valid model identifier\nand more")
                self.dim = int(name.rpartition("-")[2])

            def encode(self, texts: list[str], *, batch_size: int, **options: Any) -> NDArray[np.float32]:
                assert options == {"normalize_embeddings": True, "show_progress_bar": False}
                library.seen += texts
                if library.stop_after is not None and len(library.seen) > library.stop_after:
                    raise KeyboardInterrupt
                rows = np.stack([embedding(text, self.dim) for text in texts]) + library.change
                return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

        self.SentenceTransformer = SentenceTransformer
        self.util = types.SimpleNamespace(is_sentence_transformer_model=self._is_model)

    def _is_model(self, name: str, *, local_files_only: bool) -> bool:
        assert local_files_only
        return self.cached and name.startswith(PREFIXES)


class Bars(types.ModuleType):
    """The progress bars of the transformers library.

    Attributes:
        shown: whether they are shown.
        hidden: how often they were switched off.
    """

    def __init__(self) -> None:
        super().__init__("transformers.utils.logging")
        self.shown = True
        self.hidden = 0

    def is_progress_bar_enabled(self) -> bool:
        return self.shown

    def disable_progress_bar(self) -> None:
        self.shown = False
        self.hidden += 1

    def enable_progress_bar(self) -> None:
        self.shown = True
