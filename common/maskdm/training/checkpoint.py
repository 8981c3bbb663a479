"""Checkpoints: safetensors whose metadata is JSON. Strict names, shapes and dtypes; nothing is ever unpickled."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from ..config import ModelConfig, TrainingConfig
from ..errors import CheckpointError
from ..metadata import METADATA_KEY, SCHEMA_VERSION, CheckpointMetadata, first_problem
from ..networks.model import Network, network, resize_positions
from ..networks.trainable import expected_shapes
from ..run.processes import is_first
from ..run.runfolder import atomic_write
from ..run.tensorfile import Stored, chunks, fp32, opened
from .distributed import as_part_of, whole
from .loop import TrainingState, optimizer_shapes, optimizer_tensors, put_weights, restore_optimizer

Checkpoint = tuple[dict[str, Tensor], CheckpointMetadata]


def save_checkpoint(path: Path, weights: dict[str, Tensor], metadata: CheckpointMetadata) -> None:
    """Write weights (fp32) and metadata, whole or not at all; called by all processes, written by the first."""
    _write(path, {name: whole(tensor.detach()) for name, tensor in weights.items()}, metadata.model_dump_json())


def _write(path: Path, tensors: Mapping[str, Tensor], document: str) -> None:
    if is_first():
        layout = fp32({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        atomic_write(path, chunks(layout, lambda name: tensors[name].float().cpu().numpy(), {METADATA_KEY: document}))


def load_checkpoint(path: Path, option: str = "--model") -> Checkpoint:
    """Read and check a checkpoint.

    Raises:
        CheckpointError: missing, truncated, foreign, from a newer version, or not fitting its own description.
    """
    with _opened(path, option) as (stored, metadata):
        weights = tensors_in(stored)
    for name, tensor in weights.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise CheckpointError(f"{option} {path}: weight {name} is not finite fp32: the file is damaged")
    return weights, metadata


def describe_checkpoint(path: Path, option: str = "--model") -> CheckpointMetadata:
    """What a checkpoint says about itself, once names and shapes agree with it; the weights are not read.

    Raises:
        CheckpointError: as `load_checkpoint`, but for values.
    """
    with _opened(path, option) as (_, metadata):
        return metadata


@contextmanager
def _opened(path: Path, option: str) -> Iterator[tuple[Stored, CheckpointMetadata]]:
    if not path.is_file():
        raise CheckpointError(f"{option} {path} does not exist or is no file: give a .safetensors written by MaskDM")
    try:
        with opened(path) as stored:
            metadata = _parse_metadata(stored.metadata, path, option)
            _check_shapes({name: shape for name, (_, shape) in stored.layout.items()}, metadata, path, option)
            yield stored, metadata
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{option} {path} is not a whole safetensors file ({error}): copy it again") from error


def tensors_in(stored: Stored) -> dict[str, Tensor]:
    """All arrays of a file, in memory of their own."""
    return {name: torch.from_numpy(array) for name, array in stored.items()}


def model_from(weights: dict[str, Tensor], config: ModelConfig, device: torch.device | str = "cpu") -> Network:
    """A network with a copy of the given weights, in evaluation mode."""
    with torch.device("meta"):
        model = network(config)
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True, assign=True)
    return model.requires_grad_().to(device).eval()


def load_weights(model: Network, path: Path, option: str) -> None:
    """Put the weights of a checkpoint into a network; position tables are resized where the grid differs.

    Raises:
        CheckpointError: the checkpoint describes another network.
    """
    weights, metadata = load_checkpoint(path, option)
    old, new = metadata.model, model.config
    table = weights["position.table"]
    if old.grid != new.grid:
        weights["position.table"] = resize_positions(table, old, new)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(shapes.keys() | weights.keys()):
        if name not in weights or tuple(weights[name].shape) != shapes.get(name):
            raise CheckpointError(
                f"{option} {path} is a {old.network} of dim {old.dim}, depth {old.depth}, patch size {old.patch_size}, "
                f"{old.channels} channels and {old.classes} classes, which does not fit: {name} differs"
            )
    model.load_state_dict(weights)


def save_state(path: Path, state: TrainingState, config: TrainingConfig) -> None:
    """Everything resume needs, in one atomic file; called by all processes together, written by the first."""
    tensors = {f"raw.{name}": p.detach() for name, p in state.model.named_parameters()}
    tensors |= {f"ema.{name}": p for name, p in state.average.items()}
    tensors |= {f"optimizer.{name}": p for name, p in optimizer_tensors(state).items()}
    counts = {"images_seen": state.images_seen, "steps": state.steps, "skipped": state.skipped}
    document = json.dumps({"schema_version": SCHEMA_VERSION, "seed": config.seed, **counts})
    _write(path, {name: whole(tensor) for name, tensor in tensors.items()}, document)


def load_state(path: Path, state: TrainingState) -> None:
    """Restore a state saved by `save_state` into a fresh state of the same shape.

    Raises:
        CheckpointError: the file is damaged or belongs to another model; `state` is as it was.
    """
    try:
        stored = Stored(path)
        counts, tensors = json.loads(stored.metadata[METADATA_KEY]), tensors_in(stored)
        numbers = [int(counts[name]) for name in ("images_seen", "steps", "skipped")]
        weights, average, moments = (_under(tensors, f"{kind}.") for kind in ("raw", "ema", "optimizer"))
        expected = {name: parameter.shape for name, parameter in state.model.named_parameters()}
        if any({name: tensor.shape for name, tensor in found.items()} != expected for found in (weights, average)):
            raise ValueError("weights of another model")
        known = optimizer_shapes(state.model)
        if any(tuple(tensor.shape) != known.get(name) for name, tensor in moments.items()):
            raise ValueError("moments of another optimiser")
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("what is no number")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"--out: {path} cannot be resumed ({error}): use --resume never and a new --out"
        ) from error
    state.images_seen, state.steps, state.skips[0] = numbers
    state.skips[1] = 0
    put_weights(state.model, weights)
    state.average = {name: as_part_of(average[name], present) for name, present in state.average.items()}
    restore_optimizer(state, moments)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _parse_metadata(found: dict[str, str], path: Path, option: str) -> CheckpointMetadata:
    if METADATA_KEY not in found:
        raise CheckpointError(f"{option} {path} was not written by MaskDM: give a prior or a model of MaskDM")
    try:
        version = json.loads(found[METADATA_KEY]).get("schema_version")
        if version != SCHEMA_VERSION:
            raise CheckpointError(f"{option} {path} has schema version {version}, this MaskDM reads {SCHEMA_VERSION}")
        return CheckpointMetadata.model_validate_json(found[METADATA_KEY])
    except (ValidationError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{option} {path} has damaged metadata: {first_problem(error)}") from error


def _check_shapes(found: dict[str, tuple[int, ...]], metadata: CheckpointMetadata, path: Path, option: str) -> None:
    expected = expected_shapes(metadata.model)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{option} {path} does not fit its own description: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such weight')}"
            )
