"""What the runs of an experiment say: one row an arm and seed, and no difference that not all seeds bear out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from .budget import ExperimentConfig

Line = dict[str, Any]  # of curve.jsonl
FEWEST_SEEDS = 3  # that a difference is claimed from


@dataclass(frozen=True)
class ArmRun:
    """One arm with one seed, at the best of the rates that were tried."""

    arm: str
    seed: int
    lr: float
    prior_flops: int
    curve: tuple[Line, ...]

    @property
    def last(self) -> Line:
        """At the end of the budget."""
        return self.curve[-1]

    @property
    def best(self) -> Line:
        """The point that is best on the images held out to choose by."""
        return min(self.curve, key=lambda line: line["fd_validation"])


def flops_to_reach(curve: Sequence[Line], distance: float) -> float | None:
    """FLOPs at which a curve first is as low as `distance`, straight between points in both logarithms.

    None where it never is.
    """
    for i, line in enumerate(curve):
        if line["fd"] > distance:
            continue
        if i == 0 or curve[i - 1]["fd"] <= distance:
            return float(line["flops"])
        before = curve[i - 1]
        share = math.log(before["fd"] / distance) / math.log(before["fd"] / line["fd"])
        return float(before["flops"] * (line["flops"] / before["flops"]) ** share)
    return None


def compute_ratio(scratch: ArmRun, other: ArmRun, counted: float) -> float | None:
    """How many times less compute `other` needs to be as good as `scratch` at its best; below 1 it needs more.

    None where it never is as good.

    Args:
        counted: share of its prior that counts, 1/N where N fine-tunings use it.
    """
    local = [{**line, "flops": line["flops"] - other.prior_flops * (1 - counted)} for line in other.curve]
    spent, needed = (flops_to_reach(curve, scratch.best["fd"]) for curve in (scratch.curve, local))
    assert spent is not None
    return None if needed is None else spent / needed


def table(runs: Mapping[str, Sequence[ArmRun]], floor: Mapping[str, float]) -> str:
    """Markdown: distances of each arm and seed."""
    lines = [
        "| arm | seed | rate | distance, best | distance, last | kernel distance, last | held-out loss | PFLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in runs.items():
        for run in seeds:
            best, last = run.best, run.last
            lines.append(
                f"| {arm} | {run.seed} | {run.lr:g} | {best['fd']:.2f} | {last['fd']:.2f} | {last['kd']:.4f} | "
                f"{last['loss']:.4f} | {last['flops'] / 1e15:.4f} |"
            )
    real = f"| {floor['n']:,} real images | – | – | {floor['fd']:.2f} | {floor['fd']:.2f} | {floor['kd']:.4f} | | |"
    return "\n".join([*lines, real])


def sentences(runs: Mapping[str, Sequence[ArmRun]], config: ExperimentConfig) -> list[str]:
    """Comparisons that the experiment was made for, each with what all seeds say, at the end of each arm's budget."""
    pairs = (
        ("masked", "scratch-short", "the masked prior, at an equal number of local images"),
        ("masked", "scratch", "the masked prior, at equal compute in all"),
        ("masked", "unmasked", "the masked prior, beside an unmasked one of equal compute"),
        ("curriculum", "masked", "the curriculum of masks, beside a constant mask"),
        ("federated", "masked", "the federation of equal sites, beside pooling their images"),
        ("federated-skewed", "masked", "the federation of sites with label skew, beside pooling as many images"),
        ("federated", "federated-scratch-short", "a federation with the masked prior, at as many local images"),
        ("federated", "federated-scratch", "a federation with the masked prior, at equal compute in all"),
        ("masked", "everything", "the masked prior and a slice, beside training from scratch on all images"),
    )
    found = [_compared(runs[one], runs[other], what) for one, other, what in pairs if {one, other} <= set(runs)]
    seeds = max((len(some) for some in runs.values()), default=0)
    if found and seeds >= FEWEST_SEEDS:
        found.append(f"{seeds} seeds agree by chance alone, where there is no difference, once in {2 ** (seeds - 1)}")
    for scratch in ("scratch-short", "scratch"):
        if {scratch, "masked"} <= set(runs):
            found += _cheaper(scratch, runs[scratch], runs["masked"], config.clients)
    return found


def _pairs(first: Sequence[ArmRun], second: Sequence[ArmRun]) -> list[tuple[ArmRun, ArmRun]]:
    """Runs of the same seed."""
    return [(one, other) for one in first for other in second if one.seed == other.seed]


def _compared(first: Sequence[ArmRun], second: Sequence[ArmRun], what: str) -> str:
    ratios = [one.last["fd"] / other.last["fd"] for one, other in _pairs(first, second)]
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    if len(ratios) < FEWEST_SEEDS:
        return f"{what}: {_too_few(shown)}"
    seeds, mean = f"{len(ratios)} seeds: {shown}", geometric_mean(ratios)
    if max(ratios) < 1:
        return f"{what}: {1 - mean:.0%} lower distance (ratios of {seeds})"
    if min(ratios) > 1:
        return f"{what}: {mean - 1:.0%} higher distance (ratios of {seeds})"
    return f"{what}: no difference that all seeds agree on (ratios of {seeds})"


def _too_few(ratios: str) -> str:
    return f"too few seeds to say (ratios {ratios}; {FEWEST_SEEDS} are the least)"


def _cheaper(name: str, scratch: Sequence[ArmRun], masked: Sequence[ArmRun], uses: int) -> list[str]:
    shares = {"counted whole": 1.0, f"counted over {uses} such uses": 1 / uses, "at hand already": 0.0}
    found = []
    for how, counted in shares.items():
        ratios = [compute_ratio(one, other, counted) for one, other in _pairs(scratch, masked)]
        shown = ", ".join("never" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        if len(ratios) < FEWEST_SEEDS:
            shown = _too_few(shown)
        found.append(
            f"compute of {name} at its best over that of the masked prior to be as good, the prior {how}: {shown}"
        )
    return found
