"""The masked U-ViT: a vision transformer with long skips that only ever sees visible patches.

Source: Lei et al. 2023 (arXiv 2306.11363), section 3.2 and appendix; backbone of Bao et al. 2023 (U-ViT, arXiv
2209.12152). Position embeddings are added before hidden tokens are dropped; here the equivalent and cheaper order is
used: gather the visible patches first, then embed only those, with the positions they came from.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from maskdm.config import ModelConfig


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) → (B, N, P·P·C), row-major over the grid."""
    patches: Tensor = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    return patches


def unpatchify(patches: Tensor, patch_size: int, channels: int) -> Tensor:
    """(B, N, P·P·C) → (B, C, H, W), the inverse of `patchify` for square images."""
    grid = math.isqrt(patches.shape[1])
    images: Tensor = rearrange(
        patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=patch_size, q=patch_size, c=channels
    )
    return images


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps: (B,) → (B, dim), fp32, cosines first."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))  # (dim/2,)
    angles = timesteps[:, None].float() * frequencies  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(QKᵀ/√d)V over (B, H, N, d)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[2] <= 1024:
        # The CPU's fused bf16 kernel spends over half of a training step in its backward pass.
        scores: Tensor = query * query.shape[3] ** -0.5 @ key.transpose(2, 3)  # (B, H, N, N)
        return scores.softmax(dim=3, dtype=torch.float32).to(value.dtype) @ value
    return functional.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = attend(query, key, value)  # (B, H, N, D/H)
        out: Tensor = self.proj(rearrange(mixed, "b h n d -> b n (h d)"))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them.

    Block for block this is timm's transformer, against which it is tested; importing timm here would add three seconds
    to the start of every process, and a client starts one each round.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


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


class PositionEmbedding(nn.Module):
    """One learned absolute table for [time, patches]; its own module so that per-sample gradients work."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1 + tokens, dim))

    def forward(self, time: Tensor, patches: Tensor, visible: Tensor | None) -> Tensor:
        """time (B, 1, D) and patches (B, V, D) at grid positions `visible` (B, V), or all → (B, 1 + V, D)."""
        positions = self.table[1:] if visible is None else self.table[1:][visible]  # (N, D) or (B, V, D)
        return torch.cat([time + self.table[0], patches + positions], dim=1)


class MaskedUViT(nn.Module):
    """Denoiser behind one small protocol: noisy visible patches + their positions + time → prediction."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(config.patch_dim, config.dim)
        self.position = PositionEmbedding(config.grid**2, config.dim)
        half = config.depth // 2
        self.in_blocks = nn.ModuleList(Block(config) for _ in range(half))
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList(Block(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.patch_dim)
        self.apply(_initialise)

    def forward(self, patches: Tensor, visible: Tensor | None, timesteps: Tensor) -> Tensor:
        """Predict the target on the given patches.

        Args:
            patches: noisy visible patches, (B, V, P·P·C).
            visible: their positions on the token grid, (B, V) int64; None where all are given in order.
            timesteps: (B,), in [0, T).

        Returns:
            (B, V, P·P·C), in the units of the prediction target.
        """
        tokens = self.patch_embedding(patches)  # (B, V, D)
        time = timestep_embedding(timesteps, self.config.dim).to(tokens.dtype)[:, None]  # (B, 1, D)
        x = self.position(time, tokens, visible)  # (B, 1 + V, D)
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        out: Tensor = self.head(self.norm(x[:, 1:]))  # (B, V, P·P·C)
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PositionEmbedding):
        nn.init.trunc_normal_(module.table, std=0.02)


def build_model(config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> MaskedUViT:
    """A freshly initialised network; the same seed gives the same weights. The global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedUViT(config).to(device)


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters())
