"""Feature networks: images → features in which distances mean something. Each is known by the sha256 of its file.

Files are data only: nothing in them is run or unpickled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskdm.checkpoint import sha256_of
from maskdm.errors import UsageError
from maskdm.evaluation.feature_net import is_feature_net, load_feature_net
from maskdm.evaluation.mobilenet import MOBILENET_SHA256, load_mobilenet


@dataclass(frozen=True)
class Extractor:
    """A feature network with what has to be told of it beside every number."""

    name: str  # as in FD-<name>
    sha256: str  # of its file
    resize: str  # how images get the size that it wants
    network: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W), C 1 or 3 → (B, D)

    @torch.no_grad()
    def features(
        self, images: Tensor, *, batch_size: int = 128, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """uint8 (N, C, H, W) → fp32 (N, D) on the CPU; the same whatever the batch size, up to rounding."""
        done = []
        for start in range(0, len(images), batch_size):
            done.append(self.network(images[start : start + batch_size]).float().cpu())
            progress(min(start + batch_size, len(images)))
        return torch.cat(done)


def open_extractor(path: Path, option: str = "--features", device: torch.device | str = "cpu") -> Extractor:
    """The feature network in a file, told by its contents.

    Raises:
        UsageError: there is no such file, or it is none that is known.
    """
    if not path.is_file():
        raise UsageError(f"{option} {path} does not exist or is no file: give the file of a feature network")
    digest = sha256_of(path)
    if digest == MOBILENET_SHA256:
        return Extractor("MobileNetV2", digest, "bilinear, antialias, to 224x224", load_mobilenet(path, device))
    if is_feature_net(path):
        about, network = load_feature_net(path, option, device)
        side = about.image_size
        return Extractor(about.name, digest, f"bilinear, antialias, to {side}x{side}", network)
    raise UsageError(
        f"{option} {path} (sha256 {digest[:16]}…) is no feature network that MaskDM knows: see docs/evaluation.md"
    )
