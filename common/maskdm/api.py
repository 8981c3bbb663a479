"""What researchers do with MaskDM, each a call of the very code that the command of its name runs.

    import maskdm

    corpus = maskdm.pack("./images", "corpus", image_size=32)
    model = maskdm.load(maskdm.pretrain(corpus, maskdm.Run(...), "prior"))
    images = maskdm.sample(model, 16)

A mistake that the caller can put right is a `maskdm.errors.UsageError` of one line; it names the option of the command,
or the argument.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from .config import DiffusionConfig, MaskConfig, ModelConfig, Precision, Sampler, Stage, TrainingConfig
from .data.batches import batches, class_numbers
from .data.corpus import Corpus
from .data.pixels import PixelPolicy, Pixels
from .data.preparation.pack import guess_channels
from .data.preparation.pack import pack as pack_source
from .data.sources.layouts import with_layout
from .diffusion import forward_process as processes
from .diffusion import sampling as samplers
from .errors import DataError
from .evaluation.cached import RealFeatures, real_features
from .evaluation.distances import moments
from .evaluation.extractors.features import RANDOM, open_extractor
from .evaluation.measure import Comparison
from .evaluation.real import choose_part
from .evaluation.record import Measured
from .metadata import CheckpointMetadata
from .networks import masking as masks
from .networks.model import Network, device_of
from .networks.precision import pick_device, pick_precision
from .run.runfolder import owned
from .training.checkpoint import load_checkpoint, model_from, save_checkpoint
from .training.loop import Progress, TrainingState, put_weights, train
from .training.pretrain import Run
from .training.pretrain import pretrain as train_prior

__all__ = [
    "Corpus",
    "DiffusionConfig",
    "MaskConfig",
    "Model",
    "ModelConfig",
    "Run",
    "Stage",
    "TrainingConfig",
    "evaluate",
    "fine_tune",
    "load",
    "masks",
    "pack",
    "pretrain",
    "processes",
    "sample",
    "samplers",
]

UNMASKED = MaskConfig(kind="none", ratio=0)


@dataclass(frozen=True)
class Model:
    """A network, called as `maskdm.networks.model` says, and its metadata: shape, diffusion process, mask, history."""

    network: Network
    metadata: CheckpointMetadata

    def save(self, path: Path | str) -> None:
        """Write a checkpoint, whole or not at all, that `load` and every command takes."""
        weights = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        save_checkpoint(Path(path), weights, self.metadata)


def load(path: Path | str, *, device: str = "auto") -> Model:
    """The model in a checkpoint: a prior, a federation's `model.safetensors`, or what `Model.save` wrote.

    Args:
        device: auto, cpu, cuda, cuda:1 …

    Raises:
        CheckpointError: missing, damaged, foreign, or of a newer version.
    """
    weights, metadata = load_checkpoint(Path(path), "load:")
    return Model(model_from(weights, metadata.model, pick_device(device)), metadata)


def sample(
    model: Model,
    n: int,
    *,
    sampler: Sampler = "dpmpp",
    steps: int | None = None,
    eta: float = 0.0,
    classes: Sequence[str] | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
    precision: Precision = "auto",
    seed: int = 0,
) -> Tensor:
    """Draw n images; the same seed gives the same ones whatever the batch size.

    Args:
        steps: evaluations of the network, half of those of heun; None for the sampler's usual number.
        eta: of ddim, from 0, deterministic, to 1, ancestral.
        classes: names, which take turns; None for all of the model's in turn.
        guidance: classifier-free guidance, at least 0; 1 is none.

    Returns:
        uint8 (n, C, S, S), on the CPU.

    Raises:
        UsageError: more steps than the process has, or a class that the model does not have.
    """
    about = model.metadata
    samplers.check_steps(steps, about.diffusion)
    return samplers.sample(
        model.network,
        about.diffusion,
        n,
        sampler=sampler,
        steps=steps,
        eta=eta,
        classes=samplers.classes_in_turn(classes, about.class_names, n),
        guidance=guidance,
        batch_size=batch_size,
        precision=pick_precision(precision, device_of(model.network)),
        seed=seed,
    )


def pack(
    data: Path | str,
    out: Path | str,
    *,
    image_size: int = 64,
    channels: Literal[1, 3] | None = None,
    layout: str = "auto",
    upscale: bool = False,
    workers: int = 0,
) -> Corpus:
    """Images as they lie on the disk → a packed corpus in the folder `out`, made once; `Corpus.open` opens it again.

    Args:
        data: a folder of any depth, a zip, a tar, an `.npz` or `.npy` of uint8 images, or a packed corpus.
        image_size: pixels along a side.
        channels: None for grey where all images are grey.
        layout: see `maskdm-server prepare --layout`.
        upscale: enlarge images that are smaller instead of skipping them.
        workers: processes; 0 takes one for each core.

    Raises:
        DataError: nothing usable in `data`, another corpus in `out`, or no room for it.
    """
    source = with_layout(Path(data), layout)
    policy = {"image_size": image_size, "channels": channels or guess_channels(source), "upscale": upscale}
    with owned(Path(out)):
        return pack_source(source, Path(out), PixelPolicy.model_validate(policy), workers=workers)


def pretrain(
    corpus: Corpus,
    config: Run,
    out: Path | str,
    *,
    init: Path | str | None = None,
    device: str = "auto",
    save_every: float = 120.0,
) -> Path:
    """Train a prior on a corpus, or go on with it, and return the path of its checkpoint for `load`.

    In one process; `torchrun -m maskdm_server pretrain` is for several.

    Args:
        config: network, diffusion process, and the stages of training with their masks.
        out: run folder: `prior.safetensors`, `metrics.jsonl`, sample grids, and the state to go on from.
        init: checkpoint to start from instead of random weights.
        save_every: seconds between saves of the full state.

    Raises:
        UsageError: `out` holds another run, or a mask does not fit the network's grid.
        Interrupted: stopped by Ctrl-C; the state was saved, and the same call goes on.
        TrainingDiverged, OutOfMemory: the last saved state stays.
    """
    picked = pick_device(device)
    with owned(Path(out)):
        return train_prior(
            corpus, Path(out), config, device=picked, init=Path(init) if init else None, save_every=save_every
        )


def fine_tune(
    model: Model,
    images: Corpus | Tensor,
    config: TrainingConfig,
    *,
    mask: MaskConfig = UNMASKED,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Model:
    """Train a copy of a model on images that are at hand, with the loop that pre-trains priors and that sites run.

    A site of a federation does more around it: it measures, saves, and lets only what its policy allows leave.

    Args:
        images: a corpus, of which the training part is used; or uint8 (N, C, S, S), without classes.
        config: length, batch size, learning rate, …
        on_progress: told images seen, loss and speed every half a second.

    Returns:
        The moving average of the weights, on the same device.

    Raises:
        DataError: images of another size or number of channels.
        TrainingDiverged, OutOfMemory: see `maskdm.training.loop.train`.
    """
    about, device = model.metadata, device_of(model.network)
    pixels: Pixels | Tensor
    if isinstance(images, Corpus):
        pixels, rows, classes = images.pixels, images.training_rows, class_numbers(images, about.class_names)
    else:
        pixels, rows, classes = images, None, None
    shape = (about.model.channels, about.model.image_size, about.model.image_size)
    if tuple(pixels.shape[1:]) != shape:
        raise DataError(f"images: {tuple(pixels.shape[1:])} each, but the model's have {shape}")
    network = model_from({name: p.detach() for name, p in model.network.named_parameters()}, about.model, device)
    state = TrainingState.fresh(network, config)
    order = batches(pixels, config.batch_size, 0, config.seed, rows=rows, classes=classes, device=device)
    train(state, order, config, about.diffusion, mask, on_progress=on_progress)
    put_weights(network, state.average)
    changed = {
        "mask": mask,
        "effective_mask_ratio": masks.effective_ratio(mask, about.model.grid),
        "images_seen": about.images_seen + state.images_seen,
    }
    return Model(network.eval(), about.model_copy(update=changed))


def evaluate(
    samples: Tensor,
    reference: Corpus | Tensor,
    features: Path | str = RANDOM,
    *,
    neighbours: int = 5,
    resamples: int = 1000,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Measured]:
    """How near drawn images are to real ones that the model never saw: each number with its interval and its floor.

    Args:
        samples: uint8 (N, C, S, S), N ≥ 2.
        reference: uint8 (M, C, S, S), M ≥ 2; or a corpus: its test part, else its validation part, else all of it.
        features: file of a feature network (Inception's weights give FID and KID); or `random`, for rough comparisons.
        neighbours: k of precision, recall, density and coverage, which need more images than that.
        resamples: of the bootstrap; 0 for no intervals.

    Raises:
        UsageError: a file that is no known feature network, or too few images.
    """
    extractor = open_extractor(features, "features", pick_device(device))
    rows = choose_part(reference, "auto")[1] if isinstance(reference, Corpus) else np.arange(len(reference))
    if min(len(samples), len(rows)) < 2:
        raise DataError(f"{len(samples)} samples and {len(rows)} images to compare them with: give at least 2 of each")
    if isinstance(reference, Corpus):
        real = real_features(reference, rows, extractor, title="features of the reference")
    else:
        found = extractor.features(reference)
        real = RealFeatures(found, moments(found))
    comparison = Comparison(extractor.features(samples), real, resamples, seed)
    metrics = comparison.distances(extractor.frechet, extractor.kernel)
    if min(len(samples), len(rows)) > neighbours:
        metrics |= comparison.neighbours(neighbours)
    return metrics
