"""The networks behind one small protocol, and how they are made.

A network is called with noisy visible patches (B, V, P·P·C), their positions on the token grid (B, V) int64 or None
where all are given in order, times (B,) in about [0, 1000), and classes (B,) int64 or None, −1 meaning no class. It
answers (B, V, P·P·C), in the units of the prediction target. It has its `config` and a switch `recompute` that trades
time for memory.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig
from .dit import MaskedDiT
from .uvit import MaskedUViT

Network = MaskedUViT | MaskedDiT


def network(config: ModelConfig) -> Network:
    """The network that a configuration names, initialised from the global generator."""
    match config.network:
        case "uvit":
            return MaskedUViT(config)
        case "dit":
            return MaskedDiT(config)


def build_model(config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> Network:
    """A freshly initialised network; the same seed gives the same weights. The global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(config).to(device)


def device_of(model: nn.Module) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def parameter_count(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(p.numel() for p in model.parameters())


def resize_positions(table: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """A position table for another grid: bicubic between places, extra tokens as they are, (E + N, D) → (E + M, D)."""
    extra, dim = len(table) - old.grid**2, table.shape[1]
    places = table[extra:].T.reshape(1, dim, old.grid, old.grid)
    resized = functional.interpolate(places, (new.grid, new.grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:extra], resized.reshape(dim, -1).T])
