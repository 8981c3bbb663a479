"""Updates that rest on few images are told from those of all."""

from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from maskdm_client.work.concentration import FEWEST_STEPS, Concentration

STEPS = 8


def problem(
    steps: Iterable[Sequence[Tensor]], shape: tuple[int, ...] = (3, 16), name: str = "layer.weight", images: int = 256
) -> str:
    """What is found where these are the gradients of the halves of each step."""
    parameter = nn.Parameter(torch.zeros(shape))
    found = Concentration([(name, parameter)])
    for halves in steps:
        parameter.grad = torch.zeros(shape)
        for number, half in enumerate(halves):
            parameter.grad += half
            found.look(number == len(halves) - 1)
    return found.problem(images) or ""


def honest(shape: tuple[int, ...] = (3, 16), scale: float = 1e-3, steps: int = STEPS) -> list[list[Tensor]]:
    randomness = torch.Generator().manual_seed(3)
    return [[scale * torch.randn(shape, generator=randomness) for _ in range(2)] for _ in range(steps)]


def test_halves_that_are_alike_are_honest() -> None:
    assert problem(honest()) == ""
    assert problem(honest((16,)), (16,)) == ""


@pytest.mark.parametrize("half", [0, 1])
def test_a_row_that_one_half_of_one_step_moved_is_named(half: int) -> None:
    steps = honest()
    for halves in steps:
        for gradient in halves:
            gradient[1] = 0
    steps[5][half][1] = 0.1
    assert problem(steps) == "1 of 3 rows of layer.weight were moved by a few images alone"


def test_a_gate_beside_a_faint_gradient_of_all_images_is_named() -> None:
    steps = honest(scale=1e-6)
    steps[2][0][1] = 0.1
    assert "1 of 3 rows" in problem(steps)


def test_a_vector_is_one_row() -> None:
    steps = [[torch.zeros(16), torch.zeros(16)] for _ in range(STEPS)]
    steps[0][1][3] = 1.0
    assert "1 of 1 rows" in problem(steps, (16,))


def test_rows_that_nothing_moved_and_steps_that_are_not_finite_say_nothing() -> None:
    steps = honest()
    for halves in steps:
        for gradient in halves:
            gradient[2] = 0
    steps[4][0][:] = torch.inf
    steps[6][1][:] = torch.nan
    assert problem(steps) == ""


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_that_is_not_finite_hides_no_gate(half: int) -> None:
    steps = honest()
    for halves in steps:
        halves[1].zero_()
    steps[0][half][:] = torch.inf
    steps[0][1 - half][:] = 1e9
    assert "3 of 3 rows" in problem(steps)


def test_long_rounds_of_honest_models_are_honest() -> None:
    """Whose least row settles at a quarter."""
    steps = [[torch.full((3, 16), 1e-3), torch.full((3, 16), 0.25e-3)] for _ in range(STEPS)]
    assert problem(steps, images=10**8) == ""


def test_gradients_that_are_next_to_nothing_show_themselves_through_the_optimiser() -> None:
    assert "next to nothing" in problem(honest(scale=1e-9))


def test_of_few_steps_nothing_is_said_and_classes_have_images_of_their_own() -> None:
    steps = honest(steps=FEWEST_STEPS - 1)
    steps[0][0][:] = 0
    assert problem(steps) == ""
    lopsided = [[torch.zeros(3, 16), torch.ones(3, 16)] for _ in range(STEPS)]
    assert problem(lopsided, name="class_embedding.table.weight") == ""
