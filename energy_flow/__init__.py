"""Flow lattices: embeddings turned into embeddings by particles that carry energy through space."""

from typing import TYPE_CHECKING, Any

from energy_flow.version import __version__

if TYPE_CHECKING:
    from energy_flow.pretrained import EnergyFlowModel

__all__ = ["EnergyFlowModel", "__version__"]


def __getattr__(name: str) -> Any:
    """`EnergyFlowModel` is imported when it is asked for: it needs torch, and `import energy_flow` must stay light."""
    if name == "EnergyFlowModel":
        from energy_flow.pretrained import EnergyFlowModel

        return EnergyFlowModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
