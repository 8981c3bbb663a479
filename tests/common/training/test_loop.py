"""The training loop: closed forms of its schedules, exact continuation, and gradients that are not finite."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm.config import (
    DiffusionConfig,
    LossWeight,
    MaskConfig,
    ModelConfig,
    NetworkKind,
    Precision,
    Prediction,
    ProcessKind,
    TrainingConfig,
)
from maskdm.data.batches import batches
from maskdm.diffusion.targets import denoising_loss
from maskdm.errors import OutOfMemory, TrainingDiverged
from maskdm.networks.layers import patchify
from maskdm.networks.model import build_model
from maskdm.training.checkpoint import load_state, save_state
from maskdm.training.loop import (
    MAX_SKIPPED_IN_A_ROW,
    Progress,
    TrainingState,
    apply_gradients,
    ema_decay,
    learning_rate,
    power_of_length,
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
    config = TrainingConfig(ema_decay=longest)
    decay = ema_decay(config, step)
    assert decay == pytest.approx(min(longest, 1 - 1 / (1 + step) ** (2 / 3)))
    assert 0 < decay <= ema_decay(config, step + 1) <= longest


@given(steps=st.integers(1, 60), length=st.floats(0.03, 0.25))
def test_the_power_function_average_weighs_step_n_as_a_power_of_n(steps: int, length: float) -> None:
    """Σ w_n θ_n with w_n ∝ n^γ in the limit; exactly, w_n = (1 − β_n) Π_{m > n} β_m, and the start is forgotten."""
    config = TrainingConfig(ema="power", ema_length=length)
    power = power_of_length(length)
    decays = [ema_decay(config, n) for n in range(1, steps + 1)]
    assert decays[0] == 0
    weights = [(1 - decays[n]) * math.prod(decays[n + 1 :]) for n in range(steps)]
    assert sum(weights) == pytest.approx(1)
    # ∏ (1 − 1/m)^(γ+1) telescopes to (n/N)^(γ+1).
    expected = [((n / steps) ** (power + 1) - ((n - 1) / steps) ** (power + 1)) for n in range(1, steps + 1)]
    assert weights == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("length", "power"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_length_of_the_power_function_average_is_the_published_one(length: float, power: float) -> None:
    assert power_of_length(length) == pytest.approx(power, abs=0.01)  # Karras et al. 2024, section 3.1


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

    train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK, on_progress=follow, report_seconds=0)
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
        on_progress=lambda progress: used.append((progress.lr, state.optimizer.param_groups[0]["lr"])),
        report_seconds=0,
    )
    assert [told for told, _ in used] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert all(told == real for told, real in used)


def test_gradients_are_clipped_to_the_given_norm(tiny: ModelConfig) -> None:
    config = TrainingConfig(betas=(0.0, 0.0), clip_norm=0.5)
    state = fresh(tiny, config)
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    apply_gradients(state, config, 1e-3)
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.5, rel=1e-4)


def stepped_away(tiny: ModelConfig, config: TrainingConfig) -> tuple[TrainingState, dict[str, Tensor]]:
    """A state whose weights have left their start by known distances, with gradients of one."""
    state, distances = fresh(tiny, config), {}
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            before = parameter.clone()
            parameter.add_(torch.randn(parameter.shape, generator=randomness))
            distances[name] = parameter - before
            parameter.grad = torch.ones_like(parameter)
    return state, distances


def test_the_proximal_term_adds_its_share_of_the_distance_to_each_gradient(tiny: ModelConfig) -> None:
    config = TrainingConfig(betas=(0.0, 0.0), clip_norm=1e6, proximal=0.5)
    state, distances = stepped_away(tiny, config)
    apply_gradients(state, config, 1e-3)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(state.optimizer.state[parameter]["exp_avg"], 1 + 0.5 * distances[name]), name


def test_gradients_are_clipped_together_with_the_proximal_term(tiny: ModelConfig) -> None:
    config = TrainingConfig(betas=(0.0, 0.0), clip_norm=0.5, proximal=100.0)
    state, _ = stepped_away(tiny, config)
    apply_gradients(state, config, 1e-3)
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.model.parameters()]
    assert float(torch.cat([m.flatten() for m in moments]).norm()) == pytest.approx(0.5, rel=1e-4)


def test_the_stronger_the_proximal_term_the_nearer_weights_stay_to_their_start(tiny: ModelConfig) -> None:
    moved = []
    for proximal in (0.0, 1.0, 100.0):
        config = TrainingConfig(
            images=400, batch_size=4, lr=1e-3, weight_decay=0, clip_norm=1e6, proximal=proximal, precision="fp32"
        )
        state = fresh(tiny, config)
        start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
        train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
        distances = [p.detach() - start[name] for name, p in state.model.named_parameters()]
        moved.append(sum(float(distance.square().sum()) for distance in distances))
    assert moved[0] > 4 * moved[1] > 16 * moved[2]


def test_without_a_proximal_term_no_anchor_is_kept_and_gradients_stay_as_they_are(tiny: ModelConfig) -> None:
    config = TrainingConfig(betas=(0.0, 0.0), clip_norm=1e6)
    assert config.proximal == 0
    state, _ = stepped_away(tiny, config)
    assert state.anchor is None
    apply_gradients(state, config, 1e-3)
    for parameter in state.model.parameters():
        assert torch.equal(state.optimizer.state[parameter]["exp_avg"], torch.ones_like(parameter))


def test_a_run_with_a_proximal_term_goes_on_from_the_model_it_started_from(tiny: ModelConfig, tmp_path: Path) -> None:
    config = TrainingConfig(images=32, batch_size=4, lr=1e-3, proximal=1.0, precision="fp32")
    whole = fresh(tiny, config)
    train(whole, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
    first = fresh(tiny, config)
    train(first, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK, stop=lambda: first.images_seen >= 16)
    save_state(tmp_path / "state.safetensors", first, config)
    second = fresh(tiny, config)
    load_state(tmp_path / "state.safetensors", second)
    train(second, batches(pictures(), 4, second.images_seen, 0), config, DIFFUSION, MASK)
    assert_same(everything(second), everything(whole))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(tiny: ModelConfig, poison: float) -> None:
    config = TrainingConfig(images=4, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
    before = everything(state)
    for parameter in state.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(state.model.parameters()).grad = torch.full_like(next(state.model.parameters()), poison)
    apply_gradients(state, config, 1e-3)
    after = everything(state)
    averages = {name for name in after if name.startswith("average.")}  # they go on towards the same weights
    assert_same({n: after[n] for n in after.keys() - averages}, {n: before[n] for n in before.keys() - averages})
    assert all(after[name].isfinite().all() for name in averages)
    assert (state.steps, state.skips.tolist()) == (2, [1, 1])
    assert all(parameter.grad is None for parameter in state.model.parameters())


def test_skipped_steps_only_end_a_run_when_they_come_in_a_row(tiny: ModelConfig) -> None:
    state = fresh(tiny, TrainingConfig())
    for good_step in (True, False):
        for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
            next(state.model.parameters()).grad = torch.full_like(next(state.model.parameters()), float("nan"))
            apply_gradients(state, TrainingConfig(), 1e-3)
        if good_step:
            next(state.model.parameters()).grad = torch.ones_like(next(state.model.parameters()))
            apply_gradients(state, TrainingConfig(), 1e-3)
    assert (state.skipped, state.steps) == (38, 39)
    assert state.skips.tolist() == [38, 19]


def test_training_gives_up_after_twenty_bad_steps_in_a_row_and_keeps_its_weights(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=1000, batch_size=4, precision="fp32")
    state = fresh(tiny, config)
    with torch.no_grad():
        state.model.get_parameter("head.bias").fill_(float("inf"))
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with pytest.raises(TrainingDiverged, match="20 steps in a row"):
        train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK, report_seconds=0)
    assert state.skipped == 20
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
    state.model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[:3]))
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


@pytest.mark.parametrize("network", ["uvit", "dit"])
@pytest.mark.parametrize("process", ["ddpm", "edm", "flow"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
@pytest.mark.parametrize("weight", ["uniform", "min-snr", "p2"])
def test_every_combination_learns(
    tiny: ModelConfig, network: NetworkKind, process: ProcessKind, prediction: Prediction, weight: LossWeight
) -> None:
    diffusion = DiffusionConfig(process=process, prediction=prediction, loss_weight=weight)
    shape = tiny.model_copy(update={"network": network, "classes": 2})
    config = TrainingConfig(images=16 * 60, batch_size=16, lr=5e-3, betas=(0.9, 0.95), precision="fp32")
    half = MaskConfig(kind="patch", ratio=0.5)
    state = fresh(shape, config)
    patches, kinds = patchify(pictures(), shape.patch_size), torch.arange(12) % 2
    before = denoising_loss(state.model, diffusion, patches, classes=kinds)
    train(state, batches(pictures(), 16, 0, 0, classes=kinds), config, diffusion, half)
    after = denoising_loss(state.model, diffusion, patches, classes=kinds)
    assert after < before


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulating_over_parts_equals_one_large_batch(tiny: ModelConfig, parts: int) -> None:
    # A large ε keeps Adam's first steps proportional to the gradient, so that rounding is not magnified to signs.
    results = []
    for accumulate in (1, parts):
        config = TrainingConfig(
            images=24, batch_size=8, accumulate=accumulate, horizontal_flip=0.5, precision="fp32", seed=3
        )
        state = fresh(tiny, config)
        state.optimizer.param_groups[0]["eps"] = 1.0
        train(state, batches(pictures(), 8, 0, 3), config, DIFFUSION, MASK)
        results.append(everything(state))
    for name, tensor in results[0].items():
        assert torch.allclose(results[1][name], tensor, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("network", ["uvit", "dit"])
def test_recomputing_activations_gives_the_same_gradients(tiny: ModelConfig, network: NetworkKind) -> None:
    results = []
    for recompute in (False, True):
        config = TrainingConfig(images=8, batch_size=4, recompute=recompute, precision="fp32")
        state = fresh(tiny.model_copy(update={"network": network}), config)
        train(state, batches(pictures(), 4, 0, 0), config, DIFFUSION, MASK)
        results.append(everything(state))
    assert_same(*results)


def test_classes_are_dropped_at_the_given_rate(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=4000, batch_size=400, class_dropout=0.3, precision="fp32", lr=1e-6)
    state = fresh(tiny.model_copy(update={"classes": 3}), config)
    seen: list[Tensor] = []
    state.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3]))
    kinds = torch.arange(12) % 3
    train(state, batches(pictures(), 400, 0, 0, classes=kinds), config, DIFFUSION, MASK)
    told = torch.cat(seen)
    assert float((told < 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert set(told.tolist()) == {-1, 0, 1, 2}


def test_running_out_of_memory_names_what_to_try(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=8, batch_size=8, accumulate=2, precision="fp32")
    state = fresh(tiny, config)

    def too_much(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("no")

    with pytest.raises(OutOfMemory, match=r"8 images does not fit .* --batch-size 4, --accumulate 4 or --recompute"):
        train(state, batches(pictures(), 8, 0, 0), config, DIFFUSION, MASK, denoiser=too_much)


def test_reports_sum_up_the_steps_since_the_last_one(tiny: ModelConfig) -> None:
    config = TrainingConfig(images=20, batch_size=4, precision="fp32")
    every: list[Progress] = []
    train(
        fresh(tiny, config),
        batches(pictures(), 4, 0, 0),
        config,
        DIFFUSION,
        MASK,
        on_progress=every.append,
        report_seconds=0,
    )
    once: list[Progress] = []
    train(
        fresh(tiny, config),
        batches(pictures(), 4, 0, 0),
        config,
        DIFFUSION,
        MASK,
        on_progress=once.append,
        report_seconds=60,
    )
    assert [progress.images for progress in every] == [4, 8, 12, 16, 20]
    assert [progress.images for progress in once] == [20]
    assert once[0].loss == pytest.approx(sum(progress.loss or 0 for progress in every) / 5, rel=1e-5)
    assert 0 <= once[0].data_wait <= 1
