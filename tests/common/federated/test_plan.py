"""What a coordinator may ask, and when it asks for the same work again."""

import json
from itertools import product
from typing import Any, Literal, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from maskdm.config import MaskConfig, Stage, Trainable, TrainingConfig
from maskdm.federated.plan import PROTOCOL_VERSION, RoundPlan, work_key
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.trainable import expected_shapes, update_shapes

WEIGHTS = bytes(range(100))

QUALITY = {"images": 10, "features": "a" * 64}

# Another value for everything that belongs to the work.
CHANGES: dict[str, Any] = {
    "federation": "f" * 16,
    "action": "measure",
    "round": 2,
    "rounds": 3,
    "local_images": 65,
    "local_minutes": 1.5,
    "batch_size": 9,
    "lr": 1.0000001e-3,
    "proximal": 1e-9,
    "keep_moments": True,
    "train": "adapters",
    "adapter_rank": 4,
    "encoding": "int8",
    "topk_share": 0.011,
    "seed": 1,
}


@pytest.fixture(scope="session")
def asked(metadata: CheckpointMetadata) -> dict[str, Any]:
    """A plan as it is before anybody checked it."""
    return {
        "federation": "0123456789abcdef",
        "exchange": 1,
        "action": "train",
        "round": 1,
        "rounds": 2,
        "local_images": 64,
        "batch_size": 8,
        "lr": 1e-3,
        "seed": 0,
        "model": metadata.model_dump(mode="json"),
    }


@pytest.fixture(scope="session")
def plan(asked: dict[str, Any]) -> RoundPlan:
    """The plan that was asked for."""
    return RoundPlan.model_validate(asked)


def test_a_plan_survives_its_way(plan: RoundPlan, asked: dict[str, Any]) -> None:
    assert plan.protocol == PROTOCOL_VERSION == 2
    assert RoundPlan.model_validate_json(plan.model_dump_json()) == plan
    assert RoundPlan.model_validate_json(json.dumps(asked)) == plan


@given(
    st.floats(0, 1, exclude_min=True),
    st.floats(0, allow_infinity=False),
    st.floats(0, 1e5, exclude_min=True) | st.none(),
)
@example(5e-324, 1.7976931348623157e308, 1e5)
def test_fractions_survive_their_way_exactly(
    plan: RoundPlan, lr: float, proximal: float, local_minutes: float | None
) -> None:
    changed = plan.model_copy(update={"lr": lr, "proximal": proximal, "local_minutes": local_minutes})
    found = RoundPlan.model_validate_json(changed.model_dump_json())
    assert found == changed
    assert work_key(found, [WEIGHTS]) == work_key(changed, [WEIGHTS])


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("protocol", [2], [1, 3, "2", True]),
        ("federation", ["0" * 16], ["short", "0" * 17, "0" * 16 + "\n", "F" * 16, "../../../../etc/a", None, 1]),
        ("exchange", [0, 2**63 - 1], [-1, 2**63, 0.5]),
        ("action", ["train", "measure", "finish"], ["evaluate", "upload", "Train", "", None]),
        ("quality", [None], [{}, QUALITY, "all"]),
        ("round", [1, 100_000], [0, -1, 1.5, 100_001, 10**30]),
        ("rounds", [1, 100_000], [0, 100_001]),
        ("local_images", [1, 100_000_000], [0, 100_000_001]),
        ("local_minutes", [None, 0.001, 100_000], [0, -1, 100_001, float("nan"), float("inf")]),
        ("batch_size", [1, 65_536], [0, 65_537]),
        ("lr", [1e-9, 1], [0, -1e-3, 1.1, float("nan"), float("inf"), None]),
        ("proximal", [0, 1e9], [-1e-9, float("nan"), float("inf")]),
        ("train", list(get_args(Trainable)), ["some", "", None]),
        ("adapter_rank", [1, 4096], [0, 4097]),
        ("encoding", ["bf16", "fp32", "int8", "topk"], ["fp16", "", None]),
        ("topk_share", [1e-6, 1], [0, -0.1, 1.1, float("nan")]),
        ("seed", [0, 2**63], [-1, 0.5]),
        ("model", [], [None, {}, {"model": {}}, "a"]),
    ],
)
def test_a_plan_has_bounds(asked: dict[str, Any], name: str, good: list[object], bad: list[object]) -> None:
    assert name in RoundPlan.model_fields
    for value in good:
        assert getattr(RoundPlan.model_validate(asked | {name: value}), name) == value
    for value in bad:
        with pytest.raises(ValidationError, match=name):
            RoundPlan.model_validate(asked | {name: value})


def test_a_plan_needs_whatever_has_no_usual_value(asked: dict[str, Any]) -> None:
    for name in asked:
        with pytest.raises(ValidationError, match=f"{name}\n  Field required"):
            RoundPlan.model_validate({key: value for key, value in asked.items() if key != name})


@pytest.mark.parametrize("where", [(), ("model",), ("model", "model"), ("model", "diffusion"), ("model", "mask")])
def test_a_plan_with_an_unknown_key_is_refused_wherever_it_stands(
    asked: dict[str, Any], where: tuple[str, ...]
) -> None:
    wrong = json.loads(json.dumps(asked))
    inside = wrong
    for name in where:
        inside = inside[name]
    inside["command"] = "rm"
    with pytest.raises(ValidationError, match=r"command\n  Extra inputs"):
        RoundPlan.model_validate(wrong)


def test_a_plan_of_a_model_that_cannot_be_is_refused(asked: dict[str, Any]) -> None:
    wrong = json.loads(json.dumps(asked))
    wrong["model"]["model"]["dim"] = 2**40
    with pytest.raises(ValidationError, match=r"model\.model\.dim"):
        RoundPlan.model_validate(wrong)


@pytest.mark.parametrize("document", ["", "{", "[]", "null", "7", '"plan"', "[" * 10**5, '{"a":' * 10**5, "NaN", "\0"])
def test_what_is_no_plan_at_all_is_refused(document: str) -> None:
    with pytest.raises(ValidationError):
        RoundPlan.model_validate_json(document)


def test_a_plan_cannot_be_changed(plan: RoundPlan) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan.lr = 1


def test_a_site_that_knows_no_kept_moments_understands_a_plan_without_them(plan: RoundPlan) -> None:
    assert "keep_moments" not in json.loads(plan.model_dump_json())
    kept = plan.model_copy(update={"keep_moments": True})
    assert RoundPlan.model_validate_json(kept.model_dump_json()) == kept


def test_a_site_that_knows_no_evaluation_understands_every_other_plan(plan: RoundPlan) -> None:
    for action in ("train", "measure", "finish"):
        document = json.loads(plan.model_copy(update={"action": action}).model_dump_json())
        assert "quality" not in document
    evaluation = RoundPlan.model_validate(plan.model_dump() | {"action": "evaluate", "quality": QUALITY})
    assert RoundPlan.model_validate_json(evaluation.model_dump_json()) == evaluation
    assert evaluation.shapes() == {}
    assert evaluation.largest_images() == 10


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images": 9}, "images"),
        ({"images": 100_001}, "images"),
        ({"features": "https://example.org/network"}, "features"),
        ({"features": "A" * 64}, "features"),
        ({"sampler": "magic"}, "sampler"),
        ({"steps": 0}, "steps"),
        ({"steps": 51}, "more than the model's 50 timesteps"),
        ({"network": "bytes"}, "network"),
    ],
)
def test_an_evaluation_has_bounds(asked: dict[str, Any], change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        RoundPlan.model_validate(asked | {"action": "evaluate", "quality": QUALITY | change})


@pytest.mark.parametrize("train", get_args(Trainable))
@pytest.mark.parametrize("rank", [1, 5])
def test_an_update_has_the_shapes_of_what_is_trained(plan: RoundPlan, train: Trainable, rank: int) -> None:
    shapes = plan.model_copy(update={"train": train, "adapter_rank": rank}).shapes()
    weights = expected_shapes(plan.model.model)
    assert shapes == update_shapes(plan.model.model, train, rank)
    match train:
        case "all":
            assert shapes == weights
        case "norm-bias":
            assert shapes == {name: shape for name, shape in weights.items() if len(shape) == 1}
        case "adapters":
            assert {shape.index(rank) if rank in shape else -1 for shape in shapes.values()} == {0, 1}
            assert {name.rpartition(".")[0] for name in shapes} < weights.keys()


@pytest.mark.parametrize(("action", "train"), list(product(["measure", "finish"], get_args(Trainable))))
def test_who_only_measures_sends_no_update(
    plan: RoundPlan, action: Literal["measure", "finish"], train: Trainable
) -> None:
    assert plan.model_copy(update={"action": action, "train": train}).shapes() == {}


@given(st.integers(1, 100_000_000), st.integers(1, 65_536))
@example(64, 8)
@example(1, 65_536)
def test_a_site_sees_whole_batches_and_none_that_begins_after_enough(
    plan: RoundPlan, local_images: int, batch_size: int
) -> None:
    largest = plan.model_copy(update={"local_images": local_images, "batch_size": batch_size}).largest_images()
    assert largest % batch_size == 0
    assert local_images <= largest < local_images + batch_size
    training = TrainingConfig(images=local_images, batch_size=batch_size)
    assert largest == Stage(mask=MaskConfig(), training=training).images(), "as training counts them"


@given(st.integers(0, 2**63 - 1))
def test_work_that_is_asked_for_again_has_the_same_key(plan: RoundPlan, exchange: int) -> None:
    again = RoundPlan.model_validate_json(plan.model_copy(update={"exchange": exchange}).model_dump_json())
    assert work_key(again, [WEIGHTS]) == work_key(plan, [memoryview(WEIGHTS)[:7], memoryview(WEIGHTS)[7:]])


def test_any_other_work_has_another_key(plan: RoundPlan) -> None:
    assert CHANGES.keys() | {"model", "exchange", "protocol", "quality"} == RoundPlan.model_fields.keys()
    assert work_key(plan, [WEIGHTS]) == work_key(plan.model_copy(update={"rounds": 99}), [WEIGHTS])
    about = plan.model.model_dump() | {"images_seen": 641}
    others = [
        RoundPlan.model_validate(plan.model_dump() | {name: value})
        for name, value in CHANGES.items()
        if name != "rounds"
    ]
    others += [
        RoundPlan.model_validate(plan.model_dump() | {"model": about | change})
        for change in (
            {},
            {"seed": 4},
            {"weights": "raw"},
            {"class_names": ("a",)},
            {"class_names": ("a", "b")},
            {"model": about["model"] | {"dim": 18}},
            {"mask": about["mask"] | {"ratio": 0.25}},
            {"diffusion": about["diffusion"] | {"timesteps": 51}},
        )
    ]
    changes: list[dict[str, Any]] = [{}, {"images": 11}, {"features": "b" * 64}, {"sampler": "ddim"}, {"steps": 3}]
    evaluation = plan.model_dump() | {"action": "evaluate"}
    others += [RoundPlan.model_validate(evaluation | {"quality": QUALITY | change}) for change in changes]
    keys = {work_key(other, [WEIGHTS]) for other in (plan, *others)}
    assert len(keys) == 1 + len(others)
    weights = {work_key(plan, [bytes(w)]) for w in (WEIGHTS, WEIGHTS[:-1], WEIGHTS + b"\0", WEIGHTS[::-1], b"")}
    assert len(weights) == 5
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys | weights)


plans = st.fixed_dictionaries(
    {
        "exchange": st.integers(0, 1),
        "action": st.sampled_from(["train", "measure"]),
        "round": st.integers(1, 2),
        "seed": st.sampled_from([0, 1, 10]),
        "adapter_rank": st.sampled_from([1, 10]),
        "lr": st.sampled_from([0.1, 0.1 + 2**-56]),
    }
)


@given(plans, plans, st.binary(max_size=1), st.binary(max_size=1))
def test_keys_are_equal_exactly_where_plan_and_weights_are(
    plan: RoundPlan, one: dict[str, Any], other: dict[str, Any], weights: bytes, more: bytes
) -> None:
    keys = [work_key(plan.model_copy(update=change), [held]) for change, held in ((one, weights), (other, more))]
    same = one | {"exchange": 0} == other | {"exchange": 0} and weights == more
    assert (keys[0] == keys[1]) == same
