"""Runs one command and never outlives, nor lets the command outlive, the process that asked for it.

Started as a script by `maskdm.processes`, with no import of anything heavy. It holds the reading end of a pipe whose
writing end its parent keeps: when the parent ends, however it ends, the pipe closes, and the guard ends the command and
everything the command started. On Linux it adopts orphans (PR_SET_CHILD_SUBREAPER) so that none can slip away.

    python guard.py PIPE_FD GRACE_SECONDS COMMAND [ARGUMENT ...]
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.1
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def descendants(pid: int) -> list[int]:
    """Every living process below `pid`, by /proc; empty where there is no /proc."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:
                for child in file.read().split():
                    found += [int(child), *descendants(int(child))]
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """End this process when its parent, process `parent`, ends, however that ends (Linux only)."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(1)


def _signal_all(command: "subprocess.Popen[bytes]", number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(command.pid, number)
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _reap(command: "subprocess.Popen[bytes]") -> None:
    """Collect ended orphans; the command itself is left to Popen."""
    for pid in descendants(os.getpid()):
        if pid != command.pid:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _in_command() -> None:
    """Between fork and exec: die with the guard, and hear signals again."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)


def main(pipe: int, grace: float, arguments: list[str]) -> int:
    """Run the command until it ends or the pipe closes; then end whatever is left."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # only the pipe and the command's end count
    command = subprocess.Popen(
        arguments,
        start_new_session=True,
        preexec_fn=_in_command,
    )
    while command.poll() is None:
        if select.select([pipe], [], [], POLL_SECONDS)[0]:
            break
        _reap(command)
    deadline = time.monotonic() + grace
    _signal_all(command, signal.SIGTERM)
    while command.poll() is None or descendants(os.getpid()):
        if time.monotonic() > deadline:
            _signal_all(command, signal.SIGKILL)
        _reap(command)
        time.sleep(0.02)
    return command.returncode


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
    sys.exit(code if code >= 0 else 128 - code)
