"""How the process that runs the rounds shows that it lives: by a lock that goes when it goes, however that happens."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskdm.run.runfolder import open_lock

PATIENCE_SECONDS = 10.0


@contextmanager
def alive(federation: Path) -> Iterator[None]:
    """Hold the lock; of two processes, e.g. after a restart, one may work.

    Raises:
        BlockingIOError: another one holds it.
    """
    with open_lock(federation / ".rounds.lock") as lock:
        deadline = time.monotonic() + PATIENCE_SECONDS  # who looks holds it for a moment
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.05)
        yield


def is_alive(federation: Path) -> bool:
    """Whether some process holds the lock."""
    try:
        with open_lock(federation / ".rounds.lock", os.O_RDWR) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
