"""Kits are made once, renewed, revoked; the server's certificate has the right names."""

import json
import os
import ssl
import stat
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from maskdm.config import ModelConfig
from maskdm.errors import UsageError
from maskdm.federated.kit import Kit
from maskdm_server.kits.provision import provision, renew, revoke
from maskdm_server.kits.sites import read_server, read_sites

POLICY = b"min-images = 2\n"
SERVER = "maskdm.example.org:8443"


def make(out: Path, *clients: str, server: str | None = SERVER, names: tuple[str, ...] = ()) -> list[Path]:
    return provision(out, server, clients, names=names, policy=POLICY)


def certificate(out: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((out / "server" / "server.crt").read_bytes())


def names_of(found: x509.Certificate) -> set[str]:
    extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in extension}


def kit_of(path: Path) -> Kit:
    with zipfile.ZipFile(path) as archive:
        return Kit.model_validate_json(archive.read("kit.json"))


def test_private_keys_are_only_this_users_and_the_authoritys_is_in_no_kit(tmp_path: Path) -> None:
    made = make(tmp_path, "a", "b")
    private = [tmp_path / "authority" / "ca.key", tmp_path / "server" / "server.key", *made]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o600] * 4
    secret = (tmp_path / "authority" / "ca.key").read_bytes()
    for path in [*made, *(tmp_path / "server").iterdir()]:
        content = path.read_bytes()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert secret.split(b"\n")[1] not in content, path


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_the_folder_of_kits_is_closed_to_other_users_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make(tmp_path / "kits", "a")
        folders = [tmp_path / "kits" / name for name in (".", "authority", "server")]
        assert [stat.S_IMODE(path.stat().st_mode) for path in folders] == [0o700] * 3
        (tmp_path / "kits").chmod(0o755)  # as an earlier version left it
        renew(tmp_path / "kits", [], policy=POLICY)
        assert stat.S_IMODE((tmp_path / "kits").stat().st_mode) == 0o700
    finally:
        os.umask(before)


def test_a_folder_that_holds_other_things_stays_open(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    make(tmp_path, "a")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "authority").stat().st_mode) == 0o700


def test_the_certificate_names_the_server_and_is_signed_by_the_authority(tmp_path: Path) -> None:
    make(tmp_path, "a", names=("10.0.0.7", "server"))
    found = certificate(tmp_path)
    assert names_of(found) == {"maskdm.example.org", "10.0.0.7", "server", "localhost", "127.0.0.1"}
    found.verify_directly_issued_by(x509.load_pem_x509_certificate((tmp_path / "server" / "ca.crt").read_bytes()))
    assert timedelta(days=89) < found.not_valid_after_utc - datetime.now(UTC) <= timedelta(days=90)


def test_the_certificates_pass_a_strict_handshake(tmp_path: Path) -> None:
    make(tmp_path, "a")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(tmp_path / "server" / "server.crt", tmp_path / "server" / "server.key")
    asking = ssl.create_default_context(cafile=str(tmp_path / "server" / "ca.crt"))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = served.wrap_bio(there, back, True), asking.wrap_bio(back, there, False, "maskdm.example.org")
    open_ends = [client, server]
    for _ in range(10):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                continue
    assert not open_ends


def test_provisioning_again_makes_only_what_is_new(tmp_path: Path) -> None:
    make(tmp_path, "a")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert make(tmp_path, "a", "b", server=None) == [tmp_path / "b.zip"]
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"sites.json"}
    assert [site.name for site in read_sites(tmp_path / "server" / "sites.json")] == ["a", "b"]


def test_another_name_of_the_server_makes_a_new_certificate_with_all_of_them(tmp_path: Path) -> None:
    make(tmp_path, "a", names=("one",))
    make(tmp_path, server=None, names=("two",))
    assert {"one", "two"} <= names_of(certificate(tmp_path))


def test_a_revoked_site_is_marked_and_can_be_given_a_new_kit(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    revoke(tmp_path, "a")
    now = datetime.now(UTC)
    assert [site.is_valid(now) for site in read_sites(tmp_path / "server" / "sites.json")] == [False, True]
    assert not (tmp_path / "a.zip").exists()
    with pytest.raises(UsageError, match="these have one: b"):
        revoke(tmp_path, "a")
    assert make(tmp_path, "a") == [tmp_path / "a.zip"]
    assert [site.is_valid(now) for site in read_sites(tmp_path / "server" / "sites.json")] == [False, True, True]


def test_a_renewal_gives_new_keys_and_leaves_the_old_ones_until_they_expire(tmp_path: Path) -> None:
    model = ModelConfig(image_size=32)
    provision(tmp_path, SERVER, ["a", "b", "c"], days=10, policy=POLICY, model=model)
    revoke(tmp_path, "c")
    before = certificate(tmp_path)
    assert renew(tmp_path, [], days=90, policy=POLICY) == [tmp_path / "a.zip", tmp_path / "b.zip"]
    sites = read_sites(tmp_path / "server" / "sites.json")
    assert [site.name for site in sites if site.is_valid(datetime.now(UTC))] == ["a", "b", "a", "b"]
    assert len({site.public_key for site in sites}) == 5
    assert [site.name for site in sites if site.is_valid(datetime.now(UTC) + timedelta(days=30))] == ["a", "b"]
    after = certificate(tmp_path)
    assert after.not_valid_after_utc > before.not_valid_after_utc
    assert names_of(after) == names_of(before)
    assert kit_of(tmp_path / "a.zip").model == model
    assert renew(tmp_path, ["b"], policy=POLICY) == [tmp_path / "b.zip"]
    with pytest.raises(UsageError, match="--client c has no kit"):
        renew(tmp_path, ["c"], policy=POLICY)


@pytest.mark.parametrize(
    ("server", "client", "problem"),
    [
        (None, "a", "--server is missing"),
        ("example.org", "a", "HOST:PORT"),
        ("example.org:0", "a", "HOST:PORT"),
        ("exa mple:80", "a", "HOST:PORT"),
        ("::1", "a", r"brackets, e\.g\. \[::1\]:8000"),
        ("[::1]:8000", "a", "give a host name or an IPv4 address, which serve listens on"),
        (SERVER, "../a", "--client"),
        (SERVER, "", "--client"),
        (SERVER, "a/b", "--client"),
    ],
)
def test_a_name_that_cannot_be_one_is_a_mistake_and_nothing_is_made(
    tmp_path: Path, server: str | None, client: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        make(tmp_path / "kits", client, server=server)
    assert not (tmp_path / "kits").exists()


def test_a_bad_extra_name_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--san a b"):
        make(tmp_path, "a", names=("a b",))


def test_kits_for_another_server_go_to_another_folder(tmp_path: Path) -> None:
    make(tmp_path, "a")
    with pytest.raises(UsageError, match="choose another --out"):
        make(tmp_path, "b", server="elsewhere.org:1")


def test_without_the_authoritys_key_no_second_authority_is_made(tmp_path: Path) -> None:
    make(tmp_path, "a")
    (tmp_path / "authority" / "ca.key").unlink()
    with pytest.raises(UsageError, match="put it back"):
        make(tmp_path, "b")
    revoke(tmp_path, "a")  # needs no key


def test_a_foreign_key_in_the_authoritys_place_is_seen(tmp_path: Path) -> None:
    make(tmp_path / "one", "a")
    make(tmp_path / "two", "a")
    (tmp_path / "one" / "authority" / "ca.key").write_bytes((tmp_path / "two" / "authority" / "ca.key").read_bytes())
    with pytest.raises(UsageError, match="does not belong"):
        make(tmp_path / "one", "b")


def test_what_the_server_is_told_can_be_read_back(tmp_path: Path) -> None:
    make(tmp_path, "a", names=("other",))
    found = read_server(tmp_path / "server")
    assert found is not None
    assert (found.server, found.names) == (SERVER, ("other",))
    (tmp_path / "server" / "sites.json").write_text(json.dumps({"sites": [{"name": "x"}]}))
    with pytest.raises(UsageError, match=r"sites\.json"):
        read_sites(tmp_path / "server" / "sites.json")


def test_a_list_with_a_key_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    make(tmp_path, "a")
    path = tmp_path / "server" / "sites.json"
    for key in ("", "ssh-foo AAAA", "ecdsa-sha2-nistp384 AAAA"):
        document = json.loads(path.read_text())
        document["sites"][0]["public_key"] = key
        path.write_text(json.dumps(document))
        with pytest.raises(UsageError, match=r"sites\.json"):
            read_sites(path)
