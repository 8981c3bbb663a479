"""What a person should know of a corpus before it is trained on: counts, sizes, oddities, and a sheet to look at.

Everything here stays on this machine.
"""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...config import Frozen
from ...metadata import Statistics
from ...run.pictures import grid_picture, save_png
from ...run.runfolder import write_json
from ...seeding import derive_seed
from ..corpus import SKIPPED, Corpus, Manifest, content_keys
from ..duplicates import near_duplicates, thumbnail
from ..pixels import PixelPolicy

if TYPE_CHECKING:
    from ...metadata import CheckpointMetadata

REPORT, CONTACT_SHEET = "preflight.json", "contact-sheet.png"
SHEET_IMAGES = 64
# Near-duplicates are looked for among so many images, drawn at random.
LOOKED_AT = 10_000
FEW_IMAGES = 100
# How far the histograms of two corpora may lie apart (total variation, 0 … 1). Parts of one corpus lie below 0.1 apart;
# blood cells, portraits, X-rays and clothes 0.24–0.78; X-rays at a sixteenth of their range 0.92 from themselves.
FAR_APART = 0.5


class Preflight(Frozen):
    """What was found; `warnings` is empty where nothing is odd."""

    images: int
    skipped: dict[str, int]
    splits: dict[str, int]
    labels: dict[str, int]
    groups: int
    duplicates: int  # files that repeat another byte by byte
    near_duplicates: int  # pairs, among at most LOOKED_AT different images
    smallest: tuple[int, int]
    largest: tuple[int, int]
    statistics: Statistics
    warnings: tuple[str, ...]


def inspect(corpus: Corpus, prior: "CheckpointMetadata | None" = None) -> Preflight:
    """Look a corpus over, and compare it with a prior's metadata where one is given."""
    manifest, index = corpus.manifest, corpus.index
    _, different = np.unique(content_keys(index), return_index=True)
    some = np.sort(np.random.default_rng(derive_seed("preflight")).permutation(different)[:LOOKED_AT])
    alike = near_duplicates(np.stack([thumbnail(corpus.image(row)) for row in some]))
    area = index["width"].astype(np.int64) * index["height"]
    smallest, largest = (index[int(row)] for row in (area.argmin(), area.argmax()))
    numbers, counts = np.unique(index["label"], return_counts=True)
    labels = Counter({corpus.labels[n]: int(count) for n, count in zip(numbers, counts, strict=True) if n >= 0})
    warnings = [*_oddities(manifest, len(alike), len(some)), *(compare(corpus, prior) if prior else ())]
    return Preflight(
        images=len(corpus),
        skipped=manifest.skipped,
        splits=manifest.splits,
        labels=dict(labels.most_common()),
        groups=manifest.groups,
        duplicates=manifest.duplicates,
        near_duplicates=len(alike),
        smallest=(int(smallest["width"]), int(smallest["height"])),
        largest=(int(largest["width"]), int(largest["height"])),
        statistics=manifest.statistics,
        warnings=tuple(warnings),
    )


def compare(corpus: Corpus, prior: "CheckpointMetadata") -> list[str]:
    """Where images look unlike what a prior was trained on; one sentence each."""
    here, there = corpus.manifest.statistics, prior.corpus
    size = prior.model.image_size
    warnings = []
    if min(here.median_size) > 16 * size:
        warnings.append(
            f"the images are {here.median_size[0]}x{here.median_size[1]} pixels and the model {size}x{size}: small "
            f"details vanish; crop to the part that matters"
        )
    if there is None:
        return warnings
    if min(there.median_size) >= size > min(here.median_size):
        warnings.append(
            f"the images are {here.median_size[0]}x{here.median_size[1]} pixels, smaller than the model's {size}x{size}"
        )
    if prior.model.channels == 3 and (here.grey > 0.5) != (there.grey > 0.5):
        kinds = ("colour", "grey")
        warnings.append(f"most images are {kinds[here.grey > 0.5]}, and the prior saw {kinds[there.grey > 0.5]} ones")
    distance = 0.5 * float(np.abs(np.subtract(here.histogram, there.histogram)).sum())
    if distance > FAR_APART:
        warnings.append(
            f"intensities are unlike the prior's (mean {np.mean(here.mean):.0f} against {np.mean(there.mean):.0f} of "
            f"255, histograms {distance:.0%} apart): look for inverted or wrongly windowed images"
        )
    return warnings


def _oddities(manifest: Manifest, alike: int, looked_at: int) -> list[str]:
    warnings = []
    files = manifest.images + sum(manifest.skipped.values())
    if manifest.images < FEW_IMAGES:
        warnings.append(f"only {manifest.images} images")
    if (left := files - manifest.images) > 0.05 * files:
        warnings.append(f"{left:,} of {files:,} files cannot be used: {SKIPPED} lists them with the reason")
    if manifest.duplicates > 0.01 * manifest.images:
        warnings.append(f"{manifest.duplicates:,} files repeat another one byte by byte")
    if alike > 0.05 * looked_at:
        warnings.append(f"{alike:,} pairs among {looked_at:,} images nearly repeat one another")
    if max(manifest.statistics.std) < 4:
        warnings.append("the images are nearly uniform: look at the contact sheet")
    return warnings


def write_report(corpus: Corpus, folder: Path, report: Preflight) -> None:
    """`preflight.json`, and `contact-sheet.png` with images drawn at random."""
    write_json(folder / REPORT, report.model_dump(mode="json"))
    rows = np.random.default_rng(derive_seed("contact sheet")).permutation(len(corpus))[:SHEET_IMAGES]
    save_png(folder / CONTACT_SHEET, grid_picture(np.stack([corpus.image(row) for row in np.sort(rows)])))


def lines(report: Preflight, policy: PixelPolicy) -> list[str]:
    """The report for a person."""
    statistics = report.statistics
    shown = list(report.labels.items())[:8]
    labels = ", ".join(f"{label} {count:,}" for label, count in shown)
    more = f" and {len(report.labels) - len(shown):,} more" if len(report.labels) > len(shown) else ""
    splits = ", ".join(f"{split} {count:,}" for split, count in report.splits.items() if count)
    found = [
        f"images       {report.images:,} at {policy.image_size}x{policy.image_size}, {policy.channels} channels "
        f"({splits})",
        f"originals    {report.smallest[0]}x{report.smallest[1]} to {report.largest[0]}x{report.largest[1]}, median "
        f"{statistics.median_size[0]}x{statistics.median_size[1]}; {statistics.grey:.0%} grey",
        f"labels       {labels or 'none'}{more}",
        f"groups       {report.groups:,}" if report.groups else "groups       none",
        f"repeated     {report.duplicates:,} files; {report.near_duplicates:,} pairs nearly alike",
        f"intensity    mean {' '.join(f'{m:.0f}' for m in statistics.mean)}, spread "
        f"{' '.join(f'{s:.0f}' for s in statistics.std)}, of 255",
    ]
    found += [f"skipped      {count:,}: {reason}" for reason, count in report.skipped.items()]
    return found + [f"warning      {warning}" for warning in report.warnings]
