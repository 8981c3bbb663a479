"""A masked diffusion transformer: time and class modulate every block instead of being tokens.

Source: Peebles & Xie 2023 (DiT, arXiv 2212.09748), section 3.2, adaLN-Zero; over visible patches only, with a learned
position table like the U-ViT's.
"""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from .layers import Attention, ClassEmbedding, Mlp, PositionEmbedding, initialise, run_block, timestep_embedding


class ModulatedBlock(nn.Module):
    """Attention and MLP whose norms and gates follow from the condition; starts as the identity."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, elementwise_affine=False)
        self.attention = Attention(config.dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.dim, elementwise_affine=False)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))
        self.modulation = nn.Linear(config.dim, 6 * config.dim)

        self.apply(initialise)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), condition (B, D) → (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(
            self.modulation(functional.silu(condition)), "b (six d) -> six b 1 d", six=6
        )
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return out


class MaskedDiT(nn.Module):
    """`depth` modulated blocks over the visible patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        self.patch_embedding = nn.Linear(config.patch_dim, config.dim)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.class_embedding = ClassEmbedding(config.classes, config.dim) if config.classes else None
        self.position = PositionEmbedding(0, config.grid**2, config.dim)
        self.norm = nn.LayerNorm(config.dim, elementwise_affine=False)
        self.modulation = nn.Linear(config.dim, 2 * config.dim)
        self.head = nn.Linear(config.dim, config.patch_dim)
        self.apply(initialise)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.head.weight)
        self.blocks = nn.ModuleList(ModulatedBlock(config) for _ in range(config.depth))

    def forward(self, patches: Tensor, visible: Tensor | None, times: Tensor, classes: Tensor | None = None) -> Tensor:
        """Predict the target on the given patches; see `maskdm.networks.model`."""
        tokens = self.patch_embedding(patches)  # (B, V, D)
        condition = self.time_embedding(timestep_embedding(times, self.config.dim).to(tokens.dtype))  # (B, D)
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(classes, len(patches))
        x = self.position(tokens[:, :0], tokens, visible)  # (B, V, D)
        for block in self.blocks:
            x = run_block(block, x, condition, recompute=self.recompute and self.training)
        shift, scale = rearrange(self.modulation(functional.silu(condition)), "b (two d) -> two b 1 d", two=2)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)  # (B, V, P·P·C)
        return out
