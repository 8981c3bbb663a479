"""Masks, as indices of the patches that stay visible.

Every function draws for a whole batch on the generator's device, without host synchronisation, and returns
`(batch, visible)` int64 indices into the row-major token grid, ascending in each row.
Source: Lei et al. 2023 (arXiv 2306.11363), section 3.2; counts as in the published code.
"""

import math

import torch
from torch import Tensor

from ..config import MaskConfig
from ..errors import UsageError


def visible_count(mask: MaskConfig, grid: int) -> int:
    """Visible patches an image on a `grid` x `grid` token grid.

    Raises:
        UsageError: the mask leaves nothing visible or hides nothing, or its blocks do not divide the grid.
    """
    match mask.kind:
        case "none":
            return grid * grid
        case "crop":
            if mask.ratio == 1:
                raise UsageError("--mask-ratio 1 leaves nothing visible: give less than 1")
            return _crop_side(mask.ratio, grid) ** 2
        case "block":
            return _visible_of_blocks(mask, mask.block_size, grid)
        case "patch":
            return _visible_of_blocks(mask, 1, grid)


def effective_ratio(mask: MaskConfig, grid: int) -> float:
    """The share of patches that is really hidden: whole blocks and square crops rarely hit `mask.ratio`."""
    return 1 - visible_count(mask, grid) / grid**2


def draw_visible(mask: MaskConfig, grid: int, batch: int, generator: torch.Generator) -> Tensor | None:
    """Indices of visible patches, shape (batch, visible_count); None where everything is visible."""
    visible = visible_count(mask, grid)
    if visible == grid * grid:
        return None
    match mask.kind:
        case "none":
            return None
        case "crop":
            return _crop(grid, _crop_side(mask.ratio, grid), batch, generator)
        case "block":
            return _blocks(grid, mask.block_size, visible, batch, generator)
        case "patch":
            return _blocks(grid, 1, visible, batch, generator)


def _visible_of_blocks(mask: MaskConfig, block: int, grid: int) -> int:
    tokens = grid * grid
    if grid % block:
        raise UsageError(
            f"--block-size {block} does not divide the {grid}x{grid} grid of patches; "
            f"choose one of {', '.join(str(b) for b in range(1, grid + 1) if grid % b == 0)}"
        )
    hidden = int(mask.ratio * tokens) // block**2
    visible = tokens - hidden * block**2
    if visible == 0:
        raise UsageError(f"--mask-ratio {mask.ratio} leaves nothing visible: give less than 1")
    if hidden == 0 and mask.ratio > 0:
        raise UsageError(
            f"--mask-ratio {mask.ratio} hides less than one block of {block}x{block} patches on a {grid}x{grid} "
            f"grid, so nothing; choose a smaller --block-size or --mask none"
        )
    return visible


def _crop_side(ratio: float, grid: int) -> int:
    """Side of the square crop, in patches, nearest to the ratio."""
    return max(1, round(grid * math.sqrt(1 - ratio)))


def _blocks(grid: int, block: int, visible: int, batch: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    blocks = (grid // block) ** 2
    keep = visible // block**2
    order = torch.rand(batch, blocks, generator=generator, device=device).argsort(dim=1)  # (B, blocks)
    chosen = order[:, :keep]  # (B, K): K blocks without replacement
    row, column = chosen // (grid // block), chosen % (grid // block)  # (B, K), in blocks
    corner = (row * grid + column) * block  # (B, K): top-left patch of each block
    step = torch.arange(block, device=device)
    offsets = (step[:, None] * grid + step[None, :]).flatten()  # (block²,): patches within a block
    indices = (corner[:, :, None] + offsets).flatten(1)  # (B, K·block²)
    return indices.sort(dim=1).values


def _crop(grid: int, side: int, batch: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    corner = torch.randint(grid - side + 1, (2, batch, 1), generator=generator, device=device)  # (2, B, 1)
    step = torch.arange(side, device=device)
    offsets = (step[:, None] * grid + step[None, :]).flatten()  # (side²,)
    return corner[0] * grid + corner[1] + offsets  # (B, side²)
