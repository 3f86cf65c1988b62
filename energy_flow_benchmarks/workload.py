"""The work of the training benchmarks: a lattice, a batch and one training step of a processor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from energy_flow.config import config_dir
from energy_flow.core.energy_lattice import LatticeSettings
from energy_flow.core.flow_processor import FlowProcessor
from energy_flow.core.networks import ModelSettings
from energy_flow.core.rollout import RolloutSettings
from energy_flow.errors import ConfigError
from energy_flow.settings import Settings, did_you_mean, read

Dtype = Literal["float32", "bfloat16"]
Kind = TypeVar("Kind", bound=Settings)

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
TRAINED_STEPS = 1000  # earlier optimiser steps: displacements have their full scale
LONGEST_WAY = 0.9  # of the distance to a plane, for a flow that must not reach it


class SizeSettings(Settings):
    """A preset of the config group `size`, and changes to it."""

    size: str
    lattice: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)


def settings_of(kind: type[Kind], group: str, *changes: Mapping[str, Any]) -> Kind:
    """Return the default option of a config group, with changes.

    Raises:
        ConfigError: a change is wrong.
    """
    # The option is read by itself: Hydra composes one config at a time, which is the benchmark's.
    defaults = OmegaConf.load(Path(config_dir(), group, "default.yaml"))
    merged: Any = OmegaConf.to_container(OmegaConf.merge(defaults, *map(dict, changes)))
    return read(kind, merged, group)


@dataclass(frozen=True)
class Step:
    """One training step without its optimiser; a call runs it."""

    run: Callable[[], Tensor]  # -> embeddings [B, D], detached; leaves gradients in the parameters
    parameters: Mapping[str, nn.Parameter]  # by the processor's names

    def __call__(self) -> Tensor:
        return self.run()


@dataclass(frozen=True)
class Workload:
    """A model and its batches."""

    lattice: LatticeSettings
    model: ModelSettings
    dim: int  # D, of the embeddings
    device: torch.device
    seed: int

    @classmethod
    def read(cls, size: SizeSettings, dim: int, device: torch.device, seed: int) -> "Workload":
        """Read a preset with its changes.

        Raises:
            ConfigError: there is no such preset, or a change is wrong.
        """
        known = {path.stem: path for path in Path(config_dir(), "size").glob("*.yaml")}
        if size.size not in known:
            raise ConfigError(f"benchmark: size = {size.size!r}: no such preset; {did_you_mean(size.size, known)}")
        preset: Any = OmegaConf.load(known[size.size])
        lattice = settings_of(LatticeSettings, "lattice", preset.get("lattice", {}), size.lattice)
        model = settings_of(ModelSettings, "model", preset.get("model", {}), size.model)
        return cls(lattice, model, dim, device, seed)

    def where_no_flow_ends(self) -> "Workload":
        """Shorten the moves, so that all flows are active in all steps: the most work there can be."""
        longest = LONGEST_WAY / max(self.lattice.num_steps, 1)
        return self.with_longest_move(min(self.lattice.movement.max_displacement, longest))

    def with_longest_move(self, max_displacement: float) -> "Workload":
        """Change `lattice.movement.max_displacement`."""
        movement = self.lattice.movement.model_copy(update={"max_displacement": max_displacement})
        return replace(self, lattice=self.lattice.model_copy(update={"movement": movement}))

    def without_steps(self) -> "Workload":
        """Let all flows land where they begin: maps, landings and aggregation alone."""
        return replace(self, lattice=self.lattice.model_copy(update={"max_steps": 0}))

    def num_flows(self, batch: int) -> int:
        """Return the number of flows of a batch."""
        return batch * self.lattice.num_cells

    def arithmetic(self, batch: int) -> float:
        """Return the FLOPs of a training step's recurrent products, if all flows are active in all steps.

        FLOPs = 3 · steps · flows · Σ over layers of 2 · 3H · (inputs + H): the forward pass once, the backward pass
        twice. Nothing else counts.
        """
        size = self.model.hidden_size
        inputs = [self.model.features + self.model.energy_dim] + [size] * (self.model.num_layers - 1)
        forward = sum(2 * self.num_flows(batch) * 3 * size * (width + size) for width in inputs)
        return 3.0 * forward * self.lattice.num_steps

    def processor(self, **rollout: Any) -> FlowProcessor:
        """Return a processor whose parameters depend on the seed alone; `rollout` changes its automatic settings."""
        settings = RolloutSettings.automatic().model_copy(update=rollout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            processor = FlowProcessor(self.dim, self.lattice, self.model, seed=self.seed, rollout=settings)
        processor.optimizer_step.fill_(TRAINED_STEPS)
        return processor.to(self.device)

    def batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return embeddings of unit length [B, D], and a random gradient [B, D] of the output."""
        generator = torch.Generator().manual_seed(self.seed)
        embedding, cotangent = (torch.randn(batch, self.dim, generator=generator) for _ in range(2))
        return functional.normalize(embedding, dim=-1).to(self.device), cotangent.to(self.device)

    def step(self, batch: int, dtype: Dtype, **rollout: Any) -> Callable[[], Step]:
        """Return a function that builds a training step of a new processor; `rollout` as in `processor`."""
        data = self.batch(batch)
        return lambda: step_of(self.processor(**rollout), *data, dtype)


Model = Callable[[Tensor], Tensor]  # embeddings [B, D] -> embeddings [B, D]


def step_of(processor: FlowProcessor, embedding: Tensor, cotangent: Tensor, dtype: Dtype) -> Step:
    """Return a training step of a processor."""
    parameters = dict(processor.named_parameters())
    return training_step(lambda batch: processor(batch).embedding, parameters, embedding, cotangent, dtype)


def training_step(
    model: Model, parameters: Mapping[str, nn.Parameter], embedding: Tensor, cotangent: Tensor, dtype: Dtype
) -> Step:
    """Return a step of any model: gradients set to None, forward, backward.

    The loss is the inner product of the output with a fixed random gradient.
    """

    def run() -> Tensor:
        for parameter in parameters.values():
            parameter.grad = None
        with autocast(dtype, embedding.device):
            out = model(embedding)
            loss = (out.float() * cotangent).sum()
        loss.backward()
        return out.detach()

    return Step(run, parameters)


def autocast(dtype: Dtype, device: torch.device) -> torch.autocast:
    """Return a context whose matrix products have this dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n], whose rate is the machine's own."""

    m: int
    k: int
    n: int
    dtype: Dtype

    @property
    def name(self) -> str:
        """Such as `[16 x 16] · [16 x 16], fp32`."""
        return f"[{self.m} x {self.k}] · [{self.k} x {self.n}], {SHORT[self.dtype]}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n

    def build(self, device: torch.device) -> Callable[[], Tensor]:
        """Return a function that computes the product."""
        shapes = ((self.m, self.k), (self.k, self.n))
        left, right = (torch.randn(shape, device=device).to(getattr(torch, self.dtype)) for shape in shapes)
        out = torch.empty(self.m, self.n, dtype=left.dtype, device=device)
        return lambda: torch.mm(left, right, out=out)
