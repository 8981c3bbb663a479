"""Tracebacks of what nobody foresaw: kept at the site, for its owner alone, and never without bound."""

import stat
from pathlib import Path

import pytest

from maskdm_client.folder import failures
from maskdm_client.folder.failures import LOG, unexpected


def error(words: str) -> Exception:
    try:
        raise KeyError(words)
    except KeyError as found:
        return found


def test_a_traceback_is_kept_for_the_owner_alone_and_one_line_says_where(tmp_path: Path) -> None:
    said = unexpected(tmp_path, error("first\x1b[2J"))
    assert said.startswith("unexpected KeyError: ")
    assert said.endswith(f"(its traceback: {LOG})")
    assert said.isprintable()
    unexpected(tmp_path, error("second \udcff"))
    kept = (tmp_path / LOG).read_text()
    assert kept.index("first") < kept.index("second")
    assert kept.count("Traceback (most recent call last)") == 2
    assert f'File "{__file__}"' in kept
    assert stat.S_IMODE((tmp_path / LOG).stat().st_mode) == 0o600


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "MOST_BYTES", 2000)
    for number in range(20):
        unexpected(tmp_path, error(f"number {number}"))
    unexpected(tmp_path, error("x" * 900))
    kept = (tmp_path / LOG).read_bytes()
    assert len(kept) <= 2000
    assert b"number 19" in kept
    assert b"number 2'" not in kept
    assert kept.endswith(b"x" * 900 + b"'\n")


def test_where_it_cannot_be_kept_the_line_is_all_there_is(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    assert unexpected(tmp_path, error("a")) == "unexpected KeyError: 'a'"


def test_no_terminal_obeys_what_is_kept(tmp_path: Path) -> None:
    unexpected(tmp_path, ValueError("a\x1b[2J\nb"))
    kept = (tmp_path / LOG).read_text()
    assert "\x1b" not in kept
    assert "ValueError: a?[2J\nb\n" in kept
