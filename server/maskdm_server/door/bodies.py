"""Bodies of requests as they come in: not too large, not too slow, and on the disk until they are whole."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Any, NamedTuple

from .keys import RequestRefused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# A body may come as slowly as this, on average, and pause for so long. The slowest links that are known to work carry
# 3,000 bytes a second.
LEAST_RATE = 512.0  # bytes a second
LONGEST_PAUSE = 60.0  # seconds
IN_MEMORY = 2**16  # bytes of a body that is not whole yet


class Body(NamedTuple):
    """One that came whole."""

    size: int  # bytes
    file: IO[bytes]


async def read_body(receive: Receive, largest: int, folder: Path, digest: str | None = None) -> Body:
    """The whole body of a request, in a file; the caller reads it when there is room, and closes it.

    Args:
        folder: on whose disk it waits until it is whole.
        digest: that it must have.

    Raises:
        RequestRefused: 400 the client went away; 401 it is not what was signed; 413 it is larger than `largest` bytes;
            503 it comes too slowly, or the disk is full: a client of ours tries again.
    """
    loop, size, hashed = asyncio.get_running_loop(), 0, hashlib.sha256()
    started = loop.time()
    with ExitStack() as unfinished:
        file = unfinished.enter_context(SpooledTemporaryFile(IN_MEMORY, dir=str(folder)))
        try:
            async with asyncio.timeout_at(started + LONGEST_PAUSE) as clock:
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise RequestRefused(400)
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > largest:
                        raise RequestRefused(413)
                    file.write(piece)
                    if digest is not None:
                        hashed.update(piece)
                    if not message.get("more_body"):
                        break
                    slowest = started + LONGEST_PAUSE + size / LEAST_RATE
                    clock.reschedule(min(loop.time() + LONGEST_PAUSE, slowest))
            file.seek(0)
        except (TimeoutError, OSError):
            raise RequestRefused(503) from None
        if digest is not None and hashed.hexdigest() != digest:
            raise RequestRefused(401)
        unfinished.pop_all()
    return Body(size, file)
