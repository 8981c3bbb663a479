"""`audit-log verify` and `show`, as both command lines have them."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer

from maskdm.commands import command_line as cli
from maskdm.commands.audit_commands import audit_log
from maskdm.federated.auditlog import append, message_of, record
from maskdm.federated.parcel import Outcome, Parcel
from maskdm_client.commands.app import app as client_app
from maskdm_server.commands.app import app as server_app

Run = Callable[..., int]


@pytest.fixture(params=[client_app, server_app], ids=["client", "server"])
def run(request: pytest.FixtureRequest) -> Run:
    app: typer.Typer = request.param
    return lambda *arguments: cli.run(app, "program", ["audit-log", *map(str, arguments)])


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder whose log holds three messages of two rounds."""
    arrays = {f"block.{number}.weight": np.zeros((2, 3), np.float32) for number in range(110)}
    path = tmp_path / "audit.jsonl"
    record(path, "in", "coordinator", 1, "train", message_of(Parcel(arrays, {"exchange": 7}, "{}")))
    done = {"outcome": int(Outcome.DONE), "round": 1, "exchange": 7}
    record(path, "out", "coordinator", 1, "released", message_of(Parcel(arrays, done)))
    failed = {"outcome": int(Outcome.POLICY), "round": 2, "exchange": 8}
    record(path, "out", "coordinator", 2, "released", message_of(Parcel({}, failed)))
    return tmp_path


def test_a_whole_log_ends_with_0_and_says_its_head(run: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--out", site) == 0
    shown = capsys.readouterr().out
    assert "3 lines" in shown
    head = re.findall("[0-9a-f]{64}", shown)
    assert len(head) == 1
    assert run("verify", "--out", site, "--head", head[0]) == 0


def test_a_changed_log_ends_with_1_and_names_the_line(run: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = site / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"in"', b'"no"'))
    assert run("verify", "--out", site) == 1
    assert "line 1 was changed" in capsys.readouterr().out


def test_a_log_that_was_cut_off_ends_with_1_where_its_head_was_noted(
    run: Run, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", "--out", site) == 0
    head = re.findall("[0-9a-f]{64}", capsys.readouterr().out)[0]
    path = site / "audit.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert run("verify", "--out", site) == 0, "nothing in the log tells"
    assert run("verify", "--out", site, "--head", head) == 1
    assert "cut off" in capsys.readouterr().out


def test_a_torn_line_is_told_and_no_tampering(run: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (site / "audit.jsonl").open("ab") as file:
        file.write(b'{"number": 4, "prev')
    append(site / "audit.jsonl", {"text": "after"})
    assert run("verify", "--out", site) == 0
    assert "line 4 cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "show"])
def test_where_there_is_no_log_it_ends_with_2(
    run: Run, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--out", tmp_path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("head", ["", "12ab", 64 * "g"])
def test_a_head_that_is_none_ends_with_2(run: Run, site: Path, head: str) -> None:
    assert run("verify", "--out", site, "--head", head) == 2


def test_help_says_what_only_a_noted_head_tells(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--help") == 0
    assert "cut off at the end" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_each_message_is_a_line_for_a_person(run: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--out", site) == 0
    came, left, code = capsys.readouterr().out.splitlines()
    assert "110 arrays" in came
    assert re.search(r"in .*coordinator .*round +1 .*train", came)
    assert re.search(r"out .*coordinator .*round +1 .*released.*110 arrays", left)
    assert re.search(r"out .*round +2 .*POLICY", code)
    digest = json.loads((site / "audit.jsonl").read_text().splitlines()[1])["sha256"]
    assert left.endswith(digest[:12])
    assert "block.0.weight" not in left


@pytest.mark.parametrize(
    ("options", "rounds"),
    [(("--round", 1), [1, 1]), (("--round", 3), []), (("--last", 1), [2]), (("--round", 1, "--last", 1), [1])],
)
def test_rounds_and_the_end_can_be_picked(
    run: Run, site: Path, options: tuple[object, ...], rounds: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "--out", site, *options) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [int(re.findall(r"round +(\d+)", line)[0]) for line in shown] == rounds


def test_what_a_terminal_would_obey_is_not_shown(run: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(site / "audit.jsonl", "in", "evil\x1b[2J", 1, "late\r\n\x07")
    append(site / "audit.jsonl", {"time": "\x1b]0;", "scalars": 3})
    with (site / "audit.jsonl").open("ab") as file:
        file.write(b"\x1b[31m\n")
    assert run("show", "--out", site) == 0
    shown = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert len(shown.splitlines()) == 6


def test_a_reader_that_has_seen_enough_is_no_failure(site: Path) -> None:
    for _ in range(300):
        append(site / "audit.jsonl", {"text": "x"})
    command = f"{sys.executable} -m maskdm_client audit-log show --out {site} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)


def test_the_commands_are_of_both_programs() -> None:
    assert {command.name for command in audit_log.registered_commands} == {"verify", "show"}
