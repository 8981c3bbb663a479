"""The training loop: closed forms of its schedules, exact continuation, and gradients that are not finite."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.checkpoint import load_state, save_state
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Precision, TrainingConfig
from maskdm.data import batches
from maskdm.diffusion import denoising_loss
from maskdm.errors import TrainingDiverged
from maskdm.model import build_model, patchify
from maskdm.training import (
    MAX_SKIPPED_IN_A_ROW,
    Progress,
    TrainingState,
    apply_gradients,
    ema_decay,
    learning_rate,
    train,
)

DIFFUSION = DiffusionConfig(timesteps=50)
MASK = MaskConfig(kind="block", ratio=0.75, block_size=2)


def pictures(count: int = 12) -> Tensor:
    """Two kinds of small pictures with a little noise."""
    randomness = torch.Generator().manual_seed(0)
    base = torch.zeros(count, 1, 8, 8)
    base[::2, :, :, 4:] = 200
    base[1::2, :, 4:, :] = 200
    return (base + 40 * torch.rand(base.shape, generator=randomness)).to(torch.uint8)


def fresh(tiny: ModelConfig, config: TrainingConfig) -> TrainingState:
    return TrainingState.fresh(build_model(tiny, seed=1), config)


def everything(state: TrainingState) -> dict[str, Tensor]:
    found = {f"raw.{name}": p.detach().clone() for name, p in state.model.named_parameters()}
    found |= {f"average.{name}": tensor.clone() for name, tensor in state.average.items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"{key}.{name}"] = value.clone()
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@given(step=st.integers(1, 10**6), longest=st.floats(0.5, 0.9999))
def test_the_moving_average_ramps_up_to_its_longest_memory(step: int, longest: float) -> None:
    decay = ema_decay(step, longest)
    assert decay == pytest.approx(min(longest, 1 - 1 / (1 + step) ** (2 / 3)))
    assert 0 < decay <= ema_decay(step + 1, longest) <= longest


def test_the_moving_average_follows_its_recurrence(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=20, batch_size=4, ema_decay=0.6, precision="fp32")
    state = fresh(tiny, config)
    expected = {name: p.detach().double() for name, p in state.model.named_parameters()}
    steps = 0

    def follow(_: Progress) -> None:
        nonlocal steps
        steps += 1
        decay = min(0.6, 1 - (1 + steps) ** (-2 / 3))
        for name, parameter in state.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()

    train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK, on_step=follow)
    assert steps == state.steps == 5
    for name, average in state.average.items():
        assert average.double() == pytest.approx(expected[name], abs=1e-6)


def test_the_learning_rate_warms_up_in_a_straight_line_and_then_stays() -> None:
    config = TrainingConfig(lr=1e-3, batch_size=10, warmup_images=90)
    rates = [learning_rate(config, seen) for seen in range(0, 130, 10)]
    assert rates[:10] == pytest.approx([1e-4 * k for k in range(1, 11)])
    assert rates[9:] == [1e-3] * 4
    assert learning_rate(TrainingConfig(lr=1e-3), 0) == 1e-3


def test_the_learning_rate_of_each_step_reaches_the_optimiser(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=16, batch_size=4, warmup_images=12, lr=1e-3, precision="fp32")
    state = fresh(tiny, config)
    used: list[tuple[float, float]] = []
    train(
        state,
        batches(pictures(), 4, 0, 0),
        config,
        DIFFUSION,
        MASK,
        on_step=lambda progress: used.append((progress.lr, state.optimizer.param_groups[0]["lr"])),
    )
    assert [told for told, _ in used] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert all(told == real for told, real in used)


def test_gradients_are_clipped_to_the_given_norm(tiny: ModelConfig) -> None:
    config = TrainingConfig(betas=(0.0, 0.0))
    state = fresh(tiny, config)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    apply_gradients(state, 1e-3, 0.5, 0.9)
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(tiny: ModelConfig, poison: float) -> None:
    config = TrainingConfig(images=4, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
    before = everything(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(state.model.parameters()).grad = torch.full_like(next(state.model.parameters()), poison)
    apply_gradients(state, 1e-3, 1.0, 0.9)
    assert_same(everything(state), before)
    assert (state.steps, state.skipped, state.skipped_in_a_row) == (1, 1, 1)
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_skipped_steps_only_end_a_run_when_they_come_in_a_row(tiny: ModelConfig) -> None:
    state = fresh(tiny, TrainingConfig())
    for good_step in (True, False):
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            next(state.model.parameters()).grad = torch.full_like(next(state.model.parameters()), float("nan"))
            apply_gradients(state, 1e-3, 1.0, 0.9)
        if good_step:
            next(state.model.parameters()).grad = torch.ones_like(next(state.model.parameters()))
            apply_gradients(state, 1e-3, 1.0, 0.9)
    assert (state.skipped, state.steps) == (38, 1)


def test_training_gives_up_after_twenty_bad_steps_in_a_row_and_keeps_its_weights(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=1000, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    with torch.no_grad():
        state.model.head.bias.fill_(float("inf"))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with pytest.raises(TrainingDiverged, match="20 steps in a row"):
        train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
    assert (state.skipped, state.steps) == (20, 0)
    assert_same({name: p.detach() for name, p in state.model.named_parameters()}, before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_in_one_go_equals_stopping_saving_loading_and_going_on(
    tiny: ModelConfig, tmp_path: Path, precision: Precision
) -> None:
    config = TrainingConfig(
        images=40, batch_size=4, warmup_images=30, horizontal_flip=0.5, ema_decay=0.9, precision=precision, seed=5
    )
    data = pictures(11)  # epochs that batches do not divide
    whole = fresh(tiny, config)
    train(whole, batches(data, 4, 0, 5), config, DIFFUSION, MASK)

    first = fresh(tiny, config)
    train(first, batches(data, 4, 0, 5), config, DIFFUSION, MASK, stop=lambda: first.images_seen >= 16)
    assert first.images_seen == 16
    save_state(tmp_path / "state.safetensors", first, config)
    second = TrainingState.fresh(build_model(tiny, seed=99), config)
    load_state(tmp_path / "state.safetensors", second)
    train(second, batches(data, 4, second.images_seen, 5), config, DIFFUSION, MASK)

    assert (second.images_seen, second.steps, second.skipped) == (whole.images_seen, whole.steps, whole.skipped)
    assert_same(everything(second), everything(whole))


def test_hidden_pixels_do_not_reach_the_update(tiny: ModelConfig) -> None:
    """One of the four quadrants is visible: a change in that one matters, in the others it does not."""
    config = TrainingConfig(images=1, batch_size=1, precision="fp32", seed=2)
    results = []
    for quadrant in [None, (0, 0), (0, 4), (4, 0), (4, 4)]:
        image = torch.full((1, 1, 8, 8), 100, dtype=torch.uint8)
        if quadrant:
            image[:, :, quadrant[0] : quadrant[0] + 4, quadrant[1] : quadrant[1] + 4] = 250
        state = fresh(tiny, config)
        train(state, batches(image, 1, 0, 0), config, DIFFUSION, MASK)
        results.append(everything(state))
    same = [all(torch.equal(result[n], results[0][n]) for n in result) for result in results[1:]]
    assert sorted(same) == [False, True, True, True]


def test_every_step_draws_its_own_mask_timesteps_and_noise(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=12, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    drawn: list[tuple[Tensor, ...]] = []
    state.model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs))
    train(state, batches(pictures(4)[:1].expand(4, -1, -1, -1), 4, 0, 0), config, DIFFUSION, MASK)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert not any(torch.equal(a, b) for a, b in zip(drawn[first], drawn[second], strict=True))


def test_the_loss_falls_on_a_tiny_problem(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=16 * 150, batch_size=16, lr=3e-3, precision="fp32")
    state = fresh(tiny, config)
    patches = patchify(pictures(), tiny.patch_size)
    before = denoising_loss(state.model, DIFFUSION, patches)
    train(state, batches(pictures(), 16, 0, 0), config, DIFFUSION, MaskConfig(kind="none"))
    assert denoising_loss(state.model, DIFFUSION, patches) < 0.5 * before


def test_a_stop_is_obeyed_before_the_first_step(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=8, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK, stop=lambda: True)
    assert (state.steps, state.images_seen) == (0, 0)
