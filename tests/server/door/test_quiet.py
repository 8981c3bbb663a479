"""What strangers can make a log say is bounded."""

import logging
from types import SimpleNamespace

import pytest

from maskdm_server.door import quiet as under_test
from maskdm_server.door.quiet import BURST, LONGEST_LINE, RATE, TELL_SECONDS, Quiet, Refusals


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [1000.0]
    monkeypatch.setattr(under_test, "time", SimpleNamespace(monotonic=lambda: moment[0]))
    return moment


def line(text: str, *arguments: object, exc_info: object = None) -> logging.LogRecord:
    return logging.LogRecord("uvicorn.error", logging.WARNING, "", 0, text, arguments, exc_info)  # type: ignore[arg-type]


def test_a_flood_is_cut_off_and_counted(now: list[float]) -> None:
    quiet, written, flood = Quiet(), 0, 100_000
    for _ in range(flood):
        record = line("refused %s", "x" * 80)
        if quiet.filter(record):
            written += len(record.getMessage())
            said = record.getMessage()
    assert said == "refused " + "x" * 80
    assert written <= BURST
    now[0] += 10
    record = line("next")
    assert quiet.filter(record)
    assert record.getMessage().startswith("next (98,")
    assert record.getMessage().endswith(" lines before this one were left out)")
    again = sum(quiet.filter(line("x" * 900)) for _ in range(1000))
    assert again * 900 <= 10 * RATE, "as much as there was time for"


def test_a_quiet_log_is_left_as_it_is(now: list[float]) -> None:
    quiet = Quiet()
    for number in range(1000):
        now[0] += 1
        record = line("%d of %s", number, "1000")
        assert quiet.filter(record)
        assert record.getMessage() == f"{number} of 1000"


def test_a_long_line_is_cut_and_a_traceback_counts(now: list[float]) -> None:
    quiet = Quiet()
    record = line("%s", "y" * 10**6)
    assert quiet.filter(record)
    assert len(record.getMessage()) == LONGEST_LINE
    assert sum(quiet.filter(line("", exc_info=(ValueError, ValueError(), None))) for _ in range(1000)) < 60


def test_refusals_are_one_line_a_minute(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals()
    with caplog.at_level(logging.WARNING, "uvicorn.error"):
        for _ in range(5000):
            refusals.count("404")
            refusals.tell()
        refusals.count("401")
        assert caplog.messages == []
        now[0] += TELL_SECONDS
        refusals.tell()
        refusals.tell()
        assert caplog.messages == ["refused in the last 60 s: 1 x 401, 5,000 x 404"]
        now[0] += 10 * TELL_SECONDS
        refusals.tell()
        assert len(caplog.messages) == 1, "nothing was"
        refusals.count("404")
        now[0] += 1
        refusals.tell()
        assert len(caplog.messages) == 1
