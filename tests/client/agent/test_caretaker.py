"""The supervision of a site's worker; whole federations are in tests/e2e."""

import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskdm.errors import DataError, FederationError
from maskdm.run.runfolder import append_line
from maskdm_client.agent import caretaker
from maskdm_client.agent.caretaker import MOST_RESTARTS, Caretaker, Worker


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the user is told; the process that trains is one that dies at once."""
    told: list[str] = []
    monkeypatch.setattr(caretaker, "say", told.append)
    monkeypatch.setattr(caretaker, "sys", SimpleNamespace(executable="/bin/false"))
    return told


def dies(worker: Worker, said: list[str], times: int) -> None:
    """Look after it until it died so many times more."""
    wanted = len(said) + times
    while len(said) < wanted:
        worker.look_after()
        time.sleep(0.01)


def test_a_worker_that_dies_is_started_again_until_that_is_no_accident(tmp_path: Path, said: list[str]) -> None:
    with closing(Worker(tmp_path)) as worker:
        dies(worker, said, MOST_RESTARTS)
        with pytest.raises(FederationError, match=f"died {MOST_RESTARTS + 1} times in a row"):
            dies(worker, said, 1)
    assert len(said) == MOST_RESTARTS
    assert all(str(tmp_path / "logs" / "worker.log") in line for line in said)


def test_deaths_before_a_round_that_was_done_do_not_count(tmp_path: Path, said: list[str]) -> None:
    with closing(Worker(tmp_path)) as worker:
        for _ in range(2):
            dies(worker, said, MOST_RESTARTS)
            worker.has_worked()
        dies(worker, said, 1)
    assert len(said) == 2 * MOST_RESTARTS + 1


def test_whoever_waits_looks_after_the_worker_and_hears_what_it_says(tmp_path: Path, said: list[str]) -> None:
    event = {"event": "failed", "round": 1, "outcome": "FAILED", "reason": "memory"}
    checks: list[None] = []
    with Caretaker(tmp_path, lambda: checks.append(None)) as site:
        for _ in range(2 * MOST_RESTARTS):  # deaths between two replies are few
            dies_by = len(said)
            while len(said) == dies_by:
                site.pause(0.02)
            append_line(tmp_path / "events.jsonl", event)
            site.look()
    assert checks
    assert said.count("round 1: memory (the server is told only FAILED)") == 2 * MOST_RESTARTS


def test_data_that_cannot_be_used_end_the_site_and_a_final_model_is_remembered(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caretaker, "FATAL_SECONDS", 0.0)
    with Caretaker(tmp_path, lambda: None) as site:
        site.look()
        assert not site.finished
        append_line(tmp_path / "events.jsonl", {"event": "finished", "round": 2, "reason": "no images"})
        site.look()
        assert site.finished
        assert said[-1] == "the federation ended; the final model was not measured: no images"
        failed = {"event": "failed", "round": 1, "outcome": "DATA_UNUSABLE", "reason": "--data is gone"}
        append_line(tmp_path / "events.jsonl", failed)
        with pytest.raises(DataError, match="--data is gone"):
            site.look()
