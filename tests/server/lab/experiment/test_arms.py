"""Arms by name."""

import pytest

from maskdm.config import MaskConfig
from maskdm.errors import UsageError
from maskdm_server.lab.experiment.arms import arms_named

MASK = MaskConfig(kind="block", ratio=0.75, block_size=2)


def test_the_masked_prior_has_the_users_mask() -> None:
    (arm,) = arms_named(["masked"], MASK)
    assert arm.prior == (MASK,)
    assert arm.sites == "pooled"


def test_any_other_mask_is_an_arm_too() -> None:
    (arm,) = arms_named(["mask=patch:0.5"], MASK)
    assert arm.prior == (MaskConfig(kind="patch", ratio=0.5, block_size=1),)


@pytest.mark.parametrize(
    "name", ["masks", "", "mask=", "mask=block", "mask=block:x:2", "mask=block:2:2", "mask=b:0.5:1"]
)
def test_what_is_no_arm_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"--arms {name}:"):
        arms_named(["scratch", name], MASK)


def test_an_arm_is_named_once() -> None:
    with pytest.raises(UsageError, match="twice"):
        arms_named(["scratch", "scratch"], MASK)
