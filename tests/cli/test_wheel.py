"""The installed package works without the checkout: modules, configs, data and licences are in the wheel."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.helpers import ROOT, write_pairs

pytestmark = pytest.mark.slow

SOURCES = ("energy_flow", "energy_flow_benchmarks", "conf", "pyproject.toml", "README.md", "LICENSE")
TINY = [
    "size=small",
    "lattice.width=3",
    "lattice.height=3",
    "lattice.max_steps=1",
    "model.hidden_size=4",
    "trainer.max_epochs=1",
]
SHORT = ["+trainer.limit_train_batches=2", "baselines.enabled=false", "trainer.enable_progress_bar=false"]


def run(command: list[str | Path], cwd: Path, *, quiet: bool = True, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert not quiet or done.stderr == "", done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel. It is built from a copy, so that the checkout gets no build files."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    run([sys.executable, "-m", "build", "--wheel", *_isolation(), "--outdir", copy / "dist", copy], copy, quiet=False)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def _isolation() -> list[str]:
    """Use the installed setuptools if it is new enough; otherwise `build` fetches one."""
    try:
        enough = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        enough = False
    return ["--no-isolation"] if enough else []


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel], folder, quiet=False
    )
    return folder


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name for name in names if ".dist-info/" not in name}
    folders = {
        "energy_flow": "energy_flow",
        "conf": "energy_flow/conf",
        "energy_flow_benchmarks": "energy_flow_benchmarks",
    }
    for folder, prefix in folders.items():
        expected = {
            f"{prefix}/{path.relative_to(ROOT / folder)}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert expected <= inside, sorted(expected - inside)
    assert "energy_flow/py.typed" in inside
    assert "energy_flow/data/reverse_dictionary/train.safetensors" in inside
    assert "energy_flow/pretrained/reverse_dictionary.safetensors" in inside
    assert all(name.startswith(("energy_flow/", "energy_flow_benchmarks/")) for name in inside)
    for licence in ("LICENSE", "LICENSE-WordNet.txt"):
        assert any(".dist-info/" in name and name.endswith(licence) for name in names), licence


def test_the_installed_package_trains_on_its_own_data(site: Path, tmp_path: Path) -> None:
    where = "import energy_flow.config as c; print(c.__file__, c.config_dir())"
    for path in run([sys.executable, "-c", where], tmp_path, PYTHONPATH=str(site)).split():
        assert path.startswith(str(site)), "the checkout is used, not the installed package"
    out = run([sys.executable, "-m", "energy_flow.train", *TINY, *SHORT], tmp_path, PYTHONPATH=str(site))
    assert "16,000 train, 1,000 val, 1,000 test pairs of dimension 768" in out
    (metrics,) = tmp_path.glob("logs/train/runs/*/metrics.json")
    assert 0 < json.loads(metrics.read_text())["test/mrr"] <= 1


def test_the_console_scripts(site: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    files = ["data=files", *(f"data.{split}={split}.safetensors" for split in ("train", "val", "test"))]
    train, evaluate = site / "bin" / "energy-flow-train", site / "bin" / "energy-flow-evaluate"
    run([train, *TINY, *SHORT, *files, "data.batch_size=16"], tmp_path, PYTHONPATH=str(site))
    (best,) = tmp_path.rglob("best.ckpt")
    out = run([evaluate, f"ckpt_path={best}", *files, "baselines.enabled=false"], tmp_path, PYTHONPATH=str(site))
    assert "flow lattice" in out
    predict, encode = site / "bin" / "energy-flow-predict", site / "bin" / "energy-flow-encode"
    out = run([predict, "row=0", "k=3"], tmp_path, PYTHONPATH=str(site))
    assert "true word: crapulous, rank " in out, "the weights and data of the package"
    assert "input: ???" in run([encode, "--cfg", "job"], tmp_path, PYTHONPATH=str(site))
    run([site / "bin" / "energy-flow-export", "output=model.pt2"], tmp_path, PYTHONPATH=str(site))
    assert (tmp_path / "model.pt2").is_file()
    assert "groups" in run([train, "--help"], tmp_path, PYTHONPATH=str(site)).lower()
