"""What `maskdm-client doctor` looks at on this machine: versions, disk, memory, and one real step of training."""

import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import metadata, version
from math import prod
from os import sysconf
from pathlib import Path
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torch import Tensor

import maskdm
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, TrainingConfig
from maskdm.data.batches import Batch
from maskdm.errors import OutOfMemory, UsageError, plain
from maskdm.federated.flower_names import lacking, wanted, without
from maskdm.networks.model import build_model
from maskdm.networks.precision import pick_device, pick_precision
from maskdm.networks.trainable import expected_shapes
from maskdm.training.checkpoint import model_from
from maskdm.training.loop import Progress, TrainingState, train

from ..flower.private_names import REPLACED, USED
from .checks import Check, mistake

BATCH = 32  # images in a step, unless the coordinator chooses another number
RECORD = 54  # bytes of a packed image besides its pixels
# Copies of the weights on the disk: as they came, two saved states of training (weights, average, two moments; the
# newer is whole before the older goes), update, residual, final model.
ON_DISK = 12
# In memory: as they came, those in training, gradients, two moments, average, update.
IN_MEMORY = 7
LIBRARIES = 200_000_000  # bytes that PyTorch loads as it is first used

Found = dict[str, str]


def installed() -> Found:
    """Versions of what matters."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"Python": python, **{name: version(name) for name in ("flwr", "torch")}}


def versions(found: Mapping[str, str]) -> Check:
    """Whether they are among those that were tested, and Flower has all that is used of it."""
    said = ", ".join(f"{name} {number}" for name, number in {"maskdm": maskdm.__version__, **found}.items())
    tested = {name: wanted(name).specifier for name in ("flwr", "torch")}
    tested["Python"] = SpecifierSet(metadata("maskdm")["Requires-Python"])
    for name, allowed in tested.items():
        if Version(found[name]).base_version not in allowed:
            ordered = ", ".join(sorted(map(str, allowed), reverse=True))
            return Check("versions", False, said, f"install {name} {ordered}, e.g. in an environment of its own")
    absent = lacking(USED, REPLACED)
    if absent:
        return mistake("versions", UsageError(without(*absent)))
    return Check("versions", True, said)


def disk(folder: Path, images: int, shape: ModelConfig) -> Check:
    """Whether the folder can be written and there is room for the packed images and what training keeps."""
    needed = images * (shape.channels * shape.image_size**2 + RECORD) + ON_DISK * weight_bytes(shape)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("disk", False, f"{folder} cannot be written ({error.strerror})", "choose another --out")
    found = f"{free / 1e9:,.1f} GB free at {folder}, at most {needed / 1e9:,.1f} GB needed"
    if needed > free:
        return Check("disk", False, found, "free some space, or choose another --out")
    return Check("disk", True, found)


def accelerator(name: str) -> tuple[torch.device | None, Check]:
    """What a site's --device picks."""
    try:
        device = pick_device(name)
    except UsageError as error:
        return None, mistake("accelerator", error)
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return device, Check("accelerator", True, f"{device}: {about.name}, {about.total_memory / 1e9:,.0f} GB")
    note = "; no accelerator was found, so rounds take longer" if name == "auto" and device.type == "cpu" else ""
    return device, Check("accelerator", True, f"{device}, {torch.get_num_threads()} threads{note}")


def weight_bytes(shape: ModelConfig) -> int:
    """Of a model's weights, fp32."""
    return 4 * sum(prod(each) for each in expected_shapes(shape).values())


def needed_memory(shape: ModelConfig, batch: int = BATCH) -> int:
    """Bytes that a step of training takes, about: measured ones were 0.7 to 1.4 of it."""
    tokens = shape.grid**2 + 1
    kept = 16 * shape.dim + shape.heads * tokens // 2  # numbers that a block keeps of a token for its gradient
    return LIBRARIES + IN_MEMORY * weight_bytes(shape) + 4 * batch * tokens * shape.depth * kept


def available_memory(device: torch.device, system: Path = Path("/")) -> int:
    """Bytes that a process can still take, on an accelerator or in the machine, also within a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = re.search(r"MemAvailable: +(\d+) kB", (system / "proc/meminfo").read_text())
        free = 1024 * int(found[1]) if found else sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        free = sysconf("SC_PHYS_PAGES") * sysconf("SC_PAGE_SIZE")
    group = system / "sys/fs/cgroup"
    with suppress(OSError, ValueError, TypeError):  # no container, or one without a limit
        cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - int(cached[1] if cached else 0)
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(0, free)


def memory(needed: int, available: int, device: torch.device) -> Check:
    """Whether a step of training fits."""
    where = "the accelerator" if device.type == "cuda" else "this machine"
    found = f"{available / 1e9:,.1f} GB available on {where}, about {needed / 1e9:,.1f} GB needed"
    if needed > available:
        remedy = "end other programs, raise the container's limit, or ask for a smaller model or --batch-size"
        return Check("memory", False, found, remedy)
    return Check("memory", True, found)


def training_step(
    shape: ModelConfig,
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
    diffusion: DiffusionConfig | None = None,
    batch: int = BATCH,
) -> Check:
    """One step as a round takes it, on images of noise.

    Args:
        weights: of the prior; None stands for fresh ones.
        batch: images.
    """
    name, config = "training step", TrainingConfig(images=batch, batch_size=batch)
    noise = torch.Generator().manual_seed(0)
    seen: list[Progress] = []
    before, started = _begin(device), time.perf_counter()
    try:
        model = model_from(dict(weights), shape, device) if weights else build_model(shape, device=device)
        state = TrainingState.fresh(model, config)

        def images() -> Iterator[Batch]:
            size = (batch, shape.channels, shape.image_size, shape.image_size)
            yield torch.randint(0, 256, size, dtype=torch.uint8, generator=noise), None

        diffused = diffusion or DiffusionConfig()
        train(state, images(), config, diffused, MaskConfig(kind="none"), on_progress=seen.append)
        broken = seen[0].loss is None or state.skipped > 0
    except (OutOfMemory, MemoryError, RuntimeError) as error:
        return _failed(name, error, batch, device)
    seconds, peak = time.perf_counter() - started, _peak(device, before)
    found = (
        f"{batch} images of {shape.image_size}x{shape.image_size} through "
        f"{weight_bytes(shape) // 4:,} weights on {device} in {pick_precision('auto', device)}: {seconds:.1f} s with "
        f"the start, {peak / 1e9:,.2f} GB at most"
    )
    if broken:
        return Check(name, False, f"{found}, but the loss is not finite", "copy the prior again, or try --device cpu")
    return Check(name, True, found)


def _failed(name: str, error: Exception, batch: int, device: torch.device) -> Check:
    # PyTorch has no kind of its own for a CPU without memory.
    if isinstance(error, OutOfMemory | MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        remedy = "end other programs, try another --device, or ask for a smaller model or --batch-size"
        return Check(name, False, f"{batch} images do not fit into the memory of {device}", remedy)
    said = plain(str(error).splitlines()[0])
    return Check(name, False, f"{device} failed ({said})", "look after its driver, or try --device cpu")


def _begin(device: torch.device) -> int:
    """Bytes in use; from here on the peak counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    with suppress(OSError):  # where it cannot be set back, an earlier peak counts too
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return _largest()


def _peak(device: torch.device, before: int) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return max(0, _largest() - before)


def _largest() -> int:
    """Bytes that this process had at most."""
    unit: Literal[1, 1024] = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
