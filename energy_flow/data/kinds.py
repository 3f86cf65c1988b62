"""Choose the kind of data by `data.name`."""

from collections.abc import Mapping
from typing import Any

from energy_flow.data.files import FileSettings
from energy_flow.data.settings import DataSettings
from energy_flow.errors import ConfigError
from energy_flow.settings import read


def read_data_settings(section: Any) -> DataSettings:
    """Read the config section `data` with the settings class for its `name`.

    Raises:
        ConfigError: the name is unknown, a key is unknown, or a value is invalid.
    """
    if isinstance(section, Mapping) and "_target_" in section:
        raise ConfigError(
            f"data._target_ = {section['_target_']}: a data module of one's own gives batches, which only training "
            "reads. Give files: data=files data.test=PATH"
        )
    name = section.get("name") if isinstance(section, Mapping) else "files"
    if name == "transport":
        from energy_flow.data.transport import TransportSettings  # imports the lattice's geometry: only when needed

        return read(TransportSettings, section, "data")
    if name not in ("reverse_dictionary", "files"):
        raise ConfigError(f"data.name = {name!r}: must be one of reverse_dictionary, files, transport")
    return read(FileSettings, section, "data")
