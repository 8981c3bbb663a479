"""Feature networks: images → features in which distances mean something. Each is known by the sha256 of its file.

Files are data only: nothing in them is run or unpickled.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UsageError
from ...run.runfolder import sha256_of
from . import inception
from .feature_net import FeatureNet, FeatureNetConfig, is_feature_net, load_feature_net
from .mobilenet import MOBILENET_SHA256, load_mobilenet


@dataclass(frozen=True)
class Extractor:
    """A feature network with what has to be told of it beside every number."""

    name: str  # as in FD-<name>
    sha256: str  # of its file
    resize: str  # how images get the size that it wants
    network: Callable[[Tensor], Tensor]  # uint8 (B, C, H, W), C 1 or 3 → (B, D)

    @property
    def frechet(self) -> str:
        """What the Fréchet distance between its features is called: FID with Inception only."""
        return "FID" if self._is_inception else f"FD-{self.name}"

    @property
    def kernel(self) -> str:
        """What the kernel distance between its features is called: KID with Inception only."""
        return "KID" if self._is_inception else f"KD-{self.name}"

    @property
    def _is_inception(self) -> bool:
        return self.sha256.startswith(inception.INCEPTION_SHA256)

    @torch.no_grad()
    def features(
        self, images: Tensor, *, batch_size: int = 128, progress: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """uint8 (N, C, H, W) → fp32 (N, D) on the CPU; the same whatever the batch size, up to rounding."""
        done = []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the same numbers on every GPU, and on a CPU
            for start in range(0, len(images), batch_size):
                done.append(self.network(images[start : start + batch_size]).float().cpu())
                progress(min(start + batch_size, len(images)))
        return torch.cat(done)


RANDOM = "random"


def random_extractor(device: torch.device | str = "cpu") -> Extractor:
    """A small convolutional network of random weights, the same everywhere: for domains without a trained one.

    Such features tell apart more than one would think, and know no domain better than another (Naeem et al. 2020, arXiv
    2002.09797, section 4, with a random VGG16 of as many features).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = FeatureNet(FeatureNetConfig(name=RANDOM, image_size=64, channels=3, classes=2))
    digest = hashlib.sha256()
    for _, weight in sorted(net.state_dict().items()):
        digest.update(weight.numpy().tobytes())
    return Extractor(RANDOM, digest.hexdigest(), "bilinear, antialias, to 64x64", net.to(device).eval())


def open_extractor(file: Path | str, option: str = "--features", device: torch.device | str = "cpu") -> Extractor:
    """The feature network in a file, told by its contents; or the one of random weights, for the word `random`.

    Raises:
        UsageError: there is no such file, or it is none that is known.
    """
    if file == RANDOM:
        return random_extractor(device)
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{option} {path} does not exist or is no file: give the file of a feature network")
    digest = sha256_of(path)
    if digest == MOBILENET_SHA256:
        return Extractor("MobileNetV2", digest, "bilinear, antialias, to 224x224", load_mobilenet(path, device))
    if digest.startswith(inception.INCEPTION_SHA256):
        return Extractor("Inception", digest, inception.RESIZE, inception.load_inception(path, option, device))
    if is_feature_net(path):
        about, network = load_feature_net(path, option, device)
        if about.name in (RANDOM, "MobileNetV2", "Inception"):
            raise UsageError(f"{option} {path} calls itself {about.name}, which is another network: name it otherwise")
        side = about.image_size
        return Extractor(about.name, digest, f"bilinear, antialias, to {side}x{side}", network)
    raise UsageError(
        f"{option} {path} (sha256 {digest[:16]}…) is no feature network that MaskDM knows: see docs/evaluation.md"
    )
