"""Grids of samples that a run leaves for people to look at."""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from maskdm.errors import MaskDMError
from maskdm.run.events import Event
from maskdm.run.reporting import say
from maskdm.training.checkpoint import load_checkpoint
from maskdm.training.grids import Abandoned, save_samples

from .events import RoundDone
from .settings import FederationConfig


class RoundPictures:
    """Draws the published model now and then, in a thread of its own: neither rounds nor their supervision wait for it.

    What could not be drawn is said, and the federation goes on.
    """

    def __init__(self, folder: Path, config: FederationConfig, count: int) -> None:
        """Draw `count` images into FED/samples/round-NNNNNN.png each time that it takes; none between rounds for 0."""
        self._folder, self._config, self._count = folder, config, count
        self._every = config.rounds_between_grids() if count else 0
        self._due, self._leaving = SimpleQueue[bool](), threading.Event()  # False: there will be no more
        self._thread = threading.Thread(target=self._run, name="samples")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """What is due is still drawn, unless the federation was stopped."""
        self._due.put(False)
        try:
            if kind is None:
                self._thread.join()
        finally:
            self._leaving.set()
            self._thread.join()

    def hear(self, event: Event) -> None:
        """After some rounds a picture is due. That of the last one is drawn anyway, as after.png."""
        if isinstance(event, RoundDone) and self._every and event.round % self._every == 0:
            self._due.put(True)

    def _run(self) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own, which those of OpenMP inherit
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while self._due.get():
            try:
                self._draw()
            except Abandoned:
                return
            except (MaskDMError, OSError, RuntimeError) as problem:  # a full disk, a GPU without room
                say(f"WARNING: no samples of this round: {problem}")

    def _draw(self) -> None:
        """Draw what is published now: where rounds are faster than pictures, that of a later round than was due."""
        weights, metadata = load_checkpoint(self._folder / "model.safetensors", "--out")
        picture = self._folder / "samples" / f"round-{metadata.rounds:06d}.png"
        if picture.exists() or metadata.rounds >= self._config.rounds:
            return
        save_samples(
            picture,
            weights,
            metadata.model,
            metadata.diffusion,
            seed=self._config.seed,
            count=self._count,
            wanted=lambda: not self._leaving.is_set(),
        )
