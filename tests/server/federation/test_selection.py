"""Who is asked in a round: everybody, a fair sample, and for a while not those who fail again and again."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from maskdm_server.federation.selection import LONGEST_REST, Standing, choose

EVERYBODY = range(1, 31)


def drawn(round_number: int, at_most: int | None = 5, seed: int = 0, **changes: object) -> list[int]:
    return choose(EVERYBODY, {}, round_number, needed=1, at_most=at_most, seed=seed)


def asked_when_it_always_fails(rounds: int) -> list[int]:
    """Rounds in which a site is asked that never answers; two others do."""
    standing, asked = Standing(), []
    for number in range(1, rounds + 1):
        if 1 in choose([1, 2, 3], {1: standing}, number, needed=1, at_most=None, seed=0):
            asked.append(number)
            standing = standing.failed(number)
    return asked


def test_from_its_second_failure_in_a_row_on_a_site_rests_for_1_2_4_up_to_16_rounds() -> None:
    asked = asked_when_it_always_fails(100)
    rests = [later - earlier - 1 for earlier, later in pairwise(asked)]
    assert rests == [0, 1, 2, 4, 8, 16, 16, 16, 16]
    assert LONGEST_REST == 16


@given(failures=st.integers(0, 200), number=st.integers(1, 1000))
def test_an_answer_makes_up_for_all_failures(failures: int, number: int) -> None:
    standing = Standing()
    for _ in range(failures):
        standing = standing.failed(number)
    standing = standing.answered(7)
    assert (standing.failures, standing.rests_until, standing.replies) == (0, 0, 1)
    assert standing.failed(number).rests_until == 0, "one failure is no reason to rest"
    assert standing.failed(number).failed(number + 1).rests_until == number + 3


def test_the_first_number_of_images_that_a_site_declared_is_remembered_whatever_follows() -> None:
    standing = Standing().answered(100).answered(150).failed(3).failed(4).answered(10**6)
    assert (standing.declared, standing.replies) == (100, 3)


def test_resting_sites_are_asked_where_too_few_others_are_there_but_no_more_of_them_than_it_takes() -> None:
    standings = {site: Standing(rests_until=10) for site in (3, 4, 5)}
    for needed, expected in ((1, {1, 2}), (2, {1, 2}), (4, {1, 2, 3, 4}), (9, {1, 2, 3, 4, 5})):
        assert set(choose([5, 4, 3, 2, 1], standings, 9, needed=needed, at_most=None, seed=0)) == expected
    assert choose([1, 2, 3, 4, 5], standings, 10, needed=1, at_most=None, seed=0) == [1, 2, 3, 4, 5]


def test_a_sample_is_drawn_from_those_that_do_not_rest() -> None:
    standings = {site: Standing(rests_until=1000) for site in EVERYBODY if site % 2}
    for number in range(1, 50):
        assert all(site % 2 == 0 for site in choose(EVERYBODY, standings, number, needed=5, at_most=5, seed=0))


def test_the_same_seed_and_round_draw_the_same_clients_and_others_draw_others() -> None:
    assert [drawn(number) for number in range(1, 20)] == [drawn(number) for number in range(1, 20)]
    assert len({tuple(drawn(number)) for number in range(1, 20)}) == 19
    assert [drawn(number, seed=1) for number in range(1, 20)] != [drawn(number) for number in range(1, 20)]


def test_every_client_is_drawn_about_as_often_as_any_other() -> None:
    counts = Counter(site for number in range(1, 601) for site in drawn(number))
    assert counts.keys() == set(EVERYBODY)
    assert all(70 <= count <= 130 for count in counts.values()), counts  # 100 expected, deviation 9


@given(
    sites=st.sets(st.integers(0, 2**63 - 1), max_size=12),
    resting=st.sets(st.integers(0, 11)),
    needed=st.integers(1, 12),
    more=st.none() | st.integers(0, 8),
    order=st.randoms(use_true_random=False),
)
def test_whoever_is_chosen_is_there_and_as_many_as_there_may_be(
    sites: set[int], resting: set[int], needed: int, more: int | None, order: object
) -> None:
    """In whatever order they are listed."""
    listed = sorted(sites)
    standings = {site: Standing(rests_until=9) for i, site in enumerate(listed) if i in resting}
    at_most = None if more is None else needed + more
    chosen = choose(listed, standings, 5, needed=needed, at_most=at_most, seed=3)
    order.shuffle(listed)  # type: ignore[attr-defined]
    assert choose(listed, standings, 5, needed=needed, at_most=at_most, seed=3) == chosen
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= sites
    awake = len(sites) - len(standings)
    candidates = awake if awake >= needed else min(needed, len(sites))
    assert len(chosen) == (candidates if at_most is None else min(candidates, at_most))
