"""The supervision of a site's worker; whole federations are in tests/e2e."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskdm.errors import FederationError
from maskdm_client import supernode
from maskdm_client.supernode import MOST_RESTARTS, Worker


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told; the process that trains is one that dies at once."""
    told: list[str] = []
    monkeypatch.setattr(supernode, "say", told.append)
    monkeypatch.setattr(supernode, "sys", SimpleNamespace(executable="/bin/false"))
    return told


def dies(worker: Worker, said: list[str], times: int) -> None:
    """Look after it until it died so many times more."""
    wanted = len(said) + times
    while len(said) < wanted:
        worker.look_after()
        time.sleep(0.01)


def test_a_worker_that_dies_is_started_again_until_that_is_no_accident(tmp_path: Path, said: list[str]) -> None:
    with Worker(tmp_path) as worker:
        dies(worker, said, MOST_RESTARTS)
        with pytest.raises(FederationError, match=f"died {MOST_RESTARTS + 1} times in a row"):
            dies(worker, said, 1)
    assert len(said) == MOST_RESTARTS
    assert all(str(tmp_path / "logs" / "worker.log") in line for line in said)


def test_deaths_before_a_round_that_was_done_do_not_count(tmp_path: Path, said: list[str]) -> None:
    with Worker(tmp_path) as worker:
        for _ in range(2):
            dies(worker, said, MOST_RESTARTS)
            worker.has_worked()
        dies(worker, said, 1)
    assert len(said) == 2 * MOST_RESTARTS + 1
