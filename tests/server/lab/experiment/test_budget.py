"""Budgets: every arm spends the same FLOPs, whatever it spends them on."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.errors import UsageError
from maskdm_server.lab.experiment.arms import arms_named, known_arms
from maskdm_server.lab.experiment.budget import ExperimentConfig, rounds_of, spending

MASK = MaskConfig(kind="block", ratio=0.75, block_size=2)
MODEL = ModelConfig.preset("tiny", image_size=32, channels=1)


def config(**more: object) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"model": MODEL, "diffusion": DiffusionConfig(prediction="x0"), "mask": MASK, **more}
    )


@settings(max_examples=30)
@given(
    prior=st.integers(20_000, 2_000_000),
    local=st.integers(5_000, 500_000),
    batch=st.sampled_from([8, 32, 64]),
    clients=st.sampled_from([2, 4, 8]),
    rounds=st.integers(1, 30),
)
def test_all_arms_but_short_ones_spend_alike(prior: int, local: int, batch: int, clients: int, rounds: int) -> None:
    assume(local >= 2 * batch * rounds)
    made = config(prior_images=prior, local_images=local, batch_size=batch, clients=clients, rounds=rounds)
    arms = [*known_arms(MASK).values(), *arms_named(["mask=patch:0.5", "mask=crop:0.5"], MASK)]
    spent = [spending(made, arm) for arm in arms]
    totals = [one.flops(one.local) for one, arm in zip(spent, arms, strict=True) if not arm.short]
    a_step = 4 * batch * spent[0].flops_per_image  # of the coarsest batch, in each of three parts
    assert max(totals) - min(totals) <= 0.02 * max(totals) + 3 * a_step
    for one in spent:
        assert list(one.points) == sorted(set(one.points))
        assert one.points[-1] == one.local
        assert one.local % batch == 0


def test_steps_of_priors_see_about_as_many_tokens_as_steps_on_whole_images() -> None:
    masked = spending(config(), known_arms(MASK)["masked"])
    unmasked = spending(config(), known_arms(MASK)["unmasked"])
    assert masked.prior_batches == (256,)  # 16 of 64 patches
    assert unmasked.prior_batches == (64,)
    assert masked.prior[0] > 3.9 * unmasked.prior[0]


def test_arms_without_a_prior_are_measured_where_the_others_are_and_beyond() -> None:
    with_prior = spending(config(), known_arms(MASK)["masked"])
    without = spending(config(), known_arms(MASK)["scratch"])
    assert without.points[:4] == with_prior.points
    assert without.local > with_prior.local


@pytest.mark.parametrize("name", ["scratch-short", "federated-scratch-short"])
def test_short_arms_see_no_more_local_images_than_others(name: str) -> None:
    short = spending(config(), known_arms(MASK)[name])
    assert short.points == spending(config(), known_arms(MASK)["masked"]).points
    assert short.prior_flops == 0


@given(local=st.integers(10_000, 200_000), rounds=st.integers(1, 40), clients=st.sampled_from([2, 4, 8]))
def test_federated_arms_see_as_many_images_in_whole_rounds(local: int, rounds: int, clients: int) -> None:
    made = config(local_images=local, rounds=rounds, clients=clients)
    spent = spending(made, known_arms(MASK)["federated"])
    count, marks = rounds_of(made, spent)
    a_round = made.round_images() * clients
    assert marks[-1] == count
    assert abs(count * a_round - spent.local) <= a_round
    assert made.round_images() % made.site_batch() == 0


def test_a_batch_that_sites_cannot_share_is_refused() -> None:
    with pytest.raises(ValidationError, match="--batch-size 10 cannot be shared out to --clients 4"):
        config(batch_size=10)


def test_rounds_without_a_step_are_refused() -> None:
    with pytest.raises(ValidationError, match="--rounds 100"):
        config(local_images=5000, rounds=100)


def test_a_mask_that_does_not_fit_is_the_users_mistake() -> None:
    (arm,) = arms_named(["mask=block:0.5:3"], MASK)
    with pytest.raises(UsageError, match="does not divide"):
        spending(config(), arm)


def test_sites_take_their_part_of_a_batch_or_what_they_are_given() -> None:
    assert config(batch_size=64, clients=4).site_batch() == 16
    assert config(batch_size=64, clients=4, site_batch_size=32).site_batch() == 32
    assert config(batch_size=64, clients=3, site_batch_size=8).site_batch() == 8
    with pytest.raises(ValidationError, match="cannot be shared out"):
        config(batch_size=64, clients=3)
