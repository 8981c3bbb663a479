"""Several processes that train one model, as `torchrun` starts them; a single process needs none of this.

Plain PyTorch rather than a framework: what is needed is one wrapper around the network, a share of each batch, and one
process that writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch import nn

from maskdm.errors import UsageError


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; does nothing where it started none."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 where there is only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes; also before the group was joined."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: torch.device) -> torch.device:
    """This process's own accelerator of a kind."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def together(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over all processes during the backward pass."""
    return nn.parallel.DistributedDataParallel(network) if world_size() > 1 else network


def agreed(wish: Callable[[], bool], device: torch.device, every: int = 16) -> Callable[[], bool]:
    """A question that all processes answer alike at the same step: whether any of them wishes to stop.

    Asking the others waits for all devices, so it is done at every so-manieth call only.
    """
    calls = 0

    def answer() -> bool:
        nonlocal calls
        calls += 1
        if world_size() == 1:
            return wish()
        if calls % every:
            return False
        flag = torch.tensor([float(wish())], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    return answer


def check_batch(batch_size: int) -> None:
    """Raises UsageError where a batch cannot be shared out equally."""
    if batch_size % world_size():
        raise UsageError(f"--batch-size {batch_size} cannot be shared equally by {world_size()} processes")
