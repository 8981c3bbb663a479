"""A federation's folder: begun, taken up again, concluded."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskdm.errors import UsageError
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write, claim, record_versions, sha256_of
from maskdm.seeding import derive_seed
from maskdm.training.checkpoint import describe_checkpoint, load_checkpoint
from maskdm.training.grids import draw_samples

from .settings import MAY_CHANGE, FederationConfig, FederationOptions, update_size

SAMPLES = 16  # in each grid
PIECE = 2**20  # bytes copied at a time


def federation_config(prior: Path, options: FederationOptions) -> FederationConfig:
    """Options plus what identifies the federation.

    One with other terms is another one: sites that agreed to the terms of an earlier try are asked anew.

    Raises:
        UsageError: the prior is no checkpoint.
    """
    describe_checkpoint(prior, "--prior")
    digest = sha256_of(prior)
    sent = (options.seed, options.train, options.adapter_rank, options.encoding)
    seen = (options.local_images, str(options.local_minutes), options.batch_size)
    name = derive_seed("federation", digest, *sent, *seen)
    return FederationConfig(**dict(options), prior_sha256=digest, federation=f"{name:016x}")


def begin(
    prior: Path, out: Path, config: FederationConfig, simulation: Mapping[str, Any], sample_count: int = SAMPLES
) -> bool:
    """Make FED ready, or see that it goes on with this very federation; returns True where nothing is left to do."""
    identity = {"federation": config.model_dump(mode="json"), "simulation": dict(simulation)}
    claim(out, "federation", identity, may_change=MAY_CHANGE)
    weights, metadata = load_checkpoint(prior, "--prior")
    needed = update_size(config, metadata.model)
    if config.max_upload and needed > config.max_upload:
        raise UsageError(
            f"--max-upload {config.max_upload:,} bytes: an update of this model has {needed:,}: choose --encoding int8 "
            f"or topk, or --train norm-bias or adapters"
        )
    copy = out / "prior.safetensors"
    if (sha256_of(copy) if copy.exists() else _copied(prior, copy)) != config.prior_sha256:  # sites would refuse it
        raise UsageError(f"{copy} is not what the terms call the prior: it changed, or is damaged; delete it")
    if _is_done(out, config):
        say(f"all rounds are done: {out / 'model.safetensors'}")
        return True
    record_versions(out, "torch", "flwr")
    for stale in ("result.json", "samples/after.png"):
        (out / stale).unlink(missing_ok=True)
    shape = metadata.model
    say(
        f"prior: {shape.image_size}x{shape.image_size} pixels, {shape.channels} channels, "
        f"{metadata.images_seen:,} images seen"
    )
    draw_samples(lambda: (weights, metadata), out / "samples" / "before.png", config.seed, sample_count)
    return False


def conclude(out: Path, config: FederationConfig, sample_count: int = SAMPLES) -> Path:
    """Leave samples of the final model, and no file of Flower's."""
    model = out / "model.safetensors"
    draw_samples(lambda: load_checkpoint(model), out / "samples" / "after.png", config.seed, sample_count)
    shutil.rmtree(out / ".flwr", ignore_errors=True)
    return model


def _is_done(out: Path, config: FederationConfig) -> bool:
    try:
        result = json.loads((out / "result.json").read_text())
    except (OSError, ValueError):
        return False
    stopped = result.get("stopped_by_patience")
    return bool(result["rounds"] >= config.rounds or (stopped and stopped == config.patience))


def _copied(file: Path, copy: Path) -> str:
    """Copy a file, and return the sha256 of what was copied."""
    digest = hashlib.sha256()
    with file.open("rb") as source:

        def pieces() -> Iterator[bytes]:
            while piece := source.read(PIECE):
                digest.update(piece)
                yield piece

        atomic_write(copy, pieces())
    return digest.hexdigest()
