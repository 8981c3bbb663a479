"""What a federation is after each round, on disk: a crash at any moment costs at most the round in progress.

A round leaves two files in FED/rounds: `N.state.safetensors` (moving average, moments of the server's optimiser, what
is known of clients) and then `N.safetensors`, the model as it goes down to clients in the next round. The second one
makes the round count. Randomness needs no place here: all of it is derived from the seed and the round.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from torch import Tensor

from maskdm.config import Frozen
from maskdm.errors import CheckpointError
from maskdm.metadata import METADATA_KEY, CheckpointMetadata
from maskdm.networks.trainable import expected_shapes
from maskdm.run.runfolder import atomic_write, keep_lines, read_lines
from maskdm.run.tensorfile import Arrays, Stored, chunks, fp32, layout_of
from maskdm.training.checkpoint import describe_checkpoint, load_checkpoint

from ..aggregation.optimizers import Moments
from .intake import UpdateNorm
from .selection import Standing

ROUNDS = "rounds"  # folder in FED
KEPT = 2  # rounds, besides every n-th and the best


class Known(Frozen):
    """What a coordinator knows after a round, besides tensors."""

    line: dict[str, Any] = Field(default_factory=dict)  # of rounds.jsonl
    standings: dict[int, Standing] = Field(default_factory=dict)
    measured: list[UpdateNorm] = Field(default_factory=list)  # of updates that were let in lately
    best_round: int = 0  # whose model had the lowest held-out loss
    best_loss: float | None = None


class Journal:
    """The last whole round of FED, or the prior where there is none yet."""

    def __init__(self, folder: Path, prior_sha256: str, keep_every: int = 0) -> None:
        """Find the last whole round, and bring model.safetensors and rounds.jsonl to where it is.

        Args:
            prior_sha256: what the federation calls its prior, also in its terms; sites hold what comes against it.

        Raises:
            CheckpointError: the journal is damaged.
        """
        self.folder, self._keep_every = folder, keep_every
        self._rounds = folder / ROUNDS
        done = self._numbers()
        self.number = max(done, default=0)
        self.metadata = describe_checkpoint(self.model_path(), "--out" if done else "--prior")
        self.known = Known()
        self._forget_unfinished()
        if done:
            self.known = self._known()
            self._publish()
        else:
            self.metadata = self.metadata.model_copy(update={"prior_sha256": prior_sha256, "rounds": 0})
        self._mend_lines()

    def model_path(self, number: int | None = None) -> Path:
        """The model after a round, as it goes down to clients."""
        number = self.number if number is None else number
        return model_of_round(self.folder, number)

    def moments(self) -> Moments:
        """Those of the server's optimiser, in memory of their own."""
        state = self._state()
        names = [name for name in state if name.startswith("moment.")]
        return {name.removeprefix("moment."): torch.from_numpy(state[name]) for name in names}

    def weights(self) -> Callable[[str], Tensor]:
        """Weights of the present model by name, each read when it is asked for, in memory of its own."""
        arrays = Stored(self.model_path())
        return lambda name: torch.from_numpy(arrays[name])

    def commit(
        self,
        metadata: CheckpointMetadata,
        changed: Mapping[str, Tensor],
        moments: Moments,
        known: Known,
        ema: float,
    ) -> None:
        """Make the next round count, whole or not at all; `settle` is to follow.

        Args:
            changed: new weights; the others stay as they are.
            ema: longest decay of the moving average; 0 for none.

        Raises:
            OSError: e.g. a full disk; nothing changed, and it may be tried again.
        """
        number, before = self.number + 1, self.weights()
        layout = fp32(expected_shapes(metadata.model))

        def weight(name: str) -> NDArray[np.generic]:
            return (changed[name] if name in changed else before(name)).numpy()

        state = fp32({f"moment.{name}": tuple(tensor.shape) for name, tensor in moments.items()})
        average = self._state() if self.number else Stored(self.model_path())
        prefix = "ema." if self.number else ""
        decay = min(ema, 1 - (1 + number) ** (-2 / 3))  # the ramp of Lei et al. 2023, for few rounds
        if ema:
            state |= {f"ema.{name}": kind for name, kind in layout.items()}

        def part(name: str) -> NDArray[np.generic]:
            kind, _, rest = name.partition(".")
            if kind == "moment":
                return moments[rest].numpy()
            new: NDArray[np.generic] = decay * average[prefix + rest] + (1 - decay) * weight(rest)
            return new.astype(np.float32)

        atomic_write(self._state_path(number), chunks(state, part, {METADATA_KEY: known.model_dump_json()}))
        metadata = metadata.model_copy(update={"weights": "raw" if ema else metadata.weights})
        atomic_write(self.model_path(number), chunks(layout, weight, {METADATA_KEY: metadata.model_dump_json()}))
        self.number, self.metadata, self.known = number, metadata, known

    def settle(self) -> None:
        """Bring model.safetensors and rounds.jsonl to where the journal is, and remove what is too old.

        Raises:
            OSError: e.g. a full disk; it may be tried again.
        """
        self._publish()
        self._mend_lines()
        self._prune()

    def adopt(self, number: int) -> None:
        """Publish the model of an earlier round as the federation's."""
        _link(self.model_path(number), self.folder / "model.safetensors")

    def _publish(self) -> None:
        state = self._state()
        layout = {n.removeprefix("ema."): kind for n, kind in layout_of(state).items() if n.startswith("ema.")}
        target = self.folder / "model.safetensors"
        if layout:
            about = self.metadata.model_copy(update={"weights": "ema"})
            atomic_write(target, chunks(layout, lambda n: state[f"ema.{n}"], {METADATA_KEY: about.model_dump_json()}))
        else:
            _link(self.model_path(), target)

    def _mend_lines(self) -> None:
        """A crash between the journal and rounds.jsonl leaves a line too few; a round taken back, one too many."""
        path = self.folder / "rounds.jsonl"
        kept = [line for line in read_lines(path) if line["round"] <= self.number]
        if self.number and (not kept or kept[-1]["round"] < self.number):
            kept.append(self.known.line)
        if len(kept) != (path.read_bytes().count(b"\n") if path.exists() else 0) or _is_torn(path):
            keep_lines(path, kept)

    def _known(self) -> Known:
        try:
            return Known.model_validate_json(Stored(self._state_path(self.number)).metadata[METADATA_KEY])
        except (OSError, ValueError, KeyError, ValidationError) as error:
            raise CheckpointError(
                f"--out: {self._state_path(self.number)} is damaged ({error}): remove the newest round's two files "
                f"from {self._rounds} to go on from the one before"
            ) from error

    def _state(self) -> Arrays:
        return Stored(self._state_path(self.number)) if self.number else {}

    def _state_path(self, number: int) -> Path:
        return state_of_round(self.folder, number)

    def _numbers(self) -> list[int]:
        return sorted(int(p.stem) for p in self._rounds.glob("*.safetensors") if p.stem.isdecimal())

    def _forget_unfinished(self) -> None:
        """What a crash left of a round that does not count, and of a model that was not published."""
        for path in (*self._rounds.glob(".*.tmp"), *self.folder.glob(".*.safetensors.*.tmp")):
            path.unlink()
        for path in self._rounds.glob("*.state.safetensors"):
            if not self.model_path(int(path.name.partition(".")[0])).exists():
                path.unlink()

    def _prune(self) -> None:
        keep = {*self._numbers()[-KEPT:], self.known.best_round}
        for number in self._numbers():
            if number not in keep and not (self._keep_every and number % self._keep_every == 0):
                self.model_path(number).unlink()
                self._state_path(number).unlink(missing_ok=True)


def model_of_round(federation: Path, number: int) -> Path:
    """The model after a round, or the prior."""
    return federation / ROUNDS / f"{number:06d}.safetensors" if number else federation / "prior.safetensors"


def state_of_round(federation: Path, number: int) -> Path:
    """What a round left beside its model."""
    return federation / ROUNDS / f"{number:06d}.state.safetensors"


def published_after(federation: Path, number: int) -> dict[str, Tensor]:
    """Weights of `model.safetensors` as it was after a round that is kept: its moving average, where there is one."""
    state = Stored(state_of_round(federation, number))
    average = {name.removeprefix("ema."): torch.from_numpy(state[name]) for name in state if name.startswith("ema.")}
    return average or load_checkpoint(model_of_round(federation, number))[0]


def _is_torn(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


def _link(path: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system has no such thing; `target` is always whole."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(target)
