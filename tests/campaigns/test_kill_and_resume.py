"""The campaign in its short form."""

import signal
from pathlib import Path

import pytest

from tests.campaigns.kill_and_resume import campaign


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_two_runs(tmp_path: Path, signum: signal.Signals) -> None:
    findings = campaign(tmp_path, runs=2, most_signals=1, seed=0, signum=signum)
    assert findings.events.total() > 0  # a run may end before its signal
    assert findings.clean, findings.report()
