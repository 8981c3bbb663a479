"""Whether an update is made of all images that were trained on, or of a few that a model let through.

Weights can be made to answer to one timestep, one class, one kind of content, so that one image of a large batch is
the whole gradient. Each step is taken in two random halves of its batch, and for each output of each layer (a row of
its weight) the lengths of the two gradients are compared: of honest models they are much alike, of a gate that lets
one image through one of them is next to nothing. Whoever gives every row a gradient of all images beside that of the
one is not found this way.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

HALVES = 2
SUMS = ("shorter", "longer")
# Σ of the shorter over Σ of the longer half's gradient, over all steps, is at least this times the root of the images
# seen, up to a bound: 0.008 for 8 steps of 16, 0.022 for 32 of 32. Measured: the least honest row had 0.027 and 0.16,
# after 400 steps 0.23 (ε, x_0, v and velocity, U-ViT and DiT, fresh and trained).
LEAST_BALANCE, MOST_BALANCE = 7e-4, 0.03
FEWEST_STEPS = 4  # of fewer a row may be lopsided by chance
ROW = 8  # numbers; vectors and layers with shorter rows are looked at as a whole
# Root mean square of the gradient of a step; trained networks have 1e-4, of 200 million weights 1e-6. A single value
# below the second bound, nearer to the optimiser's ε, would be shown as it is, where a step mostly shows signs.
SMALLEST, FAINTEST = 1e-7, 1e-11


class Concentration:
    """Running sums over all steps; two numbers a row, on the device."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        # A class has images of its own: how many is looked at where labels are shared.
        self._parameters = [(name, p) for name, p in named if "class_embedding" not in name]
        self._numbers = sum(p.numel() for _, p in self._parameters)
        self._before: tuple[list[Tensor], list[Tensor]] | None = None  # the first half's gradients and lengths
        self._shorter = [torch.zeros(len(_rows(p)), device=p.device) for _, p in self._parameters]
        self._longer = [torch.zeros_like(sums) for sums in self._shorter]
        self._steps = 0

    def look(self, done: bool) -> None:
        """Call after the backward pass of each half of a step's batch.

        Args:
            done: it was the second one.
        """
        summed = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self._parameters]
        if self._before is None:
            lengths = [_rows(gradient).norm(dim=1) for gradient in summed]
            self._before = [gradient.clone() for gradient in summed], lengths
        else:
            earlier, first = self._before
            second = [_rows(both - one).norm(dim=1) for both, one in zip(summed, earlier, strict=True)]
            for shorter, longer, one, other in zip(self._shorter, self._longer, first, second, strict=True):
                # A step whose gradient is not finite is left out, by the optimiser too.
                finite = one.isfinite() & other.isfinite()
                shorter += torch.where(finite, torch.minimum(one, other), 0.0)
                longer += torch.where(finite, torch.maximum(one, other), 0.0)
            self._steps += 1
        if done:
            self._before = None

    def tensors(self) -> dict[str, Tensor]:
        """What an interrupted work goes on with."""
        named = zip(self._parameters, self._shorter, self._longer, strict=True)
        found = {f"{name}.{kind}": sums for (name, _), *both in named for kind, sums in zip(SUMS, both, strict=True)}
        return found | {"steps": torch.tensor([float(self._steps)])}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        for (name, _), *both in zip(self._parameters, self._shorter, self._longer, strict=True):
            for kind, sums in zip(SUMS, both, strict=True):
                sums.copy_(tensors[f"{name}.{kind}"])
        self._steps = int(tensors["steps"])

    def problem(self, images: int) -> str | None:
        """What is wrong with an update of so many images, if it is."""
        if self._steps < FEWEST_STEPS:
            return None
        length = sum(float((longer / self._steps).square().sum()) for longer in self._longer) ** 0.5
        if length < SMALLEST * self._numbers**0.5:
            return f"gradients were next to nothing ({length:.1g} long)"
        for (name, _), shorter, longer in zip(self._parameters, self._shorter, self._longer, strict=True):
            few = shorter < min(LEAST_BALANCE * images**0.5, MOST_BALANCE) * longer
            if bool(few.any()):
                return f"{int(few.sum())} of {len(few)} rows of {name} were moved by a few images alone"
        return None


def without_faint(parameters: Iterable[nn.Parameter]) -> None:
    """Set gradients to zero that are so small, once clipped, that the optimiser's ε would show them as they are."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    faintest = FAINTEST * nn.utils.get_total_norm(gradients, foreach=True).clamp(min=1)
    for gradient in gradients:
        gradient.masked_fill_(gradient.abs() < faintest, 0.0)


def _rows(tensor: Tensor) -> Tensor:
    """(outputs, numbers of each); one row where those are few."""
    rows = tensor.detach().reshape(len(tensor), -1)
    return rows if rows.shape[1] >= ROW else rows.reshape(1, -1)
