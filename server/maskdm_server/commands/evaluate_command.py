"""`maskdm-server evaluate`: how near a model's images are to real ones, with all that belongs to such numbers."""

import inspect
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from maskdm import __version__
from maskdm.commands.image_options import Upscale
from maskdm.config import DEFAULT_STEPS
from maskdm.data.batches import class_numbers
from maskdm.data.corpus import in_both
from maskdm.diffusion.sampling import Options, check_steps, classes_in_turn
from maskdm.errors import UsageError
from maskdm.evaluation.extractors.features import RANDOM, Extractor, open_extractor
from maskdm.evaluation.measure import Comparison, headline, notes
from maskdm.evaluation.neighbours import Memorisation, memorisation
from maskdm.evaluation.real import Real, load_real
from maskdm.evaluation.record import (
    FOLDER,
    Evaluation,
    ExtractorFacts,
    Pair,
    ReferenceFacts,
    SamplingFacts,
    TrainingFacts,
    lines,
    write_record,
)
from maskdm.evaluation.samples import StoredSamples, drawn, proportional_classes
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.run.pictures import grid_picture, save_png
from maskdm.run.reporting import WorkBar, say
from maskdm.run.runfolder import sha256_of
from maskdm.training.checkpoint import load_checkpoint, model_from

from .options import Device, PrecisionOption, Seed, pixel_policy
from .sample_command import BatchSize, Eta, Guidance, SamplerOption, Steps

PAIRS = 16  # most similar ones, for a person to look at


def evaluate(
    reference: Annotated[
        Path, typer.Option(help="Real images to compare with, never trained on: whatever --data takes elsewhere.")
    ],
    model: Annotated[Path | None, typer.Option(help="Checkpoint to draw images from.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Instead of a model: an .npz or .npy of images, as sample --npz writes.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(help="File of a feature network: Inception's weights (FID), MobileNetV2, your own; or random."),
    ] = RANDOM,
    split: Annotated[
        Literal["auto", "validation", "test", "train", "all"],
        typer.Option(
            envvar="MASKDM_REFERENCE_SPLIT", help="Part of --reference; auto: test, else validation, else all."
        ),
    ] = "auto",
    train: Annotated[
        Path | None, typer.Option(envvar="MASKDM_TRAINING_IMAGES", help="The model's training images: memorisation.")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="Images to draw.")] = 2000,
    sampler: SamplerOption = "dpmpp",
    steps: Steps = None,
    eta: Eta = 0.0,
    class_name: Annotated[
        list[str] | None,
        typer.Option("--class", help="Only this class, several take turns; default: in the reference's proportions."),
    ] = None,
    guidance: Guidance = 1.0,
    neighbours: Annotated[int, typer.Option(min=1, help="k of precision, recall, density and coverage.")] = 5,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap; 0: no intervals.")] = 1000,
    extrapolate: Annotated[bool, typer.Option(help="Also the Fréchet distance of infinitely many images.")] = False,
    json: Annotated[
        Path | None, typer.Option(help="File of the record; default: in evaluations/ beside the model.")
    ] = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    upscale: Upscale = False,
) -> None:
    """Measure generated images against real ones: Fréchet and kernel distance, precision and recall, memorisation."""
    if (model is None) == (samples is None):
        raise UsageError("give either --model, or --samples with images made elsewhere")
    if samples:
        refuse_drawing(
            count=count, sampler=sampler, steps=steps, eta=eta, guidance=guidance, class_name=class_name or None
        )
    picked = pick_device(device)
    extractor = open_extractor(features, device=picked)
    metadata: CheckpointMetadata | None = None
    if model:
        weights, metadata = load_checkpoint(model)
        check_steps(steps, metadata.diffusion)
        network = model_from(weights, metadata.model, picked)
        policy = pixel_policy(metadata.model.image_size, metadata.model.channels, upscale)
        names = metadata.class_names
    else:
        assert samples
        stored = StoredSamples(samples)
        count, names = stored.count, ()
        policy = pixel_policy(stored.image_size, stored.channels, upscale)
    classes = classes_in_turn(class_name, names, count)  # refuses unknown names
    wanted = tuple(class_name or ())
    real = load_real(
        reference, policy, extractor, option="--reference", part=split, labels=wanted, batch_size=batch_size
    )
    training = None
    if train:
        training = load_real(
            train, policy, extractor, option="--train", part="train", labels=wanted, batch_size=batch_size
        )
    remarks = remarks_on(real, training, features, names)
    if classes is not None and not class_name:
        known = known_classes(real, names)
        classes = proportional_classes(known, count, seed) if len(known) else classes

    with WorkBar("samples", count) as bar, tempfile.TemporaryFile() as pixels:
        if metadata:
            options: Options = {
                "sampler": sampler,
                "steps": steps or DEFAULT_STEPS[sampler],
                "eta": eta,
                "seed": seed,
                "classes": classes,
                "guidance": guidance,
                "batch_size": batch_size,
                "precision": pick_precision(precision, picked),
                "progress": bar.update,
            }
            blocks = drawn(network, metadata.diffusion, count, **options)
            sampling = sampling_facts(count, options, names)
        else:
            blocks = counted(stored.blocks(), bar)
            sampling = SamplingFacts(count=count, seed=seed, file=str(stored.path), sha256=sha256_of(stored.path))
        generated = features_of(blocks, extractor, batch_size, pixels if training else None)
        similar = None
        if training:
            found = memorisation(generated, training.features.features, real.features.features)
            similar = most_similar(found, training, pixels)

    say("comparing")
    comparison = Comparison(generated, real.features, resamples, seed)
    metrics = comparison.distances(extractor.frechet, extractor.kernel, extrapolate=extrapolate)
    if min(count, len(real.rows)) > neighbours:
        metrics |= comparison.neighbours(neighbours)
    else:
        remarks.append(f"precision, recall, density and coverage need more than --neighbours {neighbours} images")
    if training:
        metrics |= comparison.memorisation(found, training.features.features)
    titles = (extractor.frechet, extractor.kernel)
    record = Evaluation(
        model=str(model) if model else None,
        model_sha256=sha256_of(model) if model else None,
        rounds=metadata.rounds if metadata else 0,
        images_seen=metadata.images_seen if metadata else 0,
        extractor=ExtractorFacts(
            name=extractor.name, sha256=extractor.sha256, resize=extractor.resize, features=generated.shape[1]
        ),
        reference=ReferenceFacts(
            path=str(reference),
            sha256=real.corpus.manifest.sha256,
            split=real.part,
            labels=wanted,
            images=len(real.rows),
            pixels=real.corpus.manifest.policy,
        ),
        training=training
        and TrainingFacts(path=str(train), sha256=training.corpus.manifest.sha256, images=len(training.rows)),
        sampling=sampling,
        neighbours=neighbours,
        resamples=resamples,
        headline=headline(*titles, generated, real.features.features),
        metrics=metrics,
        pairs=similar.pairs if similar else (),
        notes=(*notes(*titles, generated, real.features.features), *remarks),
        maskdm=__version__,
        torch=torch.__version__,
    )
    print("\n".join(lines(record)))
    beside = model or samples
    assert beside
    path = json or beside.parent / FOLDER / f"{record.name()}.json"
    try:
        if similar:
            save_png(path.with_suffix(".png"), similar.picture)
        write_record(path, record)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}): choose another file") from error
    say(f"record: {path}")


def refuse_drawing(**given: object) -> None:
    """With images made elsewhere, what decides how a model draws would be overlooked.

    Raises:
        UsageError: one of them differs from what it is if nobody gives it.
    """
    usual = inspect.signature(evaluate).parameters
    for name, value in given.items():
        if value != usual[name].default:
            option = name.removesuffix("_name")
            raise UsageError(f"--{option} is for --model: the images of --samples are drawn already; leave it out")


def remarks_on(real: Real, training: Real | None, features: str, names: tuple[str, ...]) -> list[str]:
    """What a reader must know about the choice of images."""
    found = []
    if features == RANDOM:
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
    if names and not len(known_classes(real, names)):
        found.append("the reference has none of the model's classes: they are drawn equally often")
    return found


def known_classes(real: Real, names: tuple[str, ...]) -> Tensor:
    """The model's classes of the real images that have one, (M,) int64."""
    numbers = class_numbers(real.corpus, names)
    assert numbers is not None
    numbers = numbers[torch.from_numpy(real.rows)]
    return numbers[numbers >= 0]


def sampling_facts(count: int, options: Options, names: tuple[str, ...]) -> SamplingFacts:
    """How images are drawn, for the record."""
    facts = {name: options[name] for name in ("sampler", "steps", "eta", "seed", "guidance", "precision")}
    classes = options["classes"]
    drawn = {} if classes is None else {name: int((classes == number).sum()) for number, name in enumerate(names)}
    return SamplingFacts.model_validate({"count": count, "classes": drawn, **facts})


def counted(blocks: Iterator[Tensor], bar: WorkBar) -> Iterator[Tensor]:
    """The blocks, each shown once it was used."""
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        bar.update(done)


def features_of(blocks: Iterator[Tensor], extractor: Extractor, batch_size: int, pixels: BinaryIO | None) -> Tensor:
    """Features (N, D) of images that come in blocks; the images go to a file, where one is given."""
    found = []
    for block in blocks:
        found.append(extractor.features(block, batch_size=batch_size))
        if pixels:
            pixels.write(block.contiguous().numpy().data)
    return torch.cat(found)


class Similar(NamedTuple):
    """Samples with the training images that they are most like."""

    pairs: tuple[Pair, ...]
    picture: Image.Image  # samples above, training images below


def most_similar(found: Memorisation, training: Real, pixels: BinaryIO) -> Similar:
    """The samples nearest to training images, by the ratio of distances; `pixels` holds all samples."""
    corpus = training.corpus
    rows = training.rows[found.row.numpy()]
    pairs = tuple(
        Pair(sample=number, training=int(rows[number]), ratio=float(found.distances[number]))
        for number in found.distances.argsort()[:PAIRS].tolist()
    )
    shape = corpus.pixels.shape[1:]
    above = []
    for pair in pairs:
        pixels.seek(pair.sample * math.prod(shape))
        above.append(np.frombuffer(pixels.read(math.prod(shape)), np.uint8).reshape(shape))
    below = [corpus.image(pair.training) for pair in pairs]
    return Similar(pairs, grid_picture(np.stack([*above, *below]), columns=len(pairs)))
