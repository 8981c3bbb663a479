"""A site's policy file: strict by default, refused with a word on the key that is wrong."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.federated.parcel import QUALITY_NAMES, REPORT_NAMES
from maskdm.federated.policy import POLICY_KEYS, SIMULATED, TEMPLATE, UNATTENDED, SitePolicy, as_toml, load_policy


def policy_in(folder: Path, text: str) -> SitePolicy:
    (folder / "policy.toml").write_text(text)
    return load_policy(folder / "policy.toml")


def test_without_a_file_the_fixed_numbers_may_leave_and_no_update_longer_than_the_model() -> None:
    policy = load_policy(None)
    assert policy.metrics == REPORT_NAMES
    assert policy.max_relative_norm == 1
    assert (policy.max_norm, policy.max_bytes_per_round) == (None, None)
    assert (policy.share_loss, policy.share_labels) == (True, ())
    assert policy.quality_names() == (), "the site's owner has to want it"
    assert policy.max_evaluations_per_day == 10
    assert (policy.min_images, policy.require_dp, policy.approve_first_round, policy.bundles) == (16, False, False, ())


def test_the_template_says_what_holds_without_it(tmp_path: Path) -> None:
    assert policy_in(tmp_path, UNATTENDED) == SitePolicy()


def test_the_template_of_kits_asks_a_person(tmp_path: Path) -> None:
    assert policy_in(tmp_path, TEMPLATE) == SitePolicy(approve_first_round=True)


def test_a_policy_as_a_file_is_the_same_policy(tmp_path: Path) -> None:
    for policy in (SitePolicy(), SIMULATED, SitePolicy(max_norm=3.0, share_labels=("a b", "ü"), metrics=("outcome",))):
        assert policy_in(tmp_path, as_toml(policy)) == policy


@pytest.mark.parametrize(
    ("images", "batch", "key"),
    [(2048, 15, "min-batch"), (255, 16, "min-images-per-update"), (2048, 512, "min-steps"), (1, 1, "min-batch")],
)
def test_an_update_of_few_images_in_a_step_or_of_few_steps_is_none_that_may_leave(
    images: int, batch: int, key: str
) -> None:
    assert f"the site's policy ({key})" in (SitePolicy().problem_of_work(images, batch) or "")
    assert SitePolicy().problem_of_work(256, 32) is None
    assert SIMULATED.problem_of_work(1, 1) is None


def test_the_template_tells_which_numbers_of_an_evaluation_there_are(tmp_path: Path) -> None:
    assert all(f'"{name}"' in TEMPLATE for name in QUALITY_NAMES)
    listed = ", ".join(f'"{name}"' for name in (*REPORT_NAMES, "quality_images", "coverage"))
    assert policy_in(tmp_path, f"metrics = [{listed}]").quality_names() == ("quality_images", "coverage")


def test_figures_leave_with_the_number_of_images_behind_them_or_not_at_all() -> None:
    assert SitePolicy(metrics=(*REPORT_NAMES, "kernel")).quality_names() == ()
    assert SitePolicy(metrics=(*REPORT_NAMES, "quality_images")).quality_names() == ()


def test_the_template_names_every_key_and_what_it_comments_out_is_valid(tmp_path: Path) -> None:
    lines = TEMPLATE.splitlines()
    settings = [line.removeprefix("# ") for line in lines if line.startswith("# ") and " = " in line]
    policy = policy_in(tmp_path, TEMPLATE + "\n".join(settings))
    assert (policy.max_norm, policy.max_bytes_per_round, policy.max_rounds_per_day) == (10, 50_000_000, 50)
    keys = tomllib.loads(TEMPLATE + "\n".join(settings)).keys()
    assert {key.replace("-", "_") for key in keys} == set(SitePolicy.model_fields)


def test_every_key_can_be_set(tmp_path: Path) -> None:
    digest = 64 * "a"
    text = f"""
        metrics = ["outcome", "round"]
        max-relative-norm = 0.5
        max-norm = 3
        max-bytes-per-round = "1.5MB"
        max-rounds-per-day = 4
        max-evaluations-per-day = 3
        min-images = 50
        require-dp = true
        approve-first-round = true
        bundles = ["{digest}"]
    """
    expected = SitePolicy(
        metrics=("outcome", "round"),
        max_relative_norm=0.5,
        max_norm=3,
        max_bytes_per_round=1_500_000,
        max_rounds_per_day=4,
        max_evaluations_per_day=3,
        min_images=50,
        require_dp=True,
        approve_first_round=True,
        bundles=(digest,),
    )
    assert policy_in(tmp_path, text) == expected
    assert SitePolicy.model_validate(expected.model_dump(mode="json")) == expected, "as it is kept in config.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-norms = 1", "unknown key 'max-norms': the keys are metrics, share-loss"),
        ("max_norm = 1", "unknown key 'max_norm'"),
        ("[sub]\nkey = 1", "unknown key 'sub'"),
        ('metrics = ["file_name"]', "metrics = ['file_name']: 'file_name' is none of outcome, round"),
        ('metrics = "round"', "metrics = 'round': Input should be a list"),
        ("metrics = [1]", "metrics = [1]: "),
        ("max-norm = 0", "max-norm = 0: Input should be greater than 0"),
        ("max-norm = inf", "max-norm = inf: Input should be a finite number"),
        ("max-norm = nan", "max-norm = nan: "),
        ("max-norm = true", "max-norm = True: Input should be a valid number"),
        ('max-relative-norm = "1"', "max-relative-norm = '1': Input should be a valid number"),
        (
            'max-bytes-per-round = "50 apples"',
            "max-bytes-per-round = '50 apples': give a number of bytes, or text such",
        ),
        ("max-bytes-per-round = 0", "max-bytes-per-round = 0: Input should be greater than or equal to 1"),
        ("max-bytes-per-round = 1.5", "max-bytes-per-round = 1.5: Input should be a valid integer"),
        ("max-rounds-per-day = 0", "max-rounds-per-day = 0: Input should be greater than or equal to 1"),
        ("max-rounds-per-day = 100001", "max-rounds-per-day = 100001: Input should be less than or equal to 100000"),
        ("min-images = true", "min-images = True: Input should be a valid integer"),
        ("require-dp = 1", "require-dp = 1: Input should be a valid boolean"),
        ('approve-first-round = "yes"', "approve-first-round = 'yes': Input should be a valid boolean"),
        ('bundles = ["abc"]', "bundles = ['abc']: String should match pattern"),
        ("min-images", "is not TOML"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        policy_in(tmp_path, text)
    assert f"policy {tmp_path / 'policy.toml'}" in str(refused.value)
    assert message in str(refused.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "policy.toml")
    with pytest.raises(UsageError, match=r"policy\.toml cannot be read"):
        load_policy(tmp_path / "policy.toml")


def test_a_policy_may_change_while_a_site_stays_the_same() -> None:
    assert {f"site.policy.{name}" for name in SitePolicy.model_fields} == set(POLICY_KEYS)


@pytest.mark.parametrize(("images", "fits"), [(9, False), (10, True)])
def test_a_slice_that_is_too_small_is_named_with_what_is_wanted(images: int, fits: bool) -> None:
    problem = SitePolicy(min_images=10).problem_of_slice(images)
    assert (problem is None) == fits
    assert fits or "9 images to train on are fewer than the 10" in str(problem)
