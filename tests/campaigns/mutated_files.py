"""Load thousands of damaged and forged files: each must load correctly or raise an EnergyFlowError.

    python -m tests.campaigns.mutated_files --data 20000 --checkpoints 5000

All files load in one process. Another exception, a hang, growing memory or wrong content is a failure. File number i is
the same in every run, except for the order of names in safetensors headers, which the library chooses.
`--only data:123` loads one file again.
"""

import argparse
import faulthandler
import json
import random
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from energy_flow.atomic import digest
from energy_flow.checkpoints import compatibility
from energy_flow.checkpoints import format as checkpoints
from energy_flow.data import PairDataset, read_data_settings
from energy_flow.data.inspection import inspect
from energy_flow.data.text.pairs import read_texts
from energy_flow.errors import DataError, EnergyFlowError
from energy_flow.pretrained import EnergyFlowModel
from energy_flow.training.module import EnergyFlowModule
from tests.campaigns.mutations import MUTATIONS
from tests.campaigns.seeds import Seed, data_seeds, model_seeds

SECONDS = 5  # per file, at most
GROWTH = 1 << 30  # bytes of memory for all files together, at most

# Replacements of a value of a config or a card.
VALUES = (None, -1, 0, 10**9, 2**62, 2**70, 1e308, float("nan"), "", "os.system", "${oc.env:HOME}", [], {}, [[]], True)

# Settings of the data without the files.
DATA = {
    **{"name": "files", "test": None, "normalize": True, "dimension": None},
    **{"batch_size": 4, "eval_batch_size": 4, "num_workers": 0, "timeout": 60, "seed": 1},
}


class HangError(BaseException):
    """A BaseException, so that no `except Exception` catches it."""


@dataclass
class Outcome:
    """Results of a campaign."""

    loaded: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: float = 0.0
    messages: Counter = field(default_factory=Counter)  # by type of error


def forged(seed: Seed, rng: random.Random, seeds: Sequence[Seed]) -> bytes:
    """Return a seed with one to three damages, or with changed values and correct checksums."""
    if seed.name.startswith("model") and rng.random() < 0.3:
        return (_other_settings if seed.name.endswith(".ckpt") else _other_card)(seed.content, rng)
    content, others = seed.content, [other.content for other in seeds]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(MUTATIONS)(content, rng, others) or b"\0"
    return content


def _other_settings(content: bytes, rng: random.Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.ckpt")
        path.write_bytes(content)
        checkpoint = torch.load(path, weights_only=True)
        _change(checkpoint, rng)
        torch.save(checkpoint, path)
        return path.read_bytes()


def _other_card(content: bytes, rng: random.Random) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(content)
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())  # safetensors gives another order in every process
            card, weights = json.loads(file.metadata()["energy_flow"]), {name: file.get_tensor(name) for name in names}
        _change(card if rng.random() < 0.7 else weights, rng)
        weights = {
            name: value for name, value in weights.items() if isinstance(value, torch.Tensor) and value.is_contiguous()
        }
        text = json.dumps(card)
        return save(weights, {"energy_flow": text, "sha256": digest(text, weights)})


def _change(tree: dict, rng: random.Random) -> None:
    """Replace, remove or add one value, anywhere."""
    while True:
        key = rng.choice(list(tree))
        if isinstance(tree[key], dict) and tree[key] and rng.random() < 0.9:
            tree = tree[key]
            continue
        break
    kind = rng.random()
    if kind < 0.15:
        del tree[key]
    elif kind < 0.3:
        tree[rng.choice(("_target_", "_instantiator", "../x", "x"))] = rng.choice(VALUES)
    elif isinstance(tree[key], torch.Tensor) and kind < 0.8:
        tree[key] = rng.choice(
            (torch.zeros(3), torch.ones(2, dtype=torch.int8), torch.zeros(()).expand(1 << 40), torch.zeros(0))
        )
    else:
        tree[key] = rng.choice(VALUES)


def load_data(path: Path) -> None:
    """Read a file as training, `check` and `encode` do. Loaded rows must be finite, of length 1 and paired."""
    if path.name.startswith("texts"):
        pairs = read_texts(path, "source", "target")
        assert len(pairs.source) == len(pairs.target) > 0
        assert all(isinstance(text, str) and text.strip() for text in (*pairs.source, *pairs.target))
        return
    file = path.with_name("pairs.npz") if path.suffix == ".jsonl" else path
    files = [str(file)] * 2 if file.suffix == ".npy" else str(file)
    refused = inspect(read_data_settings({**DATA, "train": files, "val": files})).refused
    try:
        dataset = PairDataset(files, True, "data.train")
    except DataError as error:
        _check_same(str(error), refused[0])
        raise
    assert not refused or len(dataset) == 1, f"check refuses what training takes: {refused[0]}"
    source, target = dataset.all()
    assert source.shape == target.shape == (len(dataset), dataset.dim)
    for rows in (source, target):
        assert bool(((rows.norm(dim=1) - 1).abs() < 1e-4).all()), "rows must have length 1"
    assert dataset.names is None or len(dataset.names) == len(dataset)


def _check_same(training: str, check: str) -> None:
    # numpy's messages contain addresses of objects. Of two bad tensors, safetensors names either.
    messages = [re.sub("0x[0-9a-f]+|`[^`]*`", "", text) for text in (training, check)]
    assert messages[0] == messages[1], f"training: {training[:200]!r}, check: {check[:200]!r}"


def load_model(path: Path) -> None:
    """Load a model by every loader. It must have the weights of the file."""
    if path.suffix == ".safetensors":
        model = EnergyFlowModel.from_pretrained(path)
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(model.processor.state_dict())
        return
    checkpoint = checkpoints.load(path)
    module = compatibility.restore(EnergyFlowModule, checkpoint, path)
    for name, value in module.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][name].to(value.dtype)) or not value.isfinite().all(), name
    EnergyFlowModel.from_checkpoint(path)


def campaign(
    kind: str, count: int, folder: Path, *, first: int = 0, report: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Damage and load `count` files of a kind (`data` or `checkpoints`) in a folder, from number `first`."""
    seeds, load = (data_seeds(), load_data) if kind == "data" else (model_seeds(folder), load_model)
    good = next((seed.content for seed in seeds if seed.name == "pairs.npz"), None)
    outcome, peak = Outcome(), _peak()
    for number in range(first, first + count):
        rng = random.Random(f"{kind} {number}")
        seed = rng.choice(seeds)
        place = folder / "files"
        place.mkdir(exist_ok=True)
        path = place / seed.name
        path.write_bytes(forged(seed, rng, seeds))
        if seed.name == "pairs.jsonl" and good is not None:
            (place / "pairs.npz").write_bytes(good)
        where = f"{kind}:{number} ({seed.name})"
        failure = _attempt(load, path, outcome)
        if _peak() - peak > GROWTH:
            failure, peak = f"memory grew to {_peak() / 2**30:.1f} GiB", _peak()
        if failure:
            outcome.failures.append(f"{where}: {failure}")
            report(outcome.failures[-1])
        for left in place.iterdir():
            left.unlink()
    return outcome


def _attempt(load: Callable[[Path], None], path: Path, outcome: Outcome) -> str | None:
    """Load a file; return the failure, or None."""
    started = time.perf_counter()
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True)  # for code that blocks signals
    try:
        load(path)
        outcome.loaded += 1
        return None
    except EnergyFlowError as error:
        outcome.refused += 1
        outcome.messages[type(error).__name__] += 1
        text = str(error)
        return None if str(path.parent) in text and len(text) < 5000 else f"an unhelpful message: {text[:200]!r}"
    except HangError:
        return f"hung for {SECONDS} s"
    except BaseException as error:  # noqa: BLE001 - the campaign searches for these
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        outcome.slowest = max(outcome.slowest, time.perf_counter() - started)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _alarm(*_: Any) -> None:
    raise HangError


def prepare() -> None:
    """Start the watchdog, and ignore warnings about damaged files."""
    signal.signal(signal.SIGALRM, _alarm)
    warnings.simplefilter("ignore")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=0, help="data files")
    parser.add_argument("--checkpoints", type=int, default=0, help="checkpoints and pretrained models")
    parser.add_argument("--only", help="load one file again: data:NUMBER or checkpoints:NUMBER")
    arguments = parser.parse_args()
    prepare()
    wanted = [("data", arguments.data, 0), ("checkpoints", arguments.checkpoints, 0)]
    if arguments.only:
        kind, _, number = arguments.only.partition(":")
        wanted = [(kind, 1, int(number))]
    failed = False
    for kind, count, first in wanted:
        if not count:
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = campaign(
                kind, count, Path(folder), first=first, report=lambda text: print(f"FAILED {text}", flush=True)
            )
        print(
            f"{kind}: {count:,} files in {time.perf_counter() - started:.0f} s: {found.loaded:,} loaded, "
            f"{found.refused:,} refused {dict(found.messages)}, {len(found.failures):,} failures; slowest "
            f"{found.slowest:.2f} s, peak {_peak() / 2**20:.0f} MiB",
            flush=True,
        )
        failed |= bool(found.failures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
