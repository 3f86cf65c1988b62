"""The campaign in its short form."""

import shutil
from pathlib import Path

import pytest

from tests.campaigns.interrupted_runs import Findings
from tests.campaigns.unwritable import UNPRIVILEGED, campaign


@pytest.mark.slow
@pytest.mark.skipif(bool(UNPRIVILEGED) and not shutil.which(UNPRIVILEGED[0]), reason="the superuser may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    _check(campaign("read-only", tmp_path, runs=2, seed=0))


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    try:
        findings = campaign("full", tmp_path, runs=2, seed=0)
    except PermissionError as error:
        pytest.skip(str(error))
    _check(findings)


def _check(findings: Findings) -> None:
    assert findings.runs == findings.events.total() == 2
    assert findings.clean, findings.report()
