"""Which device and which arithmetic a run uses; nothing global is changed."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Literal

import torch

from maskdm.config import Precision
from maskdm.errors import UsageError


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


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> AbstractContextManager[object]:
    """Matrix products in `precision`; weights, norms and the loss stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@lru_cache(maxsize=1)
def _bf16_pays() -> bool:
    """Whether this CPU multiplies bf16 clearly faster than fp32, measured: with equal flags it may be 4× faster or half
    as fast (an EPYC of the 4th generation; a Xeon whose tiles the hypervisor hides)."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not torch.cpu._is_avx512_bf16_supported():
        return False
    left, right = torch.ones(512, 512), torch.ones(512, 512)
    half_left, half_right = left.bfloat16(), right.bfloat16()
    return _seconds(lambda: half_left @ half_right) < 0.8 * _seconds(lambda: left @ right)


def _seconds(work: Callable[[], object]) -> float:
    """The fastest of several runs, so that other work on the machine hardly matters."""
    fastest = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
