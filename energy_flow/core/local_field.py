"""A neuron that senses the input surface at the place of every flow."""

import torch
from torch import Tensor, nn

from energy_flow.core.convolution import ReflectPad, convolutions, planes_to_surface, surface_to_planes
from energy_flow.core.energy_lattice import Count
from energy_flow.core.geometry import deposit_cells
from energy_flow.core.precision import without_autocast


class LocalFieldNeuron(nn.Module):
    """Computes the features of a flow from its position, its energy, and the input surface around it.

        field = encoder(input surface)                                once per batch, C numbers per cell
        reading = field at (x, y), and at one cell less and more of x, then of y
        features = linear2(silu(linear1([position, energy, reading])))   in every step

    A reading is bilinear between the four cells around a place, and borders reflect, as the lattice's do. It has
    gradients for the field and for the position.

    Args:
        energy_dim: E.
        features: F.
        width, height: W and H, cells of a plane.
        channels: C.
        kernel_size: width of the encoder's kernels in cells, odd.
        num_layers: convolutions of the encoder.

    Raises:
        ConfigError: `kernel_size` is even.
    """

    def __init__(
        self,
        *,
        energy_dim: Count,
        features: Count,
        width: Count,
        height: Count,
        channels: Count,
        kernel_size: Count,
        num_layers: Count,
    ) -> None:
        super().__init__()
        self.width, self.height = width, height
        sizes = [energy_dim] + [channels] * num_layers
        self.encoder = convolutions(sizes, kernel_size, "model.neuron.kernel_size")
        self.border = ReflectPad(1)
        inputs = 3 + energy_dim + 5 * channels
        self.network = nn.Sequential(nn.Linear(inputs, features), nn.SiLU(), nn.Linear(features, features))

    def sense(self, surface: Tensor, context: dict[str, Tensor]) -> Tensor:
        """Encode the input surface; called once per batch.

        Args:
            surface: [B, S, E].
            context: not used.

        Returns:
            The field of every cell and of its four neighbours, [B, S, 5 C], in the dtype of the surface. A place one
            cell away has the bilinear weights of the flow's own place, on cells one further. So one reading of these
            5 C numbers is a reading of the field at all five places.
        """
        field = self.encoder(surface_to_planes(surface, self.width, self.height))
        around = self.border(field)
        left, right = around[..., 1:-1, :-2], around[..., 1:-1, 2:]
        lower, higher = around[..., :-2, 1:-1], around[..., 2:, 1:-1]
        return planes_to_surface(torch.cat([field, left, right, lower, higher], dim=1)).to(surface.dtype)

    def forward(self, position: Tensor, energy: Tensor, field: Tensor) -> Tensor:
        """One step of all flows.

        Args:
            position: [B, M, 3], normalised.
            energy: [B, M, E].
            field: [B, S, 5 C], the result of `sense`.

        Returns:
            features [B, M, F].
        """
        # In the dtype of the positions, also under autocast: bfloat16 can't tell neighbouring cells apart.
        with without_autocast(position.device):
            reading = read_field(field, position[..., :2], self.width, self.height)
            features: Tensor = self.network(torch.cat([position, energy.to(position.dtype), reading], dim=-1))
            return features


def read_field(field: Tensor, xy: Tensor, width: int, height: int) -> Tensor:
    """Read a field bilinearly at some places.

    `torch.nn.functional.grid_sample` has other gradients at the last cell, where its left cell is the last one, not
    the last but one; and on a GPU it refuses deterministic algorithms. Here several flows read one cell, so on a GPU
    the bits of the field's gradient can differ from run to run, unless `torch.use_deterministic_algorithms(True)`.

    Args:
        field: [B, S, C].
        xy: [B, M, 2], in [-1, 1].
        width, height: W and H, cells of a plane.

    Returns:
        [B, M, C].
    """
    cells, weights = deposit_cells(xy, width, height, "bilinear")
    batch, num_cells, channels = field.shape
    first_row = torch.arange(batch, device=field.device)[:, None, None] * num_cells
    rows = field.flatten(0, 1).index_select(0, (cells + first_row).flatten())
    return (rows.view(*cells.shape, channels) * weights[..., None]).sum(-2)
