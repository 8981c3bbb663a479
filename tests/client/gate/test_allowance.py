"""How often a site may be asked, whatever happens between."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import DAY, SitePolicy
from maskdm_client.folder.job import Job
from maskdm_client.folder.settings import SiteSettings
from maskdm_client.gate import allowance
from maskdm_client.gate.allowance import MEASUREMENTS, UPDATES, check_allowance, use_allowance
from maskdm_client.refusals import PolicyRefused

JobOf = Callable[..., Job]

TWICE = SitePolicy(max_rounds_per_day=2)


@pytest.fixture
def job_of(make_plan: Callable[..., RoundPlan], tmp_path: Path) -> Callable[..., Job]:
    """Some work at a site that may be asked twice a day."""

    def make(work: str, policy: SitePolicy = TWICE, **changes: Any) -> Job:
        settings = SiteSettings(data=tmp_path, policy=policy)
        return Job(make_plan(**changes), work, settings, tmp_path, lambda event: None, lambda: False)

    return make


class Clock:
    """What `time.time` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(allowance, "time", SimpleNamespace(time=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_as_many_updates_are_made_in_24_hours_as_the_policy_says(job_of: JobOf, clock: Clock) -> None:
    use_allowance(job_of("1"), UPDATES)
    clock.now += DAY / 2
    use_allowance(job_of("2"), UPDATES)
    for refused in (check_allowance, use_allowance):
        with pytest.raises(PolicyRefused, match="allows 2 updates in 24 hours"):
            refused(job_of("3"), UPDATES)
    clock.now += DAY / 2 + 1
    use_allowance(job_of("3"), UPDATES)
    with pytest.raises(PolicyRefused):
        use_allowance(job_of("4"), UPDATES)


def test_an_update_that_is_made_again_after_a_crash_counts_once_and_an_earlier_one_anew(
    job_of: JobOf, tmp_path: Path
) -> None:
    for work in ("1", "2", "2", "2"):
        use_allowance(job_of(work), UPDATES)
    check_allowance(job_of("2"), UPDATES)
    with pytest.raises(PolicyRefused):
        use_allowance(job_of("1"), UPDATES)


def test_work_without_a_key_counts_each_time(job_of: JobOf) -> None:
    use_allowance(job_of(""), UPDATES)
    use_allowance(job_of(""), UPDATES)
    with pytest.raises(PolicyRefused):
        use_allowance(job_of(""), UPDATES)


def test_a_clock_that_was_put_back_gives_no_more(job_of: JobOf, clock: Clock) -> None:
    use_allowance(job_of("1"), UPDATES)
    use_allowance(job_of("2"), UPDATES)
    clock.now -= 10 * DAY
    with pytest.raises(PolicyRefused):
        use_allowance(job_of("3"), UPDATES)


def test_what_is_kept_does_not_grow_for_ever(job_of: JobOf, tmp_path: Path, clock: Clock) -> None:
    sizes = []
    for number in range(40):
        use_allowance(job_of(f"{number:064}"), UPDATES)
        sizes.append((tmp_path / UPDATES.file).stat().st_size)
        clock.now += 100 * DAY
    assert max(sizes) == sizes[-1] == sizes[5], "a year's"


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[["now", 1]]', "[[NaN, 1]]", "[[1, null]]"])
def test_where_nobody_knows_what_left_nothing_leaves(job_of: JobOf, tmp_path: Path, content: str) -> None:
    (tmp_path / UPDATES.file).write_text(content)
    for refused in (check_allowance, use_allowance):
        with pytest.raises(PolicyRefused, match=r"updates\.json is damaged"):
            refused(job_of("1"), UPDATES)


def test_what_cannot_be_counted_does_not_leave(job_of: JobOf, tmp_path: Path) -> None:
    (tmp_path / UPDATES.file).mkdir()
    with pytest.raises(OSError, match="directory"):
        use_allowance(job_of("1"), UPDATES)


def test_a_federation_may_ask_only_so_often_however_many_days_it_lasts(job_of: JobOf, clock: Clock) -> None:
    policy = SitePolicy(max_rounds_per_day=2, max_rounds=3)
    for work in ("1", "2", "3"):
        use_allowance(job_of(work, policy), UPDATES)
        clock.now += DAY
    for again in (check_allowance, use_allowance):
        with pytest.raises(PolicyRefused, match=r"allows 3 updates in a federation.*max-rounds\)"):
            again(job_of("4", policy), UPDATES)
    use_allowance(job_of("4", policy, federation="f" * 16), UPDATES)
    use_allowance(job_of("4", policy), MEASUREMENTS)


def test_other_federations_count_for_the_day_and_do_not_hide_what_one_asked(job_of: JobOf) -> None:
    policy = SitePolicy(max_rounds_per_day=10, max_rounds=2)
    use_allowance(job_of("1", policy), UPDATES)
    for number in range(7):
        use_allowance(job_of(f"other {number}", policy, federation=f"{number:016x}"), UPDATES)
    use_allowance(job_of("2", policy), UPDATES)
    with pytest.raises(PolicyRefused, match="in a federation"):
        use_allowance(job_of("3", policy), UPDATES)
    use_allowance(job_of("3", policy, federation="f" * 16), UPDATES)
    with pytest.raises(PolicyRefused, match="in 24 hours"):
        use_allowance(job_of("4", policy, federation="e" * 16), UPDATES)
