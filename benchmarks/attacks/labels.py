"""Whether a site has a class, by its name: folder names are guessed, and put where a model's class names stand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from maskdm.federated.parcel import Outcome
from maskdm.metadata import CheckpointMetadata

from .gradients import EPSILON, summed_gradient
from .site import Coordinator, fresh_weights

NONSENSE = "no folder is called so"
DEEP = 30  # blocks of a network that overflows by factors which weights may have


def of_classes(prior: CheckpointMetadata, names: Sequence[str]) -> tuple[CheckpointMetadata, dict[str, Tensor]]:
    """A conditional model whose answer depends loudly on whether an image has one of the named classes."""
    metadata = prior.model_copy(
        update={"model": prior.model.model_copy(update={"classes": len(names)}), "class_names": tuple(names)}
    )
    weights = fresh_weights(metadata.model)
    table = weights["class_embedding.table.weight"]
    table[-1].zero_()
    table[:-1].mul_(400)
    for name in weights:
        if name.endswith(("attention.qkv.weight", "attention.proj.weight", "head.weight")):
            weights[name].mul_(5)
    return metadata, weights


def by_loss(coordinator: Coordinator, guesses: Sequence[str]) -> set[str]:
    """Those that the held-out images have: with their name the loss is another than with a name that none has."""
    usual, *losses = (
        coordinator.loss(weights, metadata, federation=f"{number:016x}")  # each with terms of its own
        for number, (metadata, weights) in enumerate(telling(coordinator.prior, n, 30.0) for n in (NONSENSE, *guesses))
    )
    return {name for name, loss in zip(guesses, losses, strict=True) if abs(loss - usual) > 0.1 * usual}


def by_code(coordinator: Coordinator, guesses: Sequence[str], louder: float = 340.0) -> set[str]:
    """As `by_loss`, from outcome codes alone: with a name that an image has the answer grows beyond all bounds.

    Args:
        louder: what takes 32, a unit that is open, beyond fp32 after all blocks, and not the time's channels, up to 1.
    """
    found = set()
    for number, name in enumerate(guesses):
        metadata, weights = telling(coordinator.prior, name, louder, DEEP)
        before = len(coordinator.refusals)
        coordinator.loss(weights, metadata, federation=f"{number:016x}")
        if coordinator.refusals[before:] == [Outcome.DIVERGED]:
            found.add(name)
    return found


def telling(
    prior: CheckpointMetadata, name: str, louder: float, depth: int = 2
) -> tuple[CheckpointMetadata, dict[str, Tensor]]:
    """A network that answers 0, and something else where an image has the named class: the more, the deeper it is.

    Args:
        louder: factor on the answer in each block of the way out.
    """
    model = prior.model.model_copy(update={"classes": 1, "depth": depth})
    weights = {key: torch.zeros_like(tensor) for key, tensor in fresh_weights(model).items()}
    for key, tensor in weights.items():
        if "norm" in key and key.endswith("weight"):
            tensor.fill_(1.0)
    weights["class_embedding.table.weight"][0, 0] = 1.0
    weights["in_blocks.0.attention.qkv.weight"][2 * model.dim, 0] = 1.0
    weights["in_blocks.0.attention.proj.weight"][0, 0] = 1.0
    weights["position.table"][2:, 2] = 1.0  # the measure of what attention brings
    weights["in_blocks.0.mlp.fc1.weight"][0, 0] = 20.0
    weights["in_blocks.0.mlp.fc1.bias"][0] = -40.0  # above what the time alone brings
    weights["in_blocks.0.mlp.fc2.weight"][1, 0] = 1.0
    for block in range(depth // 2):
        weights[f"out_blocks.{block}.skip.weight"][1, 1] = louder
    weights["head.weight"][:, 1] = 1.0
    return prior.model_copy(update={"model": model, "class_names": (name,)}), weights


def by_update(coordinator: Coordinator, guesses: Sequence[str]) -> set[str]:
    """Those that the training images have: only their rows of the class table have a gradient. One question."""
    metadata, weights = of_classes(coordinator.prior, guesses)
    plan = coordinator.plan(model=metadata, **coordinator.limits.plan(batch=256))
    update = coordinator.update(plan, weights)
    if update is None:
        return set()
    name = "class_embedding.table.weight"
    gradient = summed_gradient(update[name], weights[name], plan)[:-1]
    moved = gradient.abs().median(dim=1).values > 0.1 * EPSILON
    return {guess for guess, has in zip(guesses, moved.tolist(), strict=True) if has}
