"""A startup kit is taken only as it was made."""

import os
import re
import shutil
import stat
import struct
import zipfile
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskdm.errors import UsageError
from maskdm.federated.kit import KEY, KIT, POLICY, SIGNATURE, SIGNED, open_kit, valid_kit
from maskdm.federated.policy import TEMPLATE
from maskdm_server.kits.provision import provision


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (made,) = provision(tmp_path / "kits", "example.org:8000", ["hospital-a"], policy=TEMPLATE.encode())
    return made


def unpacked(kit: Path, folder: Path) -> Path:
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(folder)
    return folder


def test_a_kit_says_who_joins_what_and_its_key_is_only_this_users(kit: Path, tmp_path: Path) -> None:
    opened = valid_kit(kit, tmp_path / "site" / "kit")
    assert (opened.kit.name, opened.kit.server) == ("hospital-a", "example.org:8000")
    assert opened.policy_is_as_made
    assert opened.kit.expires - opened.kit.issued == timedelta(days=90)
    assert stat.S_IMODE(opened.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(opened.folder.stat().st_mode) == 0o700
    assert b"ca.key" not in kit.read_bytes(), "the authority's key is in the kit"


def test_a_folder_of_the_same_files_is_a_kit_too_whatever_its_permissions(kit: Path, tmp_path: Path) -> None:
    folder = unpacked(kit, tmp_path / "unpacked")
    (folder / KEY).chmod(0o644)
    opened = open_kit(folder, tmp_path / "site")
    assert stat.S_IMODE(opened.key.stat().st_mode) == 0o600
    assert opened.fingerprint() == open_kit(kit, tmp_path / "other").fingerprint()


def test_the_policy_may_be_changed_by_the_site_and_that_is_seen(kit: Path, tmp_path: Path) -> None:
    folder = unpacked(kit, tmp_path / "unpacked")
    (folder / POLICY).write_text("min-images = 50\n")
    assert not open_kit(folder, tmp_path / "site").policy_is_as_made


@pytest.mark.parametrize("name", [KIT, SIGNATURE, *SIGNED])
def test_a_kit_whose_files_were_changed_is_refused(kit: Path, tmp_path: Path, name: str) -> None:
    folder = unpacked(kit, tmp_path / "unpacked")
    content = bytearray((folder / name).read_bytes())
    middle = len(content) // 2  # a letter that is sought may be missing from a signature
    content[middle] = ord("B" if content[middle] == ord("A") else "A")
    (folder / name).write_bytes(content)
    with pytest.raises(UsageError, match="was damaged or changed"):
        open_kit(folder, tmp_path / "site")


@pytest.mark.parametrize("name", [KIT, KEY])
def test_files_of_two_kits_do_not_make_one(kit: Path, tmp_path: Path, name: str) -> None:
    (other,) = provision(tmp_path / "others", "example.org:8000", ["hospital-a"], policy=TEMPLATE.encode())
    folder, foreign = unpacked(kit, tmp_path / "unpacked"), unpacked(other, tmp_path / "foreign")
    shutil.copy(foreign / name, folder / name)
    with pytest.raises(UsageError, match="was damaged or changed"):
        open_kit(folder, tmp_path / "site")


def test_a_kit_signed_by_its_own_holder_is_refused(kit: Path, tmp_path: Path) -> None:
    """A site cannot give itself another server, or more time."""
    folder = unpacked(kit, tmp_path / "unpacked")
    (folder / KIT).write_text((folder / KIT).read_text().replace("example.org", "example.com"))
    with pytest.raises(UsageError, match="its signature does not hold"):
        open_kit(folder, tmp_path / "site")


def test_an_expired_kit_and_one_from_the_future_say_what_to_do(kit: Path, tmp_path: Path) -> None:
    opened = open_kit(kit, tmp_path / "site")
    assert opened.kit.problem(opened.kit.issued) is None
    assert "provision renew" in str(opened.kit.problem(opened.kit.expires + timedelta(seconds=1)))
    assert "this machine's clock" in str(opened.kit.problem(opened.kit.issued - timedelta(hours=1)))


@pytest.mark.parametrize("make", ["nothing", "text", "empty folder", "zip without a key", "huge"])
def test_what_is_no_kit_is_a_mistake_of_one_line(kit: Path, tmp_path: Path, make: str) -> None:
    path = tmp_path / "given"
    if make == "text":
        path.write_text("no zip")
    elif make == "empty folder":
        path.mkdir()
    elif make != "nothing":
        with zipfile.ZipFile(kit) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in whole.namelist():
                content = bytes(2_000_000) if make == "huge" and name == "README.md" else whole.read(name)
                if make == "huge" or name != KEY:
                    archive.writestr(name, content)
    with pytest.raises(UsageError, match="--kit"):
        open_kit(path, tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("name", [KIT, POLICY, KEY])
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "link to a FIFO"])
def test_a_kit_that_holds_what_is_no_file_is_refused_at_once(kit: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = unpacked(kit, tmp_path / "unpacked")
    (folder / name).unlink()
    match kind:
        case "FIFO":
            os.mkfifo(folder / name)
        case "device":
            (folder / name).symlink_to("/dev/zero")
        case "folder":
            (folder / name).mkdir()
        case _:
            os.mkfifo(tmp_path / "fifo")
            (folder / name).symlink_to(tmp_path / "fifo")
    with pytest.raises(UsageError, match=rf"--kit .* is no kit: {re.escape(name)} is no regular file"):
        open_kit(folder, tmp_path / "site")


def test_a_kit_of_links_to_files_is_a_kit(kit: Path, tmp_path: Path) -> None:
    """As Kubernetes mounts a Secret."""
    unpacked(kit, tmp_path / "data")
    (tmp_path / "mounted").mkdir()
    for path in (tmp_path / "data").iterdir():
        (tmp_path / "mounted" / path.name).symlink_to(path)
    assert open_kit(tmp_path / "mounted", tmp_path / "site").kit.name == "hospital-a"


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "FIFO"])
def test_a_device_is_no_kit(tmp_path: Path, path: str) -> None:
    if path == "FIFO":
        os.mkfifo(tmp_path / path)
    with pytest.raises(UsageError, match=r"is no kit: .* is no regular file"):
        open_kit(tmp_path / path, tmp_path / "site")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR])
def test_a_member_of_a_zip_that_is_no_file_is_refused(kit: Path, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "given.zip"
    with zipfile.ZipFile(kit) as whole, zipfile.ZipFile(path, "w") as archive:
        for name in whole.namelist():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (mode if name == POLICY else stat.S_IFREG) << 16
            archive.writestr(entry, "policy.toml" if name == POLICY else whole.read(name))
    with pytest.raises(UsageError, match=r"policy\.toml is no regular file"):
        open_kit(path, tmp_path / "site")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\udcff.zip", "two\nlines"])
def test_a_name_that_cannot_be_one_is_a_mistake_of_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--kit") as raised:
        open_kit(tmp_path / name, tmp_path / "site")
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("broken", ["name", "method", "name and method"])
def test_a_zip_whose_names_or_contents_cannot_be_decoded_is_a_mistake_of_one_line(
    kit: Path, tmp_path: Path, broken: str
) -> None:
    content, path = bytearray(kit.read_bytes()), tmp_path / "given.zip"
    place = content.find(b"PK\x01\x02")
    while place >= 0:  # the headers of the central directory
        if "method" in broken:
            content[place + 10 : place + 12] = struct.pack("<H", 14)  # LZMA
        if "name" in broken:
            content[place + 8 : place + 10] = struct.pack("<H", 0x800)  # UTF-8
            content[place + 46] = 0xFF
        place = content.find(b"PK\x01\x02", place + 4)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="--kit"):
        open_kit(path, tmp_path / "site")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_however_a_zip_is_damaged_it_is_refused_or_opens_as_what_it_was(
    kit: Path, tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content, path = bytearray(kit.read_bytes()), tmp_path / "given.zip"
    for place, value in changes:
        content[-1 - place % len(content)] = value
    path.write_bytes(content)
    with suppress(UsageError):
        assert open_kit(path, tmp_path / "site").kit.name == "hospital-a"
