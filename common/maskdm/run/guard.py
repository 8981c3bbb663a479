"""Runs one command and never outlives, nor lets the command outlive, the process that asked for it.

Started as a script by `processes`, with no import of anything heavy. It holds the reading end of a pipe whose
writing end its parent keeps: when the parent ends, however it ends, the pipe closes, and the guard ends the command and
everything the command started. On Linux it adopts orphans (PR_SET_CHILD_SUBREAPER) so that none can slip away.

What the command prints goes through the guard, which keeps the newest of it: whatever makes a command print without end
must not fill the disk.

    python guard.py PIPE_FD GRACE_SECONDS LOG MOST_BYTES COMMAND [ARGUMENT ...]
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
CHUNK = 2**16  # bytes, as many as a pipe holds
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


class Log:
    """A file that is appended to; at `most` bytes it becomes LOG.1, in place of the one before, and begins anew."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._most = path, most
        self._descriptor = _appending(path)

    def write(self, content: bytes) -> None:
        """Append; what cannot be written, as where the disk is full, is lost: the work is worth more than its log."""
        with contextlib.suppress(OSError):
            if os.fstat(self._descriptor).st_size + len(content) > self._most:
                os.replace(self._path, f"{self._path}.1")
                os.close(self._descriptor)
                self._descriptor = _appending(self._path)
            os.write(self._descriptor, content)


def _appending(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _read(printed: int) -> bytes:
    """What was printed and not read yet; empty where there is nothing, and at the end."""
    with contextlib.suppress(BlockingIOError):
        return os.read(printed, CHUNK)
    return b""


def main(pipe: int, grace: float, log: Log, arguments: list[str]) -> int:
    """Run the command until it ends or the pipe closes; then end whatever is left."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # only the pipe and the command's end count
    printed, output = os.pipe()
    os.set_blocking(printed, False)
    command = subprocess.Popen(
        arguments,
        stdout=output,
        stderr=output,
        start_new_session=True,
        preexec_fn=_in_command,
    )
    os.close(output)
    _watch(command, pipe, printed, log)
    deadline = time.monotonic() + grace
    _signal_all(command, signal.SIGTERM)
    while command.poll() is None or descendants(os.getpid()):
        if time.monotonic() > deadline:
            _signal_all(command, signal.SIGKILL)
        _reap(command)
        if content := _read(printed):  # who cannot print cannot end
            log.write(content)
        else:
            time.sleep(0.02)
    while content := _read(printed):
        log.write(content)
    return command.returncode


def _watch(command: "subprocess.Popen[bytes]", pipe: int, printed: int, log: Log) -> None:
    """Until the command ends or the pipe closes."""
    watched, reaped = [pipe, printed], time.monotonic()
    while command.poll() is None:
        ready = select.select(watched, [], [], POLL_SECONDS)[0]
        if pipe in ready:
            return
        if printed in ready:
            if content := _read(printed):
                log.write(content)
            else:  # all that could print have closed it
                watched.remove(printed)
        if time.monotonic() - reaped > POLL_SECONDS:
            _reap(command)
            reaped = time.monotonic()


if __name__ == "__main__":
    code = main(int(sys.argv[1]), float(sys.argv[2]), Log(sys.argv[3], int(sys.argv[4])), sys.argv[5:])
    sys.exit(code if code >= 0 else 128 - code)
