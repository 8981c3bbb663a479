"""Real images to compare generated ones with: which of a corpus, and their features."""

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..data.corpus import SPLITS, Corpus, Index
from ..data.pixels import PixelPolicy
from ..data.preparation.cache import load_corpus
from ..data.sources.source import open_source
from ..errors import DataError
from .cached import RealFeatures, real_features
from .extractors.features import Extractor

Part = Literal["test", "validation", "train", "all"]
PARTS: tuple[Part, ...] = ("test", "validation", "all")  # what `auto` looks for, in this order


class Real(NamedTuple):
    """Real images."""

    path: Path
    corpus: Corpus
    part: Part
    rows: NDArray[np.int64]  # of the corpus
    features: RealFeatures  # of these rows

    @property
    def records(self) -> Index:
        """Of the index of the corpus."""
        return self.corpus.index[self.rows]


def load_real(
    path: Path,
    policy: PixelPolicy,
    extractor: Extractor,
    *,
    option: str,
    part: Part | Literal["auto"],
    labels: tuple[str, ...] = (),
    batch_size: int = 128,
) -> Real:
    """Images of any source, packed once, and their features, computed once.

    Args:
        option: what the user chose the source with.
        part: see `choose_part`.
        labels: only images of these, where the corpus has labels at all.

    Raises:
        DataError: see `open_source` and `load_corpus`; or there are fewer than two such images.
    """
    corpus = load_corpus(open_source(path, option), policy, option=option)
    chosen, rows = choose_part(corpus, part)
    numbers = [number for number, label in enumerate(corpus.labels) if label in labels]
    if labels and corpus.labels and not numbers:
        raise DataError(
            f"{option} {path} has no images of class {', '.join(labels)}: it has {', '.join(corpus.labels)}"
        )
    if numbers:
        rows = rows[np.isin(corpus.index["label"][rows], numbers)]
    if len(rows) < 2:
        kind = f" of class {', '.join(labels)}" if numbers else ""
        raise DataError(
            f"{option} {path} has {len(rows)} images{kind} in its part {chosen} (of {len(corpus):,} in all): give at "
            f"least 2, or another part"
        )
    features = real_features(corpus, rows, extractor, title=f"features of {option}", batch_size=batch_size)
    return Real(path, corpus, chosen, rows, features)


def choose_part(corpus: Corpus, part: Part | Literal["auto"]) -> tuple[Part, NDArray[np.int64]]:
    """A part of a corpus and its rows; auto is the test part where there is one, else the validation part, else all."""
    chosen = next(name for name in PARTS if len(_rows(corpus, name))) if part == "auto" else part
    return chosen, _rows(corpus, chosen)


def _rows(corpus: Corpus, part: Part) -> NDArray[np.int64]:
    if part == "all":
        return np.arange(len(corpus))
    return np.flatnonzero(corpus.index["split"] == SPLITS.index(part))
