"""A whole training step, ours beside the research code's, interleaved in one process.

    python benchmarks/step.py [--peer CHECKOUT] [--threads 1] [--repeats 7] [--device cpu] [--json FILE]

CHECKOUT is a clone of jiachenlei/maskdm; its own classes are imported from there, nothing of it is in this repository.
A step is: uint8 images in, mask, noise, forward, loss, backward, AdamW, moving average. The peer gets its images as
floats and its masks ready-made, which its data loader would have to draw. Its moving average is one loop over the
parameters, as the package that it uses does. Ratios are medians of the peer's seconds over ours, of the same round.
With `--peer` it is also checked that both have the same parameters, outputs and gradients.
"""

import argparse
import importlib
import math
import platform
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Size, TrainingConfig
from maskdm.diffusion.forward_process import forward_process
from maskdm.networks.flops import forward_flops
from maskdm.networks.layers import patchify
from maskdm.networks.masking import draw_visible, visible_count
from maskdm.networks.model import build_model, parameter_count
from maskdm.networks.precision import other_route_pays, pick_device
from maskdm.run.runfolder import write_json
from maskdm.training.loop import TrainingState, training_step

LINEAR = DiffusionConfig(schedule="linear")
NONE = MaskConfig(kind="none", ratio=0)


@dataclass(frozen=True)
class Case:
    """One configuration of the table."""

    name: str
    image_size: int
    ratio: float
    batch: int
    size: Size = "S"

    def model(self) -> ModelConfig:
        return ModelConfig.preset(self.size, image_size=self.image_size, channels=3)

    def mask(self) -> MaskConfig:
        return MaskConfig(ratio=self.ratio) if self.ratio else NONE

    def tokens(self) -> int:
        return visible_count(self.mask(), self.model().grid) + 1

    def flops(self) -> float:
        """Floating-point operations of matrix products, forwards and twice that backwards."""
        return 3 * self.batch * forward_flops(self.model(), self.tokens())


CPU_CASES = (
    Case("64 px, 90 %, batch 4", 64, 0.9, 4),
    Case("64 px, 90 %, batch 16", 64, 0.9, 16),
    Case("64 px, unmasked, batch 8", 64, 0.0, 8),
)
GPU_CASES = tuple(
    Case(f"{size} {pixels} px, {ratio:.0%}, batch {batch}", pixels, ratio, batch, size)
    for size in ("S", "B")
    for pixels, ratio, batch in (
        (64, 0.9, 1024),
        (64, 0.5, 512),
        (64, 0.0, 256),
        (256, 0.9, 128),
        (256, 0.5, 32),
        (256, 0.0, 16),
    )
)
TOKEN_CASES = tuple(Case(f"{ratio:.0%}", 64, ratio, 8) for ratio in (0.9, 0.75, 0.5, 0.0))
LARGE = Case("256 px, unmasked, batch 1", 256, 0.0, 1)

Step = Callable[[], None]


def our_step(case: Case, precision: str, device: torch.device, *, compiled: bool = False) -> Step:
    """A step of ours; "stock" is fp32 through PyTorch's stock route, "fp32" the route that is chosen."""
    config = TrainingConfig(batch_size=case.batch, lr=2e-4)
    model = build_model(case.model(), device=device)
    if compiled:
        model.compile()
    state = TrainingState.fresh(model.train(), config)
    process, mask = forward_process(LINEAR, device), case.mask()
    images = torch.randint(0, 256, (case.batch, 3, case.image_size, case.image_size), dtype=torch.uint8).to(device)

    def step() -> None:
        reduced = "bf16" if precision == "bf16" else "fp32"
        if precision == "stock":
            real, precision_module.other_route_pays = precision_module.other_route_pays, lambda: False
        try:
            training_step(state, model, images, None, config, LINEAR, process, mask, 2e-4, reduced)  # type: ignore[arg-type]
        finally:
            if precision == "stock":
                precision_module.other_route_pays = real

    return step


precision_module: Any = importlib.import_module("maskdm.networks.precision")


def import_peer(checkout: Path) -> tuple[Any, Any]:
    """Its network and diffusion classes, with what they import but do not need stood in for."""
    for name in ("pywt", "xformers"):
        sys.modules.setdefault(name, types.ModuleType(name))
    import timm.layers

    layers = types.ModuleType("timm.models.layers")
    layers.trunc_normal_ = timm.layers.trunc_normal_  # type: ignore[attr-defined]
    sys.modules["timm.models.layers"] = layers
    del sys.modules["xformers"]
    sys.path.insert(0, str(checkout))
    return (
        importlib.import_module("models.mask_uvit").MaskedUViT,
        importlib.import_module("gaussian_ddpm").GaussianDiffusion,
    )


def peer_network(case: Case, network: Any) -> nn.Module:
    shape = case.model()
    made: nn.Module = network(
        img_size=shape.image_size,
        patch_size=shape.patch_size,
        in_chans=shape.channels,
        encoder_embed_dim=shape.dim,
        encoder_depth=shape.depth,
        encoder_heads=shape.heads,
    )
    return made


def peer_mask(case: Case) -> Tensor:
    """True where hidden, as its data loader gives it: (B, 1 + N), the time token always visible."""
    grid = case.model().grid
    visible = draw_visible(case.mask(), grid, case.batch, torch.Generator().manual_seed(0))
    hidden = torch.zeros(case.batch, 1 + grid**2, dtype=torch.bool)
    if visible is not None:
        hidden[:, 1:] = True
        hidden.scatter_(1, 1 + visible, False)
    return hidden


def peer_step(case: Case, peer: tuple[Any, Any], precision: str, device: torch.device) -> Step:
    network, diffusion_class = peer
    diffusion = diffusion_class(
        peer_network(case, network), image_size=case.image_size, loss_type="l2", beta_schedule="linear"
    ).to(device)
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03)
    average = [p.detach().clone() for p in diffusion.model.parameters()]
    images, mask = torch.rand(case.batch, 3, case.image_size, case.image_size).to(device), peer_mask(case).to(device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion((images, mask))["loss"]
        loss.item()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for kept, parameter in zip(average, diffusion.model.parameters(), strict=True):
                kept.lerp_(parameter, 0.001)

    return step


def check_equal(peer: tuple[Any, Any]) -> dict[str, float]:
    """Same parameters, outputs within 1e-5 and gradients, with our weights put into the peer's network."""
    case = Case("check", 64, 0.9, 2)
    shape = case.model()
    ours, theirs = build_model(shape, seed=3), peer_network(case, peer[0])
    assert parameter_count(ours) == parameter_count(theirs), "not the same number of parameters"
    theirs.load_state_dict(peer_weights(dict(ours.named_parameters()), shape), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    hidden, times = peer_mask(case), torch.tensor([17, 803])
    visible = (~hidden[:, 1:]).nonzero()[:, 1].view(2, -1)
    patches = patchify(images, 4).gather(1, visible[:, :, None].expand(-1, -1, 48))
    found = ours(patches, visible, times)
    expected = theirs(images, times, mask=hidden)
    found.square().mean().backward()
    expected.square().mean().backward()
    wanted = peer_weights({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, shape)
    pairs = [(wanted[name], p.grad) for name, p in theirs.named_parameters() if p.grad is not None]
    assert len(pairs) == len(list(ours.parameters()))
    off = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    result = {
        "parameters": parameter_count(ours),
        "largest difference of outputs": float((found - expected).detach().abs().max()),
        "relative difference of gradients": off / sum(float(b.square().sum()) for _, b in pairs) ** 0.5,
    }
    assert result["largest difference of outputs"] <= 1e-5, result
    return result


def peer_weights(weights: dict[str, Tensor], shape: ModelConfig) -> dict[str, Tensor]:
    """Our weights under the peer's names."""
    named = {}
    for name, tensor in weights.items():
        new = f"encoder.{name}".replace(".attention.", ".attn.").replace(".skip.", ".skip_linear.")
        new = new.replace("encoder.head.", "encoder_to_output.").replace("patch_embedding.", "patch_embed.proj.")
        value = tensor.detach()
        if name == "patch_embedding.weight":
            side = shape.patch_size
            value = value.view(shape.dim, side, side, shape.channels).permute(0, 3, 1, 2)
        elif name == "position.table":
            new, value = "encoder.encoder_pos_embed", value[None]
        named[new] = value
    return named


def timed(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant, taken in turns after one round of warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median over rounds."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def gemm_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the best of several square products."""
    side = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(t for t in timed({"": lambda: (a @ b, None)[1]}, 8, device)[""])


def peak_memory(which: str, options: argparse.Namespace) -> float:
    """MiB that one step of the large case adds to a fresh process."""
    command = [sys.executable, __file__, "--memory-of", which, "--threads", str(options.threads)]
    command += ["--peer", str(options.peer)] if options.peer else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_memory(which: str, options: argparse.Namespace) -> None:
    cpu = torch.device("cpu")
    peer = import_peer(options.peer) if options.peer else None
    torch.ones(8, 8) @ torch.ones(8, 8)
    before = highest_memory()
    step = peer_step(LARGE, peer, "fp32", cpu) if which == "peer" and peer else our_step(LARGE, which, cpu)
    step()
    print((highest_memory() - before) / 1024)


def highest_memory() -> int:
    """Most memory that this process ever held, KiB; getrusage would count what its parent held, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def exponent(precision: str, device: torch.device, repeats: int) -> float:
    """Slope of log seconds over log tokens."""
    seconds = timed({case.name: our_step(case, precision, device) for case in TOKEN_CASES}, repeats, device)
    points = [(math.log(case.tokens()), math.log(statistics.median(seconds[case.name]))) for case in TOKEN_CASES]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def run_cpu(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    peer = import_peer(options.peer) if options.peer else None
    if peer:
        yield {"what": "the same network as the peer's", **check_equal(peer)}
    peaks = {"fp32": gemm_peak(torch.float32, device), "bf16": gemm_peak(torch.bfloat16, device)}
    row: dict[str, Any] = {"what": "GEMM peak, GFLOP/s"} | {name: value / 1e9 for name, value in peaks.items()}
    row["the other fp32 route pays"] = other_route_pays()
    yield row
    for case in CPU_CASES:
        steps = {name: our_step(case, name, device) for name in ("stock", "fp32", "bf16")}
        if peer:
            steps |= {f"peer {name}": peer_step(case, peer, name, device) for name in ("fp32", "bf16")}
        seconds = timed(steps, options.repeats, device)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        row = {"what": case.name, "seconds": median}
        for name in ("stock", "fp32", "bf16"):
            row[f"share of peak, {name}"] = case.flops() / median[name] / peaks["bf16" if name == "bf16" else "fp32"]
        if peer:
            for name, against in (("stock", "fp32"), ("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
                row[f"{name} against the peer's {against}"] = ratio(seconds[f"peer {against}"], seconds[name])
        yield row
    yield {"what": "exponent of cost in visible tokens"} | {
        name: exponent(name, device, max(2, options.repeats // 2)) for name in ("fp32", "bf16")
    }
    names = ("stock", "bf16", "peer") if peer else ("stock", "bf16")
    yield {"what": f"peak memory, {LARGE.name}, MiB"} | {name: peak_memory(name, options) for name in names}


def run_gpu(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compiled steps last: to compile takes most of the time, and a borrowed GPU may have to go back before."""
    peak = gemm_peak(torch.bfloat16, device)
    yield {"what": "bf16 GEMM peak, TFLOP/s", "value": peak / 1e12}
    peer = import_peer(options.peer) if options.peer else None
    for compiled in (False, True):
        for case in GPU_CASES:
            torch.cuda.empty_cache()
            yield {"what": case.name, "compiled": compiled} | gpu_row(
                case, compiled, peer, peak, options.repeats, device
            )


def gpu_row(
    case: Case, compiled: bool, peer: tuple[Any, Any] | None, peak: float, repeats: int, device: torch.device
) -> dict[str, Any]:
    steps = {"": our_step(case, "bf16", device, compiled=compiled)}
    torch.cuda.reset_peak_memory_stats()
    try:
        steps[""]()
        memory = torch.cuda.max_memory_allocated() / 2**20
        if peer and not compiled:
            steps["peer"] = peer_step(case, peer, "bf16", device)
        found = timed(steps, repeats, device)
    except torch.OutOfMemoryError:
        return {"out of memory": "peer" if "peer" in steps else "ours"}
    seconds = statistics.median(found[""])
    row = {
        "seconds": seconds,
        "images/s": case.batch / seconds,
        "TFLOP/s": case.flops() / seconds / 1e12,
        "share of peak": case.flops() / seconds / peak,
        "MiB": memory,
    }
    return row | {"bf16 against the peer's bf16": ratio(found["peer"], found[""])} if "peer" in steps else row


def print_row(row: dict[str, Any]) -> None:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= {f"{name}, s": number for name, number in value.items()} if isinstance(value, dict) else {key: value}
    texts = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in flat.items())
    print(", ".join(texts).removeprefix("what "), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if options.memory_of:
        print_memory(options.memory_of, options)
        return
    machine = {
        "cpu": cpu_name(),
        "threads": options.threads,
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    rows = []
    for row in (run_cpu if device.type == "cpu" else run_gpu)(options, device):
        print_row(row)
        rows.append({**row, "machine": machine, "versions": versions})
        if options.json:
            write_json(options.json, rows)


def cpu_name() -> str:
    """As the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
