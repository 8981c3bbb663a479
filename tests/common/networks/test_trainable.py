"""Training parts of a network: what changes, what goes up, and that it is what an explicit implementation gives."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, NetworkKind, Trainable, TrainingConfig
from maskdm.data.batches import batches
from maskdm.networks.model import Network, build_model
from maskdm.networks.trainable import (
    Adapted,
    PartialNetwork,
    changed_weights,
    delta,
    expected_shapes,
    load_values,
    partial_update,
    squared_norm,
    update_shapes,
)
from maskdm.training.checkpoint import load_state, model_from, save_state
from maskdm.training.loop import TrainingState, train

Part = Literal["norm-bias", "adapters"]

RANK = 3
DIFFUSION = DiffusionConfig(timesteps=50)
MASK = MaskConfig(kind="patch", ratio=0.5)
TRAINING = TrainingConfig(images=40, batch_size=4, lr=1e-2, betas=(0.9, 0.95), precision="fp32", seed=5)


@pytest.fixture(params=["uvit", "dit"])
def shape(request: pytest.FixtureRequest, tiny: ModelConfig) -> ModelConfig:
    """Either network, told classes, with biases everywhere."""
    network: NetworkKind = request.param
    return tiny.model_copy(update={"network": network, "classes": 2, "qkv_bias": True})


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stirred(config: ModelConfig) -> Network:
    """A network none of whose weights is at its start, where a DiT would pass no gradient on."""
    model = build_model(config, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * tensor(*parameter.shape, seed=number))
    return model


def inputs(config: ModelConfig) -> tuple[Tensor, None, Tensor, Tensor]:
    return tensor(3, config.grid**2, config.patch_dim), None, torch.tensor([0.0, 7.0, 49.0]), torch.tensor([0, 1, -1])


def go_on(state: TrainingState, stop: int = TRAINING.images, training: TrainingConfig = TRAINING) -> TrainingState:
    pixels = (tensor(11, 1, 8, 8).abs() * 80).clamp(max=255).to(torch.uint8)
    order = batches(pixels, training.batch_size, state.images_seen, 5, classes=torch.arange(11) % 2)
    train(state, order, training, DIFFUSION, MASK, stop=lambda: state.images_seen >= stop)
    return state


def trained(network: Network, part: Part) -> PartialNetwork:
    model = PartialNetwork(network, part, RANK, seed=4)
    go_on(TrainingState.fresh(model, TRAINING))
    return model


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients_of(model: Callable[..., Tensor], parameters: Sequence[Tensor], config: ModelConfig) -> list[Tensor]:
    return list(torch.autograd.grad(model(*inputs(config)).square().mean(), parameters))


def test_an_update_of_all_weights_has_the_shapes_of_the_network(shape: ModelConfig) -> None:
    assert update_shapes(shape, "all", RANK) == expected_shapes(shape)
    assert list(changed_weights(shape, "all")) == list(expected_shapes(shape))


def test_an_update_of_norms_and_biases_has_every_vector_and_nothing_else(shape: ModelConfig) -> None:
    shapes = update_shapes(shape, "norm-bias", RANK)
    assert shapes == {name: size for name, size in expected_shapes(shape).items() if len(size) == 1}
    assert tuple(shapes) == changed_weights(shape, "norm-bias")
    assert "head.bias" in shapes


def test_an_update_of_adapters_has_two_thin_matrices_for_each_of_four_layers_of_every_block(shape: ModelConfig) -> None:
    shapes, weights = update_shapes(shape, "adapters", RANK), expected_shapes(shape)
    blocks = ["in_blocks.0", "mid_block", "out_blocks.0"] if shape.network == "uvit" else ["blocks.0", "blocks.1"]
    layers = ["attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2"]
    names = [f"{block}.{layer}.weight" for block in blocks for layer in layers]
    assert changed_weights(shape, "adapters") == tuple(names)
    assert list(shapes) == [f"{name}.{end}" for name in names for end in ("down", "up")]
    for name in names:
        rows, columns = weights[name]
        assert (shapes[f"{name}.down"], shapes[f"{name}.up"]) == ((RANK, columns), (rows, RANK))


@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_output_is_exactly_the_networks(shape: ModelConfig, part: Part, dtype: torch.dtype) -> None:
    network = stirred(shape)
    model = PartialNetwork(network, part, RANK, seed=0)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert torch.equal(model(*inputs(shape)), network(*inputs(shape)))


@pytest.mark.parametrize("part", get_args(Part))
def test_what_is_not_trained_is_neither_parameter_nor_state_nor_copied(shape: ModelConfig, part: Part) -> None:
    network = stirred(shape)
    model = PartialNetwork(network, part, RANK, seed=0)
    own = [tuple(p.shape) for p in model.parameters()]
    assert own == list(update_shapes(shape, part, RANK).values())
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
    places = {p.data_ptr() for p in network.parameters()}
    assert all(frozen.data_ptr() in places for frozen in model.buffers())
    assert not any(p.data_ptr() in places for p in model.parameters())
    assert all(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("part", get_args(Part))
def test_training_changes_every_chosen_part_and_not_a_bit_of_the_network(shape: ModelConfig, part: Part) -> None:
    network = stirred(shape)
    before = values_of(network)
    start = values_of(PartialNetwork(network, part, RANK, seed=4))
    model = trained(network, part)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert all(p.grad is None for p in network.parameters())
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []


@pytest.mark.parametrize("part", get_args(Part))
def test_a_plain_network_with_the_differences_added_gives_the_same_output(shape: ModelConfig, part: Part) -> None:
    network = stirred(shape)
    model = trained(network, part)
    update = partial_update(model, values_of(model))
    assert {name: tuple(tensor.shape) for name, tensor in update.items()} == update_shapes(shape, part, RANK)
    weights = values_of(network)
    for name in changed_weights(shape, part):
        weights[name] += delta(update.__getitem__, name, part)
    with torch.no_grad():
        found = model_from(weights, shape)(*inputs(shape))
        assert torch.allclose(found, model(*inputs(shape)), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found, network(*inputs(shape)), rtol=1e-2, atol=1e-2)


def test_gradients_of_adapters_are_those_of_products_added_to_the_weights(shape: ModelConfig) -> None:
    network = stirred(shape)
    model = trained(network, "adapters")
    factors = {name: value.requires_grad_() for name, value in partial_update(model, values_of(model)).items()}
    added = values_of(network)
    for name in changed_weights(shape, "adapters"):
        added[name] = added[name] + factors[f"{name}.up"] @ factors[f"{name}.down"]
    expected = gradients_of(lambda *x: functional_call(network, added, x), list(factors.values()), shape)
    found = gradients_of(model, list(model.parameters()), shape)
    for mine, reference in zip(found, expected, strict=True):
        assert float(reference.norm()) > 0
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-6)


def test_gradients_of_norms_and_biases_are_the_plain_networks(shape: ModelConfig) -> None:
    network = stirred(shape)
    model = PartialNetwork(network, "norm-bias", RANK, seed=0)
    chosen = [network.get_parameter(name) for name in changed_weights(shape, "norm-bias")]
    for mine, reference in zip(
        gradients_of(model, list(model.parameters()), shape), gradients_of(network, chosen, shape), strict=True
    ):
        assert torch.allclose(mine, reference, rtol=1e-5, atol=1e-7)


def test_a_step_of_one_adapted_layer_is_that_of_a_hand_written_one() -> None:
    frozen = nn.Linear(6, 4).requires_grad_(False)
    layer, x, wanted = Adapted(frozen, 2, torch.Generator().manual_seed(0)), tensor(5, 6), tensor(5, 4, seed=1)
    with torch.no_grad():
        layer.weight["up"].copy_(tensor(4, 2, seed=2))
    up, down = layer.weight["up"].detach().double(), layer.weight["down"].detach().double()
    (layer(x) - wanted).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    answer = x.double() @ (frozen.weight.double() + up @ down).T + frozen.bias.double()
    gradient = (2 * (answer - wanted)).T @ x.double()  # of the loss by the whole matrix, (4, 6)
    assert layer.weight["up"].detach().double() == pytest.approx(up - 0.01 * gradient @ down.T, abs=1e-5)
    assert layer.weight["down"].detach().double() == pytest.approx(down - 0.01 * up.T @ gradient, abs=1e-5)


@pytest.mark.parametrize("part", get_args(Part))
def test_recomputing_activations_gives_the_same_gradients(shape: ModelConfig, part: Part) -> None:
    model = trained(stirred(shape), part).train()
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        assert model.recompute == model.network.recompute == recompute
        results.append(gradients_of(model, list(model.parameters()), shape))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_modes_reach_the_blocks_and_follow_the_network_at_first(shape: ModelConfig) -> None:
    model = PartialNetwork(build_model(shape).eval(), "adapters", RANK, seed=0)
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize("part", get_args(Part))
def test_training_in_one_go_equals_stopping_saving_loading_and_going_on(
    shape: ModelConfig, part: Part, tmp_path: Path
) -> None:
    def fresh(seed: int) -> TrainingState:
        return TrainingState.fresh(PartialNetwork(stirred(shape), part, RANK, seed), TRAINING)

    whole, first, second = go_on(fresh(4)), go_on(fresh(4), stop=16), fresh(99)
    save_state(tmp_path / "state.safetensors", first, TRAINING)
    load_state(tmp_path / "state.safetensors", second)
    go_on(second)
    assert (first.images_seen, second.images_seen, second.steps) == (16, whole.images_seen, whole.steps)
    for state in (whole, second):
        state.average |= {f"raw.{name}": value for name, value in values_of(state.model).items()}
    assert all(torch.equal(second.average[name], value) for name, value in whole.average.items())


@pytest.mark.parametrize("part", get_args(Part))
def test_averaged_values_put_into_the_model_are_what_goes_up(shape: ModelConfig, part: Part) -> None:
    network = stirred(shape)
    state = go_on(TrainingState.fresh(PartialNetwork(network, part, RANK, seed=4), TRAINING))
    assert isinstance(state.model, PartialNetwork)
    update = partial_update(state.model, state.average)
    load_values(state.model, state.average)
    again = partial_update(state.model, values_of(state.model))
    assert all(torch.equal(again[name], value) for name, value in update.items())
    weights = values_of(network)
    if part == "norm-bias":
        assert all(
            torch.equal(value, state.average[f"network.{name}"] - weights[name]) for name, value in update.items()
        )


@pytest.mark.parametrize("part", get_args(Part))
def test_a_proximal_term_keeps_the_parts_near_their_start(shape: ModelConfig, part: Part) -> None:
    moved = []
    for proximal in (0.0, 10.0):
        training = TRAINING.model_copy(update={"images": 400, "proximal": proximal, "clip_norm": 1e6, "lr": 1e-3})
        model = PartialNetwork(stirred(shape), part, RANK, seed=4)
        start = values_of(model)
        go_on(TrainingState.fresh(model, training), 400, training)
        moved.append(sum(float((value - start[name]).square().sum()) for name, value in values_of(model).items()))
    assert moved[1] < moved[0] / 16


def test_adapters_follow_from_their_seed_and_leave_the_global_generator_alone(tiny: ModelConfig) -> None:
    network, before = build_model(tiny), torch.random.get_rng_state()
    first, again, other = (values_of(PartialNetwork(network, "adapters", 8, seed)) for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    downs = [name for name in first if name.endswith(".down")]
    assert not any(torch.equal(first[name], other[name]) for name in downs)
    assert not any(first[name].any() for name in first.keys() - set(downs))
    scaled = torch.cat([first[name].flatten() * first[name].shape[1] ** 0.5 for name in downs])
    assert (float(scaled.mean()), float(scaled.std())) == pytest.approx((0, 1), abs=0.05)


def test_the_mean_of_two_clients_differences_is_not_the_product_of_their_mean_factors() -> None:
    clients = [{"w.up": tensor(4, 2, seed=seed), "w.down": tensor(2, 6, seed=seed + 9)} for seed in (0, 1)]
    mean = sum(delta(client.__getitem__, "w", "adapters") for client in clients) / 2
    factors = {name: (clients[0][name] + clients[1][name]) / 2 for name in clients[0]}
    exact = (clients[0]["w.up"] @ clients[0]["w.down"] + clients[1]["w.up"] @ clients[1]["w.down"]) / 2
    assert torch.equal(torch.as_tensor(mean), exact)
    assert not torch.allclose(exact, delta(factors.__getitem__, "w", "adapters"), atol=0.1)


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_the_squared_norm_is_that_of_the_whole_difference(rows: int, columns: int, rank: int, seed: int) -> None:
    update = {
        "w.up": tensor(rows, rank, seed=seed),
        "w.down": tensor(rank, columns, seed=seed + 1),
        "w": tensor(rows, columns, seed=seed),
    }
    parts: tuple[Trainable, ...] = get_args(Trainable)
    for part in parts:
        explicit = update["w.up"].double() @ update["w.down"].double() if part == "adapters" else update["w"].double()
        assert squared_norm(update.__getitem__, "w", part) == pytest.approx(float(explicit.norm() ** 2), rel=1e-5)


def test_factors_chosen_to_cancel_do_not_hide_what_their_product_adds() -> None:
    """Exactly, 2³⁰ + 1 − 2³⁰ − 1 = 0; in fp32 it is −1, and whoever sends the factors can scale it at will."""
    scale = 2.0**20
    update = {
        "w.up": scale * torch.tensor([[2.0**15, 1, -(2.0**15), -1]]),
        "w.down": torch.tensor([[2.0**15], [1], [2.0**15], [1]]),
    }
    added = delta(update.__getitem__, "w", "adapters")
    assert squared_norm(update.__getitem__, "w", "adapters") == pytest.approx(
        float(added.double().square().sum()), rel=1e-4
    )
    overflowing = {"w.up": torch.full((1, 1), 1e25), "w.down": torch.full((1, 1), 1e25)}
    assert not math.isfinite(squared_norm(overflowing.__getitem__, "w", "adapters"))
