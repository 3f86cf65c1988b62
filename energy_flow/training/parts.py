"""Loss terms of one's own (config key `loss.terms`): their protocol, and how they are built and called.

B samples, D embedding dimension, S cells, E energy dimension
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from energy_flow import targets
from energy_flow.core.flow_processor import FlowOutput, FlowProcessor
from energy_flow.errors import ConfigError
from energy_flow.training.losses import LossSettings


class LossTerm(Protocol):
    """A part of the loss. A `torch.nn.Module` may have parameters, which are trained and saved with the model."""

    def __call__(self, output: FlowOutput, batch: Mapping[str, Tensor]) -> Tensor:
        """Compute the term of one batch.

        Args:
            output: of the model; `embedding` [B, D], `surface` and `input_surface` [B, S, E], `landings`.
            batch: `source` and `target` [B, D], `row` int64 [B] if the data have rows, and all further entries of the
                batch that the data loader gave.

        Returns:
            A scalar, such as a mean over the samples.
        """


class LossTerms(nn.Module):
    """The terms of `loss.terms`. Modules are registered under their names; without terms there are no parameters.

    Args:
        settings: the section `loss`.
        processor: a term gets its sizes `embedding_dim`, `width`, `height`, `num_cells` and `energy_dim` if its
            constructor asks for them by these names.

    Raises:
        ConfigError: a term can't be built or called, or its name is taken.
    """

    def __init__(self, settings: LossSettings, processor: FlowProcessor) -> None:
        super().__init__()
        lattice = processor.settings
        sizes = {"width": lattice.width, "height": lattice.height, "num_cells": lattice.num_cells}
        sizes |= {"embedding_dim": processor.dim, "energy_dim": processor.model.energy_dim}
        self._weights = settings.term_weights()
        self._functions: dict[str, LossTerm] = {}
        for name, weight in self._weights.items():
            key = f"loss.terms.{name}"
            section = {part: value for part, value in settings.term_section(name).items() if part != "weight"}
            term = targets.build(section, key, sizes)
            _check_call(term, f"{key}._target_ = {section['_target_']}")
            if not isinstance(term, nn.Module):
                self._functions[name] = term
            elif hasattr(self, name):
                raise ConfigError(f"{key}: torch.nn.Module has an attribute of this name. Choose another name")
            else:
                self.add_module(name, term.requires_grad_(weight > 0))

    def forward(self, output: FlowOutput, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The terms of a batch by name; in training those with a weight > 0.

        Raises:
            ConfigError: a term isn't a scalar.
        """
        dtype = torch.promote_types(output.embedding.dtype, torch.float32)
        return {
            name: _scalar(self._term(name)(output, batch), name).to(dtype)
            for name, weight in self._weights.items()
            if weight > 0 or not self.training
        }

    def _term(self, name: str) -> Any:
        return self._functions[name] if name in self._functions else getattr(self, name)


def _check_call(term: Any, where: str) -> None:
    """Check that a term can be called with an output and a batch."""
    if not callable(term):
        raise ConfigError(f"{where}: gives a {type(term).__name__}, which can't be called as term(output, batch)")
    called = term.forward if isinstance(term, nn.Module) else term
    try:
        inspect.signature(called).bind(None, None)
    except TypeError as error:
        raise ConfigError(f"{where}: can't be called as term(output, batch): {error}") from error


def _scalar(value: Any, name: str) -> Tensor:
    """Check the result of a term."""
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        return value
    found = f"a {value.dtype} tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
    raise ConfigError(f"loss.terms.{name}: returned {found}: return a floating-point scalar, such as a mean")
