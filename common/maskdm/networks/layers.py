"""Layers that the networks share."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


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
    slow = query.dtype == torch.bfloat16 or torch.get_float32_matmul_precision() != "highest"
    if query.device.type == "cpu" and slow and query.shape[2] <= 1024:
        # On short sequences the CPU's fused kernel spends over half of a training step in its backward pass in bf16,
        # and is up to 20 times slower where fp32 products go through oneDNN.
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


class PositionEmbedding(nn.Module):
    """One learned absolute table for [extra tokens, patches]; its own module so that per-sample gradients work."""

    def __init__(self, extra: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.extra = extra
        self.table = nn.Parameter(torch.zeros(extra + tokens, dim))

    def forward(self, extra: Tensor, patches: Tensor, visible: Tensor | None) -> Tensor:
        """extra (B, E, D) and patches (B, V, D) at grid positions `visible` (B, V), or all → (B, E + V, D)."""
        places = self.table[self.extra :]  # (N, D)
        positions = places if visible is None else places[visible]  # (N, D) or (B, V, D)
        return torch.cat([extra + self.table[: self.extra], patches + positions], dim=1)


class ClassEmbedding(nn.Module):
    """A vector for each class and one for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.none = classes
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, classes: Tensor | None, batch: int) -> Tensor:
        """(B,) int64, −1 for none, or None for none at all → (B, D)."""
        if classes is None:
            classes = torch.full((batch,), -1, device=self.table.weight.device)
        out: Tensor = self.table(torch.where(classes < 0, self.none, classes))
        return out


def run_block(block: nn.Module, *inputs: Tensor, recompute: bool) -> Tensor:
    """Call a block; with `recompute` its activations are computed again in the backward pass instead of being kept."""
    out: Tensor = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
    return out


def initialise(module: nn.Module) -> None:
    """Weights from a normal of 0.02 cut at ±2, biases zero: as published."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PositionEmbedding):
        nn.init.trunc_normal_(module.table, std=0.02)
    elif isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
