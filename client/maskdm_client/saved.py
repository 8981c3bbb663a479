"""Unfinished training is saved now and then, so that after a crash the same plan is taken up there."""

import json
import time
from contextlib import suppress
from pathlib import Path

from maskdm.checkpoint import load_state, save_state
from maskdm.config import TrainingConfig
from maskdm.runfolder import write_json
from maskdm.training import TrainingState

# What a crash may cost; a save takes at most a twentieth of the time between two.
SAVE_SECONDS, SAVE_SHARE = 60.0, 20
ABOUT = "training.json"
STARTS = "starts.json"  # of the worker over this work, since it was last saved


class Saved:
    """The state of unfinished training, on disk: a description that names the file of the state it describes."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._about, self._key = folder, folder / ABOUT, key
        self._saved, self._took = time.monotonic(), 0.0

    def restore(self, state: TrainingState) -> tuple[float, float] | None:
        """Put what was saved into `state`; returns the loss before and the seconds spent, or None where it is new."""
        try:
            about = json.loads(self._about.read_text())
        except (OSError, ValueError):
            return None
        if about.get("key") != self._key:
            self.forget()
            return None
        load_state(self._folder / about["state"], state)
        return float(about["loss_before"]), float(about["seconds"])

    def keep(self, state: TrainingState, training: TrainingConfig, loss_before: float, seconds: float) -> None:
        """Save, if it is time to; where that fails, e.g. on a full disk, what was saved before stays."""
        now = time.monotonic()
        if now - self._saved < max(SAVE_SECONDS, SAVE_SHARE * self._took):
            return
        path = self._folder / f"training-{state.images_seen}.safetensors"
        about = {"key": self._key, "state": path.name, "loss_before": loss_before, "seconds": seconds}
        with suppress(OSError):
            save_state(path, state, training)
            write_json(self._about, about)
            self._remove_states(path)
        self._saved = time.monotonic()
        self._took = self._saved - now

    def forget(self) -> None:
        """Remove what is of no more use."""
        self._about.unlink(missing_ok=True)
        self._remove_states()

    def _remove_states(self, but: Path | None = None) -> None:
        for path in self._folder.glob("training-*.safetensors"):
            if path != but:
                path.unlink(missing_ok=True)


def saved_at(folder: Path) -> int:
    """When unfinished training was last saved, ns; 0 where none is."""
    try:
        return (folder / ABOUT).stat().st_mtime_ns
    except OSError:
        return 0
