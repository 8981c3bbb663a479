"""Child processes and all they start end with the one who started them."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maskdm.run import processes
from maskdm.run.processes import Child, free_port, port_is_taken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")

# Starts a grandchild in a session of its own, writes both process numbers, and waits for it.
FAMILY = """
import os, subprocess, sys
stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if "stubborn" in sys.argv else ""
program = "import signal; " + stubborn + "print('up', flush=True); signal.pause()"
grandchild = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, start_new_session=True)
grandchild.stdout.readline()
print(os.getpid(), grandchild.pid, flush=True)
if "orphan" in sys.argv:
    os._exit(0)
grandchild.wait()
"""

# A process that starts a Child and waits to be killed.
PARENT = """
import sys
from pathlib import Path
from maskdm.run.processes import Child
child = Child([sys.executable, "-S", "-c", sys.argv[2]], log=Path(sys.argv[1]))
print("started", flush=True)
input()
"""


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def family(log: Path) -> list[int]:
    assert wait_for(lambda: log.exists() and log.read_text().count("\n") >= 1)
    return [int(word) for word in log.read_text().split()]


def test_closing_a_child_ends_what_it_started(tmp_path: Path) -> None:
    with Child([sys.executable, "-S", "-c", FAMILY], log=tmp_path / "log") as child:
        pids = family(tmp_path / "log")
        assert child.exit_code() is None
        assert all(alive(pid) for pid in pids)
    assert wait_for(lambda: not any(alive(pid) for pid in pids))
    assert child.exit_code() is not None


def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    with Child([sys.executable, "-S", "-c", FAMILY, "stubborn"], log=tmp_path / "log"):
        pids = family(tmp_path / "log")
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


def test_an_orphan_ends_when_the_command_ends(tmp_path: Path) -> None:
    with Child([sys.executable, "-S", "-c", FAMILY, "orphan"], log=tmp_path / "log") as child:
        assert wait_for(lambda: child.exit_code() is not None)
        _, orphan = family(tmp_path / "log")
        assert not alive(orphan)


def test_children_end_even_when_their_parent_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log"), FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        pids = family(tmp_path / "log")
        parent.kill()
    assert wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(0)", 0), ("raise SystemExit(3)", 3)])
def test_the_exit_code_of_the_command_is_handed_on(tmp_path: Path, program: str, code: int) -> None:
    with Child([sys.executable, "-S", "-c", program], log=tmp_path / "log") as child:
        assert wait_for(lambda: child.exit_code() is not None)
        assert child.exit_code() == code


def test_the_output_and_the_environment_of_a_child_can_be_looked_at(tmp_path: Path) -> None:
    program = "import os, sys; print('a\\nb', os.environ['WORD']); print('c', file=sys.stderr)"
    log = tmp_path / "deep" / "log"
    with Child([sys.executable, "-S", "-u", "-c", program], log=log, environment={"WORD": "w"}) as child:
        assert wait_for(lambda: child.exit_code() is not None)
        assert child.last_lines() == "a\nb w\nc"
        assert child.last_lines(1) == "c"


# Prints numbered lines, each of 100 bytes: as many as it is told, or without end and deaf to requests to stop.
FLOOD = """
import itertools, signal, sys
if sys.argv[1] == "endless":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for number in itertools.count() if sys.argv[1] == "endless" else range(int(sys.argv[1])):
    print(f"{number:099d}")
"""


def test_of_a_log_that_grows_large_the_newest_part_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_LOGGED", 100_000)
    log = tmp_path / "log"
    with Child([sys.executable, "-S", "-c", FLOOD, "30000"], log=log) as child:
        assert wait_for(lambda: child.exit_code() is not None)
    older = tmp_path / "log.1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "log.1"]
    assert max(log.stat().st_size, older.stat().st_size) <= 100_000
    assert child.last_lines(1) == f"{29_999:099d}"
    text = older.read_text() + log.read_text()
    assert text.endswith("".join(f"{number:099d}\n" for number in range(29_500, 30_000))), "nothing in between is lost"


def test_a_command_that_prints_without_end_fills_no_disk_and_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MOST_LOGGED", 100_000)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    log, older = tmp_path / "log", tmp_path / "log.1"
    with Child([sys.executable, "-S", "-c", FLOOD, "endless"], log=log) as child:
        assert wait_for(lambda: older.exists() and int(older.read_text().split("\n")[1]) > 5000)
        assert child.exit_code() is None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200_000


def test_a_large_log_is_put_aside_before_a_command_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what a command prints first is in the log from where it began."""
    monkeypatch.setattr(processes, "MOST_LOGGED", 100_000)
    log = tmp_path / "log"
    for before, begins in ((40_000, 40_000), (60_000, 0)):
        log.write_text("x" * before)
        with Child([sys.executable, "-S", "-c", "print('first')"], log=log) as child:
            assert wait_for(lambda: child.exit_code() is not None)
        assert log.read_bytes()[begins:] == b"first\n"
    assert (tmp_path / "log.1").read_text() == "x" * 60_000


def test_a_command_goes_on_where_its_log_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MOST_LOGGED", 10_000)
    (tmp_path / "log.1").mkdir()  # in the way of the older part
    (tmp_path / "log.1" / "more").touch()
    with Child([sys.executable, "-S", "-c", FLOOD + "raise SystemExit(7)", "30000"], log=tmp_path / "log") as child:
        assert wait_for(lambda: child.exit_code() is not None)
    assert child.exit_code() == 7
    assert (tmp_path / "log").stat().st_size <= 10_000


def test_a_command_that_closes_its_output_lives_on(tmp_path: Path) -> None:
    program = "import os, time; os.close(1); os.close(2); time.sleep(0.5); raise SystemExit(5)"
    with Child([sys.executable, "-S", "-c", program], log=tmp_path / "log") as child:
        assert wait_for(lambda: child.exit_code() is not None)
    assert child.exit_code() == 5


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    child = Child([sys.executable, "-S", "-c", "input()"], log=tmp_path / "log")
    child.close()
    child.close()


def test_a_free_port_is_free_until_something_listens() -> None:
    port = free_port()
    assert not port_is_taken("127.0.0.1", port)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", port))
        listening.listen()
        assert port_is_taken("127.0.0.1", port)
    assert port_is_taken("203.0.113.1", port)  # an address that is not this computer's
