"""Features of real images, and their moments, computed once for each corpus and feature network."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.corpus import Corpus
from ..data.preparation.cache import cache_folder
from ..errors import UsageError
from ..run.reporting import WorkBar, say
from ..run.runfolder import atomic_write
from ..run.tensorfile import Stored, chunks, layout_of
from .distances import Moments, moments
from .extractors.features import Extractor

VERSION = 1  # of what is computed here and in the feature networks: raise it where they change
KEY, DIGEST = "maskdm.cached-features", "sha256"


class RealFeatures(NamedTuple):
    """Features of real images."""

    features: Tensor  # (M, D) fp32
    moments: Moments


def real_features(
    corpus: Corpus,
    rows: NDArray[np.int64],
    extractor: Extractor,
    *,
    title: str,
    batch_size: int = 128,
    cache: Path | None = None,
) -> RealFeatures:
    """Features of some images of a corpus (M ≥ 2), from the cache where they are there and whole.

    Two processes that compute the same write the same file, each in one piece.

    Args:
        title: of the progress bar, e.g. "features of --reference".

    Raises:
        UsageError: the cache cannot be written.
    """
    asked = [VERSION, corpus.manifest.sha256, hashlib.sha256(rows.tobytes()).hexdigest(), extractor.sha256]
    key = json.dumps([*asked, extractor.resize])
    name = f"{extractor.name}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    path = (cache or cache_folder()) / "features" / name
    if found := _read(path, key, len(rows)):
        say(f"{title}: from the cache")
        return found
    parts = []
    with WorkBar(title, len(rows)) as bar:
        for start in range(0, len(rows), batch_size):
            images = torch.from_numpy(np.asarray(corpus.pixels[rows[start : start + batch_size]]))  # (B, C, S, S)
            parts.append(extractor.features(images, batch_size=batch_size))
            bar.update(min(start + batch_size, len(rows)))
    features = torch.cat(parts)
    computed = RealFeatures(features, moments(features))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        tensors = {"features": features, "mean": computed.moments.mean, "covariance": computed.moments.covariance}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        about = {KEY: key, DIGEST: _digest(tensors)}
        atomic_write(path, chunks(layout_of(arrays), arrays.__getitem__, about))
    except OSError as error:
        raise UsageError(
            f"features are kept in {path.parent}, which cannot be written ({error.strerror}): set MASKDM_CACHE to "
            f"another folder"
        ) from error
    return computed


def _read(path: Path, key: str, rows: int) -> RealFeatures | None:
    """What a file holds, or None where it is missing, damaged or about something else."""
    try:
        stored = Stored(path)
        metadata = stored.metadata
        tensors = {name: torch.from_numpy(stored[name]) for name in ("features", "mean", "covariance")}
    except (OSError, ValueError, KeyError):
        return None
    if metadata.get(KEY) != key or metadata.get(DIGEST) != _digest(tensors) or len(tensors["features"]) != rows:
        return None
    return RealFeatures(tensors["features"], Moments(tensors["mean"], tensors["covariance"]))


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
