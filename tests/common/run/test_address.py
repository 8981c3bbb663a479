"""HOST:PORT as both sides read it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm.errors import UsageError
from maskdm.run.address import host_and_port


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example.org:8000", ("example.org", 8000)),
        ("localhost:1", ("localhost", 1)),
        ("my_server:65535", ("my_server", 65535)),
        ("127.0.0.1:9", ("127.0.0.1", 9)),
        ("[::1]:8000", ("::1", 8000)),
        ("[2001:db8::7]:443", ("2001:db8::7", 443)),
        ("[fe80::1%eth0]:443", ("fe80::1%eth0", 443)),
    ],
)
def test_a_name_and_both_kinds_of_addresses_are_read(text: str, expected: tuple[str, int]) -> None:
    assert host_and_port("--server", text) == expected


@pytest.mark.parametrize("text", ["::1", "::1:8000", "2001:db8::7", "2001:db8::7:443"])
def test_an_ipv6_address_without_brackets_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^--server {text}: an IPv6 address goes in brackets, e\.g\. \[::1\]:8000$"):
        host_and_port("--server", text)


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", "example.org", ":80", "example.org:", "[::1]", "[]:80", "[example.org]:80", "[127.0.0.1]:80"),
        *("example.org:0", "example.org:65536", "example.org:-1", "example.org:+1", "example.org: 1", "example.org:1 "),
        *("a:b", "example.org:٣", "example.org:8_0", "example.org:99999999999999999999"),
        *("exa mple:80", "https://example.org:80", "user@example.org:80", "example.org/path:80", "a:b:80", "-a:80"),
    ],
)
def test_what_is_no_address_is_a_mistake(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--server .*: give HOST:PORT, e\.g\. maskdm\.example\.org:8000$"):
        host_and_port("--server", text)


@given(st.text(max_size=12) | st.from_regex(r"\A[][a-f0-9:.%]{0,12}:[0-9]{0,6}\Z"))
def test_whatever_is_typed_is_an_address_or_a_mistake_of_the_user(text: str) -> None:
    try:
        host, port = host_and_port("--server", text)
    except UsageError:
        return
    assert host
    assert 0 < port < 65536
