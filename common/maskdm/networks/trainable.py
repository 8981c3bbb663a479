"""Which parts of a network a client trains, and what of them goes up.

all: every weight. norm-bias: the vectors, which are biases and the scales of norms (BitFit, Ben Zaken et al. 2022,
arXiv 2106.10199). adapters: thin matrices beside those of attention and MLP (LoRA, Hu et al. 2021, arXiv 2106.09685,
section 4.1, scale 1). What goes up is called after the weight that it changes.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..config import ModelConfig, Trainable
from ..seeding import generator
from .model import Network, network

ADAPTED = ("attention.qkv.weight", "attention.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
PART = 2**18
PREFIX = "network."  # of every parameter's name in a PartialNetwork


def update_shapes(config: ModelConfig, train: Trainable, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what goes up, in the network's order.

    adapters: for a weight (out, in), `<name>.down` (rank, in) and `<name>.up` (out, rank). Otherwise the differences of
    the weights, and `rank` does not matter.
    """
    shapes = _changed(config, train)
    if train != "adapters":
        return shapes
    factors: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in shapes.items():
        factors |= {f"{name}.down": (rank, columns), f"{name}.up": (rows, rank)}
    return factors


def changed_weights(config: ModelConfig, train: Trainable) -> tuple[str, ...]:
    """Names of the network's weights that an update changes, in the network's order."""
    return tuple(_changed(config, train))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all weights, without allocating them."""
    return dict(_shapes_of(config))


@lru_cache(maxsize=8)  # asked for every update, and a network takes tens of milliseconds to make
def _shapes_of(config: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    with torch.device("meta"):
        return tuple((name, tuple(p.shape)) for name, p in network(config).named_parameters())


def _changed(config: ModelConfig, train: Trainable) -> dict[str, tuple[int, ...]]:
    shapes = expected_shapes(config)
    if train == "norm-bias":
        return {name: shape for name, shape in shapes.items() if len(shape) == 1}
    if train == "adapters":
        return {name: shape for name, shape in shapes.items() if name.endswith(ADAPTED)}
    return shapes


class Adapted(nn.Module):
    """A linear layer and a trained one of low rank beside it: x ↦ frozen(x) + up down x, with up = 0 at the start.

    The product is not merged into the weight: that would cost the gradient of the whole weight, and a small change
    would be lost where the sum is rounded to bf16.
    """

    def __init__(self, frozen: nn.Linear, rank: int, randomness: torch.Generator) -> None:
        super().__init__()
        rows, columns = frozen.weight.shape
        down = torch.randn(rank, columns, generator=randomness) / math.sqrt(columns)
        self.frozen = frozen
        self.weight = nn.ParameterDict({"down": down.to(frozen.weight), "up": frozen.weight.new_zeros(rows, rank)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + functional.linear(functional.linear(x, self.weight["down"]), self.weight["up"])
        return out


class PartialNetwork(nn.Module):
    """A network of which only the chosen parts are parameters; the others are frozen and shared with `network`.

    Called like a network, whose weights never change. Where activations are recomputed, blocks run a second time after
    `forward` is over, so the parts are put into the modules rather than lent for a call (`torch.func.functional_call`).

    Args:
        rank: of the adapters, at least 1.
        seed: of the adapters; the global generator is left alone.
    """

    def __init__(self, network: Network, train: Literal["norm-bias", "adapters"], rank: int, seed: int) -> None:
        super().__init__()
        self.config = network.config
        self.adapters = train == "adapters"
        self.start = {name: p.detach() for name, p in network.named_parameters()}
        self.network = deepcopy(network, {id(p): p for p in network.parameters()})
        chosen = changed_weights(network.config, train)
        for path, module in list(self.network.named_modules()):
            for name, weight in list(module.named_parameters(path, recurse=False)):
                own = name.rpartition(".")[2]
                delattr(module, own)
                if name in chosen and not self.adapters:
                    setattr(module, own, nn.Parameter(weight.detach().clone()))
                    continue
                # A buffer follows the module to other devices, but no optimiser and no saved state knows it.
                module.register_buffer(own, weight.detach(), persistent=False)
                if name in chosen and isinstance(module, nn.Linear):
                    adapted = Adapted(module, rank, generator("adapters", seed, name))
                    self.network.set_submodule(path, adapted)
        self.train(network.training)

    @property
    def recompute(self) -> bool:
        """See `maskdm.networks.model`."""
        return self.network.recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        self.network.recompute = value

    def forward(self, patches: Tensor, visible: Tensor | None, times: Tensor, classes: Tensor | None = None) -> Tensor:
        """Predict the target on the given patches; see `maskdm.networks.model`."""
        out: Tensor = self.network(patches, visible, times, classes)
        return out


def partial_update(model: PartialNetwork, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What goes up, named and shaped as `update_shapes` says, from (averaged) values of the model's parameters.

    Args:
        values: by the names of `model.named_parameters()`.
    """
    named = {key.removeprefix(PREFIX): values[key] for key, _ in model.named_parameters()}
    if model.adapters:
        return named
    return {name: value - model.start[name].to(value.device) for name, value in named.items()}


def load_values(model: PartialNetwork, values: Mapping[str, Tensor]) -> None:
    """Put (averaged) values, by the names of `model.named_parameters()`, into the model, e.g. to measure it."""
    model.load_state_dict(dict(values))


def delta(update: Callable[[str], Tensor], name: str, train: Trainable) -> Tensor:
    """The difference of one weight, given what went up by name.

    Averaging this over clients is exact; averaging their factors is not: a mean of products is no product of means.
    """
    if train != "adapters":
        return update(name)
    down, up = update(f"{name}.down"), update(f"{name}.up")
    return up @ down


def squared_norm(update: Callable[[str], Tensor], name: str, train: Trainable) -> float:
    """‖delta‖² of one weight, summed in fp32; not finite where the difference is not, or is absurdly large.

    Of the very product that will be added: trace((UᵀU)(D Dᵀ)) is cheaper, but factors can be chosen that make it 0, or
    finite, where the product in fp32 is huge, or not finite.
    """
    return squared_length(delta(update, name, train))


def squared_length(difference: Tensor) -> float:
    """‖difference‖² of one weight of any float type, summed in fp32."""
    # Parts that fit into a cache: half the time of a norm of the whole.
    parts = (part.float() for part in torch.split(difference.reshape(-1), PART))
    return sum(float(torch.dot(part, part)) for part in parts)
