"""What a federation is: which one follows from what was asked for, and only what is named goes to a site."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError, create_model

from maskdm.federated.plan import RoundPlan
from maskdm.federated.terms import Terms, terms_of
from maskdm.metadata import CheckpointMetadata
from maskdm.training.checkpoint import describe_checkpoint
from maskdm_server.federation.folder import federation_config
from maskdm_server.federation.settings import FederationConfig, FederationOptions, round_plan

# All that goes to a site with the weights. A new key is seen by every institution: it is decided here.
TRAVELS = {
    *("protocol", "federation", "exchange", "action", "round", "rounds"),
    *("local_images", "local_minutes", "batch_size", "lr", "proximal", "train", "adapter_rank"),
    *("encoding", "topk_share", "seed", "model"),
}
# Keys that go only where they ask for something.
SOMETIMES = {"keep_moments", "quality"}

# Options that are part of what a site agrees to.
OTHER_TERMS: dict[str, Any] = {
    "train": "adapters",
    "adapter_rank": 4,
    "encoding": "int8",
    "local_images": 2047,
    "local_minutes": 5.0,
    "batch_size": 16,
}


@pytest.fixture
def prior(folder: Path) -> Path:
    return folder / "prior.safetensors"


@pytest.fixture
def model(prior: Path) -> CheckpointMetadata:
    return describe_checkpoint(prior)


def test_what_travels_is_this_and_no_more(prior: Path, model: CheckpointMetadata) -> None:
    usual = federation_config(prior, FederationOptions())
    assert round_plan(usual, "train", 1, model, exchange=7).model_dump().keys() == TRAVELS
    everything = FederationOptions(keep_moments=True, evaluate=20, evaluate_features="a" * 64)
    plan = round_plan(federation_config(prior, everything), "evaluate", 1, model, exchange=7)
    assert plan.model_dump().keys() == TRAVELS | SOMETIMES
    assert RoundPlan.model_fields.keys() == TRAVELS | SOMETIMES


def test_a_plan_asks_for_what_was_chosen(prior: Path, model: CheckpointMetadata) -> None:
    other = {"rounds": 12, "lr": 1e-3, "proximal": 0.1, "keep_moments": True, "topk_share": 0.25, "seed": 7}
    options = FederationOptions.model_validate(other | OTHER_TERMS)
    config = federation_config(prior, options)
    plan = round_plan(config, "train", 3, model, exchange=7)
    shared = options.model_dump().keys() & RoundPlan.model_fields.keys()
    assert {name: getattr(plan, name) for name in shared} == {name: getattr(options, name) for name in shared}
    assert (plan.federation, plan.exchange, plan.action, plan.round) == (config.federation, 7, "train", 3)
    assert (plan.model, plan.quality) == (model, None)


def test_a_new_option_stays_here_whatever_its_name(prior: Path, model: CheckpointMetadata) -> None:
    """Also where a plan has a field of its name."""
    config = federation_config(prior, FederationOptions())
    added: dict[str, Any] = {
        name: (Any, Field(default="hidden", exclude=True))
        for name in (*RoundPlan.model_fields.keys() - FederationConfig.model_fields.keys(), "secret")
    }
    later = create_model("Later", __base__=FederationConfig, **added)(**dict(config))
    assert round_plan(later, "train", 1, model, exchange=7) == round_plan(config, "train", 1, model, exchange=7)


def test_another_prior_other_terms_or_another_seed_is_another_federation(
    prior: Path, model: CheckpointMetadata
) -> None:
    """So that sites which agreed to the terms of an earlier try are asked anew."""
    terms = FederationOptions.model_fields.keys() & Terms.model_fields.keys()
    assert OTHER_TERMS.keys() == terms
    usual = FederationOptions()
    changes = [{name: value} for name, value in OTHER_TERMS.items()] + [{"seed": 1}]
    found = {federation_config(prior, usual.model_copy(update=change)).federation for change in [{}, *changes]}
    assert len(found) == 2 + len(terms)
    same = federation_config(prior, usual.model_copy(update={"rounds": 99, "lr": 0.1, "proximal": 1.0}))
    assert same.federation == federation_config(prior, usual).federation


def test_every_plan_of_a_federation_is_under_the_same_terms(prior: Path, model: CheckpointMetadata) -> None:
    options = FederationOptions(evaluate=20, evaluate_features="a" * 64)
    config = federation_config(prior, options)
    plans = [
        round_plan(config, "train", 1, model, exchange=0),
        round_plan(config, "measure", 4, model, exchange=9),
        round_plan(config, "evaluate", 5, model, exchange=8),
    ]
    assert len({terms_of(plan).fingerprint() for plan in plans}) == 1


def test_numbers_may_be_written_as_people_write_them() -> None:
    found = FederationOptions.model_validate({"local_images": "2K", "max_upload": "50MB", "server_betas": "0.8,0.9"})
    assert (found.local_images, found.max_upload, found.server_betas) == (2000, 50_000_000, (0.8, 0.9))
    with pytest.raises(ValidationError):
        FederationOptions.model_validate({"batch_size": "2K"})


def test_where_minutes_are_given_images_are_no_limit_unless_they_are_given_too() -> None:
    assert FederationOptions(local_minutes=5).local_images == 100_000_000
    assert FederationOptions(local_minutes=5, local_images=2048).local_images == 2048
    again = FederationOptions.model_validate(FederationOptions(local_minutes=5).model_dump())
    assert again == FederationOptions(local_minutes=5)
