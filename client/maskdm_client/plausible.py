"""Whether weights that come look like those of a model that was trained on images, and not made to read them.

It stops what is made without care: tables of zeros around one path, factors that drown everything else. It does not
stop a coordinator who hides such a path in a trained model of the usual size; nothing that looks at weights can.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from maskdm.policy import SitePolicy
from maskdm.runfolder import write_json

FIRST = "first-model.json"  # lengths of each weight of the first model that came, by federation
# Biases begin at zero and may become this large (root mean square) whatever they were.
SLACK = 0.1
# Root mean square of a weight of the first model, and of any value in it: trained ones lie near 1 at most.
LARGEST, LARGEST_VALUE = 10.0, 1000.0


def problem_of_weights(
    weights: Mapping[str, Tensor], first: Mapping[str, float] | None, policy: SitePolicy
) -> str | None:
    """What makes weights implausible.

    Args:
        weights: fp32, finite.
        first: `lengths` of the federation's first model; None where this is the first.
    """
    for name, found in lengths(weights).items():
        bound = LARGEST if first is None else policy.max_weight_growth * (first[name] + SLACK)
        if found > bound:
            return f"{name} is {found:.3g} long (root mean square), more than {bound:.3g} (max-weight-growth)"
        if float(weights[name].abs().max()) > LARGEST_VALUE:
            return f"a value of {name} is beyond {LARGEST_VALUE:g}"
        if weights[name].dim() > 1:
            zeros = 1 - int(weights[name].count_nonzero()) / weights[name].numel()
            if zeros > policy.max_zero_share:
                return f"{zeros:.0%} of {name} is zero, more than {policy.max_zero_share:.0%} (max-zero-share)"
    return None


def lengths(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Root mean square of each weight."""
    return {name: float(tensor.norm()) / math.sqrt(tensor.numel()) for name, tensor in weights.items()}


def first_lengths(folder: Path, federation: str) -> dict[str, float] | None:
    """Of the first model of a federation that this site took; None where there was none yet."""
    found = _read(folder / FIRST).get(federation)
    return dict(found) if found else None


def remember_first(folder: Path, federation: str, weights: Mapping[str, Tensor]) -> None:
    """Keep what later models of a federation are compared with."""
    path = folder / FIRST
    write_json(path, {**_read(path), federation: lengths(weights)})


def _read(path: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    return found
