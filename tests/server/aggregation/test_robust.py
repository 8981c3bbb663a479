"""Robust rules: against their definitions in NumPy, and against attackers in a small federation."""

import math
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskdm_server.aggregation import robust
from maskdm_server.aggregation.robust import (
    Rule,
    coordinate_median,
    krum_order,
    needed,
    robust_delta,
    squared_distances,
    trimmed_mean,
)

Update = dict[str, Tensor]

SHAPES: dict[str, tuple[int, ...]] = {"a": (2, 3), "b": (4,), "c": (), "none": (0, 2)}
RULES: tuple[Rule, ...] = get_args(Rule)
ROBUST = [rule for rule in RULES if rule != "mean"]

seeds = st.integers(0, 2**31)


def draws(seed: int, count: int) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


def aggregate(rule: Rule, updates: list[Update], byzantine: int) -> Update:
    return dict(robust_delta(rule, len(updates), updates[0], lambda i, name: updates[i][name], byzantine))


def stacked(updates: list[Update], name: str) -> Any:
    return np.stack([update[name].numpy() for update in updates])


def brute_force_krum(updates: list[Update], byzantine: int) -> list[int]:
    """Best first, from the definition: whole vectors, all pairs, each row's smallest."""
    vectors = [np.concatenate([tensor.double().numpy().ravel() for tensor in update.values()]) for update in updates]
    scores = []
    for i, vector in enumerate(vectors):
        distances = sorted(np.sum((vector - other) ** 2) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - byzantine - 2]))
    return sorted(range(len(vectors)), key=lambda i: scores[i])


@given(seed=seeds, count=st.integers(1, 20))
def test_the_median_is_numpys(seed: int, count: int) -> None:
    updates = draws(seed, count)
    for name in SHAPES:
        found = coordinate_median(torch.stack([update[name] for update in updates]))
        assert found.dtype == torch.float32
        assert found.shape == SHAPES[name]
        assert found.numpy() == pytest.approx(np.median(stacked(updates, name), axis=0), rel=1e-6)


@given(seed=seeds, count=st.integers(1, 20), data=st.data())
def test_the_trimmed_mean_is_the_mean_of_the_values_in_the_middle(seed: int, count: int, data: st.DataObject) -> None:
    trim = data.draw(st.integers(0, (count - 1) // 2))
    updates = draws(seed, count)
    for name in SHAPES:
        found = trimmed_mean(torch.stack([update[name] for update in updates]), trim)
        assert found.dtype == torch.float32
        assert found.shape == SHAPES[name]
        expected = np.sort(stacked(updates, name), axis=0)[trim : count - trim].mean(0, dtype=np.float64)
        assert found.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40))
def test_equal_values_are_sorted_too(values: list[int]) -> None:
    stack = torch.tensor(values, dtype=torch.float32)
    assert coordinate_median(stack).item() == np.median(values)


@given(seed=seeds, count=st.integers(2, 8))
def test_distances_are_those_of_whole_updates(seed: int, count: int) -> None:
    updates = draws(seed, count)
    found = squared_distances(count, SHAPES, lambda i, name: updates[i][name])
    vectors = np.stack([np.concatenate([t.double().numpy().ravel() for t in u.values()]) for u in updates])
    expected = ((vectors[:, None] - vectors[None]) ** 2).sum(2)
    assert found.dtype == torch.double
    assert found.numpy() == pytest.approx(expected, rel=1e-12)
    assert not found.diagonal().any()
    assert torch.equal(found, found.T)


def test_distances_are_right_near_each_other_and_far_from_zero_and_finite_for_the_largest_values() -> None:
    near = 1e4 + 1e-2 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    found = squared_distances(4, ["w"], lambda i, _: near[i])
    rows = near.double().numpy()
    assert found.numpy() == pytest.approx(((rows[:, None] - rows[None]) ** 2).sum(2), rel=1e-9)
    largest = torch.finfo(torch.float32).max
    far = torch.tensor([[largest], [-largest]])
    assert squared_distances(2, ["w"], lambda i, _: far[i])[0, 1].item() == pytest.approx(4 * largest**2)


@given(seed=seeds, byzantine=st.integers(0, 3), more=st.integers(0, 4))
def test_krum_is_its_definition(seed: int, byzantine: int, more: int) -> None:
    count = 2 * byzantine + 3 + more
    updates = draws(seed, count)
    expected = brute_force_krum(updates, byzantine)
    distances = squared_distances(count, SHAPES, lambda i, name: updates[i][name])
    assert krum_order(distances, byzantine) == expected
    krum, multi = aggregate("krum", updates, byzantine), aggregate("multi-krum", updates, byzantine)
    best = [updates[i] for i in expected[: count - byzantine]]
    for name in SHAPES:
        assert torch.equal(krum[name], updates[expected[0]][name])
        mean = stacked(best, name).mean(0, dtype=np.float64)
        assert multi[name].numpy() == pytest.approx(mean, rel=1e-5, abs=1e-6)


def test_of_equal_updates_krum_prefers_the_first() -> None:
    assert krum_order(torch.zeros(5, 5, dtype=torch.double), 1) == [0, 1, 2, 3, 4]


@given(seed=seeds, count=st.integers(7, 11), data=st.data())
@pytest.mark.parametrize("rule", ROBUST)
def test_the_order_in_which_updates_arrive_does_not_matter(
    rule: Rule, seed: int, count: int, data: st.DataObject
) -> None:
    updates = draws(seed, count)
    order = data.draw(st.permutations(range(count)))
    found, permuted = aggregate(rule, updates, 2), aggregate(rule, [updates[i] for i in order], 2)
    assert all(torch.equal(found[name], permuted[name]) for name in SHAPES)


@given(seed=seeds, byzantine=st.integers(0, 4), size=st.sampled_from([1e2, 1e10, 3e37]))
@pytest.mark.parametrize("rule", ROBUST)
def test_with_as_few_updates_as_needed_far_ones_do_not_lead_out_of_the_honest_range(
    rule: Rule, seed: int, byzantine: int, size: float
) -> None:
    updates = draws(seed, needed(rule, byzantine))
    honest = updates[byzantine:]
    generator = torch.Generator().manual_seed(seed)
    for update in updates[:byzantine]:
        for tensor in update.values():
            tensor.copy_(size * (1 + torch.rand(tensor.shape, generator=generator)))
            tensor.mul_(torch.randint(2, (), generator=generator) * 2 - 1)
    found = aggregate(rule, updates, byzantine)
    for name in SHAPES:
        rows = stacked(honest, name)
        assert np.all(found[name].numpy() <= rows.max(0) + 1e-6)
        assert np.all(found[name].numpy() >= rows.min(0) - 1e-6)


@pytest.mark.parametrize("rule", ROBUST)
def test_equal_updates_are_what_every_rule_returns(rule: Rule) -> None:
    updates = draws(0, 1) * 7
    found = aggregate(rule, updates, 2)
    for name in SHAPES:
        assert found[name].numpy() == pytest.approx(updates[0][name].numpy(), rel=1e-6)


@pytest.mark.parametrize("rule", ROBUST)
def test_parts_are_put_together_to_the_whole(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [{"w": torch.randn(5, 11, generator=torch.Generator().manual_seed(i)).T} for i in range(9)]
    whole = aggregate(rule, updates, 2)
    assert whole["w"].shape == (11, 5)
    monkeypatch.setattr(robust, "PART", 7)
    assert torch.equal(aggregate(rule, updates, 2)["w"], whole["w"])
    if rule == "median":
        assert whole["w"].numpy() == pytest.approx(np.median(stacked(updates, "w"), axis=0))


@pytest.mark.parametrize("rule", ROBUST)
def test_bfloat16_differences_come_out_in_fp32_and_are_only_read(rule: Rule) -> None:
    packed = [{name: tensor.bfloat16() for name, tensor in update.items()} for update in draws(0, 7)]
    unpacked = [{name: tensor.float() for name, tensor in update.items()} for update in packed]
    before = [{name: tensor.clone() for name, tensor in update.items()} for update in unpacked]
    found, expected = aggregate(rule, packed, 2), aggregate(rule, unpacked, 2)
    for name in SHAPES:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], expected[name])
        assert all(torch.equal(now[name], then[name]) for now, then in zip(unpacked, before, strict=True))


@pytest.mark.parametrize("rule", ROBUST)
def test_differences_of_no_more_than_one_weight_are_in_memory(rule: Rule) -> None:
    count, alive, most = 7, 0, 0

    def freed() -> None:
        nonlocal alive
        alive -= 1

    def delta(i: int, name: str) -> Tensor:
        nonlocal alive, most
        array = np.random.default_rng(i).normal(size=10).astype(np.float32)
        weakref.finalize(array, freed)
        alive += 1
        most = max(most, alive)
        return torch.from_numpy(array)

    for _ in robust_delta(rule, count, ["a", "b", "c"], delta, 2):
        pass
    assert most == count
    assert alive <= 1


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        ("mean", [1, 1, 1]),
        ("median", [3, 3, 5]),
        ("trimmed-mean", [1, 3, 5]),
        ("krum", [3, 5, 7]),
        ("multi-krum", [3, 5, 7]),
    ],
)
def test_so_many_updates_are_needed(rule: Rule, least: list[int]) -> None:
    assert [needed(rule, byzantine) for byzantine in range(3)] == least


@pytest.mark.parametrize("rule", ROBUST)
def test_fewer_updates_than_needed_are_refused_at_once(rule: Rule) -> None:
    least = needed(rule, 2)
    with pytest.raises(ValueError, match=f"{rule} needs {least} updates to withstand 2, not {least - 1}"):
        robust_delta(rule, least - 1, ["w"], lambda i, name: torch.zeros(1), 2)


def test_the_mean_is_not_among_the_robust_rules() -> None:
    with pytest.raises(ValueError, match="the mean is no robust rule"):
        robust_delta("mean", 9, ["w"], lambda i, name: torch.zeros(1), 0)


# A federation: linear regression, with other coefficients and other inputs at every site.

HONEST, HOSTILE, ROUNDS = 7, 2, 10
Site = tuple[Tensor, Tensor]
Attack = Callable[[Update, Update, torch.Generator], Update]  # (mean of the honest, own honest one, randomness)

ATTACKS: dict[str, Attack] = {
    "sign flip": lambda mean, own, _: {name: -10 * tensor for name, tensor in mean.items()},
    "times a hundred": lambda mean, own, _: {name: 100 * tensor for name, tensor in own.items()},
    "not a number": lambda mean, own, _: {name: math.nan * tensor for name, tensor in own.items()},
    "large and random": lambda mean, own, generator: {
        name: 100 * torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()
    },
}


def make_sites(count: int, generator: torch.Generator) -> list[Site]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    matrix, bias = draw(5, 3), draw(3)
    sites = []
    for _ in range(count):
        inputs = draw(60, 5)
        targets = inputs @ (matrix + 0.2 * draw(5, 3)) + bias + 0.2 * draw(3) + 0.1 * draw(60, 3)
        sites.append((inputs, targets))
    return sites


def error(weights: Update, site: Site) -> Tensor:
    return (site[0] @ weights["matrix"] + weights["bias"] - site[1]).square().mean()


def train(weights: Update, site: Site) -> Update:
    """Five steps of gradient descent; the difference that they make."""
    now = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.SGD(now.values(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        error(now, site).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: now[name].detach() - tensor for name, tensor in weights.items()}


def plain_mean(updates: list[Update]) -> Update:
    return {name: torch.stack([update[name] for update in updates]).mean(0) for name in updates[0]}


def honest_loss(
    rule: Rule, attack: Attack | None, hostile: int = HOSTILE, rounds: int = ROUNDS, seed: int = 0
) -> float:
    """Loss over the honest sites after a federation in which `HOSTILE` hostile sites are expected."""
    generator = torch.Generator().manual_seed(seed)
    sites = make_sites(HONEST + hostile, generator)
    weights = {"matrix": torch.zeros(5, 3), "bias": torch.zeros(3)}
    for _ in range(rounds):
        updates = [train(weights, site) for site in sites[:HONEST]]
        if attack is not None:
            mean = plain_mean(updates)
            updates += [attack(mean, train(weights, site), generator) for site in sites[HONEST:]]
        # As the server does before any rule.
        updates = [update for update in updates if all(tensor.isfinite().all() for tensor in update.values())]
        delta = plain_mean(updates) if rule == "mean" else aggregate(rule, updates, HOSTILE)
        weights = {name: weights[name] + delta[name] for name in weights}
    return sum(error(weights, site).item() for site in sites[:HONEST]) / HONEST


@lru_cache
def start_and_best(seed: int) -> tuple[float, float]:
    """Losses before training and after that of a mean without hostile sites."""
    return honest_loss("mean", None, rounds=0, seed=seed), honest_loss("mean", None, seed=seed)


def lost(rule: Rule, attack: Attack | None, hostile: int = HOSTILE, seed: int = 0) -> float:
    """The share of that progress which is not made: 0 is all made, 1 is as if nothing was trained."""
    start, best = start_and_best(seed)
    return (honest_loss(rule, attack, hostile, seed=seed) - best) / (start - best)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_robust_rule_survives_two_hostile_sites_of_nine(rule: Rule, attack: str) -> None:
    assert lost(rule, ATTACKS[attack]) < 0.05


@pytest.mark.parametrize("attack", ["sign flip", "times a hundred", "large and random"])
def test_the_mean_does_not_survive_them(attack: str) -> None:
    assert lost("mean", ATTACKS[attack]) > 10


def test_the_mean_survives_what_is_refused_before_it() -> None:
    assert lost("mean", ATTACKS["not a number"]) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", RULES)
def test_without_hostile_sites_every_rule_comes_near_the_mean(rule: Rule, seed: int) -> None:
    assert abs(lost(rule, None, seed=seed)) < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_survives_a_hostile_majority(rule: Rule) -> None:
    assert lost(rule, ATTACKS["sign flip"], hostile=HONEST + 1) > 10
