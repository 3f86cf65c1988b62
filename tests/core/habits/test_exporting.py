"""`torch.export` of a processor."""

import torch
from torch import Tensor, nn

from energy_flow.core.flow_processor import FlowProcessor
from tests.core.habits.helpers import GENERIC, assert_close, own_results, processor_of
from tests.helpers import DIM, Case

CASE = Case({"max_steps": 2, "width": 4, "height": 3, "spawn.enabled": True})  # a plane that no other test has


class Embedding(nn.Module):
    """Gives the embedding alone: the program of `torch.export` returns tensors."""

    def __init__(self, processor: FlowProcessor) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, source: Tensor) -> Tensor:
        return self.processor(source).embedding


def test_torch_export() -> None:
    """The program is right for every batch size; the processor and others like it compute as before."""
    processor = processor_of(GENERIC["auto"], CASE).requires_grad_(False)
    dynamic = {"source": {0: torch.export.Dim.DYNAMIC}}
    source = torch.randn(3, DIM, dtype=torch.float64)
    program = torch.export.export(Embedding(processor), (source,), dynamic_shapes=dynamic).module()
    assert processor.last_output is None
    for batch in (1, 3, 8):
        rows = torch.randn(batch, DIM, dtype=torch.float64)
        assert_close({"embedding": program(rows)}, {"embedding": processor(rows).embedding})
    processor.requires_grad_(True)
    expected = own_results(processor_of(GENERIC["autograd"], CASE), CASE)
    assert_close(own_results(processor, CASE), expected)
