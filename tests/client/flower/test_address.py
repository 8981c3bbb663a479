"""A site speaks in the clear to its own machine, and to another one only when told to."""

from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.federated.kit import open_kit
from maskdm_client.flower.address import address_of
from maskdm_server.kits.provision import provision


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (None, ("127.0.0.1", 8000)),
        ("127.0.0.1:9", ("127.0.0.1", 9)),
        ("localhost:9", ("localhost", 9)),
        ("[::1]:9", ("::1", 9)),
        ("127.8.8.8:9", ("127.8.8.8", 9)),
    ],
)
def test_loopback_needs_no_kit(server: str | None, expected: tuple[str, int]) -> None:
    assert address_of(server, None, insecure=False) == expected


@pytest.mark.parametrize("server", ["example.org:80", "10.0.0.1:80", "localhost.example.org:80", "0.0.0.0:80"])
def test_another_machine_needs_a_kit_or_the_word_insecure(server: str) -> None:
    with pytest.raises(UsageError, match="--kit"):
        address_of(server, None, insecure=False)
    assert address_of(server, None, insecure=True)[1] == 80


def test_a_kit_knows_the_server_and_an_option_beats_it(tmp_path: Path) -> None:
    (made,) = provision(tmp_path / "kits", "example.org:8443", ["a"], policy=b"")
    kit = open_kit(made, tmp_path / "site")
    assert address_of(None, kit, insecure=False) == ("example.org", 8443)
    assert address_of("tunnel:1", kit, insecure=False) == ("tunnel", 1)


def test_what_is_no_address_is_a_mistake_under_the_name_of_the_option() -> None:
    with pytest.raises(UsageError, match=r"^--server example\.org: give HOST:PORT"):
        address_of("example.org", None, insecure=True)
