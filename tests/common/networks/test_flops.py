"""FLOPs: against arithmetic by hand, and what masking saves."""

import pytest

from maskdm.config import MaskConfig, ModelConfig
from maskdm.networks.flops import forward_flops, training_flops


def by_hand(config: ModelConfig, visible: int) -> float:
    """Matrix products of the U-ViT: embedding and head on patches, blocks on patches and the time token."""
    half, tokens, dim = config.depth // 2, visible + 1, config.dim
    blocks = 2 * half + 1
    linear = blocks * (4 + 2 * config.mlp_ratio) * dim**2 + half * 2 * dim**2
    attention = blocks * 2 * tokens * dim
    return 2 * (tokens * (linear + attention) + 2 * visible * dim * config.patch_dim)


@pytest.mark.parametrize("visible", [1, 16, 64])
def test_counts_the_products_of_the_network(visible: int) -> None:
    config = ModelConfig.preset("tiny", image_size=32, channels=1)
    assert forward_flops(config, visible) == by_hand(config, visible)


def test_the_published_network_costs_what_the_literature_says() -> None:
    config = ModelConfig.preset("S", image_size=64, channels=3)
    whole = training_flops(config, MaskConfig(kind="none"))
    masked = training_flops(config, MaskConfig(kind="block", ratio=0.9, block_size=4))
    assert whole == pytest.approx(73e9, rel=0.01)
    assert masked == pytest.approx(8.8e9, rel=0.01)


def test_classes_and_the_other_network_are_counted_too() -> None:
    plain = ModelConfig.preset("tiny", image_size=32, channels=1)
    classes = plain.model_copy(update={"classes": 3})
    assert forward_flops(classes, 16) > forward_flops(plain, 16)
    assert forward_flops(plain.model_copy(update={"network": "dit"}), 16) > 0
