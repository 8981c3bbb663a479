"""Flower's processes of a site, played by small scripts; the real ones are in tests/e2e."""

import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.federated.flower_names import UNFIT
from maskdm.federated.kit import open_kit
from maskdm_client.flower import supernode
from maskdm_client.flower.pinned import ADMITTED, UNANSWERED
from maskdm_client.flower.supernode import SuperNode
from maskdm_server.kits.provision import provision

SCRIPTS = {
    # Its options are --superlink, its address, --host, its address, --port, the port …
    "flower-supernode": 'echo "$@"; cat "$0.says"; $0.admitted "$1" "$7"; exec /bin/sleep 60',
    "flower-supernode.admitted": 'printf %s "$2" > "$1/.flwr/admitted"',
    "flower-superexec": 'echo "$@"; echo $$ > "$0.pid"; exec /bin/sleep 60',
}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of scripts that do as Flower does."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, lines in SCRIPTS.items():
        (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
        (folder / name).chmod(0o755)
    (folder / "flower-supernode.says").write_text("Starting\n")
    monkeypatch.setattr(supernode, "pinned", lambda name, site: [str(folder / f"flower-{name}"), str(site)])
    return folder


@pytest.fixture
def node(programs: Path, tmp_path: Path) -> Iterator[SuperNode]:
    with SuperNode(tmp_path, "::1", 8000, None) as found:
        yield found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pid_of(programs: Path) -> int | None:
    path = programs / "flower-superexec.pid"
    return int(path.read_text()) if path.exists() and path.read_text().strip() else None


def test_a_superexec_that_dies_ends_the_connection_so_that_another_one_is_made(
    programs: Path, tmp_path: Path, node: SuperNode, capsys: pytest.CaptureFixture[str]
) -> None:
    until(lambda: node.is_alive() and pid_of(programs) is not None)
    written = (tmp_path / "logs" / "supernode.log").read_text()
    assert "--superlink [::1]:8000" in written
    address = f"127.0.0.1:{written.split('--port ')[1].split()[0]}"
    given = f"--runtime-api-address {address} --insecure"
    until(lambda: given in (tmp_path / "logs" / "superexec.log").read_text())  # a process of its own writes it
    executor = pid_of(programs)
    assert executor
    os.kill(executor, signal.SIGKILL)
    until(lambda: not node.is_alive())
    assert "superexec ended unexpectedly" in capsys.readouterr().err


def test_a_clientapp_that_ended_without_an_answer_ends_the_connection_and_the_next_one_lives(
    programs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its SuperNode would wait for that answer for ever."""
    with SuperNode(tmp_path, "127.0.0.1", 8000, None) as node:
        until(node.is_let_in)
        assert node.is_alive()
        address = re.search(r"--port (\d+)", (tmp_path / "logs" / "supernode.log").read_text())
        assert address
        (tmp_path / UNANSWERED).write_text(f"127.0.0.1:{address[1]}")
        assert not node.is_alive()
    assert "ClientApp ended without an answer" in capsys.readouterr().err
    with SuperNode(tmp_path, "127.0.0.1", 8000, None) as node:
        assert node.is_alive()


@pytest.mark.parametrize("mark", [None, "", "1"], ids=["none", "half written", "of another connection"])
def test_a_site_is_let_in_when_this_connection_says_so_and_nothing_runs_before(
    programs: Path, tmp_path: Path, mark: str | None
) -> None:
    with SuperNode(tmp_path, "127.0.0.1", 8000, None) as earlier:
        until(earlier.is_let_in)
    (programs / "flower-supernode.says").write_text("SuperNode ID: 1\n")  # what it prints says nothing
    lines = "exit" if mark is None else f'printf %s "{mark}" > "$1/{ADMITTED}"'
    (programs / "flower-supernode.admitted").write_text(f"#!/bin/sh\n{lines}\necho marked\n")
    with SuperNode(tmp_path, "127.0.0.1", 8000, None) as node:
        log = tmp_path / "logs" / "supernode.log"
        until(lambda: log.read_text().count("SuperNode ID") == 1 and (mark is None or "marked" in log.read_text()))
        assert node.is_alive()
        assert not node.is_let_in()
    assert pid_of(programs) is None


def test_a_supernode_that_ends_ends_the_connection(programs: Path, tmp_path: Path) -> None:
    (programs / "flower-supernode").write_text("#!/bin/sh\nexit 1\n")
    with SuperNode(tmp_path, "127.0.0.1", 8000, None) as node:
        until(lambda: not node.is_alive())


def test_a_superexec_finds_no_program_but_ours_and_has_the_secret_of_its_node(
    programs: Path, tmp_path: Path, node: SuperNode
) -> None:
    (programs / "flower-superexec").write_text('#!/bin/sh\necho "$PATH" "$@"\nexec /bin/sleep 60\n')
    log = tmp_path / "logs" / "superexec.log"
    until(lambda: node.is_alive() and log.exists() and log.read_text().endswith("\n"))
    path, *arguments = log.read_text().split()
    assert [program.name for program in Path(path).iterdir()] == ["flwr-clientapp"]
    secret = Path(arguments[arguments.index("--superexec-auth-secret-file") + 1])
    assert f"--superexec-auth-secret-file {secret}" in (tmp_path / "logs" / "supernode.log").read_text()
    assert (stat.S_IMODE(secret.stat().st_mode), len(secret.read_text())) == (0o600, 64)


def test_a_kit_gives_authority_and_key_and_takes_away_insecure(programs: Path, tmp_path: Path) -> None:
    (made,) = provision(tmp_path / "kits", "127.0.0.1:8000", ["a"], policy=b"")
    opened = open_kit(made, tmp_path / ".kit")
    with SuperNode(tmp_path, "127.0.0.1", 8000, opened) as node:
        until(node.is_let_in)
    written = (tmp_path / "logs" / "supernode.log").read_text()
    assert f"--root-certificates {opened.authority} --auth-supernode-private-key {opened.key}" in written
    assert "--insecure" not in written


def test_a_flower_that_lacks_a_name_ends_the_site_with_what_to_install(programs: Path, tmp_path: Path) -> None:
    (programs / "flower-supernode").write_text(f"#!/bin/sh\necho one; echo 'Flower 9 lacks it: pip'; exit {UNFIT}\n")
    with SuperNode(tmp_path, "::1", 8000, None) as node, pytest.raises(UsageError, match=r"^Flower 9 lacks it: pip$"):
        until(lambda: not node.is_alive())
