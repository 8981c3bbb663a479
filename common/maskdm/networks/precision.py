"""Which device and which arithmetic a run uses; what is global in PyTorch is put back."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..config import Precision
from ..errors import UsageError

# Relative error of true fp32 products of this size is a few 1e-7; bf16 gives some 1e-3, TF32 some 1e-4.
LARGEST_ERROR = 3e-6


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes the first accelerator, else the CPU.

    Raises:
        UsageError: the named device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} is not available here: use cpu, or auto") from error
    return device


def pick_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """`auto` is bf16 where the hardware multiplies it faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _bf16_pays() else "fp32"


@contextmanager
def arithmetic(device: torch.device, precision: Literal["fp32", "bf16"]) -> Iterator[None]:
    """Matrix products in `precision`, forwards and backwards; weights, norms and the loss stay fp32.

    On a CPU, fp32 products take the faster of PyTorch's two routes where both are true fp32. The choice is process-wide
    in PyTorch, so it holds inside of this context only.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cpu" and precision == "fp32" and other_route_pays():
            torch.set_float32_matmul_precision("medium")
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def other_route_pays() -> bool:
    """Whether fp32 products through oneDNN are as exact as the stock ones and far faster, measured once.

    With the setting "medium" PyTorch hands them to oneDNN: true fp32 at twice the speed on some AMD machines, where the
    stock route runs at less than half the machine's rate; rounded to bf16 on CPUs that multiply that, which is refused.
    The bar is high so that a run which is continued takes the same route again, to the same bits.
    """
    randomness = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 512, generator=randomness), torch.randn(1024, 512, generator=randomness)
    y = torch.randn(512, 1024, generator=randomness)

    def products(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
        """A linear layer forwards, and both halves of it backwards."""
        return torch.cat([part.flatten() for part in (x @ weight.T, y @ weight, y.T @ x)])

    def through(setting: str) -> Tensor:
        torch.set_float32_matmul_precision(setting)
        return products(x, weight, y)

    exact = products(x.double(), weight.double(), y.double())
    before = torch.get_float32_matmul_precision()
    try:
        error = float((through("medium").double() - exact).norm() / exact.norm())
        return error < LARGEST_ERROR and _ratio(lambda: through("medium"), lambda: through("highest")) < 0.7
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache(maxsize=1)
def _bf16_pays() -> bool:
    """Whether this CPU multiplies bf16 clearly faster than fp32, measured: with equal flags it may be 4× faster or half
    as fast (an EPYC of the 4th generation; a Xeon whose tiles the hypervisor hides)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not torch.cpu._is_avx512_bf16_supported():
        return False
    left, right = torch.ones(512, 512), torch.ones(512, 512)
    half_left, half_right = left.bfloat16(), right.bfloat16()
    return _ratio(lambda: half_left @ half_right, lambda: left @ right) < 0.8


def _ratio(first: Callable[[], object], second: Callable[[], object]) -> float:
    """Time of the first over time of the second: the fastest of several runs each, in turns, so that other work on the
    machine slows both alike."""
    fastest = [float("inf"), float("inf")]
    for _ in range(12):
        for number, work in enumerate((first, second)):
            started = time.perf_counter()
            work()
            fastest[number] = min(fastest[number], time.perf_counter() - started)
    return fastest[0] / fastest[1]
