"""Flow lattices: embeddings turned into embeddings by particles that carry energy through space."""

from energy_flow.version import __version__

__all__ = ["__version__"]
