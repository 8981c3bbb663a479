"""Unfinished training is saved now and then, so that after a crash the same plan is taken up there."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from maskdm.config import TrainingConfig
from maskdm.errors import CheckpointError
from maskdm.run.runfolder import atomic_write, write_json
from maskdm.run.tensorfile import chunks, fp32
from maskdm.training.checkpoint import load_state, save_state
from maskdm.training.loop import TrainingState

from .damage import read_tensors, say_dropped

# What a crash may cost; a save takes at most a twentieth of the time between two.
SAVE_SECONDS, SAVE_SHARE = 60.0, 20
ABOUT = "training.json"
STARTS = "starts.json"  # of the worker over this work, since it was last saved


class Resumed(NamedTuple):
    """What is known of training that was begun, beside its state."""

    loss_before: float
    one_stands_out: bool
    seconds: float
    halves: Mapping[str, Tensor]  # of `Concentration`


TOLD = ("loss_before", "one_stands_out", "seconds")  # in the description


class UnfinishedWork:
    """The state of unfinished training, on disk: a description that names the file of the state it describes."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._about, self._key = folder, folder / ABOUT, key
        self._saved, self._took = time.monotonic(), 0.0

    def restore(self, state: TrainingState, halves: Mapping[str, Tensor]) -> Resumed | None:
        """Put what was saved into `state`; returns what else there was, or None where the work is new.

        What is damaged is dropped, `state` stays as it was, and the work is new too.

        Args:
            halves: of the names and shapes that those of this work have.
        """
        if not self._about.exists():
            return None
        try:
            about = json.loads(self._about.read_text())
            if about["key"] != self._key:
                self.forget()
                return None
            path = self._folder / about["state"]
            found = read_tensors(_halves_of(path))
            if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in halves.items()}:
                raise ValueError("its halves are of other weights")
            loss, odd, seconds = (float(about[name]) for name in TOLD)
            load_state(path, state)
        except (OSError, ValueError, KeyError, TypeError, CheckpointError) as error:
            self.forget()
            say_dropped(self._about, error.__cause__ or error)  # a CheckpointError's own advice is for a coordinator
            return None
        return Resumed(loss, bool(odd), seconds, found)

    def keep(self, state: TrainingState, training: TrainingConfig, unfinished: Resumed) -> None:
        """Save, if it is time to; where that fails, e.g. on a full disk, what was saved before stays."""
        now = time.monotonic()
        if now - self._saved < max(SAVE_SECONDS, SAVE_SHARE * self._took):
            return
        path = self._folder / f"training-{state.images_seen}.safetensors"
        about, halves = {name: getattr(unfinished, name) for name in TOLD}, unfinished.halves
        layout = fp32({name: tuple(sums.shape) for name, sums in halves.items()})
        with suppress(OSError):
            atomic_write(_halves_of(path), chunks(layout, lambda name: halves[name].cpu().numpy()))
            save_state(path, state, training)
            write_json(self._about, {"key": self._key, "state": path.name, **about})
            self._remove_states(path)
        self._saved = time.monotonic()
        self._took = self._saved - now

    def forget(self) -> None:
        """Remove what is of no more use."""
        self._about.unlink(missing_ok=True)
        self._remove_states()

    def _remove_states(self, but: Path | None = None) -> None:
        for path in self._folder.glob("training-*.safetensors"):
            if but is None or path not in (but, _halves_of(but)):
                path.unlink(missing_ok=True)


def _halves_of(state: Path) -> Path:
    return state.with_name(f"{state.stem}-halves.safetensors")


def saved_at(folder: Path) -> int:
    """When unfinished training was last saved, ns; 0 where none is."""
    try:
        return (folder / ABOUT).stat().st_mtime_ns
    except OSError:
        return 0
