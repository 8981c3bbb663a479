"""The masked U-ViT: a vision transformer with long skips that only ever sees visible patches.

Source: Lei et al. 2023 (arXiv 2306.11363), section 3.2 and appendix; backbone of Bao et al. 2023 (U-ViT, arXiv
2209.12152). Position embeddings are added before hidden tokens are dropped; here the equivalent and cheaper order is
used: gather the visible patches first, then embed only those, with the positions they came from.
"""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .layers import Attention, ClassEmbedding, Mlp, PositionEmbedding, initialise, run_block, timestep_embedding


class Block(nn.Module):
    """Pre-norm transformer block; with `skip` it first joins the long skip by Linear(2·dim → dim)."""

    def __init__(self, config: ModelConfig, *, skip: bool = False) -> None:
        super().__init__()
        self.skip = nn.Linear(2 * config.dim, config.dim) if skip else None
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = self.skip(torch.cat([x, skip], dim=-1))  # type: ignore[list-item]
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class MaskedUViT(nn.Module):
    """`depth // 2` blocks in, one in the middle, `depth // 2` out, over [class, time, visible patches]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embedding = nn.Linear(config.patch_dim, config.dim)
        self.class_embedding = ClassEmbedding(config.classes, config.dim) if config.classes else None
        self.position = PositionEmbedding(2 if config.classes else 1, config.grid**2, config.dim)
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.patch_dim)
        self.apply(initialise)

    def forward(self, patches: Tensor, visible: Tensor | None, times: Tensor, classes: Tensor | None = None) -> Tensor:
        """Predict the target on the given patches; see `maskdm.networks.model`."""
        tokens = self.patch_embedding(patches)  # (B, V, D)
        extra = [timestep_embedding(times, self.config.dim).to(tokens.dtype)]  # (B, D)
        if self.class_embedding is not None:
            extra.insert(0, self.class_embedding(classes, len(patches)).to(tokens.dtype))
        x = self.position(torch.stack(extra, dim=1), tokens, visible)  # (B, E + V, D)
        recompute = self.recompute and self.training
        skips = []
        for block in self.in_blocks:
            x = run_block(block, x, recompute=recompute)
            skips.append(x)
        x = run_block(self.mid_block, x, recompute=recompute)
        for block in self.out_blocks:
            x = run_block(block, x, skips.pop(), recompute=recompute)
        out: Tensor = self.head(self.norm(x[:, len(extra) :]))  # (B, V, P·P·C)
        return out
