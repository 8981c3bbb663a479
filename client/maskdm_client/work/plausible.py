"""Whether weights that come look like those of a model that was trained on images, and not made to read them.

The first model of a federation that a site trains is kept, and later ones must stay near it; in the first round it must
be the very prior that the terms name. It stops what is made without care: tables of zeros around one path, factors
that drown everything else, a good prior followed by a crafted model. It does not stop a coordinator whose prior itself
is crafted, or who hides a path in a few channels of a good one; nothing that looks at weights can.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from maskdm.federated.encoding import as_tensor
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.run.runfolder import atomic_write
from maskdm.run.tensorfile import Arrays, Document, Stored, fp32, layout_of

from ..folder.events import JoinedLate
from ..folder.job import Job
from ..refusals import PlanRefused, PolicyRefused

# Root mean square of a weight of the first model, and of any value in it: trained ones lie near 1 at most.
LARGEST, LARGEST_VALUE = 10.0, 1000.0
# Beside the root mean square of its layer. Of a normal distribution 8 % of the values are smaller; measured in trained
# and fresh layers: up to 11 %, 38 % in the modulation of a DiT.
NEXT_TO_ZERO = 0.1
# Vectors, which are biases and norms, may move by this much (root mean square) whatever they were: many begin at zero.
SLACK = 0.1
MOST_FIRST = 3  # federations whose first models are kept


def problem_of_weights(weights: Mapping[str, Tensor], first: Arrays, policy: SitePolicy) -> str | None:
    """What makes weights implausible.

    Args:
        weights: fp32, finite.
        first: those of the federation's first model; empty where this is the first.
    """
    for name, tensor in weights.items():
        if length(tensor) > LARGEST or float(tensor.abs().max()) > LARGEST_VALUE:
            largest = float(tensor.abs().max())
            return f"{name} is {length(tensor):.3g} long (root mean square), with values to {largest:.3g}"
        if tensor.dim() > 1:
            zeros = float((tensor.abs() <= NEXT_TO_ZERO * length(tensor)).float().mean())
            if zeros > policy.max_zero_share:
                most = f"more than {policy.max_zero_share:.0%} (max-zero-share)"
                return f"{zeros:.0%} of {name} is zero or next to it, {most}"
        if first:
            before = as_tensor(first[name])
            moved, slack = length(tensor - before), SLACK if tensor.dim() == 1 else 0.0
            if moved > policy.max_weight_change * (length(before) + slack):
                return (
                    f"{name} moved by {moved:.3g} (root mean square) since this site's first round, where it was "
                    f"{length(before):.3g} long (max-weight-change)"
                )
    return None


def length(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.norm()) / math.sqrt(tensor.numel())


def check_weights(job: Job, weights: Mapping[str, Tensor], packed: Document) -> None:
    """See that weights are plausible beside the first ones of the federation that were trained here.

    Args:
        packed: weights as they came.

    Raises:
        PlanRefused: they are not.
        PolicyRefused: there is nothing to compare them with, and they need not be looked at.
    """
    plan, folder = job.plan, job.folder / "work"
    first = _first_weights(folder, plan)
    if layout_of(first) != fp32({name: tuple(tensor.shape) for name, tensor in weights.items()}):
        first = {}  # of terms that were approved anew
    problem = problem_of_weights(weights, first, job.settings.policy)
    simulated = job.settings.secret_seed is not None  # there is nobody to be protected from whom
    if not problem and not first and plan.model.prior_sha256 is not None and not simulated:
        if plan.action == "finish":
            raise PolicyRefused("this site trained in no round of the federation, so it measures no final model")
        # A site that joins late trains on what became of the prior, and says so; there is nothing else that it must do.
        if (plan.round == 1 or plan.action != "train") and not _is_prior(packed, plan):
            problem = "they are not the prior that the terms name, and this site has seen none of the federation yet"
    if problem:
        raise PlanRefused(f"the coordinator's weights were refused: {problem}")
    if plan.action == "train" and not first:
        _remember_first(folder, plan, packed)
        if plan.round > 1:
            job.say(JoinedLate(round=plan.round))


def _is_prior(packed: Document, plan: RoundPlan) -> bool:
    digest = hashlib.sha256(packed).hexdigest()  # type: ignore[arg-type]
    return digest == plan.model.prior_sha256


def _first_weights(folder: Path, plan: RoundPlan) -> Arrays:
    """Of the first model of a federation that this site trained; empty where there was none."""
    path = _path(folder, plan)
    try:
        return Stored(path) if path.exists() else {}
    except ValueError as error:
        raise PolicyRefused(f"{path} is damaged, so later models cannot be held against it: delete it") from error


def _remember_first(folder: Path, plan: RoundPlan, packed: Document) -> None:
    """Keep what later models of a federation are compared with, as it came; of few federations, since it is large."""
    others = sorted(folder.glob("first-*.safetensors"), key=lambda path: path.stat().st_mtime)
    for path in others[: 1 - MOST_FIRST]:
        path.unlink()
    atomic_write(_path(folder, plan), [np.frombuffer(packed, np.uint8).data])


def _path(folder: Path, plan: RoundPlan) -> Path:
    return folder / f"first-{plan.federation}-model.safetensors"
