"""Several processes that train one model, as `torchrun` starts them; a single process needs none of this.

Plain PyTorch rather than a framework: what is needed is one wrapper around the network, a share of each batch, and one
process that writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import UsageError
from ..run.processes import launched


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started; does nothing where it started none."""
    if not launched():
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


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_device(device: torch.device) -> torch.device:
    """This process's own accelerator of a kind."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def together(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over all processes during the backward pass; a sharded one does so itself."""
    if world_size() == 1 or hasattr(next(network.parameters()), "placements"):
        return network
    return nn.parallel.DistributedDataParallel(network)


def shard(network: nn.Module) -> None:
    """Fully sharded data parallelism: each process keeps only its part of weights, gradients, moments and averages.

    In place, block by block; whole weights exist only while their block computes (Zhao et al. 2023, arXiv 2304.11277).
    """
    from torch.distributed.device_mesh import init_device_mesh  # these take a second to import, which few need
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(network.parameters()).device.type, (world_size(),))
    for module in network.modules():
        for block in module if isinstance(module, nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; all processes must ask for it together."""
    gather = getattr(tensor, "full_tensor", None)
    full: Tensor = gather() if gather else tensor
    return full


def as_part_of(tensor: Tensor, like: Any) -> Tensor:
    """A full tensor on the device of another, and sharded as that is; one that is sharded already stays so."""
    if not hasattr(like, "placements") or hasattr(tensor, "placements"):
        return tensor.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


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
