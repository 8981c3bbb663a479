"""Fixtures that every test shares: one thread, reproducible properties, and the smallest model that is a model."""

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import settings

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.metadata import CheckpointMetadata

settings.register_profile("maskdm", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("maskdm")
torch.set_num_threads(1)  # bit-for-bit comparisons, and no fighting over cores


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sources are packed into a folder of the test run, by the processes that it starts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """A 4×4 grid of 2×2 grey patches; one block in, one in the middle, one out."""
    return ModelConfig(image_size=8, channels=1, patch_size=2, dim=16, depth=2, heads=2)


@pytest.fixture(scope="session")
def metadata(tiny: ModelConfig) -> CheckpointMetadata:
    """What a masked prior of the tiny model says about itself."""
    return CheckpointMetadata(
        model=tiny,
        diffusion=DiffusionConfig(timesteps=50),
        mask=MaskConfig(kind="patch", ratio=0.5),
        effective_mask_ratio=0.5,
        images_seen=640,
        seed=3,
        created=datetime(2026, 1, 1, tzinfo=UTC),  # on which the draws of a site's work hang, too
    )
