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

from torch import Tensor

from maskdm.policy import SitePolicy
from maskdm.protocol import RoundPlan
from maskdm.runfolder import atomic_write
from maskdm.tensorfile import Arrays, Document, Stored, chunks, fp32
from maskdm.wire import as_tensor

# Root mean square of a weight of the first model, and of any value in it: trained ones lie near 1 at most.
LARGEST, LARGEST_VALUE = 10.0, 1000.0
# Vectors, which are biases and norms, may move by this much (root mean square) whatever they were: many begin at zero.
SLACK = 0.1


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
            zeros = 1 - int(tensor.count_nonzero()) / tensor.numel()
            if zeros > policy.max_zero_share:
                return f"{zeros:.0%} of {name} is zero, more than {policy.max_zero_share:.0%} (max-zero-share)"
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


def is_prior(packed: Document, plan: RoundPlan) -> bool | None:
    """Whether weights that came, whole, are the very file that the terms name; None where they need not be."""
    if plan.round > 1 or plan.action != "train" or plan.model.prior_sha256 is None:
        return None
    digest = hashlib.sha256(packed).hexdigest()  # type: ignore[arg-type]
    return digest == plan.model.prior_sha256


def first_weights(work: Path, plan: RoundPlan) -> Arrays:
    """Of the first model of a federation that this site trained; empty where there was none, or of another network."""
    path = _path(work, plan)
    return Stored(path) if path.exists() else {}


def remember_first(work: Path, plan: RoundPlan, weights: Mapping[str, Tensor]) -> None:
    """Keep what later models of a federation are compared with."""
    layout = fp32({name: tuple(tensor.shape) for name, tensor in weights.items()})
    atomic_write(_path(work, plan), chunks(layout, lambda name: weights[name].numpy()))


def _path(work: Path, plan: RoundPlan) -> Path:
    return work / f"first-{plan.federation}-model.safetensors"
