"""A small convolutional network, trained on images of the domain itself, whose features tell its pictures apart.

For domains that ImageNet knows nothing of. Train it on labelled images that no compared model sees.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from ...config import Frozen
from ...data.batches import batch_rows
from ...errors import UsageError
from ...run.runfolder import atomic_write
from ...run.tensorfile import Stored, chunks, layout_of
from ...seeding import generator
from .mobilenet import resized

KEY = "maskdm.features"


class FeatureNetConfig(Frozen):
    """What a file of a feature network says about it."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
    image_size: Annotated[int, Field(ge=8, le=512)]
    channels: Annotated[int, Field(ge=1, le=3)]
    classes: Annotated[int, Field(ge=2, le=10_000)]
    width: Annotated[int, Field(ge=4, le=256)] = 32
    features: Annotated[int, Field(ge=4, le=2048)] = 64
    trained_on: str = ""  # for people: which images
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = None  # on images that it was not trained on


class FeatureNet(nn.Module):
    """Three halvings by convolutions; the features come before the last layer, which names the class."""

    def __init__(self, config: FeatureNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.body = nn.Sequential(
            *_block(config.channels, width, 1),
            *_block(width, 2 * width, 2),
            *_block(2 * width, 4 * width, 2),
            *_block(4 * width, 4 * width, 2),
        )
        self.features = nn.Linear(4 * width, config.features)
        self.head = nn.Linear(config.features, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) → (B, features); grey is repeated for a net of colours, colour averaged for a grey one."""
        x = resized(images.to(self.head.weight.device).float(), self.config.image_size)
        if self.config.channels == 1:
            x = x.mean(dim=1, keepdim=True)
        x = self.body(x.expand(-1, self.config.channels, -1, -1) / 127.5 - 1).mean(dim=(2, 3))  # (B, 4 · width)
        found: Tensor = self.features(x)
        return found


def train_feature_net(
    images: Tensor,
    labels: Tensor,
    config: FeatureNetConfig,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    progress: Callable[[int], None] = lambda seen: None,
) -> FeatureNet:
    """Train as a classifier: AdamW, one cycle of the rate, images moved by up to two pixels.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,) in [0, classes).
        progress: told the number of images seen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FeatureNet(config)
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for step in range(steps):
        rows = torch.from_numpy(batch_rows(len(images), batch_size, step * batch_size, seed))
        moved = _moved(images[rows], generator("feature net", seed, step))
        scores = net.head(functional.gelu(net(moved)))  # (B, classes)
        loss = functional.cross_entropy(scores, labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(min((step + 1) * batch_size, epochs * len(images)))
    return net.eval()


@torch.no_grad()
def accuracy(net: FeatureNet, images: Tensor, labels: Tensor) -> float:
    """Share of images (N, C, H, W) whose label (N,) the network names."""
    named = torch.cat([net.head(functional.gelu(net(part))).argmax(dim=1) for part in torch.split(images, 256)])
    return float((named == labels).double().mean())


def save_feature_net(path: Path, net: FeatureNet, config: FeatureNetConfig) -> None:
    """Write it whole or not at all; `config` may say more than the one it was made with."""
    arrays = {name: tensor.numpy(force=True) for name, tensor in net.state_dict().items()}
    atomic_write(path, chunks(layout_of(arrays), arrays.__getitem__, {KEY: config.model_dump_json()}))


def is_feature_net(path: Path) -> bool:
    """Whether a file says that it is one."""
    try:
        return KEY in Stored(path).metadata
    except (OSError, ValueError):
        return False


def load_feature_net(
    path: Path, option: str, device: torch.device | str = "cpu"
) -> tuple[FeatureNetConfig, Callable[[Tensor], Tensor]]:
    """Read and check a feature network.

    Raises:
        UsageError: damaged, or not what it says.
    """
    try:
        stored = Stored(path)
        config = FeatureNetConfig.model_validate(json.loads(stored.metadata[KEY]))
        weights = {name: torch.from_numpy(array) for name, array in stored.items()}
        net = FeatureNet(config)
        net.load_state_dict(weights, strict=True)
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError("a weight is not finite")
    except (OSError, ValueError, KeyError, RuntimeError, ValidationError) as error:
        raise UsageError(f"{option} {path} is a damaged feature network: copy it again") from error
    return config, net.to(device).eval()


def _block(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.GELU()]


def _moved(images: Tensor, randomness: torch.Generator) -> Tensor:
    """The batch, mirrored or not and moved by up to two pixels, all alike (B, C, H, W)."""
    down, right = torch.randint(-2, 3, (2,), generator=randomness).tolist()
    flip = bool(torch.randint(0, 2, (1,), generator=randomness))
    found = torch.roll(images, (down, right), dims=(2, 3))
    return found.flip(3) if flip else found
