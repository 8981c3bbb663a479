"""A model's images beside those that the site holds out, as a few numbers.

Distances are taken in the features of a network that the owner of the site has given: none comes with a plan, which
only names the hash of the one that it means.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskdm.data.corpus import Corpus
from maskdm.errors import UsageError
from maskdm.evaluation.distances import frechet_distance, kernel_distance, moments
from maskdm.evaluation.extractors.features import RANDOM, Extractor, open_extractor
from maskdm.evaluation.neighbours import memorisation, neighbourhoods
from maskdm.evaluation.samples import drawn, proportional_classes
from maskdm.federated.parcel import LARGEST_DISTANCE, rounded
from maskdm.federated.plan import FEWEST_COMPARED, QualityPlan
from maskdm.networks.model import Network, device_of
from maskdm.networks.precision import pick_precision

from ..folder.events import DrawingGoesOn
from ..folder.job import Job
from ..folder.settings import SiteSettings
from ..gate.allowance import EVALUATIONS, use_allowance
from ..refusals import NotEvaluated, Superseded
from .fine_tuning import REPORT_SECONDS, classes_of
from .local_data import LocalImages

NEIGHBOURS = 5  # k of precision, recall, density and coverage
BATCH = 32


def features_of(option: str) -> str:
    """What `--features` says, as the site's settings keep it, once the network could be loaded.

    Raises:
        UsageError: it is none.
    """
    if option == RANDOM:
        return RANDOM
    open_extractor(option)
    return str(Path(option).absolute())


def measure_quality(model: Network, job: Job, images: LocalImages) -> dict[str, int | float]:
    """Draw images, compare them with those held out, and count it: the numbers that the site's policy lists.

    Raises:
        NotEvaluated, PolicyRefused: they may not leave, or there are none.
        Superseded: something newer is asked for.
        OSError: it cannot be written down that they leave.
    """
    plan, policy, held_out = job.plan, job.settings.policy, images.held_out
    assert plan.quality is not None
    names = policy.quality_names()
    if not names:
        raise NotEvaluated("the policy lists none of the numbers, or not quality_images with them (metrics)")
    if len(held_out) < FEWEST_COMPARED:
        raise NotEvaluated(f"{len(held_out)} images are held out, fewer than the {FEWEST_COMPARED} that it takes")
    extractor = _extractor(job.settings, plan.quality, device_of(model))
    use_allowance(job, EVALUATIONS)
    generated = _features_of_drawn(model, job, plan.quality, images, extractor)  # (N, D)
    reference = _features(images.corpus, held_out, extractor)  # (M, D)
    found: dict[str, float] = {
        "kernel": kernel_distance(generated, reference),
        "frechet": frechet_distance(moments(generated), moments(reference)),
        **{name: float(v.mean()) for name, v in neighbourhoods(generated, reference, NEIGHBOURS)._asdict().items()},
    }
    if "memorisation" in names:
        training = _features(images.corpus, images.train, extractor)  # all: any of them may have been learned by heart
        found["memorisation"] = memorisation(generated, training, reference).ratio
    told = {name: _rounded(found[name]) for name in names if name in found and math.isfinite(found[name])}
    return {"quality_images": int(rounded(len(held_out))), **told}


def _extractor(settings: SiteSettings, wanted: QualityPlan, device: torch.device) -> Extractor:
    if settings.features is None:
        raise NotEvaluated(f"this site has no feature network; sha256 {wanted.features} is wanted (--features)")
    try:
        found = open_extractor(settings.features, device=device)
    except UsageError as error:
        raise NotEvaluated(str(error)) from error
    if found.sha256 != wanted.features:
        raise NotEvaluated(f"--features {settings.features} has sha256 {found.sha256}; {wanted.features} is wanted")
    return found


def _features_of_drawn(
    model: Network, job: Job, wanted: QualityPlan, images: LocalImages, extractor: Extractor
) -> Tensor:
    """Features of images that the model draws, (N, D), from the same noise for each model of a federation.

    A model of classes draws them in the proportions that the images held out have.
    """
    plan, last = job.plan, time.monotonic()
    seed = job.seed("evaluation", plan.federation)
    numbers = classes_of(images, job)
    own = None if numbers is None else numbers[torch.from_numpy(images.held_out)]  # (M,)

    def progress(done: int) -> None:
        nonlocal last
        if job.superseded():
            raise Superseded
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            job.say(DrawingGoesOn(round=plan.round, images=done, of=wanted.images))

    blocks = drawn(
        model,
        plan.model.diffusion,
        wanted.images,
        sampler=wanted.sampler,
        steps=wanted.steps,
        seed=seed,
        classes=None if own is None else proportional_classes(own, wanted.images, seed),
        batch_size=BATCH,
        precision=pick_precision(job.settings.precision, device_of(model)),
        progress=progress,
    )
    return torch.cat([extractor.features(block) for block in blocks])


def _features(corpus: Corpus, rows: NDArray[np.int64], extractor: Extractor) -> Tensor:
    """Of images of the site, (M, D); they are kept nowhere."""
    parts = [torch.from_numpy(np.asarray(corpus.pixels[part])) for part in np.array_split(rows, -(-len(rows) // 256))]
    return torch.cat([extractor.features(part) for part in parts])


def _rounded(value: float) -> float:
    return rounded(max(-LARGEST_DISTANCE, min(value, LARGEST_DISTANCE)))
