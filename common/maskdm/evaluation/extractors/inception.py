"""Inception v3 as FID and KID use it (Heusel et al. 2017), from a local file of weights; nothing is ever downloaded.

torchmetrics and torch-fidelity hold the network. Images are enlarged as TensorFlow 1 did it, like torch-fidelity and
unlike torchmetrics' own default, so that the numbers are those of the literature.
"""

import io
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ...errors import UsageError

# weights-inception-2015-12-05-6726825d.pth of torch-fidelity; pytorch-fid's pt_inception-… is the same file.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESIZE = "bilinear as TensorFlow 1, to 299x299"


def load_inception(
    path: Path, option: str = "--features", device: torch.device | str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The network of a file of weights, uint8 (B, 1 or 3, H, W) → (B, 2048).

    Raises:
        UsageError: torch-fidelity is missing, or the file is damaged.
    """
    try:
        import torch_fidelity  # noqa: F401  (without it torchmetrics has the class, but not the network)
        from torchmetrics.image.fid import NoTrainInceptionV3  # takes seconds
    except ImportError as error:
        raise UsageError(
            f"{option} {path}: Inception needs torch-fidelity, which is not installed: pip install 'maskdm[fid]'"
        ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles whatever it is given: it gets a copy of what was read without.
        copy = io.BytesIO()
        torch.save(weights, copy)
        copy.seek(0)
        network = NoTrainInceptionV3("inception-v3", ["2048"], copy, antialias=False)  # type: ignore[arg-type]
        network.to(device)
        if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
            raise ValueError("a weight is not finite")
    except (OSError, UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
        raise UsageError(f"{option} {path} holds no weights of Inception v3: copy it again") from error

    def features(images: Tensor) -> Tensor:
        found: Tensor = network(images.to(device).expand(-1, 3, -1, -1))
        return found

    return features
