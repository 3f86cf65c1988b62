"""The count of hops between files: right on a tiny package, and limited for a training step."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.campaigns.walks import Walk, walk_of_training_step

MAX_HOPS = {"autograd": 150, "tape": 260}


def test_calls_and_returns_between_files_are_hops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "walked_b.py").write_text("def twice(f):\n    return [f(), f()]\n\ndef alone():\n    return len('b')\n")
    (tmp_path / "walked_a.py").write_text(
        "import walked_b\n\n"
        "def own():\n    return sorted([2, 1], key=lambda x: x)\n\n"
        "def walk():\n    walked_b.alone()\n    return walked_b.twice(own)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    walked = importlib.import_module("walked_a")
    walk = Walk(tmp_path)
    with walk.record():
        walked.walk()
    assert sys.getprofile() is None
    # alone: there and back. twice: there, back and there for each of two calls, and back.
    assert walk.hops == {("walked_a.py", "walked_b.py"): 4, ("walked_b.py", "walked_a.py"): 4}
    assert walk.num_hops == 8
    assert walk.files == {"walked_a.py", "walked_b.py"}


@pytest.mark.parametrize("engine", MAX_HOPS)
def test_a_training_step_stays_within_its_hops(engine: str) -> None:
    walk = walk_of_training_step(engine)
    assert 50 < walk.num_hops <= MAX_HOPS[engine], walk.hops.most_common()
    assert {"training/module.py", "core/flow_processor.py", "core/rollout.py"} <= walk.files
