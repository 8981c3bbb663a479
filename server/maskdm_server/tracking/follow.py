"""`--log`: what a run writes anyway, its lines and sample grids, followed into TensorBoard or MLflow.

A thread reads the files that the run leaves, so that neither the training loop nor the rounds know of it, and whatever
happens to a tracking server or its disk happens to that thread alone. The files stay the truth: what could not be
logged is logged when it works again, at the latest by the same command.
"""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from maskdm.errors import Interrupted, UsageError
from maskdm.metadata import METADATA_KEY
from maskdm.run.processes import is_first
from maskdm.run.reporting import say
from maskdm.run.runfolder import LineReader
from maskdm.run.tensorfile import Stored

Log = Literal["off", "tensorboard", "mlflow"]
PACKAGES = {"tensorboard": "TensorBoard", "mlflow": "MLflow"}

POLL_SECONDS = 2.0
RETRY_SECONDS = 30.0  # after a failure
# At the end of a run, how long its last lines may take; a server that hangs must not keep the command from ending.
LEAVE_SECONDS = 60.0

Scalars = Mapping[str, float]


class Sink(Protocol):
    """Where a run is logged to, as one run of it."""

    settled_only: bool  # what is logged cannot be taken back
    last: float  # x of the newest line that it holds; −∞ without one

    def configuration(self, document: Mapping[str, Any]) -> None:
        """Log config.json."""

    def scalars(self, lines: Sequence[tuple[int, Scalars]]) -> None:
        """Log the numbers of lines, each with its x."""

    def picture(self, path: Path, x: int) -> None:
        """Log a grid of samples.

        Raises:
            FileNotFoundError: it was taken away meanwhile.
        """

    def close(self, status: str) -> None:
        """Make sure of all of it; `status` is how the run ended: FINISHED, KILLED or FAILED."""


@dataclass(frozen=True)
class Files:
    """What a run writes as it goes."""

    kind: str  # before the names of its numbers
    lines: str
    x: str  # the number of a line that is the axis
    settled: Callable[[Path], float] = lambda out: math.inf  # up to which x no crash takes a line back


def images_saved(out: Path) -> float:
    """Images seen by the last saved state: where `pretrain` would go on after a crash."""
    prior = out / "prior.safetensors"
    return float(json.loads(Stored(prior).metadata[METADATA_KEY])["images_seen"]) if prior.exists() else -math.inf


PRETRAINING = Files("pretrain", "metrics.jsonl", "images", images_saved)
FEDERATION = Files("federation", "rounds.jsonl", "round")


def check_installed(log: Log) -> Log:
    """The choice itself, if it can be had; nothing is imported.

    Raises:
        UsageError: a package is missing.
    """
    if log in PACKAGES and find_spec(log) is None:
        raise UsageError(f"--log {log} needs {PACKAGES[log]}: pip install 'maskdm[{log}]'")
    return log


def follow(out: Path, files: Files, log: Log) -> AbstractContextManager[Any]:
    """Log a run while the `with` lasts: from its first line, without those that were logged before.

    Of several processes the first one does it. The lines of the file must not be taken back any more.
    """
    return nullcontext() if log == "off" or not is_first() else Follower(out, files, log)


def open_sink(log: Log, out: Path) -> Sink:
    """The run's own place, found again where it was logged before. Only here its package is imported."""
    if log == "tensorboard":
        from .tensorboard_log import TensorBoardRun

        return TensorBoardRun(out / "tensorboard")
    from .mlflow_log import MLflowRun

    return MLflowRun(out)


class Follower:
    """The thread; leaving the `with` logs the rest and ends it."""

    def __init__(self, out: Path, files: Files, log: Log) -> None:
        self._out, self._files, self._log = out, files, log
        self._leaving, self._status, self._warned = threading.Event(), "FINISHED", False
        self._sink: Sink | None = None
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self._status = "KILLED" if issubclass(kind, Interrupted | KeyboardInterrupt) else "FAILED"
        self._leaving.set()
        self._thread.join(LEAVE_SECONDS)
        if self._thread.is_alive():
            self._warn("it does not answer")

    def _run(self) -> None:
        pause = 0.0
        while True:
            leaving = self._leaving.wait(pause)
            pause = POLL_SECONDS
            try:
                self._pass_on()
                if leaving and self._sink:
                    self._sink.close(self._status)
            except Exception as error:  # of packages that are not ours: the run goes on whatever it is
                self._warn(f"{type(error).__name__}: {error}")
                self._give_up()
                pause = RETRY_SECONDS
            if leaving:
                return

    def _pass_on(self) -> None:
        """What is new in the run's folder."""
        if not (self._out / "config.json").exists():  # the run has not begun
            return
        if not self._sink:
            self._sink = open_sink(self._log, self._out)
            self._reader = LineReader(self._out / self._files.lines)
            self._reader.position = 0
            self._waiting: list[dict[str, Any]] = []
            self._config, self._pictures = b"", set[tuple[Path, int]]()
        config = (self._out / "config.json").read_bytes()
        if config != self._config:
            self._sink.configuration(json.loads(config))
            self._config = config
        self._pass_on_lines(self._sink)
        self._pass_on_pictures(self._sink)

    def _pass_on_lines(self, sink: Sink) -> None:
        x = self._files.x
        self._waiting += [line for line in self._reader.new() if line[x] > sink.last]
        settled = self._files.settled(self._out) if sink.settled_only and self._waiting else math.inf
        ready = [line for line in self._waiting if line[x] <= settled]
        if ready:
            sink.scalars([(line[x], self._numbers(line)) for line in ready])
            sink.last = ready[-1][x]
            self._waiting = self._waiting[len(ready) :]

    def _pass_on_pictures(self, sink: Sink) -> None:
        for path in sorted((self._out / "samples").glob("*.png")):
            with suppress(FileNotFoundError):  # an old one, taken away by the run
                seen = (path, path.stat().st_mtime_ns)
                if seen not in self._pictures:
                    sink.picture(path, self._x_of(path, sink))
                    self._pictures.add(seen)

    def _x_of(self, picture: Path, sink: Sink) -> int:
        """Grids are named by their x, or say that they are of the beginning or of the end."""
        number = picture.stem.removeprefix("round-")
        if number.isdecimal():
            return int(number)
        return 0 if picture.stem == "before" or sink.last == -math.inf else int(sink.last)

    def _numbers(self, line: Mapping[str, Any]) -> dict[str, float]:
        return {
            f"{self._files.kind}/{name}": value
            for name, value in line.items()
            if name != self._files.x and isinstance(value, int | float)
        }

    def _give_up(self) -> None:
        """Whatever state it is in: the next one starts from the files."""
        sink, self._sink = self._sink, None
        if sink:
            with suppress(Exception):  # said already
                sink.close("FAILED")

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            say(
                f"WARNING: --log {self._log}: {' '.join(reason.split())[:300]}; the run goes on, and what is missing "
                f"is logged when it works again, or by the same command"
            )
