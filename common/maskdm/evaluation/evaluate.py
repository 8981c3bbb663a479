"""One evaluation, whole: images of a model or of a file beside real ones, and the record of what came out."""

import math
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from .. import __version__
from ..data.batches import class_numbers
from ..data.corpus import in_both
from ..run.pictures import grid_picture
from ..run.reporting import WorkBar, say
from ..run.runfolder import sha256_of
from .extractors.features import RANDOM, Extractor
from .measure import Comparison, headline, notes
from .neighbours import Memorisation, memorisation
from .real import Real
from .record import Evaluation, ExtractorFacts, Pair, ReferenceFacts, TrainingFacts
from .samples import DrawnSamples, StoredSamples

PAIRS = 16  # most similar ones, for a person to look at


class Evaluated(NamedTuple):
    """What came out of an evaluation."""

    record: Evaluation
    picture: Image.Image | None  # samples above, the training images that they are most like below


def evaluate(
    samples: DrawnSamples | StoredSamples,
    real: Real,
    training: Real | None,
    extractor: Extractor,
    *,
    labels: tuple[str, ...] = (),
    neighbours: int = 5,
    resamples: int = 1000,
    extrapolate: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> Evaluated:
    """Measure samples against real images.

    Args:
        training: what the model was trained on, for memorisation.
        labels: the classes that were chosen; without any, a model draws them in the proportions of the real images.
        neighbours: k of precision, recall, density and coverage.
        resamples: of the bootstrap; 0 for no intervals.
        extrapolate: also give the Fréchet distance of infinitely many images.
        seed: of the bootstrap and of the proportions.
    """
    remarks = remarks_on(samples, real, training, extractor)
    if isinstance(samples, DrawnSamples) and not labels and len(known := known_classes(real, samples.class_names)):
        samples = samples.in_proportions_of(known, seed)
    with WorkBar("samples", samples.count) as bar, tempfile.TemporaryFile() as pixels:
        blocks = samples.blocks(bar.update)
        generated = features_of(blocks, extractor, batch_size, pixels if training else None)
        found = memorisation(generated, training.features.features, real.features.features) if training else None
        pairs, picture = most_similar(found, training, pixels) if training and found else ((), None)
    say("comparing")
    comparison = Comparison(generated, real.features, resamples, seed)
    metrics = comparison.distances(extractor.frechet, extractor.kernel, extrapolate=extrapolate)
    if min(samples.count, len(real.rows)) > neighbours:
        metrics |= comparison.neighbours(neighbours)
    else:
        remarks.append(f"precision, recall, density and coverage need more than --neighbours {neighbours} images")
    if training and found:
        metrics |= comparison.memorisation(found, training.features.features)
    sets = (extractor.frechet, extractor.kernel, generated, real.features.features)
    model = samples if isinstance(samples, DrawnSamples) else None
    record = Evaluation(
        model=str(model.path) if model else None,
        model_sha256=sha256_of(model.path) if model else None,
        rounds=model.metadata.rounds if model else 0,
        images_seen=model.metadata.images_seen if model else 0,
        extractor=ExtractorFacts(
            name=extractor.name, sha256=extractor.sha256, resize=extractor.resize, features=generated.shape[1]
        ),
        reference=_reference_facts(real, labels),
        training=training and _training_facts(training),
        sampling=samples.facts(seed),
        neighbours=neighbours,
        resamples=resamples,
        headline=headline(*sets),
        metrics=metrics,
        pairs=pairs,
        notes=(*notes(*sets), *remarks),
        maskdm=__version__,
        torch=torch.__version__,
    )
    return Evaluated(record, picture)


def remarks_on(
    samples: DrawnSamples | StoredSamples, real: Real, training: Real | None, extractor: Extractor
) -> list[str]:
    """What a reader must know about the choice of images and of features."""
    found = []
    if extractor.name == RANDOM:
        found.append(
            "features of random weights compare models roughly: give --features for figures to publish, e.g. a network "
            "that maskdm-server features trains"
        )
    if real.part in ("train", "all"):
        found.append(
            f"the reference is {'all' if real.part == 'all' else 'the training part'} of {real.path.name}: make sure "
            f"that the model never saw these images, since learning them by heart improves every number"
        )
    if training and (shared := in_both(real.records, training.records)):
        found.append(f"{shared:,} images of --reference are in --train too, which hides memorisation")
    if samples.class_names and not len(known_classes(real, samples.class_names)):
        found.append("the reference has none of the model's classes: they are drawn equally often")
    return found


def known_classes(real: Real, names: tuple[str, ...]) -> Tensor:
    """The model's classes of the real images that have one, (M,) int64; none for a model without classes."""
    numbers = class_numbers(real.corpus, names)
    if numbers is None:
        return torch.empty(0, dtype=torch.int64)
    numbers = numbers[torch.from_numpy(real.rows)]
    return numbers[numbers >= 0]


def features_of(blocks: Iterator[Tensor], extractor: Extractor, batch_size: int, pixels: BinaryIO | None) -> Tensor:
    """Features (N, D) of images that come in blocks; the images go to a file, where one is given."""
    found = []
    for block in blocks:
        found.append(extractor.features(block, batch_size=batch_size))
        if pixels:
            pixels.write(block.contiguous().numpy().data)
    return torch.cat(found)


def most_similar(found: Memorisation, training: Real, pixels: BinaryIO) -> tuple[tuple[Pair, ...], Image.Image]:
    """The samples nearest to training images, by the ratio of distances; `pixels` holds all samples."""
    corpus = training.corpus
    rows = training.rows[found.row.numpy()]
    pairs = tuple(
        Pair(sample=number, training=int(rows[number]), ratio=float(found.distances[number]))
        for number in found.distances.argsort()[:PAIRS].tolist()
    )
    shape = corpus.pixels.shape[1:]
    above: list[NDArray[np.uint8]] = []
    for pair in pairs:
        pixels.seek(pair.sample * math.prod(shape))
        above.append(np.frombuffer(pixels.read(math.prod(shape)), np.uint8).reshape(shape))
    below = [corpus.image(pair.training) for pair in pairs]
    return pairs, grid_picture(np.stack([*above, *below]), columns=len(pairs))


def _reference_facts(real: Real, labels: tuple[str, ...]) -> ReferenceFacts:
    about = real.corpus.manifest
    return ReferenceFacts(
        path=str(real.path),
        sha256=about.sha256,
        split=real.part,
        labels=labels,
        images=len(real.rows),
        pixels=about.policy,
    )


def _training_facts(training: Real) -> TrainingFacts:
    return TrainingFacts(path=str(training.path), sha256=training.corpus.manifest.sha256, images=len(training.rows))
