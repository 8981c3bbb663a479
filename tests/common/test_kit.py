"""A startup kit is taken only as it was made."""

import shutil
import stat
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.kit import KEY, KIT, POLICY, SIGNATURE, SIGNED, open_kit, valid_kit
from maskdm.policy import TEMPLATE
from maskdm_server.provision import provision


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
