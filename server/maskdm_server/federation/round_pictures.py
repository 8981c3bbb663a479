"""Grids of samples that a run leaves for people to look at."""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from maskdm.training.checkpoint import load_checkpoint, model_from
from maskdm.config import DiffusionConfig, ModelConfig, Precision
from maskdm.errors import MaskDMError
from maskdm.run.pictures import grid_picture, save_png
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.run.reporting import say
from maskdm.diffusion.sampling import sample
from .settings import FederationConfig


class Abandoned(Exception):
    """Nobody waits for the picture any more."""


def save_samples(
    picture: Path,
    weights: dict[str, Tensor],
    shape: ModelConfig,
    diffusion: DiffusionConfig,
    *,
    seed: int,
    count: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Draw a grid of `count` images and write it as PNG.

    The same seed gives the same noise, so that two models can be compared picture by picture.

    Args:
        wanted: asked before each evaluation of the network.

    Raises:
        Abandoned: `wanted` said no; nothing was written.
    """

    def check(*_: Any) -> None:
        if not wanted():
            raise Abandoned

    picked = pick_device(device)
    model = model_from(weights, shape, picked)
    model.register_forward_pre_hook(check)
    drawn = sample(model, diffusion, count, seed=seed, precision=pick_precision(precision, picked))
    save_png(picture, grid_picture(drawn.numpy()))


def draw_samples(checkpoint: Path, picture: Path, seed: int, count: int) -> None:
    """`save_samples` of a checkpoint, unless the picture is there already or `count` is 0."""
    if picture.exists() or not count:
        return
    weights, metadata = load_checkpoint(checkpoint)
    save_samples(picture, weights, metadata.model, metadata.diffusion, seed=seed, count=count)


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

    def hear(self, event: Mapping[str, Any]) -> None:
        """Of events.jsonl: after some rounds a picture is due. That of the last one is drawn anyway, as after.png."""
        if event["event"] == "round" and self._every and event["round"] % self._every == 0:
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
