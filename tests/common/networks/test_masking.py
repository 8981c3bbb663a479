"""What a training step sees: how many patches, which ones, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import MaskConfig, MaskKind
from maskdm.errors import UsageError
from maskdm.networks.masking import draw_visible, effective_ratio, visible_count


def drawn(mask: MaskConfig, grid: int, batch: int = 3, seed: int = 0) -> Tensor:
    visible = draw_visible(mask, grid, batch, torch.Generator().manual_seed(seed))
    assert visible is not None
    return visible


@pytest.mark.parametrize(
    ("kind", "ratio", "block_size", "grid", "effective"),
    [
        ("block", 0.9, 4, 16, 0.875),
        ("block", 0.9, 4, 64, 0.8984375),
        ("block", 0.1, 4, 16, 0.0625),
        ("block", 0.9, 8, 16, 0.75),
        ("block", 0.75, 2, 8, 0.75),
        ("patch", 0.5, 4, 16, 0.5),
        ("patch", 0.9, 4, 16, 230 / 256),
        ("crop", 0.1, 4, 16, 1 - 15**2 / 16**2),
        ("crop", 0.5, 4, 16, 1 - 11**2 / 16**2),
        ("crop", 0.9, 4, 16, 1 - 5**2 / 16**2),
        ("none", 0.9, 4, 16, 0.0),
    ],
)
def test_effective_ratio_is_what_whole_blocks_and_square_crops_allow(
    kind: MaskKind, ratio: float, block_size: int, grid: int, effective: float
) -> None:
    mask = MaskConfig(kind=kind, ratio=ratio, block_size=block_size)
    assert effective_ratio(mask, grid) == pytest.approx(effective, abs=1e-12)
    assert visible_count(mask, grid) == round((1 - effective) * grid**2)


def test_published_crop_percentages_round_to_12_53_and_90() -> None:
    found = [100 * effective_ratio(MaskConfig(kind="crop", ratio=ratio), 16) for ratio in (0.1, 0.5, 0.9)]
    assert [f"{percent:.1f}" for percent in found] == ["12.1", "52.7", "90.2"]


@given(
    block=st.sampled_from([1, 2, 4]),
    blocks=st.integers(2, 6),
    ratio=st.floats(0.3, 0.95),
    kind=st.sampled_from(["block", "patch", "crop"]),
    seed=st.integers(0, 2**31),
)
def test_indices_are_unique_ascending_and_inside_the_grid(
    block: int, blocks: int, ratio: float, kind: MaskKind, seed: int
) -> None:
    grid = block * blocks
    mask = MaskConfig(kind=kind, ratio=ratio, block_size=block)
    visible = draw_visible(mask, grid, 4, torch.Generator().manual_seed(seed))
    if visible is None:
        assert visible_count(mask, grid) == grid**2
        return
    assert visible.shape == (4, visible_count(mask, grid))
    assert visible.dtype == torch.int64
    assert (visible.diff(dim=1) > 0).all()
    assert int(visible.min()) >= 0
    assert int(visible.max()) < grid**2


@given(block=st.sampled_from([2, 3, 4]), blocks=st.integers(2, 5), seed=st.integers(0, 2**31))
def test_block_masks_show_whole_blocks_only(block: int, blocks: int, seed: int) -> None:
    grid = block * blocks
    for row in drawn(MaskConfig(kind="block", ratio=0.6, block_size=block), grid, seed=seed):
        shown = torch.zeros(grid * grid)
        shown[row] = 1
        sums = shown.view(blocks, block, blocks, block).sum(dim=(1, 3))
        assert set(sums.flatten().tolist()) <= {0.0, float(block**2)}


@given(grid=st.integers(3, 16), ratio=st.floats(0.2, 0.95), seed=st.integers(0, 2**31))
def test_crops_are_one_contiguous_square(grid: int, ratio: float, seed: int) -> None:
    mask = MaskConfig(kind="crop", ratio=ratio)
    visible = draw_visible(mask, grid, 3, torch.Generator().manual_seed(seed))
    if visible is None:
        return
    side = round(visible.shape[1] ** 0.5)
    for row in visible:
        top, left = divmod(int(row[0]), grid)
        assert left + side <= grid
        expected = [(top + i) * grid + left + j for i in range(side) for j in range(side)]
        assert row.tolist() == expected


def test_the_same_generator_seed_gives_the_same_mask_and_another_seed_another_one() -> None:
    mask = MaskConfig(kind="block", ratio=0.9, block_size=4)
    assert torch.equal(drawn(mask, 16, 8, seed=5), drawn(mask, 16, 8, seed=5))
    assert not torch.equal(drawn(mask, 16, 8, seed=5), drawn(mask, 16, 8, seed=6))


def test_images_of_one_batch_get_masks_of_their_own() -> None:
    rows = drawn(MaskConfig(kind="patch", ratio=0.5), 16, 8)
    assert len({tuple(row.tolist()) for row in rows}) == 8


@pytest.mark.parametrize("kind", ["block", "patch"])
def test_every_patch_is_visible_equally_often(kind: MaskKind) -> None:
    visible = drawn(MaskConfig(kind=kind, ratio=0.75, block_size=2), 4, 8000)
    share = torch.bincount(visible.flatten(), minlength=16) / 8000
    assert share == pytest.approx(torch.full((16,), 0.25), abs=0.025)  # five standard errors


def test_no_mask_means_no_indices() -> None:
    assert draw_visible(MaskConfig(kind="none"), 16, 3, torch.Generator()) is None


@pytest.mark.parametrize("kind", ["block", "patch", "crop"])
def test_a_mask_that_leaves_nothing_visible_is_refused(kind: MaskKind) -> None:
    with pytest.raises(UsageError, match="nothing visible"):
        visible_count(MaskConfig(kind=kind, ratio=1.0), 16)


def test_a_mask_that_hides_less_than_one_block_is_refused() -> None:
    with pytest.raises(UsageError, match="hides less than one block"):
        visible_count(MaskConfig(kind="block", ratio=0.1, block_size=8), 16)


def test_blocks_that_do_not_divide_the_grid_are_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"does not divide the 16x16 grid.*1, 2, 4, 8, 16"):
        visible_count(MaskConfig(kind="block", ratio=0.9, block_size=5), 16)
