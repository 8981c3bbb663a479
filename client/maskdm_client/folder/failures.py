"""Tracebacks of what nobody foresaw, for whoever looks after the site; none of them ever leaves it."""

import time
import traceback
from contextlib import suppress
from pathlib import Path

from maskdm.errors import plain
from maskdm.run.runfolder import atomic_write

LOG = Path("logs") / "failures.log"  # in the site's folder
MOST_BYTES = 200_000


def unexpected(site: Path, error: Exception) -> str:
    """Keep a traceback, the newest last and older ones as far as there is room; returns what to say of it, one line."""
    said = plain(f"unexpected {type(error).__name__}: {error}")
    when, path = time.strftime("%Y-%m-%d %H:%M:%S %z"), site / LOG
    lines = "".join(traceback.format_exception(error)).splitlines()
    told = "".join(f"{plain(line, 2000)}\n" for line in (when, *lines)).encode(errors="backslashreplace")
    with suppress(OSError):
        before = path.read_bytes() if path.exists() else b""
        atomic_write(path, (before + told)[-MOST_BYTES:], private=True)
        return f"{said} (its traceback: {LOG})"
    return said
