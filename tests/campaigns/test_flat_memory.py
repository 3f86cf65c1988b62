"""The campaign of flat memory measures and compares. Only a long run shows whether memory is flat."""

import subprocess
import sys

import pytest

from tests.campaigns.flat_memory import grown
from tests.cli.helpers import ROOT, environment


def test_growth_is_relative() -> None:
    seen = {0: (100, 10, 1), 1: (200, 10, 1), 2: (202, 10, 1), 3: (203, 10, 1)}
    assert grown(seen[1], seen[3]) == {"resident memory": pytest.approx(0.015), "open files": 0, "threads": 0}
    assert max(grown(seen[0], seen[3]).values()) > 1


@pytest.mark.slow
def test_a_short_campaign() -> None:
    own = ["lattice.width=4", "lattice.height=4", "model.hidden_size=8"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.flat_memory", "steps", "50", *own],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = done.stdout.splitlines()
    start = lines.index("steps,resident MiB,open files,threads")
    assert [line.split(",")[0] for line in lines[start + 1 : -1]] == [str(step) for step in range(5, 51, 5)], (
        done.stderr
    )
    assert "resident memory" in lines[-1]
