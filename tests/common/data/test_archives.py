"""Zips and tars are read like the standard library reads them, in flat memory, and damage is one line."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maskdm.data import archives
from maskdm.data.archives import MAX_FILE_BYTES, Part, is_tar, is_zip, read, tar_members, zip_members
from maskdm.errors import DataError

pytestmark = pytest.mark.usefixtures("in_time")

Files = dict[str, bytes]
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
THREE: Files = {"a/1.png": b"first " * 50, "a/b/2.png": bytes(range(256)) * 3, "3.png": b""}

names = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=12)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)
contents = st.one_of(st.binary(max_size=300), st.builds(bytes.__mul__, st.binary(max_size=3), st.integers(0, 3000)))
comments = st.binary(max_size=40).filter(lambda comment: b"PK\x05\x06" not in comment)  # which zipfile cannot read
programs = st.binary(max_size=90).map(lambda data: data and b"MZ" + data)  # that unpack themselves
files = st.dictionaries(paths, contents, max_size=5)


def zipped(content: Files, method: int = zipfile.ZIP_DEFLATED, comment: bytes = b"", zip64: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.comment = comment
        for name, data in content.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(data)
    return buffer.getvalue()


def tarred(content: Files, kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, data in content.items():
            add(archive, name, data)
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    archive.addfile(info, io.BytesIO(data))


def whole(path: Path, members: Callable[[Path], Iterable[tuple[str, Part | bytes]]]) -> list[tuple[str, bytes]]:
    return [(name, read(part) if isinstance(part, Part) else part) for name, part in members(path)]


def delivered(path: Path, members: Callable[[Path], Iterable[tuple[str, Part | bytes]]]) -> list[tuple[str, bytes]]:
    """What can be read of an archive before it turns out to be damaged. Nothing but DataError may come of that."""
    found = []
    try:
        for name, part in members(path):
            try:
                found.append((name, read(part) if isinstance(part, Part) else part))
            except DataError:
                continue
    except DataError:
        pass
    return found


def by_zipfile(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist() if not info.is_dir()]


def by_tarfile(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        opened = [(info.name, archive.extractfile(info)) for info in archive if info.isreg()]
        return [(name, file.read()) for name, file in opened if file]


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archives")


@given(
    content=files,
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    comment=comments,
    zip64=st.booleans(),
    before=programs,
)
@settings(max_examples=120)
def test_whatever_zipfile_writes_is_read_alike(
    folder: Path, content: Files, method: int, comment: bytes, zip64: bool, before: bytes
) -> None:
    path = folder / "any.zip"
    path.write_bytes(before + zipped(content, method, comment, zip64))
    assert is_zip(path)
    assert whole(path, zip_members) == by_zipfile(path) == list(content.items())


@given(content=files, before=programs)
def test_zips_that_need_64_bits_everywhere_are_read_alike(folder: Path, content: Files, before: bytes) -> None:
    path = folder / "wide.zip"
    with pytest.MonkeyPatch.context() as patch:  # as if every one of them were beyond 4 GB
        patch.setattr(zipfile, "ZIP64_LIMIT", -1)
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", -1)
        path.write_bytes(before + zipped(content, zip64=True))
    assert b"PK\x06\x06" in path.read_bytes()
    assert whole(path, zip_members) == by_zipfile(path) == list(content.items())


def test_a_zip64_record_that_lies_apart_from_its_locator_is_found(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", -1)
        data = zipped(THREE, zip64=True)
    locator = data.rfind(b"PK\x06\x07")
    (tmp_path / "a.zip").write_bytes(data[:locator] + b"an extension of the record" + data[locator:])
    assert whole(tmp_path / "a.zip", zip_members) == list(THREE.items())


def test_a_zip64_record_beside_values_that_need_none_is_no_offset(tmp_path: Path) -> None:
    """Some writers add the record always: 76 bytes between the directory and its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", -1)
        wide = zipped(THREE)
    plain = zipped(THREE)
    record = wide[wide.rfind(b"PK\x06\x06") : wide.rfind(b"PK\x05\x06")]
    end = plain.rfind(b"PK\x05\x06")
    size, start = struct.unpack_from("<2L", plain, end + 12)
    record = record[:40] + struct.pack("<2Q", size, start) + record[56:64] + struct.pack("<Q", end) + record[72:]
    (tmp_path / "a.zip").write_bytes(plain[:end] + record + plain[end:])
    assert whole(tmp_path / "a.zip", zip_members) == by_zipfile(tmp_path / "a.zip") == list(THREE.items())


def test_folders_in_a_zip_are_no_members(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/", b"")
        archive.writestr("a/1.png", b"1")
    assert whole(tmp_path / "a.zip", zip_members) == [("a/1.png", b"1")]


def test_names_that_are_not_unicode_are_read_as_the_zip_format_says(tmp_path: Path) -> None:
    data = zipped({"M?ller.png": b"1"}).replace(b"M?ller", b"M\x81ller")
    (tmp_path / "a.zip").write_bytes(data)
    assert whole(tmp_path / "a.zip", zip_members) == by_zipfile(tmp_path / "a.zip") == [("Müller.png", b"1")]


def test_records_of_the_greatest_length_are_read_alike(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(12):
            info = zipfile.ZipInfo(f"{number:02}" + "n" * 65529 + ".png")
            info.extra = struct.pack("<2H", 0xCAFE, 65531) + bytes(65531)
            info.comment = b"c" * 65535
            archive.writestr(info, bytes([number]))
    assert whole(tmp_path / "a.zip", zip_members) == by_zipfile(tmp_path / "a.zip")


def test_a_zip_of_very_many_members_is_listed_in_flat_memory(tmp_path: Path) -> None:
    """Its writer kept 16 bits of their number, as old ones do."""
    count = 66_000
    data = zipped({"00000000.png": b"content"}, zipfile.ZIP_STORED)
    start, end = data.find(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    record = data[start:end]
    directory = b"".join(record.replace(b"00000000", b"%08d" % number) for number in range(count))
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, len(directory), start, 0)
    (tmp_path / "a.zip").write_bytes(data[:start] + directory + last)
    with memory_below(4 << 20):
        number = 0
        for name, part in zip_members(tmp_path / "a.zip"):
            if number % 10_000 == 0:
                assert name == f"{number:08}.png"
                assert read(part) == b"content"
            number += 1
    assert number == count


def test_a_zip_whose_directory_has_more_or_fewer_members_than_it_says_is_refused(tmp_path: Path) -> None:
    for said in (2, 4):
        data = bytearray(zipped(THREE))
        struct.pack_into("<2H", data, data.rfind(b"PK\x05\x06") + 8, said, said)
        (tmp_path / "a.zip").write_bytes(data)
        with pytest.raises(DataError, match="not a whole archive"):
            whole(tmp_path / "a.zip", zip_members)


@pytest.mark.parametrize("comment", [b"", b"a comment that is cut too"])
def test_a_zip_cut_anywhere_is_refused_or_gives_its_members(tmp_path: Path, comment: bytes) -> None:
    data = zipped(THREE, comment=comment)
    path = tmp_path / "a.zip"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        try:
            found = whole(path, zip_members)
        except DataError:
            continue
        assert cut >= len(data) - len(comment)
        assert found == list(THREE.items())


def test_a_zip_cut_after_it_was_listed_loses_no_other_members(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    data = zipped(THREE, zipfile.ZIP_STORED)
    path.write_bytes(data)
    parts = [part for _, part in zip_members(path)]
    path.write_bytes(data[: parts[1].offset + 60])
    assert read(parts[0]) == THREE["a/1.png"]
    for part in parts[1:]:
        with pytest.raises(DataError, match="cut off"):
            read(part)


def patched(data: bytes, record: bytes, offset: int, kind: str, value: int) -> bytes:
    """Every record of that signature with another value in one of its fields."""
    changed, place = bytearray(data), -1
    while (place := data.find(record, place + 1)) >= 0:
        struct.pack_into(kind, changed, place + offset, value)
    return bytes(changed)


def test_an_encrypted_member_says_so(tmp_path: Path) -> None:
    data = patched(patched(zipped(THREE), b"PK\x03\x04", 6, "<H", 1), b"PK\x01\x02", 8, "<H", 1)
    (tmp_path / "a.zip").write_bytes(data)
    for _, part in zip_members(tmp_path / "a.zip"):
        with pytest.raises(DataError, match=r"^encrypted$"):
            read(part)


def test_an_unknown_compression_says_which_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped({"a.png": b"1" * 99}, zipfile.ZIP_BZIP2))
    with pytest.raises(DataError, match="zip compression 12, which is not read: use deflate or none"):
        whole(tmp_path / "a.zip", zip_members)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_whose_bytes_changed_is_damaged_and_the_others_are_not(tmp_path: Path, method: int) -> None:
    data = bytearray(zipped(THREE, method))
    data[30 + len("a/1.png") + 3] ^= 0x55
    (tmp_path / "a.zip").write_bytes(data)
    first, *rest = (part for _, part in zip_members(tmp_path / "a.zip"))
    with pytest.raises(DataError, match="a damaged member of the zip"):
        read(first)
    assert [read(part) for part in rest] == list(THREE.values())[1:]


@pytest.mark.parametrize(("record", "offset", "kind"), [(b"PK\x01\x02", 24, "<L"), (b"PK\x01\x02", 16, "<L")])
def test_a_member_of_another_length_or_checksum_than_claimed_is_damaged(
    tmp_path: Path, record: bytes, offset: int, kind: str
) -> None:
    (tmp_path / "a.zip").write_bytes(patched(zipped({"a.png": b"1" * 99}), record, offset, kind, 98))
    with pytest.raises(DataError, match="a damaged member of the zip"):
        whole(tmp_path / "a.zip", zip_members)


def test_a_place_where_no_member_is_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(patched(zipped({"a.png": b"1" * 99}), b"PK\x01\x02", 42, "<L", 1))
    with pytest.raises(DataError, match="a damaged member of the zip"):
        whole(tmp_path / "a.zip", zip_members)


def test_a_member_that_inflates_far_beyond_what_it_claims_takes_no_memory(tmp_path: Path) -> None:
    packer = zlib.compressobj(9, wbits=-15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    bomb = piece * 1024 + packer.flush()  # a gigabyte of zeros
    data = zipped({"bomb.png": bomb}, zipfile.ZIP_STORED)
    for signature, method, length in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        data = patched(patched(data, signature, method, "<H", 8), signature, length, "<L", 10)
    (tmp_path / "a.zip").write_bytes(data)
    ((_, part),) = zip_members(tmp_path / "a.zip")
    assert part.length == 10
    with memory_below(4 << 20), pytest.raises(DataError, match="a damaged member of the zip"):
        read(part)


@pytest.mark.parametrize("claimed", [MAX_FILE_BYTES + 1, 0xFFFFFFFF])
@pytest.mark.parametrize("offset", [20, 24])
def test_a_member_that_claims_to_be_huge_is_refused_unread(tmp_path: Path, claimed: int, offset: int) -> None:
    (tmp_path / "a.zip").write_bytes(patched(zipped({"a.png": b"1" * 99}), b"PK\x01\x02", offset, "<L", claimed))
    with memory_below(1 << 20), pytest.raises(DataError, match="larger than a picture can be"):
        whole(tmp_path / "a.zip", zip_members)


def test_a_member_that_claims_more_than_the_file_holds_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(patched(zipped({"a.png": b"1" * 99}), b"PK\x01\x02", 20, "<L", 1 << 29))
    with memory_below(1 << 20), pytest.raises(DataError, match="cut off"):
        whole(tmp_path / "a.zip", zip_members)


def test_places_and_sizes_beyond_63_bits_are_damage(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", -1)
        data = zipped({"a.png": b"1" * 99}, zip64=True)
    path = tmp_path / "a.zip"
    at = data.find(b"\x01\x00\x18\x00", data.find(b"PK\x01\x02"))  # length, stored, offset
    for place in (at + 4, at + 12, at + 20, data.rfind(b"PK\x06\x06") + 40, data.rfind(b"PK\x06\x06") + 48):
        for value in (1 << 62, (1 << 63) + 5, (1 << 64) - 1):
            changed = bytearray(data)
            struct.pack_into("<Q", changed, place, value)
            path.write_bytes(changed)
            assert delivered(path, zip_members) == []
    changed = bytearray(data)
    struct.pack_into("<Q", changed, data.rfind(b"PK\x06\x07") + 8, (1 << 64) - 1)
    path.write_bytes(changed)  # where the record is said to be; it stands where it always does
    assert whole(path, zip_members) == [("a.png", b"1" * 99)]


@given(content=files, kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), how=st.sampled_from(["", "gz"]))
@settings(max_examples=120)
def test_whatever_tarfile_writes_is_read_alike(folder: Path, content: Files, kind: int, how: str) -> None:
    path = folder / "any.tar"
    path.write_bytes(COMPRESSIONS[how](tarred(content, kind)))
    assert whole(path, tar_members) == by_tarfile(path) == list(content.items())


@pytest.mark.parametrize("how", COMPRESSIONS)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_kind_and_compression_are_read_alike(tmp_path: Path, kind: int, how: str) -> None:
    content = dict(THREE)
    if kind != tarfile.USTAR_FORMAT:
        content |= {"f/" * 200 + "long.png": b"long", "é" * 120 + "/ü.png": b"accents"}
    path = tmp_path / "a.tar"
    path.write_bytes(COMPRESSIONS[how](tarred(content, kind)))
    assert is_tar(path)
    assert not is_zip(path)
    assert whole(path, tar_members) == by_tarfile(path) == list(content.items())


def test_a_tar_of_the_seventies_is_read_alike(tmp_path: Path) -> None:
    data = bytearray(tarred({"a.png": b"old"}, tarfile.USTAR_FORMAT))
    data[257:265] = bytes(8)  # it has no magic
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    assert whole(tmp_path / "a.tar", tar_members) == by_tarfile(tmp_path / "a.tar") == [("a.png", b"old")]


def test_a_gzip_of_several_streams_is_read_to_its_end(tmp_path: Path) -> None:
    data = tarred(THREE)
    (tmp_path / "a.tgz").write_bytes(gzip.compress(data[:700]) + gzip.compress(data[700:]))
    assert whole(tmp_path / "a.tgz", tar_members) == list(THREE.items())


@pytest.mark.parametrize("how", COMPRESSIONS)
def test_what_is_no_file_in_a_tar_is_passed_over(tmp_path: Path, how: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        add(archive, "folder", kind=tarfile.DIRTYPE)
        add(archive, "folder/1.png", b"1")
        add(archive, "folder/symbolic.png", kind=tarfile.SYMTYPE, link="1.png")
        add(archive, "folder/hard.png", kind=tarfile.LNKTYPE, link="folder/1.png")
        for name, special in (("pipe", tarfile.FIFOTYPE), ("block", tarfile.BLKTYPE), ("character", tarfile.CHRTYPE)):
            add(archive, f"{name}.png", kind=special)
        add(archive, "2.png", b"2")
    (tmp_path / "a.tar").write_bytes(COMPRESSIONS[how](buffer.getvalue()))
    assert whole(tmp_path / "a.tar", tar_members) == [("folder/1.png", b"1"), ("2.png", b"2")]


@pytest.mark.parametrize("how", ["", "gz"])
def test_files_with_holes_are_read_alike(tmp_path: Path, how: str) -> None:
    info = tarfile.TarInfo("./GNUSparseFile.0/holes.png")
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "holes.png",
        "GNU.sparse.realsize": "1000",
    }
    stored = b"2\n100\n5\n990\n10\n".ljust(512, b"\0") + b"12345" + b"0123456789"
    info.size = len(stored)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(stored))
    (tmp_path / "a.tar").write_bytes(COMPRESSIONS[how](buffer.getvalue()))
    expected = bytes(100) + b"12345" + bytes(885) + b"0123456789"
    assert whole(tmp_path / "a.tar", tar_members) == by_tarfile(tmp_path / "a.tar") == [("holes.png", expected)]


def test_names_in_a_tar_that_are_not_unicode_are_shown_with_backslashes(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tarred({"M\udcfcller.png": b"1"}, tarfile.GNU_FORMAT))
    ((name, _),) = tar_members(tmp_path / "a.tar")
    assert name == r"M\udcfcller.png"
    assert name.encode()


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_cut_anywhere_is_refused_or_gives_its_members(tmp_path: Path, kind: int) -> None:
    content = THREE | {"é" * 120 + ".png": b"x" * 600, "last.png": b"end"}
    data = tarred(content, kind)
    path = tmp_path / "a.tar"
    near_blocks = {block + near for block in range(0, len(data), 512) for near in (-1, 0, 1)}
    for cut in sorted(near_blocks | set(range(0, len(data), 37))):
        path.write_bytes(data[: max(0, cut)])
        found = delivered(path, tar_members)
        assert found == list(content.items())[: len(found)]
        if len(found) < len(content):
            with pytest.raises(DataError, match="not a whole archive"):
                list(tar_members(path))


@pytest.mark.parametrize("how", ["gz", "bz2", "xz"])
def test_a_compressed_tar_cut_anywhere_is_refused(tmp_path: Path, how: str) -> None:
    content = THREE | {"4.png": bytes(range(256)) * 4}
    data = COMPRESSIONS[how](tarred(content))
    path = tmp_path / f"a.tar.{how}"
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(DataError, match="not a whole archive"):
            whole(path, tar_members)


def test_a_gzip_with_another_checksum_is_refused(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(tarred(THREE)))
    data[-8] ^= 1
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(DataError, match="not a whole archive"):
        whole(tmp_path / "a.tgz", tar_members)


@pytest.mark.parametrize("how", ["", "gz"])
def test_a_damaged_header_inside_a_tar_is_not_taken_for_its_end(tmp_path: Path, how: str) -> None:
    data = bytearray(tarred(THREE))
    data[1024 + 3] ^= 1  # in the second member's name
    (tmp_path / "a.tar").write_bytes(COMPRESSIONS[how](bytes(data)))
    with pytest.raises(DataError, match="not a whole archive"):
        list(tar_members(tmp_path / "a.tar"))


def header(name: bytes, size: bytes, kind: bytes) -> bytes:
    """A header of a tar that tarfile itself would not write."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("how", ["", "gz"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [-512, -1024, 1 << 40, 1 << 62, (1 << 87) + 3])
def test_sizes_that_cannot_be_end_in_an_error_at_once(tmp_path: Path, how: str, kind: bytes, size: int) -> None:
    wide = (size + (1 << 96) if size < 0 else size | 0x80 << 88).to_bytes(12, "big")
    data = tarred({"1.png": b"1" * 600})[:1536] + header(b"2.png", wide, kind) + bytes(1024)
    (tmp_path / "a.tar").write_bytes(COMPRESSIONS[how](data))
    with memory_below(8 << 20), pytest.raises(DataError):
        whole(tmp_path / "a.tar", tar_members)


def test_a_negative_size_among_the_pax_records_ends_in_an_error_at_once(tmp_path: Path) -> None:
    records = b"13 size=-2048\n"
    data = header(b"pax", b"%011o\0" % len(records), b"x") + records.ljust(512, b"\0") + tarred({"1.png": b"1"})
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="not a whole archive"):
        list(tar_members(tmp_path / "a.tar"))


def test_files_and_members_above_the_limit_are_refused_and_their_neighbours_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    content = {"large.png": bytes(1001), "small.png": b"small"}
    for name, data, members in (
        ("a.zip", zipped(content), zip_members),
        ("a.tar", tarred(content), tar_members),
        ("a.tgz", gzip.compress(tarred(content)), tar_members),
    ):
        (tmp_path / name).write_bytes(data)
        assert delivered(tmp_path / name, members) == [("small.png", b"small")]
        large = next(part for member, part in members(tmp_path / name) if member == "large.png")
        assert isinstance(large, Part)
        with pytest.raises(DataError, match="larger than a picture can be"):
            read(large)
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    assert read(Part(str(tmp_path / "small.png"))) == b"small"
    with pytest.raises(DataError, match="larger than a picture can be"):
        read(Part(str(tmp_path / "large.png")))


def test_a_tar_of_many_members_is_listed_in_flat_memory(tmp_path: Path) -> None:
    one = tarred({"1.png": b"1"}, tarfile.USTAR_FORMAT)[:1024]
    (tmp_path / "a.tar").write_bytes(one * 5_000 + bytes(1024))
    with memory_below(2 << 20):
        assert sum(1 for _ in tar_members(tmp_path / "a.tar")) == 5_000


def test_a_tar_that_ends_with_a_zip_is_no_zip(tmp_path: Path) -> None:
    data = tarred({"1.png": b"1", "labels.xlsx": zipped(THREE)})
    for how, compress in COMPRESSIONS.items():
        path = tmp_path / f"a.tar.{how}"
        path.write_bytes(compress(data))
        assert not is_zip(path)
        assert is_tar(path)
    (tmp_path / "a.zip").write_bytes(zipped({"a.tar": data}, zipfile.ZIP_STORED))
    assert is_zip(tmp_path / "a.zip")
    (tmp_path / "a.png").write_bytes(b"neither")
    assert not is_zip(tmp_path / "a.png")
    assert not is_tar(tmp_path / "a.png")


def test_archives_are_read_in_turn_and_none_stays_open_without_end(tmp_path: Path) -> None:
    parts = []
    for number in range(12):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(zipped({"a.png": b"%d" % number}))
        parts += [part for _, part in zip_members(path)]
    read(parts[0])
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert [read(part) for _ in range(2) for part in parts] == [b"%d" % (i % 12) for i in range(24)]
    if before:
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


def test_an_archive_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for content in (b"old", b"new"):
        (tmp_path / "other").write_bytes(zipped({"a.png": content}))
        (tmp_path / "other").replace(path)
        assert whole(path, zip_members) == [("a.png", content)]


@pytest.mark.parametrize("part", [Part("missing"), Part("missing", 0, 1), Part("/")])
def test_what_cannot_be_opened_is_not_readable(part: Part) -> None:
    with pytest.raises(DataError, match=r"^not readable$"):
        read(part)


def test_an_archive_that_vanished_is_refused_by_name(tmp_path: Path) -> None:
    for members in (zip_members, tar_members):
        with pytest.raises(DataError, match=r"gone\.zip is not a whole archive"):
            whole(tmp_path / "gone.zip", members)


def _wide_zip() -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", -1)
        return zipped(THREE, zip64=True)


WHOLE = {
    "stored": zipped(THREE, zipfile.ZIP_STORED),
    "deflated": zipped(THREE, comment=b"a comment"),
    "wide": _wide_zip(),
    "pax": tarred(THREE | {"é" * 120: b"x"}),
    "gnu": tarred(THREE | {"é" * 120: b"x"}, tarfile.GNU_FORMAT),
}
damage = st.lists(
    st.tuples(st.sampled_from(["flip", "set", "cut", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, where, value in changes:
        at = int(where * len(data))
        if kind == "flip":
            data = data[:at] + bytes(byte ^ 1 << value[0] % 8 for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "cut":
            data = data[:at] + data[at + value[0] * len(value) :]
        else:
            data = data[:at] + value + data[at:]
    return data


@given(
    kind=st.sampled_from(list(WHOLE)), changes=damage, how=st.sampled_from(list(COMPRESSIONS)), outside=st.booleans()
)
@example(kind="pax", changes=[("set", 0.0, b"\0" * 9)], how="", outside=False)
@settings(max_examples=250)
def test_damage_of_any_kind_is_one_error_and_takes_little_memory(
    folder: Path, kind: str, changes: list[tuple[str, float, bytes]], how: str, outside: bool
) -> None:
    compress = COMPRESSIONS[how]
    path = folder / "damaged"
    path.write_bytes(damaged(compress(WHOLE[kind]), changes) if outside else compress(damaged(WHOLE[kind], changes)))
    with memory_below(40 << 20):
        is_zip(path), is_tar(path)
        delivered(path, zip_members)
        delivered(path, tar_members)
