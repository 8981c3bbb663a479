"""Who is let in follows the list of sites, while the server runs."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from maskdm.errors import FederationError, UsageError
from maskdm_server import roster as under_test
from maskdm_server.provision import provision, renew, revoke
from maskdm_server.roster import NODES, Named, Roster
from maskdm_server.sites import SITES, read_sites, write_sites


class Control:
    """Flower's control interface, played."""

    def __init__(self) -> None:
        self.nodes: dict[int, str] = {}
        self.away = False
        self._next = 0

    def register(self, name: str, public_key: bytes) -> int:
        self._check()
        assert public_key.startswith(b"-----BEGIN PUBLIC KEY-----")
        self._next += 1
        self.nodes[self._next] = name
        return self._next

    def unregister(self, node: int) -> None:
        self._check()
        del self.nodes[node]

    def names(self) -> list[str]:
        return sorted(self.nodes.values())

    def _check(self) -> None:
        if self.away:
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
    assert names == place.control.nodes


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
    named = Named(place.federation)
    before = {place.control.nodes[node]: named.site(node) for node in place.control.nodes}
    assert len(set(before.values())) == 2
    assert {named.name(site) for site in before.values()} == {"a", "b"}
    renew(place.kits, ["a"], policy=b"")
    place.follow()
    after = {node: named.site(node) for node in place.control.nodes}
    assert {after[node] for node, name in place.control.nodes.items() if name == "a"} == {before["a"]}
    assert Named(place.federation).site(1) == named.site(1)


def test_without_kits_a_site_is_its_node(tmp_path: Path) -> None:
    named = Named(tmp_path)
    assert (named.site(2**63), named.name(5)) == (2**63, "5")
