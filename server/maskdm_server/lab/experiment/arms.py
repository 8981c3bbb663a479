"""The arms of an experiment: what a model starts from, whose images it is trained on, and where."""

from typing import Literal

from maskdm.config import Frozen, MaskConfig
from maskdm.errors import UsageError

UNMASKED = MaskConfig(kind="none", ratio=0.0, block_size=1)
Sites = Literal["pooled", "iid", "skewed"]


class Arm(Frozen):
    """One way to spend the compute."""

    name: str
    what: str  # for people
    prior: tuple[MaskConfig, ...] | None  # masks of equal parts of pre-training; None: random weights
    sites: Sites = "pooled"
    everything: bool = False  # all local images instead of a slice of them
    short: bool = False  # without a prior: as many local images as after one, instead of as many FLOPs in all


def known_arms(mask: MaskConfig) -> dict[str, Arm]:
    """Arms by name.

    Args:
        mask: of the masked prior.
    """
    half = mask.model_copy(update={"ratio": 0.5})
    arms = (
        Arm(name="scratch", what="random weights, slices of all sites pooled", prior=None),
        Arm(name="scratch-short", what="random weights, no more local images than others", prior=None, short=True),
        Arm(name="masked", what="masked prior, slices pooled", prior=(mask,)),
        Arm(name="unmasked", what="unmasked prior of as many FLOPs, slices pooled", prior=(UNMASKED,)),
        Arm(name="federated", what="masked prior, federated over equal sites", prior=(mask,), sites="iid"),
        Arm(name="federated-skewed", what="masked prior, federated, label skew", prior=(mask,), sites="skewed"),
        Arm(name="federated-scratch", what="random weights, federated over equal sites", prior=None, sites="iid"),
        Arm(
            name="federated-scratch-short",
            what="random weights, federated over equal sites, no more local images than others",
            prior=None,
            sites="iid",
            short=True,
        ),
        Arm(name="everything", what="random weights, all local images pooled", prior=None, everything=True),
        Arm(name="curriculum", what="prior masked less and less, slices pooled", prior=(mask, half, UNMASKED)),
    )
    return {arm.name: arm for arm in arms}


def arms_named(names: list[str], mask: MaskConfig) -> tuple[Arm, ...]:
    """The arms that a user asks for; `mask=KIND:RATIO:BLOCK` is a masked prior with another mask.

    Raises:
        UsageError: no such arm.
    """
    known = known_arms(mask)
    found = []
    for name in names:
        if name.startswith("mask="):
            found.append(Arm(name=name, what=f"prior with {name}, slices pooled", prior=(_mask(name),)))
        elif name in known:
            found.append(known[name])
        else:
            raise UsageError(f"--arms {name}: there are {', '.join(known)} and mask=KIND:RATIO:BLOCK")
    if len({arm.name for arm in found}) < len(found):
        raise UsageError(f"--arms {','.join(names)}: an arm is named twice")
    return tuple(found)


def _mask(name: str) -> MaskConfig:
    kind, _, rest = name.removeprefix("mask=").partition(":")
    ratio, _, block = rest.partition(":")
    try:
        return MaskConfig.model_validate({"kind": kind, "ratio": float(ratio), "block_size": int(block or 1)})
    except ValueError as error:
        raise UsageError(f"--arms {name}: give e.g. mask=block:0.75:2, mask=patch:0.5 or mask=crop:0.5") from error
