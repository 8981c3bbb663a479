"""Configuration objects: published sizes, and no silent mistakes."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from maskdm.config import DiffusionConfig, Frozen, MaskConfig, ModelConfig, Size, TrainingConfig
from maskdm.networks.model import parameter_count
from maskdm.networks.uvit import MaskedUViT


@pytest.mark.parametrize(
    ("size", "image_size", "parameters"), [("S", 64, 44_292_144), ("S", 256, 46_258_224), ("B", 256, 102_417_456)]
)
def test_published_sizes_have_the_published_number_of_parameters(size: Size, image_size: int, parameters: int) -> None:
    with torch.device("meta"):
        model = MaskedUViT(ModelConfig.preset(size, image_size=image_size, channels=3))
    assert parameter_count(model) == parameters


@pytest.mark.parametrize("config", [ModelConfig, DiffusionConfig, MaskConfig, TrainingConfig])
def test_unknown_keys_are_refused(config: type[Frozen]) -> None:
    with pytest.raises(ValidationError, match="batchsize"):
        config.model_validate({"batchsize": 1})


@pytest.mark.parametrize("config", [ModelConfig(), DiffusionConfig(), MaskConfig(), TrainingConfig()])
def test_a_configuration_cannot_be_changed_after_it_was_made(config: Frozen) -> None:
    field = next(iter(type(config).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, field, getattr(config, field))


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": 30, "patch_size": 4},
        {"dim": 100, "heads": 3},
        {"dim": 15, "heads": 5},
        {"channels": 0},
        {"mlp_ratio": float("nan")},
    ],
)
def test_impossible_model_shapes_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig.model_validate(values)


@pytest.mark.parametrize("values", [{"lr": 0}, {"lr": float("inf")}, {"ema_decay": 1}, {"images": 0}, {"seed": -1}])
def test_impossible_training_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig.model_validate(values)


def test_grid_and_patch_dimension_follow_from_the_shape() -> None:
    config = ModelConfig(image_size=64, channels=3, patch_size=4)
    assert (config.grid, config.patch_dim) == (16, 48)


def test_a_configuration_survives_json() -> None:
    config = ModelConfig.preset("L", image_size=32, channels=1)
    assert config.qkv_bias
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
