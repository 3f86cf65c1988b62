"""Choose the kind of data by `data.name`."""

from collections.abc import Mapping
from typing import Any

from energy_flow.data.files import FileSettings
from energy_flow.data.settings import DataSettings
from energy_flow.errors import ConfigError
from energy_flow.settings import read

NAMES = ("reverse_dictionary", "files", "transport")


def read_data_settings(section: Any) -> DataSettings:
    """Read the config section `data` with the settings class for its `name`.

    Raises:
        ConfigError: the name is unknown, a key is unknown, or a value is invalid.
    """
    name = section.get("name") if isinstance(section, Mapping) else "files"
    if not isinstance(name, str) or name not in NAMES:
        raise ConfigError(f"data.name = {name!r}: must be one of {', '.join(NAMES)}")
    return read(_settings_class(name), section, "data")


def _settings_class(name: str) -> type[DataSettings]:
    if name != "transport":
        return FileSettings
    from energy_flow.data.transport import TransportSettings  # imports the lattice's geometry: only when needed

    return TransportSettings
