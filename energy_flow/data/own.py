"""Data of one's own: a LightningDataModule that the config section `data` names in `_target_`.

B samples, D embedding dimension
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.seed import isolate_rng

from energy_flow import targets
from energy_flow.data.datamodule import EnergyDataModule
from energy_flow.errors import ConfigError


class OwnData:
    """A data module of one's own, as a run uses it: it gives batches, but no splits to read.

    So there are no fingerprints, no bank of targets, no baselines, no row scores and no named examples.

    Args:
        loaders: the data module. It has `train_dataloader` and `val_dataloader`, and `test_dataloader` if there are
            test data. Its attribute `dim` is D; without it, D is read from the first training batch.
        target: its path in the config, for messages.

    Raises:
        ConfigError: it is no data module, lacks a loader, or gives batches of another form.
    """

    train = val = test = None

    def __init__(self, loaders: Any, target: str) -> None:
        self._where = f"data._target_ = {target}"
        if not isinstance(loaders, LightningDataModule):
            raise ConfigError(f"{self._where}: gives a {type(loaders).__name__}, not a LightningDataModule")
        self.loaders = loaders
        self.fingerprint: dict[str, str] = {}
        for loader in ("train_dataloader", "val_dataloader"):
            if not self._has(loader):
                raise ConfigError(f"{self._where}: has no method {loader}. Add it")

    @property
    def has_test(self) -> bool:
        """Whether there are test data."""
        return self._has("test_dataloader")

    def setup(self, stage: str) -> None:
        """Prepare the loaders. Lightning does it once more, so both methods of the module must bear a second call.

        Every process calls `prepare_data` here, and several may do so at once: there is no process group yet, so none
        of them could wait for another.
        """
        self.loaders.prepare_data()
        self.loaders.setup(stage)
        loader = self.loaders.val_dataloader()
        if isinstance(loader, list | tuple | dict):
            raise ConfigError(f"{self._where}: val_dataloader gives a {type(loader).__name__}. Return one loader")
        self.dim = self._dim()

    def splits(self) -> dict[str, Any]:
        """No data sets."""
        return {}

    def num_batches(self) -> int | None:
        """The number of training batches of an epoch; None: the loader has no length."""
        try:
            return len(self.loaders.train_dataloader())
        except TypeError:
            return None

    def describe(self) -> str:
        """The data in one line."""
        return f"batches of dimension {self.dim}"

    def _has(self, method: str) -> bool:
        own = getattr(self.loaders, method)  # `LightningDataModule.from_datasets` sets it on the object
        return getattr(own, "__func__", own) is not getattr(LightningDataModule, method)

    def _dim(self) -> int:
        dim = getattr(self.loaders, "dim", None)
        if dim is not None:
            if isinstance(dim, int) and not isinstance(dim, bool) and dim > 0:
                return dim
            raise ConfigError(f"{self._where}: its dim = {dim!r}: must be a number of at least 1")
        with isolate_rng():  # a shuffled loader draws numbers
            batch: Any = next(iter(self.loaders.train_dataloader()), None)
        source: Any = batch.get("source") if isinstance(batch, Mapping) else batch[0] if batch else None
        if getattr(source, "ndim", 0) != 2:
            found = "nothing" if source is None else f"a source of shape {list(source.shape)}"
            raise ConfigError(
                f"{self._where}: the first training batch has {found}: must be a dict with 'source' and 'target' "
                "[B, D], or a pair of them"
            )
        return int(source.shape[1])


RunData = EnergyDataModule | OwnData


def build_data(config: Mapping[str, Any]) -> RunData:
    """The data of a config: of the class in `data._target_`, or of a kind that the package has."""
    section = config["data"]
    if "_target_" not in section:
        return EnergyDataModule.from_config(config)
    # Presets of sizes set batch_size, also for a class that has no such argument.
    spare = ("batch_size",) if "batch_size" in section else ()
    module = targets.build(section, "data", {"seed": config["seed"]}, spare)
    return module if isinstance(module, EnergyDataModule) else OwnData(module, section["_target_"])
