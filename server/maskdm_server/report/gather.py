"""Folder → what is known of the run or the federation in it, also while it goes on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from maskdm.errors import CheckpointError
from maskdm.federated.auditlog import AUDIT, Verdict, verify
from maskdm.metadata import CheckpointMetadata
from maskdm.run.events import EVENTS
from maskdm.run.runfolder import is_owned, sha256_of
from maskdm.training.checkpoint import describe_checkpoint

from ..federation.events import QualityLine, Result, RoundLine
from .files import Followed, Row, read_row, read_rows, read_settings
from .happened import Happened
from .sites import Sites

MOST_GRIDS = 12  # through a run, besides the first and the last

State = Literal["starting", "waiting", "running", "finished", "stopped by patience", "failed", "interrupted"]
Settings = Mapping[str, Any]


class RunKind(Row):
    """What config.json says that its folder holds."""

    kind: str


class MetricsLine(Row):
    """Of metrics.jsonl."""

    images: int
    loss: float | None
    images_per_s: float
    data_wait: float
    skipped: int = 0


class Versions(Row):
    """Of versions.jsonl."""

    maskdm: str
    torch: str = ""
    flwr: str = ""


@dataclass(frozen=True)
class Federation:
    """Everything about a federation that its page shows."""

    folder: Path
    settings: Settings
    state: State
    rounds: list[RoundLine]
    quality: list[QualityLine]
    result: Result | None
    happened: Happened
    sites: Sites
    audit: Verdict | None  # None where it was not looked at
    model: CheckpointMetadata | None
    model_sha256: str  # empty where it was not computed
    grids: list[tuple[int, Path]]  # drawn after these rounds
    versions: list[Versions]
    unreadable: Mapping[str, int]  # lines by file

    def planned(self) -> int:
        """Rounds that were asked for."""
        return whole_number(self.settings.get("federation.rounds"))

    def done(self) -> int:
        """Rounds that counted until now."""
        return self.rounds[-1].round if self.rounds else 0

    def losses(self) -> tuple[float | None, float | None]:
        """Held-out loss of the prior, and the newest one: of the final model, or of what came to the last round."""
        measured: list[float | None] = [r.loss_before for r in self.rounds if r.loss_before is not None]
        newest = self.result.loss_final if self.result else None
        return measured[0] if measured else None, newest if newest is not None else (measured or [None])[-1]


class FederationFolder:
    """FED; looked at again and again, it reads only what is new of the files that grow large."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._happened = Followed(folder / EVENTS, Happened)
        self._sites = Followed(folder / AUDIT, Sites)

    def look(self, *, thorough: bool = True) -> Federation | None:
        """What is there now; None where config.json is not.

        Args:
            thorough: verify the audit log and hash the model, which takes seconds where they are large.
        """
        settings = read_settings(self.folder / "config.json")
        if settings is None:
            return None
        rounds, bad_rounds = read_rows(self.folder / "rounds.jsonl", RoundLine)
        result = read_row(self.folder / "result.json", Result)
        happened, sites = self._happened.now(), self._sites.now()
        versions, bad_versions = read_rows(self.folder / "versions.jsonl", Versions)
        quality, bad_quality = read_rows(self.folder / "quality.jsonl", QualityLine)
        model, audit = self.folder / "model.safetensors", self.folder / AUDIT
        unreadable = {
            "rounds.jsonl": bad_rounds,
            EVENTS: happened.unreadable,
            AUDIT: sites.unreadable,
            "quality.jsonl": bad_quality,
            "versions.jsonl": bad_versions,
        }
        return Federation(
            folder=self.folder,
            settings=settings,
            state=_state(self.folder, result, happened),
            rounds=rounds,
            quality=quality,
            result=result,
            happened=happened,
            sites=sites,
            audit=verify(audit) if thorough and audit.exists() else None,
            model=described(model),
            model_sha256=sha256_of(model) if thorough and model.exists() else "",
            grids=grids(self.folder / "samples", "round-"),
            versions=versions,
            unreadable={name: count for name, count in unreadable.items() if count},
        )


@dataclass(frozen=True)
class PretrainRun:
    """Everything about a pre-training run that its page shows."""

    folder: Path
    settings: Settings
    state: State
    metrics: list[MetricsLine]
    prior: CheckpointMetadata | None
    prior_sha256: str
    grids: list[tuple[int, Path]]  # drawn after so many images
    versions: list[Versions]
    unreadable: Mapping[str, int]

    def begins(self) -> list[int]:
        """Images seen before each stage, and at the end, as they were asked for."""
        sums = [0]
        for stage in range(1, 1000):
            images = whole_number(self.settings.get(f"stages.{stage}.training.images"))
            batch = whole_number(self.settings.get(f"stages.{stage}.training.batch_size"))
            if not images or not batch:
                break
            sums.append(sums[-1] + -(-images // batch) * batch)
        return sums

    def seen(self) -> int:
        """Images until now."""
        return max([line.images for line in self.metrics[-1:]] + ([self.prior.images_seen] if self.prior else [0]))


def look_at_run(folder: Path) -> PretrainRun | None:
    """What RUN holds; None where config.json is none."""
    settings = read_settings(folder / "config.json")
    if settings is None:
        return None
    metrics, bad_metrics = read_rows(folder / "metrics.jsonl", MetricsLine)
    versions, bad_versions = read_rows(folder / "versions.jsonl", Versions)
    prior = folder / "prior.safetensors"
    unreadable = {"metrics.jsonl": bad_metrics, "versions.jsonl": bad_versions}
    found = PretrainRun(
        folder=folder,
        settings=settings,
        state="interrupted",
        metrics=metrics,
        prior=described(prior),
        prior_sha256=sha256_of(prior) if prior.exists() else "",
        grids=grids(folder / "samples", ""),
        versions=versions,
        unreadable={name: count for name, count in unreadable.items() if count},
    )
    if is_owned(folder):
        return replace(found, state="running")
    is_done = found.prior is not None and found.prior.images_seen >= found.begins()[-1] > 0
    return replace(found, state="finished" if is_done else "interrupted")


def grids(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """Pictures named after a number, in its order; of many, evenly chosen ones and the last."""
    found = []
    for path in folder.glob(f"{prefix}*.png"):
        number = path.stem.removeprefix(prefix)
        if number.isascii() and number.isdecimal():
            found.append((int(number), path))
    found.sort()
    every = -(-len(found) // MOST_GRIDS) or 1
    return found[::-1][::every][::-1]


def described(checkpoint: Path) -> CheckpointMetadata | None:
    """What a checkpoint says about itself; None where it is missing or damaged."""
    try:
        return describe_checkpoint(checkpoint)
    except CheckpointError:
        return None


def whole_number(value: Any) -> int:
    """0 where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else 0


def _state(folder: Path, result: Result | None, happened: Happened) -> State:
    if result:
        return "stopped by patience" if result.stopped_by_patience else "finished"
    if not is_owned(folder):
        return "failed" if happened.failure else "interrupted"
    if happened.waiting:
        return "waiting"
    return "running" if happened.starts and not happened.failure else "starting"
