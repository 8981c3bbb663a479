"""What is said of results: only what all seeds bear out."""

import pytest

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm_server.lab.experiment.budget import ExperimentConfig
from maskdm_server.lab.experiment.summary import ArmRun, compute_ratio, flops_to_reach, sentences, table

CONFIG = ExperimentConfig(
    model=ModelConfig.preset("tiny", image_size=32, channels=1),
    diffusion=DiffusionConfig(),
    mask=MaskConfig(kind="block", ratio=0.75, block_size=2),
    local_images=400,
    batch_size=4,
    rounds=10,
)


def run(arm: str, seed: int, distances: list[float], prior: int = 0) -> ArmRun:
    """Measured at 100, 200, … images of 10 FLOPs each."""
    lines = [
        {"images": 100 * i, "flops": prior + 1000 * i, "fd": fd, "fd_validation": fd, "kd": fd / 100, "loss": 0.1}
        for i, fd in enumerate(distances, start=1)
    ]
    return ArmRun(arm, seed, 1e-3, prior, tuple(lines))


def test_time_to_reach_is_read_between_the_points() -> None:
    curve = run("a", 0, [80.0, 40.0, 10.0]).curve
    assert flops_to_reach(curve, 80.0) == 1000
    assert flops_to_reach(curve, 40.0) == 2000
    assert flops_to_reach(curve, 20.0) == pytest.approx(2000 * 1.5**0.5)  # half of the way in both logarithms
    assert flops_to_reach(curve, 5.0) is None


def test_a_curve_that_rises_again_has_reached_it() -> None:
    assert flops_to_reach(run("a", 0, [80.0, 20.0, 60.0]).curve, 40.0) == pytest.approx(2000 * 0.5**0.5)


def test_the_prior_counts_as_a_whole_or_shared() -> None:
    scratch = run("scratch", 0, [80.0, 40.0, 20.0, 10.0])
    masked = run("masked", 0, [40.0, 10.0], prior=2000)  # as good as scratch ever is after 2,000 local FLOPs
    assert compute_ratio(scratch, masked, counted=1.0) == pytest.approx(4000 / (2000 + 2000))
    assert compute_ratio(scratch, masked, counted=0.25) == pytest.approx(4000 / (500 + 2000))
    assert compute_ratio(scratch, run("masked", 0, [40.0, 11.0]), counted=0.0) is None


def test_the_best_point_is_chosen_by_other_images_than_it_is_reported_on() -> None:
    one = run("a", 0, [30.0, 20.0, 10.0])
    changed = tuple(line | {"fd_validation": value} for line, value in zip(one.curve, (3.0, 1.0, 2.0), strict=True))
    assert ArmRun("a", 0, 1e-3, 0, changed).best["fd"] == 20.0


def test_a_difference_is_claimed_where_all_seeds_have_it() -> None:
    runs = {
        "scratch-short": [run("scratch", seed, [80.0, 60.0, 50.0, 40.0]) for seed in range(3)],
        "masked": [run("masked", seed, [30.0, 25.0, 22.0, last]) for seed, last in enumerate((20.0, 16.0, 12.0))],
    }
    said = sentences(runs, CONFIG)
    assert said[0].startswith("the masked prior, at an equal number of local images: 61% lower distance")
    assert said[0].endswith("(ratios of 3 seeds: 0.50, 0.40, 0.30)")  # whose geometric mean is 0.391
    assert said[1] == "3 seeds agree by chance alone, where there is no difference, once in 4"


def test_two_seeds_are_too_few_to_claim_anything() -> None:
    runs = {arm: [run(arm, seed, [last]) for seed in range(2)] for arm, last in (("masked", 1.0), ("unmasked", 9.0))}
    assert sentences(runs, CONFIG) == [
        "the masked prior, beside an unmasked one of equal compute: too few seeds to say (ratios 0.11, 0.11; 3 are the "
        "least)"
    ]


def test_compute_is_told_with_the_prior_whole_shared_and_at_hand() -> None:
    runs = {
        "scratch": [run("scratch", seed, [80.0, 40.0, 20.0, 10.0]) for seed in range(3)],
        "masked": [run("masked", seed, [40.0, last], prior=2000) for seed, last in enumerate((10.0, 10.0, 11.0))],
    }
    _, _, *said = sentences(runs, CONFIG)  # the first two compare distances
    assert [line.partition("to be as good, the prior ")[2] for line in said] == [
        "counted whole: 1.00, 1.00, never",
        "counted over 4 such uses: 1.60, 1.60, never",
        "at hand already: 2.00, 2.00, never",
    ]


def test_of_compute_too_one_seed_says_too_little() -> None:
    runs = {
        "scratch": [run("scratch", 0, [80.0, 40.0, 20.0, 10.0])],
        "masked": [run("masked", 0, [40.0, 10.0], prior=2000)],
    }
    *_, said = sentences(runs, CONFIG)
    assert said.endswith("the prior at hand already: too few seeds to say (ratios 2.00; 3 are the least)")


def test_no_difference_is_claimed_where_seeds_disagree() -> None:
    runs = {
        "masked": [run("masked", seed, [10.0]) for seed in range(3)],
        "unmasked": [run("unmasked", seed, [last]) for seed, last in enumerate((20.0, 9.0, 20.0))],
    }
    said, _ = sentences(runs, CONFIG)
    assert "no difference that all seeds agree on" in said


def test_arms_that_did_not_run_are_not_spoken_of() -> None:
    assert sentences({"masked": [run("masked", 0, [10.0])]}, CONFIG) == []


def test_the_table_has_a_row_for_each_run_and_one_for_real_images() -> None:
    lines = table(
        {"masked": [run("masked", 0, [30.0, 20.0]), run("masked", 1, [20.0, 25.0])]},
        floor={"fd": 1.5, "kd": 0.25, "n": 1000},
    ).split("\n")
    assert len(lines) == 5
    assert "| masked | 1 | 0.001 | 20.00 | 25.00 |" in lines[3]
    assert lines[4].startswith("| 1,000 real images | – | – | 1.50 | 1.50 | 0.2500 |")
