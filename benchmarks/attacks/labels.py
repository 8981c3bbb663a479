"""Whether a site has a class, by its name: folder names are guessed, and put where a model's class names stand."""

from collections.abc import Sequence

from torch import Tensor

from maskdm.checkpoint import CheckpointMetadata

from .gradients import EPSILON, summed_gradient
from .site import Coordinator, fresh_weights

NONSENSE = "no folder is called so"


def of_classes(prior: CheckpointMetadata, names: Sequence[str]) -> tuple[CheckpointMetadata, dict[str, Tensor]]:
    """A conditional model whose answer depends loudly on whether an image has one of the named classes."""
    metadata = prior.model_copy(
        update={"model": prior.model.model_copy(update={"classes": len(names)}), "class_names": tuple(names)}
    )
    weights = fresh_weights(metadata.model)
    table = weights["class_embedding.table.weight"]
    table[-1].zero_()
    table[:-1].mul_(1000)
    for name in weights:
        if name.endswith(("attention.qkv.weight", "attention.proj.weight", "head.weight")):
            weights[name].mul_(5)
    return metadata, weights


def by_loss(coordinator: Coordinator, guesses: Sequence[str]) -> set[str]:
    """Those that the held-out images have: with their name the loss is another than with a name that none has."""
    found, usual = set(), None
    for name in (NONSENSE, *guesses):
        metadata, weights = of_classes(coordinator.prior, [name])
        loss = coordinator.loss(weights, metadata)
        usual = loss if name == NONSENSE else usual
        if loss != usual and loss == loss:
            found.add(name)
    return found


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
