"""Who is let in follows the list of sites, while the server runs."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from maskdm.errors import FederationError, UsageError
from maskdm_server.flower import roster as under_test
from maskdm_server.flower.roster import NODES, Named, Roster
from maskdm_server.kits.provision import provision, renew, revoke
from maskdm_server.kits.sites import SITES, read_sites, write_sites


class Control:
    """Flower's control interface, played: what it did may be done though its answer was lost."""

    def __init__(self) -> None:
        self.keys: dict[bytes, int] = {}
        self.called: dict[int, str] = {}
        self.away = self.loses_answers = False

    def nodes(self) -> dict[bytes, int]:
        self._check(self.away)
        return dict(self.keys)

    def register(self, name: str, public_key: bytes) -> int:
        self._check(self.away or public_key in self.keys)
        assert public_key.startswith(b"-----BEGIN PUBLIC KEY-----")
        self.keys[public_key] = len(self.called) + 1
        self.called[self.keys[public_key]] = name
        self._check(self.loses_answers)
        return self.keys[public_key]

    def unregister(self, node: int) -> None:
        self._check(self.away or node not in self.keys.values())
        self.keys = {key: number for key, number in self.keys.items() if number != node}
        self._check(self.loses_answers)

    def names(self) -> list[str]:
        return sorted(self.called[node] for node in self.keys.values())

    def _check(self, fails: bool) -> None:
        if fails:
            raise FederationError("the SuperLink is away")


class Place:
    """A folder of kits and a federation, and a roster between them."""

    def __init__(self, folder: Path) -> None:
        self.kits, self.federation = folder / "kits", folder / "fed"
        provision(self.kits, "127.0.0.1:8000", ["a", "b"], policy=b"")
        (self.federation / ".flwr").mkdir(parents=True)
        self.control, self.said = Control(), list[str]()
        self.roster = Roster(self.kits / "server", self.federation / ".flwr", self.said.append)
        self.follow()

    def follow(self) -> None:
        self.roster.follow(self.control)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(under_test, "LOOK_SECONDS", 0.0)
    return Place(tmp_path)


def test_those_on_the_list_are_let_in_and_known_by_name(place: Place) -> None:
    assert place.control.names() == ["a", "b"]
    names = {int(node): name for node, name in json.loads((place.federation / ".flwr" / NODES).read_text()).items()}
    assert names == {node: place.control.called[node] for node in place.control.keys.values()}


def test_who_is_revoked_is_put_out_and_who_is_new_let_in(place: Place) -> None:
    revoke(place.kits, "a")
    provision(place.kits, None, ["c"], policy=b"")
    place.follow()
    assert place.control.names() == ["b", "c"]
    assert place.said == ["a is let in no more: its kit was revoked or has expired"]


def test_who_has_expired_is_put_out(place: Place) -> None:
    path = place.kits / "server" / SITES
    first, second = read_sites(path)
    write_sites(path, [first.model_copy(update={"expires": datetime.now(UTC) - timedelta(seconds=1)}), second])
    place.follow()
    assert place.control.names() == ["b"]


def test_a_list_that_somebody_is_editing_puts_nobody_out_and_is_complained_of_once(place: Place) -> None:
    path = place.kits / "server" / SITES
    path.write_text('{"sites": [')
    place.follow()
    place.follow()
    assert place.control.names() == ["a", "b"]
    assert len(place.said) == 1
    assert place.said[0].startswith("WARNING")


def test_a_superlink_that_is_away_is_told_later(place: Place) -> None:
    place.control.away = True
    revoke(place.kits, "a")
    place.follow()
    assert place.control.names() == ["a", "b"]
    place.control.away = False
    place.follow()
    assert place.control.names() == ["b"]


def test_an_answer_that_was_lost_jams_nothing(place: Place) -> None:
    place.control.loses_answers = True
    revoke(place.kits, "a")
    provision(place.kits, None, ["c", "d"], policy=b"")
    for _ in range(6):
        place.follow()
    assert place.control.names() == ["b", "c", "d"]
    names = json.loads((place.federation / ".flwr" / NODES).read_text())
    assert sorted(names.values()) == ["b", "c", "d"]


def test_a_disk_that_is_full_is_told_and_tried_again(place: Place) -> None:
    path = place.federation / ".flwr" / NODES
    path.unlink()
    path.mkdir()
    revoke(place.kits, "a")
    place.follow()
    assert place.control.names() == ["b"]
    assert place.said[-1].startswith("WARNING")
    path.rmdir()
    place.follow()
    assert list(json.loads(path.read_text()).values()) == ["b"]


def test_it_looks_every_few_seconds_only(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(under_test, "LOOK_SECONDS", 1e9)
    revoke(place.kits, "a")
    place.follow()
    assert place.control.names() == ["a", "b"]


def test_a_list_that_cannot_be_read_at_the_start_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / SITES).write_text("{}")
    with pytest.raises(UsageError, match=SITES):
        Roster(tmp_path, tmp_path, print)


def test_a_site_is_the_same_with_another_key_and_after_a_restart(place: Place) -> None:
    named, called = Named(place.federation), place.control.called
    before = {called[node]: named.site(node) for node in called}
    assert len(set(before.values())) == 2
    assert {named.name(site) for site in before.values()} == {"a", "b"}
    renew(place.kits, ["a"], policy=b"")
    place.follow()
    old, new = sorted(node for node, name in called.items() if name == "a")
    assert named.site(old) == named.site(new) == before["a"]
    assert named.nodes([new, old])[before["a"]] == named.nodes([old, new])[before["a"]] == new
    assert Named(place.federation).site(1) == named.site(1)


def test_without_kits_a_site_is_its_node(tmp_path: Path) -> None:
    named = Named(tmp_path)
    assert (named.site(2**63), named.name(5), named.nodes([5, 7])) == (2**63, "5", {5: 5, 7: 7})
