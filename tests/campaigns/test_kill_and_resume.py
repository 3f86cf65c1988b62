"""The campaign's short form."""

from pathlib import Path

import pytest

from tests.campaigns.kill_and_resume import campaign


@pytest.mark.slow
def test_two_killed_runs(tmp_path: Path) -> None:
    findings = campaign(tmp_path, runs=2, most_kills=1, seed=0)
    assert findings.kills > 0  # a run may end before its time has come
    assert findings.clean, findings.report()
