"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), trained on ImageNet, as a feature network.

From one known file: the int8 weights that Google publishes for its accelerators, as NumPy arrays with a list of
operations. Its features are the 1280 channels before the classifier, averaged over places.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

MOBILENET_SHA256 = "f932dae0fe243922149127ddbbdd39aea0eb39a030727de10aad78b978176221"
SIDE, FEATURES = 224, 1280


class MobileNetV2(nn.Module):
    """The network, with weights scaled back from int8."""

    w0: Tensor  # of the first layer

    def __init__(self, operations: list[dict[str, Any]], arrays: dict[str, Tensor]) -> None:
        super().__init__()
        self._operations = operations
        for name, array in arrays.items():
            self.register_buffer(name, array)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) → (B, 1280)."""
        x = resized(images.to(self.w0.device).float(), SIDE).expand(-1, 3, -1, -1) / 127.5 - 1  # (B, 3, 224, 224)
        values: dict[int, Tensor] = {}
        for operation in self._operations:
            if operation["op"] == "add":
                values[operation["o"]] = values[operation["a"]] + values[operation["b"]]
            elif operation["op"] == "conv":
                number = operation["n"]
                weight, bias = getattr(self, f"w{number}"), getattr(self, f"b{number}")
                found = _convolve(values.get(operation["i"], x), weight, bias, operation)
                if len(weight) == FEATURES:
                    return found.mean(dim=(2, 3))
                values[operation["o"]] = found
        raise AssertionError("no layer of 1280 channels")


def load_mobilenet(path: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """The network in a file whose sha256 was found to be MOBILENET_SHA256."""
    with np.load(path, allow_pickle=False) as packed:
        operations = json.loads(bytes(packed["meta"]).decode())
        arrays = {}
        for number in (operation["n"] for operation in operations if operation["op"] == "conv"):
            scale = packed[f"s{number}"].reshape(-1, 1, 1, 1)
            arrays[f"w{number}"] = torch.from_numpy(packed[f"w{number}"].astype(np.float32) * scale)
            arrays[f"b{number}"] = torch.from_numpy(packed[f"b{number}"])
    return MobileNetV2(operations, arrays).to(device).eval()


def resized(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) → (B, C, side, side), as they are where they have that size."""
    if images.shape[-2:] == (side, side):
        return images
    return functional.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, operation: dict[str, Any]) -> Tensor:
    stride, kernel = operation["stride"], weight.shape[-1]
    if kernel > 1:  # TensorFlow's "SAME", which puts the odd one behind
        padding = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        x = functional.pad(x, (padding[1] // 2, -(-padding[1] // 2), padding[0] // 2, -(-padding[0] // 2)))
    found = functional.conv2d(x, weight, bias, stride, groups=len(weight) if operation["dw"] else 1)
    return found.clamp(0, 6) if operation["relu6"] else found
