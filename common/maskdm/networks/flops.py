"""Floating-point operations of networks, counted by PyTorch on tensors that have no contents."""

from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import MaskConfig, ModelConfig
from .masking import visible_count
from .model import network


@lru_cache(maxsize=64)
def forward_flops(config: ModelConfig, visible: int) -> int:
    """Of one image with so many visible patches: two for each multiplication in a matrix product."""
    with torch.device("meta"):
        model = network(config)
        patches = torch.empty(1, visible, config.patch_dim)
        positions = None if visible == config.grid**2 else torch.empty(1, visible, dtype=torch.long)
        classes = torch.zeros(1, dtype=torch.long) if config.classes else None
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(patches, positions, torch.empty(1), classes)
    return int(counter.get_total_flops())


def training_flops(config: ModelConfig, mask: MaskConfig) -> int:
    """Of training on one image: forwards, and twice that backwards."""
    return 3 * forward_flops(config, visible_count(mask, config.grid))
