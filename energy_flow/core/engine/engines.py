"""The engines of a processor, and the choice between them at every call."""

import logging
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from energy_flow.core.energy_carrier import EnergyCarrier
from energy_flow.core.engine.autograd import AutogradEngine
from energy_flow.core.engine.choice import tape_obstacle
from energy_flow.core.engine.engine import TapeEngine
from energy_flow.core.engine.locking import EngineLock
from energy_flow.core.parts import SensingNeuron
from energy_flow.core.rollout import Rollout, RolloutCall, RolloutResult, RolloutSettings
from energy_flow.core.simple_neuron import SimpleNeuron
from energy_flow.errors import ConfigError

log = logging.getLogger(__name__)


class Engines:
    """Runs every rollout on the engine that is right for the parts as they are at the call.

    Args:
        settings: how rollouts are computed.
    """

    def __init__(self, settings: RolloutSettings) -> None:
        self._said: set[str] = set()
        self._lock = EngineLock()
        self._build(settings)

    @torch.compiler.disable
    def run(
        self,
        settings: RolloutSettings,
        neuron: nn.Module,
        carrier: nn.Module,
        rollout: Rollout,
        surface: Tensor,
        call: RolloutCall,
        context: dict[str, Tensor],
    ) -> RolloutResult:
        """Run all steps, from surface energies [B, S, E] to flows that have all ended.

        Args:
            settings: how rollouts are computed.
            neuron, carrier: the networks that flows share.
            rollout: the rules.
            surface: energies of the input plane.
            call: the other inputs.
            context: further inputs of the batch, for a neuron that senses.

        Raises:
            ConfigError: `rollout.engine = tape` can't run the parts.
        """
        with self._lock.on(surface.device):
            return self._run(settings, neuron, carrier, rollout, surface, call, context)

    def _run(
        self,
        settings: RolloutSettings,
        neuron: nn.Module,
        carrier: nn.Module,
        rollout: Rollout,
        surface: Tensor,
        call: RolloutCall,
        context: dict[str, Tensor],
    ) -> RolloutResult:
        if settings is not self._settings:  # changed by the user
            self._build(settings)
        if settings.engine != "autograd" and rollout.settings.num_steps > 0:  # without a step there is nothing to tape
            obstacle = tape_obstacle(neuron, carrier, rollout.lattice, surface)
            if obstacle is None:
                return self.tape.run(cast(SimpleNeuron, neuron), cast(EnergyCarrier, carrier), rollout, surface, call)
            if settings.engine == "tape":
                raise ConfigError(
                    f"rollout.engine = tape: {obstacle}, and the tape knows only the default parts as they are. Set "
                    "rollout.engine=auto"
                )
            self._say(obstacle, settings)
        if isinstance(neuron, SensingNeuron):
            call = replace(call, sensed=neuron.sense(surface, context))
        return self.autograd.run(neuron, carrier, rollout, surface, call)

    def trim(self) -> int:
        """Free graphs and buffers that no batch since the last call has needed; returns the bytes freed."""
        return self.tape.trim()

    def _build(self, settings: RolloutSettings) -> None:
        self._settings = settings
        self.tape, self.autograd = TapeEngine(settings, self._lock), AutogradEngine(settings, self._lock)

    def _say(self, obstacle: str, settings: RolloutSettings) -> None:
        """Say once why rollouts are slower than they could be, and which settings have no effect then."""
        if obstacle not in self._said:
            self._said.add(obstacle)
            unused = [key for key in ("recompute", "compaction", "cuda_graph") if getattr(settings, key) is True]
            log.warning(
                "rollout.engine = auto: %s. So the modules run as they are, which is right for any part, and slower "
                "than the fused step of the default parts (see docs/performance.md)%s",
                obstacle,
                "".join(f". rollout.{key} = true has no effect then" for key in unused),
            )
