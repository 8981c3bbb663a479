"""What the door writes down about nodes for the process that runs the rounds: bytes carried, and replies refused."""

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from maskdm.run.runfolder import LineReader, append_line

CARRIED, REFUSED = "traffic.json", "refused.jsonl"
WRITE_SECONDS = 1.0
# What a stranger can make us remember or write: nodes that carried something, and refusals a second.
MOST_NODES = 10_000
REFUSAL_SECONDS = 1.0


class TrafficTally:
    """The side that writes."""

    def __init__(self, folder: Path) -> None:
        self._traffic, self._refused = folder / CARRIED, folder / REFUSED
        self._carried: dict[int, int] = {}  # by node, the one that carried last at the end
        self._written = self._told = -math.inf

    def refuse(self, node: int) -> None:
        """Tell the process that runs the rounds, now and then."""
        now = time.monotonic()
        if now - self._told >= REFUSAL_SECONDS:
            self._told = now
            with suppress(OSError):  # a full disk: it is refused all the same
                append_line(self._refused, {"time": time.time(), "site": node})

    def count(self, node: int, size: int) -> None:
        """Count bytes that a node carried."""
        self._carried[node] = self._carried.pop(node, 0) + size
        if len(self._carried) > MOST_NODES:
            del self._carried[next(iter(self._carried))]
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._written = time.monotonic()
            temporary = self._traffic.with_suffix(".tmp")
            with suppress(OSError):  # a full disk: whoever watches sees no progress for a while
                temporary.write_text(json.dumps(self._carried))
                temporary.replace(self._traffic)


class Traffic:
    """The side that reads."""

    def __init__(self, federation: Path) -> None:
        folder = federation / ".flwr"
        self._path, self._refused = folder / CARRIED, LineReader(folder / REFUSED)

    def carried(self) -> Mapping[int, int]:
        """Bytes carried for each node."""
        try:
            return {int(node): int(size) for node, size in json.loads(self._path.read_text()).items()}
        except (OSError, ValueError):
            return {}

    def refused(self) -> list[int]:
        """Nodes whose replies were refused since the last call."""
        return [int(line["site"]) for line in self._refused.new()]
