"""What a site agrees to: the same terms have the same fingerprint, and nothing that matters can change unseen."""

import re

import pytest

from maskdm.config import FINGERPRINT
from maskdm.federated.plan import RoundPlan
from maskdm.federated.terms import Terms, terms_of
from maskdm.metadata import CheckpointMetadata


@pytest.fixture
def plan(metadata: CheckpointMetadata) -> RoundPlan:
    return RoundPlan(
        federation="0123456789abcdef",
        exchange=7,
        action="train",
        round=1,
        rounds=2,
        local_images=2048,
        batch_size=32,
        lr=1e-3,
        seed=0,
        model=metadata.model_copy(update={"prior_sha256": "a" * 64}),
    )


@pytest.fixture
def terms(plan: RoundPlan) -> Terms:
    return terms_of(plan)


def test_what_changes_from_round_to_round_is_not_among_the_terms(plan: RoundPlan, terms: Terms) -> None:
    later = plan.model_copy(update={"round": 2, "exchange": 9, "lr": 0.1, "action": "measure", "seed": 3})
    assert terms_of(later) == terms
    trained = plan.model.model_copy(update={"rounds": 5, "images_seen": 10**6})
    assert terms_of(plan.model_copy(update={"model": trained})) == terms


def test_every_other_term_is_a_change_and_has_another_fingerprint(terms: Terms) -> None:
    """Each in turn, so that a new field is not forgotten."""
    others = {
        "federation": "f" * 16,
        "prior_sha256": None,
        "model": terms.model.model_copy(update={"dim": 32}),
        "diffusion": terms.diffusion.model_copy(update={"loss_weight": "p2"}),
        "class_names": ("a", "b"),
        "train": "norm-bias",
        "adapter_rank": 4,
        "encoding": "fp32",
        "local_images": 2047,
        "local_minutes": 1.0,
        "batch_size": 31,
    }
    assert others.keys() == Terms.model_fields.keys()
    assert re.fullmatch(FINGERPRINT, terms.fingerprint())
    for name, value in others.items():
        changed = terms.model_copy(update={name: value})
        (said,) = terms.changes(changed)
        assert name in said
        assert changed.fingerprint() != terms.fingerprint()
    assert not list(terms.changes(terms))


def test_more_images_and_larger_batches_are_no_change_to_the_worse(terms: Terms) -> None:
    assert not list(terms.changes(terms.model_copy(update={"local_images": 4096, "batch_size": 64})))


def test_what_a_coordinator_calls_its_classes_forges_no_line(terms: Terms) -> None:
    forged = terms.model_copy(update={"class_names": ("none\nprior       sha256 checked\x1b[2K",)})
    for line in (*forged.described(), *terms.changes(forged)):
        assert line.isprintable()


def test_a_person_reads_what_is_asked_for(terms: Terms) -> None:
    text = "\n".join(terms.described())
    for part in ("0123456789abcdef", "a" * 64, "uvit, 8x8 pixels", "ddpm", "predicts epsilon", "2,048 images a round"):
        assert part in text
    assert terms.fingerprint() in text
