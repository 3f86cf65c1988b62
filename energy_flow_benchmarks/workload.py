"""What training benchmarks run: a lattice of some size, a batch for it, and one training step of a processor."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shape = tuple[int, int, int]  # of a product [m, k] x [k, n]

SHORT = {"float32": "fp32", "bfloat16": "bf16"}
TRAINED_STEPS = 1000  # optimiser steps behind us: displacements have their full scale
STAYS = 0.9  # share of the way to a plane that a flow may go in all steps together


class SizeSettings(Settings):
    """A preset of the config group `size`, and what is changed of it."""

    size: str
    lattice: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Workload:
    """A model and what it is trained on."""

    lattice: LatticeSettings
    model: ModelSettings
    dim: int  # D, of the embeddings
    device: torch.device
    seed: int

    @classmethod
    def read(cls, size: SizeSettings, dim: int, device: torch.device, seed: int) -> "Workload":
        """The sizes of a preset with its changes.

        Raises:
            ConfigError: there is no such preset, or its changes can't work.
        """
        preset = _preset(size.size)
        lattice = _merged(_group("lattice"), preset.get("lattice", {}), size.lattice)
        model = _merged(_group("model"), preset.get("model", {}), size.model)
        return cls(read(LatticeSettings, lattice, "lattice"), read(ModelSettings, model, "model"), dim, device, seed)

    def where_no_flow_ends(self) -> "Workload":
        """The same with moves so short that all flows are active in all steps: the most work there can be."""
        movement = self.lattice.movement
        shortest = min(movement.max_displacement, STAYS / max(self.lattice.num_steps, 1))
        movement = movement.model_copy(update={"max_displacement": shortest})
        return Workload(
            self.lattice.model_copy(update={"movement": movement}), self.model, self.dim, self.device, self.seed
        )

    def without_steps(self) -> "Workload":
        """The same with flows that land where they begin: maps, landings and aggregation alone."""
        lattice = self.lattice.model_copy(update={"max_steps": 0})
        return Workload(lattice, self.model, self.dim, self.device, self.seed)

    def num_flows(self, batch: int) -> int:
        return batch * self.lattice.num_cells

    def arithmetic(self, batch: int) -> float:
        """FLOPs of a training step's recurrent products, three times the forward pass's, all flows active to the end.

        An element of [flows x X] · [X x 3H] and of [flows x H] · [H x 3H] each counts for two; nothing else counts.
        """
        size = self.model.hidden_size
        inputs = [self.model.features + self.model.energy_dim] + [size] * (self.model.num_layers - 1)
        forward = sum(2 * self.num_flows(batch) * 3 * size * (width + size) for width in inputs)
        return 3.0 * forward * self.lattice.num_steps

    def processor(self, **rollout: Any) -> FlowProcessor:
        """A processor whose parameters depend on the seed alone.

        Args:
            rollout: changes to the automatic settings of the rollout.
        """
        settings = RolloutSettings.automatic().model_copy(update=rollout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            processor = FlowProcessor(self.dim, self.lattice, self.model, seed=self.seed, rollout=settings)
        processor.optimizer_step.fill_(TRAINED_STEPS)
        return processor.to(self.device)

    def batch(self, batch: int) -> tuple[Tensor, Tensor]:
        """Embeddings of unit length [B, D], and a random gradient of what comes out."""
        generator = torch.Generator().manual_seed(self.seed)
        embedding, cotangent = (torch.randn(batch, self.dim, generator=generator) for _ in range(2))
        return functional.normalize(embedding, dim=-1).to(self.device), cotangent.to(self.device)


Model = Callable[[Tensor], Tensor]  # embeddings [B, D] -> embeddings [B, D]


@dataclass(frozen=True)
class Step:
    """One training step without its optimiser."""

    run: Callable[[], Tensor]  # -> embeddings [B, D] without their graph; gradients are left in the parameters
    parameters: Mapping[str, nn.Parameter]  # under the processor's names


def product(shape: Shape, dtype: Dtype, device: torch.device) -> Callable[[], Callable[[], Tensor]]:
    """Builds the product [m, k] x [k, n] of a shape (m, k, n): the machine's own rate, to be timed beside the steps."""
    m, k, n = shape

    def build() -> Callable[[], Tensor]:
        left, right = (torch.randn(size, device=device).to(getattr(torch, dtype)) for size in ((m, k), (k, n)))
        out = torch.empty(m, n, dtype=left.dtype, device=device)
        return lambda: torch.mm(left, right, out=out)

    return build


def product_rate(shape: Shape, seconds: float) -> float:
    """FLOP/s of a product that took so long."""
    return 2 * shape[0] * shape[1] * shape[2] / seconds


def autocast(dtype: Dtype, device: torch.device) -> torch.autocast:
    """A context in which products are of this dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def forward_backward(model: Model, embedding: Tensor, cotangent: Tensor, dtype: Dtype) -> Tensor:
    """Forward and backward; the loss is the inner product of the output with a fixed random gradient."""
    with autocast(dtype, embedding.device):
        out = model(embedding)
        loss = (out.float() * cotangent).sum()
    loss.backward()
    return out.detach()


def training_step(
    model: Model, parameters: Mapping[str, nn.Parameter], embedding: Tensor, cotangent: Tensor, dtype: Dtype
) -> Step:
    """Gradients are let go, then forward and backward."""

    def run() -> Tensor:
        for parameter in parameters.values():
            parameter.grad = None
        return forward_backward(model, embedding, cotangent, dtype)

    return Step(run, parameters)


def step_of(processor: FlowProcessor, embedding: Tensor, cotangent: Tensor, dtype: Dtype) -> Step:
    """A step of the framework's own."""
    parameters = dict(processor.named_parameters())
    return training_step(lambda batch: processor(batch).embedding, parameters, embedding, cotangent, dtype)


def free(device: torch.device) -> None:
    """Give back what nobody holds any more of a GPU's memory, the allocator's reserve included."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _preset(name: str) -> dict[str, Any]:
    known = {path.stem: path for path in Path(config_dir(), "size").glob("*.yaml")}
    if name not in known:
        raise ConfigError(f"benchmark: size = {name!r}: no such preset; {did_you_mean(name, known)}")
    return _plain(known[name])


def _group(group: str) -> dict[str, Any]:
    return _plain(Path(config_dir(), group, "default.yaml"))


def _plain(path: Path) -> dict[str, Any]:
    # Read by itself: Hydra composes one config at a time, and that is the benchmark's.
    plain = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _merged(*sections: Mapping[str, Any]) -> dict[str, Any]:
    merged = OmegaConf.to_container(OmegaConf.merge(*(OmegaConf.create(dict(section)) for section in sections)))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}
