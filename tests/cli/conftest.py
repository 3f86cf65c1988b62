"""Data and programs for the tests of the command line."""

import sys
from pathlib import Path

import pytest

from tests.cli import stand_in
from tests.cli.helpers import Outcome, Program, spawn, write_pairs


@pytest.fixture
def program(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The entry points on tiny files in a fresh folder, which is the working directory."""
    write_pairs(tmp_path, seed=1)
    monkeypatch.chdir(tmp_path)
    return Program(tmp_path, capfd, monkeypatch)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> stand_in.Library:
    """A replacement of sentence-transformers."""
    library = stand_in.Library()
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    monkeypatch.setitem(sys.modules, "transformers.utils.logging", stand_in.Bars())
    return library


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny files, and the run of `trained` in logs/."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder)
    return folder


@pytest.fixture(scope="session")
def trained(trained_folder: Path) -> Outcome:
    """One finished run with everything switched on, in its own process."""
    overrides = (
        "trainer.max_epochs=2",
        "baselines.enabled=true",
        "baselines.training.epochs=1",
        "logger=[tensorboard,csv]",
    )
    return spawn("train", trained_folder, *overrides, check=True)
