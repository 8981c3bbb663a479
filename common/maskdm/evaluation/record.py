"""The record of an evaluation: every number with what it takes to understand it and to repeat it.

Written as FOLDER_OF_MODEL/evaluations/NAME.json. The same evaluation writes the same NAME again; another model, feature
network, reference or way of sampling has another.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ..config import Frozen, Sampler
from ..data.pixels import PixelPolicy
from ..errors import UsageError
from ..metadata import first_problem
from ..run.runfolder import write_json

FOLDER = "evaluations"
MAX_BYTES = 10_000_000

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class Measured(Frozen):
    """One number."""

    value: float
    better: Literal["lower", "higher", "one"]  # one: the nearer to 1 from below
    low: float | None = None  # bootstrap interval; None where there is none
    high: float | None = None
    floor: float | None = None  # the same number of two disjoint halves of the reference: what perfect images would get
    floor_images: Count = 0  # in each half
    images: Count  # generated ones behind the value
    reference_images: Count


class ExtractorFacts(Frozen):
    """The feature network."""

    name: str
    sha256: Sha256
    resize: str  # how images got its size
    features: Annotated[int, Field(ge=1)]


class ReferenceFacts(Frozen):
    """Real images that the generated ones are compared with."""

    path: str
    sha256: Sha256  # of the packed corpus
    split: Literal["validation", "test", "train", "all"]
    labels: tuple[str, ...] = ()  # only images of these; empty: of all
    images: Count
    pixels: PixelPolicy


class TrainingFacts(Frozen):
    """Training images, for memorisation."""

    path: str
    sha256: Sha256
    images: Count


class SamplingFacts(Frozen):
    """How the generated images came about; of images made elsewhere only their number and the file are known."""

    count: Count
    file: str | None = None
    sha256: Sha256 | None = None  # of that file
    sampler: Sampler | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    classes: dict[str, int] = Field(default_factory=dict)  # images of each class of a conditional model
    precision: Literal["fp32", "bf16"] | None = None
    seed: Count


class Pair(Frozen):
    """A generated image and the training image that it is most like."""

    sample: Count  # number of the generated image
    training: Count  # row of the training corpus
    ratio: Annotated[float, Field(ge=0)]  # of the distances to it and to the nearest held-out image


class Evaluation(Frozen):
    """One evaluation."""

    schema_version: Literal[1] = 1
    model: str | None = None  # path as it was given; None for images made elsewhere
    model_sha256: Sha256 | None = None
    rounds: Count = 0  # of federated training behind the model
    images_seen: Count = 0
    extractor: ExtractorFacts
    reference: ReferenceFacts
    training: TrainingFacts | None = None
    sampling: SamplingFacts
    neighbours: Annotated[int, Field(ge=1)]  # k of precision, recall, density and coverage
    resamples: Count  # of the bootstrap
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    headline: str  # which of the metrics to look at first
    metrics: dict[str, Measured]
    pairs: tuple[Pair, ...] = ()  # most similar first
    notes: tuple[str, ...] = ()  # what a reader must know
    maskdm: str  # versions
    torch: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def name(self) -> str:
        """Of the record's file, without folder and suffix."""
        stem = Path(self.model or self.sampling.file or "images").stem
        when = f"round-{self.rounds:06}" if self.rounds else f"{self.images_seen}"
        about = {"extractor", "reference", "training", "sampling", "neighbours", "resamples", "confidence"}
        paths: dict[str, set[str]] = {"reference": {"path"}, "training": {"path"}, "sampling": {"file"}}
        settings = self.model_dump(mode="json", include=about, exclude=paths)
        document = json.dumps([settings, sorted(self.metrics)], sort_keys=True)
        digest = hashlib.sha256(document.encode()).hexdigest()
        name = f"{stem}-{when}-{self.extractor.name}-{self.reference.sha256[:8]}-{digest[:8]}"
        return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def write_record(path: Path, record: Evaluation) -> None:
    """Write it whole or not at all."""
    write_json(path, record.model_dump(mode="json"))


def read_record(path: Path) -> Evaluation:
    """Read and check a record.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        return Evaluation.model_validate_json(path.read_bytes())
    except (OSError, ValueError, ValidationError) as error:
        raise UsageError(f"{path} is no record of an evaluation: {first_problem(error)}") from error


def records_of(folder: Path) -> Iterator[Evaluation]:
    """All readable records beside a model, oldest model first."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            found.append(read_record(path))
        except UsageError:  # of another version, or half copied: the others are worth showing
            continue
    yield from sorted(found, key=lambda record: (record.rounds, record.images_seen))


def lines(record: Evaluation) -> list[str]:
    """The record for a person."""
    sampling, reference, extractor = record.sampling, record.reference, record.extractor
    drawn_by = f"{sampling.sampler}, {sampling.steps} steps" if sampling.sampler else f"{sampling.file}"
    found = [
        f"samples      {sampling.count:,} ({drawn_by}, seed {sampling.seed})",
        f"reference    {reference.images:,} ({reference.split} of {reference.path}, sha256 {reference.sha256[:16]}…)",
        f"features     {extractor.name}, {extractor.features:,} numbers an image (sha256 {extractor.sha256[:16]}…)",
        "",
        f"{'':28} {'value':>10}   {f'{record.confidence:.0%} interval':21}   real against real",
    ]
    first_headline = sorted(record.metrics, key=lambda name: name != record.headline)
    found += [_line(name, record.metrics[name]) for name in first_headline]
    return found + [f"note         {note}" for note in record.notes]


def _line(name: str, number: Measured) -> str:
    interval = f"{number.low:.4g} … {number.high:.4g}" if number.low is not None and number.high is not None else ""
    floor = f"{number.floor:.4g} (at {number.floor_images:,})" if number.floor is not None else ""
    return f"{name:28} {number.value:10.4g}   {interval:21}   {floor}".rstrip()
