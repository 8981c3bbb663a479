"""The denoiser against a second, plain implementation, and what it may and may not depend on."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from maskdm.config import ModelConfig
from maskdm.networks.dit import ModulatedBlock
from maskdm.networks.layers import attend, patchify, timestep_embedding, unpatchify
from maskdm.networks.model import Network, build_model, resize_positions
from maskdm.networks.uvit import Block


def plain_forward(model: Network, patches: Tensor, visible: Tensor, timesteps: Tensor) -> Tensor:
    """The paper's order: embed every patch, add every position, then drop the hidden tokens; float64 throughout."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config

    def linear(x: Tensor, name: str) -> Tensor:
        bias = weights.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))
        out: Tensor = x @ weights[f"{name}.weight"].T + bias
        return out

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        out: Tensor = scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        return out

    def block(x: Tensor, name: str) -> Tensor:
        width = config.dim // config.heads
        query, key, value = linear(norm(x, f"{name}.norm1"), f"{name}.attention.qkv").chunk(3, dim=-1)
        mixed = []
        for head in range(config.heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
            mixed.append(scores.softmax(dim=-1) @ value[..., part])
        x = x + linear(torch.cat(mixed, dim=-1), f"{name}.attention.proj")
        hidden = linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return x + linear(hidden, f"{name}.mlp.fc2")

    table = weights["position.table"]
    tokens = linear(patches.double(), "patch_embedding") + table[1:]
    tokens = torch.stack([row[kept] for row, kept in zip(tokens, visible, strict=True)])
    half = config.dim // 2
    angles = timesteps.double()[:, None] * torch.tensor([10_000 ** (-i / half) for i in range(half)]).double()
    time = torch.cat([angles.cos(), angles.sin()], dim=1)[:, None] + table[0]
    x = torch.cat([time, tokens], dim=1)
    skips = []
    for i in range(config.depth // 2):
        x = block(x, f"in_blocks.{i}")
        skips.append(x)
    x = block(x, "mid_block")
    for i in range(config.depth // 2):
        x = block(linear(torch.cat([x, skips.pop()], dim=-1), f"out_blocks.{i}.skip"), f"out_blocks.{i}")
    return linear(norm(x[:, 1:], "norm"), "head")


@pytest.fixture
def inputs(tiny: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """All patches (B, N, P), six visible positions of each image, timesteps."""
    randomness = torch.Generator().manual_seed(1)
    patches = torch.randn(3, tiny.grid**2, tiny.patch_dim, generator=randomness)
    visible = torch.rand(3, tiny.grid**2, generator=randomness).argsort(dim=1)[:, :6].sort(dim=1).values
    return patches, visible, torch.tensor([0, 7, 49])


def shown(patches: Tensor, visible: Tensor) -> Tensor:
    return patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))


@given(grid=st.integers(1, 4), patch=st.integers(1, 4), channels=st.integers(1, 3), batch=st.integers(1, 3))
def test_unpatchify_undoes_patchify(grid: int, patch: int, channels: int, batch: int) -> None:
    images = torch.arange(batch * channels * (grid * patch) ** 2).view(batch, channels, grid * patch, grid * patch)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid**2, patch**2 * channels)
    assert torch.equal(unpatchify(patches, patch, channels), images)


def test_patches_are_in_reading_order() -> None:
    image = torch.arange(16).view(1, 1, 4, 4)
    assert patchify(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_block_equals_timms_with_the_same_weights(qkv_bias: bool) -> None:
    from timm.models.vision_transformer import Block as Reference

    config = ModelConfig(image_size=8, dim=48, depth=2, heads=3, qkv_bias=qkv_bias)
    block, reference = Block(config), Reference(48, 3, qkv_bias=qkv_bias, norm_layer=nn.LayerNorm)
    weights = {name.replace("attention.", "attn."): tensor for name, tensor in block.state_dict().items()}
    reference.load_state_dict(weights, strict=True)
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert block(x) == pytest.approx(reference(x), abs=1e-6)


def test_importing_the_library_loads_neither_timm_nor_flower() -> None:
    code = "import sys, maskdm.training.loop, maskdm.diffusion.sampling; print({'timm', 'flwr'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"


def test_visible_patches_give_what_embedding_all_and_dropping_gives(
    tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    patches, visible, timesteps = inputs
    model = build_model(tiny.model_copy(update={"depth": 5, "qkv_bias": True}), seed=2)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not at their trivial start
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)), alpha=0.05)
        found = model(shown(patches, visible), visible, timesteps)
        expected = plain_forward(model, patches, visible, timesteps)
    assert found.double() == pytest.approx(expected, abs=2e-5)


def test_all_positions_in_order_are_the_same_as_no_positions(
    tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    patches, _, timesteps = inputs
    model = build_model(tiny)
    everything = torch.arange(tiny.grid**2).expand(3, -1)
    with torch.no_grad():
        assert torch.equal(model(patches, everything, timesteps), model(patches, None, timesteps))


def test_the_output_depends_on_position_and_time(tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    patches, visible, timesteps = inputs
    model = build_model(tiny)
    seen = shown(patches, visible)
    with torch.no_grad():
        here = model(seen, visible, timesteps)
        assert not torch.allclose(here, model(seen, (visible + 1) % tiny.grid**2, timesteps))
        assert not torch.allclose(here, model(seen, visible, timesteps + 1))


def test_images_of_a_batch_do_not_influence_each_other(
    tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    patches, visible, timesteps = inputs
    model = build_model(tiny)
    seen = shown(patches, visible)
    with torch.no_grad():
        together = model(seen, visible, timesteps)
        alone = torch.cat([model(seen[i : i + 1], visible[i : i + 1], timesteps[i : i + 1]) for i in range(3)])
    assert together == pytest.approx(alone, abs=1e-5)


def test_timestep_embedding_is_cosines_then_sines_of_geometric_frequencies() -> None:
    found = timestep_embedding(torch.tensor([0.0, 3.5]), 6)
    frequencies = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    expected = [[1, 1, 1, 0, 0, 0], [f(3.5 * w) for f in (math.cos, math.sin) for w in frequencies]]
    assert found == pytest.approx(torch.tensor(expected), abs=1e-6)


def test_all_timesteps_are_told_apart() -> None:
    table = timestep_embedding(torch.arange(1000), 16)
    distances = torch.cdist(table, table) + torch.eye(1000)
    assert float(distances.min()) > 1e-3


def test_plain_bf16_attention_is_close_to_exact_attention_in_values_and_gradients() -> None:
    randomness = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 33, 16, generator=randomness).bfloat16().requires_grad_() for _ in range(3))
    rough = (query, key, value)
    fine = tuple(tensor.detach().double().requires_grad_() for tensor in rough)
    found = attend(query, key, value)
    expected = functional.scaled_dot_product_attention(fine[0], fine[1], fine[2])
    assert found.dtype == torch.bfloat16
    assert found.detach().double() == pytest.approx(expected.detach(), abs=0.02)
    gradients = torch.autograd.grad(found.float().square().sum(), rough)
    exact = torch.autograd.grad(expected.square().sum(), fine)
    for gradient, truth in zip(gradients, exact, strict=True):
        assert float((gradient.double() - truth).norm() / truth.norm()) < 0.02


def test_the_same_seed_builds_the_same_network_and_leaves_the_global_generator_alone(tiny: ModelConfig) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (build_model(tiny, seed=seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_modulated_block_follows_adaln_zero() -> None:
    """Peebles & Xie 2023, figure 3: x + γ ⊙ f((1 + scale) norm(x) + shift), the condition by one linear layer."""
    config = ModelConfig(image_size=8, dim=12, depth=1, heads=3, network="dit")
    block = ModulatedBlock(config)
    x, condition = tensor(2, 5, 12), tensor(2, 12, seed=1)
    with torch.no_grad():
        block.modulation.weight.copy_(0.1 * tensor(72, 12, seed=2))
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(functional.silu(condition))[:, None].chunk(
            6, dim=2
        )
        middle = x + gate1 * block.attention(functional.layer_norm(x, (12,)) * (1 + scale1) + shift1)
        expected = middle + gate2 * block.mlp(functional.layer_norm(middle, (12,)) * (1 + scale2) + shift2)
        assert block(x, condition) == pytest.approx(expected, abs=1e-6)


def test_a_fresh_dit_answers_zero_and_its_blocks_pass_everything_on(tiny: ModelConfig) -> None:
    model = build_model(tiny.model_copy(update={"network": "dit"}))
    x = tensor(2, tiny.grid**2, tiny.patch_dim)
    with torch.no_grad():
        assert float(model(x, None, torch.tensor([1, 2])).abs().max()) == 0
        block = ModulatedBlock(ModelConfig(image_size=8, dim=12, depth=1, heads=3))
        hidden = tensor(2, 5, 12)
        assert torch.equal(block(hidden, tensor(2, 12)), hidden)


def stirred(config: ModelConfig) -> Network:
    """A network none of whose weights is at its start."""
    model = build_model(config)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * tensor(*parameter.shape, seed=number))
    return model


@pytest.mark.parametrize("network", ["uvit", "dit"])
def test_every_network_takes_visible_patches_with_their_positions_in_any_order(
    tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor], network: str
) -> None:
    patches, visible, timesteps = inputs
    model = stirred(ModelConfig.model_validate(tiny.model_dump() | {"network": network, "depth": 4}))
    order = torch.randperm(visible.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(shown(patches, visible), visible, timesteps)
        turned = model(shown(patches, visible[:, order]), visible[:, order], timesteps)
        assert turned == pytest.approx(found[:, order], abs=1e-4)
        assert not torch.allclose(found, model(shown(patches, visible), visible, timesteps + 5))


@pytest.mark.parametrize("network", ["uvit", "dit"])
def test_classes_matter_and_no_class_is_one_of_its_own(
    tiny: ModelConfig, inputs: tuple[Tensor, Tensor, Tensor], network: str
) -> None:
    patches, _, timesteps = inputs
    model = stirred(ModelConfig.model_validate(tiny.model_dump() | {"network": network, "classes": 3}))

    def answer(*classes: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = model(patches, None, timesteps, torch.tensor(classes))
        return out

    with torch.no_grad():
        assert torch.equal(answer(-1, -1, -1), model(patches, None, timesteps))
    mixed = answer(0, 2, -1)
    assert not torch.allclose(answer(0, 0, 0), answer(1, 1, 1))
    for i, number in enumerate((0, 2, -1)):
        assert mixed[i] == pytest.approx(answer(number, number, number)[i], abs=1e-5)


def test_positions_are_resized_between_grids_and_come_back(tiny: ModelConfig) -> None:
    large = tiny.model_copy(update={"image_size": 16})
    wave = torch.linspace(-1, 1, tiny.grid)
    smooth = torch.stack([wave[:, None].expand(4, 4), wave[None].expand(4, 4)]).reshape(2, -1).T  # (16, 2)
    table = torch.cat([torch.tensor([[7.0, -7.0]]), smooth])
    up = resize_positions(table, tiny, large)
    assert up.shape == (1 + large.grid**2, 2)
    assert torch.equal(up[0], table[0])
    rows = up[1:].view(large.grid, large.grid, 2)
    assert (rows[1:, :, 0] > rows[:-1, :, 0]).all()  # still a ramp downwards, and one to the right
    assert (rows[:, 1:, 1] > rows[:, :-1, 1]).all()
    assert torch.equal(resize_positions(table, tiny, tiny), table)
    assert resize_positions(up, large, tiny) == pytest.approx(table, abs=0.15)
