"""The forms of a batch: a dict with `source`, `target` and `row`, or a pair (source, target)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from energy_flow.errors import ConfigError

Batch = Mapping[str, Tensor] | tuple[Tensor, Tensor] | list[Tensor]


def unpack_batch(batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return source and target [B, D] in the model's `dtype`, and row int64 [B], or None if the batch has no rows.

    Custom loaders often give NumPy's float64.

    Raises:
        ConfigError: the batch has another form.
    """
    if isinstance(batch, Mapping) and {"source", "target"} <= batch.keys():
        return batch["source"].to(dtype), batch["target"].to(dtype), batch.get("row")
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0].to(dtype), batch[1].to(dtype), None
    content = f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f" of {len(batch)}"
    raise ConfigError(
        f"a batch is a {type(batch).__name__}{content}: give a dict with 'source' and 'target' (and 'row'), "
        "or a pair (source, target)"
    )
