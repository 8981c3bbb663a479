"""How many updates may leave a site in 24 hours, whatever happens between."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskdm.policy import DAY, SitePolicy
from maskdm_client import allowance
from maskdm_client.allowance import UPDATES, PolicyRefused, check_allowance, use_allowance

TWICE = SitePolicy(max_rounds_per_day=2)


class Clock:
    """What `time.time` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.time()
        monkeypatch.setattr(allowance, "time", SimpleNamespace(time=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_as_many_updates_leave_in_24_hours_as_the_policy_says(tmp_path: Path, clock: Clock) -> None:
    use_allowance(tmp_path, "1", TWICE)
    clock.now += DAY / 2
    use_allowance(tmp_path, "2", TWICE)
    for refused in (check_allowance, use_allowance):
        with pytest.raises(PolicyRefused, match="allows 2 updates in 24 hours"):
            refused(tmp_path, "3", TWICE)
    clock.now += DAY / 2 + 1
    use_allowance(tmp_path, "3", TWICE)
    with pytest.raises(PolicyRefused):
        use_allowance(tmp_path, "4", TWICE)


def test_an_update_that_is_made_again_after_a_crash_counts_once_and_an_earlier_one_anew(tmp_path: Path) -> None:
    for work in ("1", "2", "2", "2"):
        use_allowance(tmp_path, work, TWICE)
    check_allowance(tmp_path, "2", TWICE)
    with pytest.raises(PolicyRefused):
        use_allowance(tmp_path, "1", TWICE)


def test_work_without_a_key_counts_each_time(tmp_path: Path) -> None:
    use_allowance(tmp_path, "", TWICE)
    use_allowance(tmp_path, "", TWICE)
    with pytest.raises(PolicyRefused):
        use_allowance(tmp_path, "", TWICE)


def test_a_clock_that_was_put_back_gives_no_more(tmp_path: Path, clock: Clock) -> None:
    use_allowance(tmp_path, "1", TWICE)
    use_allowance(tmp_path, "2", TWICE)
    clock.now -= 10 * DAY
    with pytest.raises(PolicyRefused):
        use_allowance(tmp_path, "3", TWICE)


def test_what_is_kept_does_not_grow(tmp_path: Path, clock: Clock) -> None:
    sizes = []
    for number in range(40):
        use_allowance(tmp_path, f"{number:064}", TWICE)
        sizes.append((tmp_path / UPDATES.file).stat().st_size)
        clock.now += DAY
    assert max(sizes) < 200


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[["now", 1]]', "[[NaN, 1]]", "[[1, null]]"])
def test_where_nobody_knows_what_left_nothing_leaves(tmp_path: Path, content: str) -> None:
    (tmp_path / UPDATES.file).write_text(content)
    for refused in (check_allowance, use_allowance):
        with pytest.raises(PolicyRefused, match=r"releases\.json is damaged"):
            refused(tmp_path, "1", TWICE)


def test_what_cannot_be_counted_does_not_leave(tmp_path: Path) -> None:
    (tmp_path / UPDATES.file).mkdir()
    with pytest.raises(OSError, match="directory"):
        use_allowance(tmp_path, "1", TWICE)


def test_without_a_limit_nothing_is_kept(tmp_path: Path) -> None:
    use_allowance(tmp_path, "1", SitePolicy())
    check_allowance(tmp_path, "1", SitePolicy())
    assert not list(tmp_path.iterdir())
