"""Folders, archives, arrays and packed corpora are streams of entries in a fixed order, whatever else lies there."""

import gzip
import hashlib
import io
import os
import socket
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskdm.data.pixels import PixelPolicy, Pixels
from maskdm.data.preparation.pack import pack
from maskdm.data.sources.source import (
    ArchiveSource,
    ArraySource,
    Entry,
    FolderSource,
    Source,
    group_of,
    is_picture,
    open_source,
)
from maskdm.errors import DataError

pytestmark = pytest.mark.usefixtures("in_time")

FILES = {"top.png": b"0", "a/one.PNG": b"1", "a/b/c/two.jpg": b"2", "b/three.dcm": b"3"}


def put(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def names(source: Source) -> list[str]:
    return [entry.name for entry in source.entries()]


def unreadable(source: Source) -> list[str]:
    found = []
    for entry in source.entries():
        try:
            entry.read()
        except DataError:
            found.append(entry.name)
    return found


def seen(entry: Entry) -> tuple[str, bytes, str, str]:
    digest, content = entry.read()
    assert isinstance(content, bytes)
    assert digest == hashlib.sha256(content).digest()
    return entry.name, content, entry.label, entry.split


def pixels(source: Source) -> list[Pixels]:
    return [content for _, content in (entry.read() for entry in source.entries()) if isinstance(content, np.ndarray)]


@contextmanager
def closed(path: Path) -> Iterator[None]:
    """Nobody may read the file or folder, not even root, who is somebody else meanwhile."""
    root = os.geteuid() == 0
    path.chmod(0)
    try:
        if root:
            try:
                os.seteuid(65534)
            except OSError:
                pytest.skip("root, for whom permissions mean nothing, and not allowed to be somebody else")
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o755)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that is not below one of pytest's, which are closed to everybody else."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def test_a_folder_is_read_to_any_depth_in_alphabetical_order_with_folders_as_labels(tmp_path: Path) -> None:
    put(tmp_path, FILES | {"notes.txt": b"", "a/table.csv": b"", ".hidden/no.png": b"", "a/.no.png": b""})
    source = open_source(tmp_path)
    assert [seen(entry) for entry in source.entries()] == [
        ("a/b/c/two.jpg", b"2", "c", "train"),
        ("a/one.PNG", b"1", "a", "train"),
        ("b/three.dcm", b"3", "b", "train"),
        ("top.png", b"0", "", "train"),
    ]
    assert source.count() == 4


def test_a_folder_deeper_than_python_can_call_itself_is_read(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=folder)
            below = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = below
        os.close(os.open("x.png", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
        assert names(FolderSource(tmp_path)) == ["d/" * 1200 + "x.png"]
    finally:
        os.close(folder)
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)  # shutil calls itself


def test_a_folder_whose_path_is_too_long_is_counted_and_its_neighbours_are_read(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("n" * 250, dir_fd=folder)
        below = os.open("n" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)
    put(tmp_path, FILES)
    source = FolderSource(tmp_path)
    assert len(unreadable(source)) == 1
    assert source.count() == len(names(source)) == len(FILES) + 1


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    put(tmp_path / "data", {"b/1.png": b"1", "b/deep/2.png": b"2"})
    put(tmp_path / "elsewhere", {"3.png": b"3"})
    (tmp_path / "data" / "a").symlink_to("b")  # comes first
    (tmp_path / "data" / "again").symlink_to("b")
    (tmp_path / "data" / "b" / "deep" / "up").symlink_to("../..")
    (tmp_path / "data" / "self").symlink_to(".")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "data")
    assert [seen(entry)[:3] for entry in source.entries()] == [
        ("a/1.png", b"1", "a"),
        ("a/deep/2.png", b"2", "deep"),
        ("out/3.png", b"3", "out"),
    ]
    assert source.count() == 3


def test_links_that_lead_nowhere_are_counted_as_unreadable_and_hide_no_neighbours(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    (tmp_path / "a" / "broken.png").symlink_to("gone.png")
    (tmp_path / "a" / "circle.png").symlink_to("circle.png")
    (tmp_path / "a" / "circle of folders").symlink_to("circle of folders")
    (tmp_path / "a" / "broken.txt").symlink_to("gone.txt")
    source = open_source(tmp_path)
    assert unreadable(source) == ["a/broken.png", "a/circle of folders", "a/circle.png"]
    assert len(names(source)) == source.count() == len(FILES) + 3
    assert len(source.fingerprint()) == 32


def test_pipes_and_sockets_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "null.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path must be short
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
    source = open_source(tmp_path)
    assert sorted(names(source)) == sorted(FILES)
    assert unreadable(source) == []
    assert len(source.fingerprint()) == 32


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    for name in ("pipe", "pipe.npy", "pipe.zip"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} is no file and no folder"):
            open_source(tmp_path / name)


@pytest.mark.parametrize("closed_one", ["a/one.PNG", "a/b", "b"])
def test_what_may_not_be_read_is_counted_and_the_rest_is_read(open_folder: Path, closed_one: str) -> None:
    put(open_folder, FILES)
    everything = names(FolderSource(open_folder))
    with closed(open_folder / closed_one):
        source = open_source(open_folder)
        assert unreadable(source) == [closed_one]
        assert len(names(source)) == source.count() == len(everything)
        assert len(source.fingerprint()) == 32


@pytest.mark.parametrize("folder", ["patient.a", "data.v2", "x"])
def test_a_closed_folder_is_counted_whatever_its_name(open_folder: Path, folder: str) -> None:
    put(open_folder, {f"{folder}/1.png": b"1", "2.png": b"2"})
    with closed(open_folder / folder):
        assert unreadable(FolderSource(open_folder)) == [folder]


def test_a_link_into_a_closed_folder_hides_no_neighbours(open_folder: Path) -> None:
    put(open_folder, {"data/1.png": b"1", "closed/2.png": b"2"})
    (open_folder / "data" / "2.png").symlink_to("../closed/2.png")
    with closed(open_folder / "closed"):
        assert unreadable(FolderSource(open_folder / "data")) == ["2.png"]
        assert names(FolderSource(open_folder / "data")) == ["1.png", "2.png"]


def test_a_source_that_may_not_be_read_is_refused_by_name(open_folder: Path) -> None:
    put(open_folder, {"closed/1.png": b"1", "a.npy": b"", "a.zip": b"", "a.tar": b"", "a.npz": b""})
    with closed(open_folder / "closed"):
        for path in (open_folder / "closed", open_folder / "closed" / "inside"):
            with pytest.raises(DataError, match=r"--prior-data .*closed.* cannot be read: .*Permission denied"):
                open_source(path, "--prior-data")
    for name in ("a.npy", "a.npz", "a.zip", "a.tar"):
        with closed(open_folder / name), pytest.raises(DataError, match=f"{name} cannot be read: .*Permission denied"):
            open_source(open_folder / name)


def test_a_file_that_cannot_be_read_though_it_is_there_is_unreadable(tmp_path: Path) -> None:
    if not Path("/proc/self/mem").exists():
        pytest.skip("no such file here")
    (tmp_path / "x.png").symlink_to("/proc/self/mem")  # reading it is an input/output error
    assert unreadable(open_source(tmp_path)) == ["x.png"]


def test_names_that_are_not_unicode_are_read_and_shown_with_backslashes(tmp_path: Path) -> None:
    for folder in (tmp_path / "data", tmp_path / "data" / os.fsdecode(b"M\xfcller")):
        put(folder, {os.fsdecode(b"\xff\xfe.png"): b"1"})
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "data", "")
    for source in (open_source(tmp_path / "data"), open_source(tmp_path / "a.tar")):
        found = sorted(seen(entry)[:3] for entry in source.entries())
        assert found == [(r"M\udcfcller/\udcff\udcfe.png", b"1", r"M\udcfcller"), (r"\udcff\udcfe.png", b"1", "")]
        assert all(text.encode() for name, _, label in found for text in (name, label) if text)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("a.png", True),
        ("a/b.JPEG", True),
        ("scan.tif", True),
        ("IM000001", True),
        ("1.2.840.113619.2.55", True),
        ("study/IMG.0001", True),
        ("patient.smith/00017", True),
        ("notes.txt", False),
        ("data.csv", False),
        (".png", False),
        (".DS_Store", False),
        ("a/.thumbs/1.png", False),
        ("__MACOSX/a/._1.png", False),
        ("a/__MACOSX/1.png", False),
        ("./a.png", True),
    ],
)
def test_pictures_are_told_by_their_names(name: str, wanted: bool) -> None:
    assert is_picture(name) == wanted


@pytest.mark.parametrize(
    ("name", "split", "label"),
    [
        ("train/cat/1.png", "train", "cat"),
        ("Training/cat/1.png", "train", "cat"),
        ("val/cat/1.png", "validation", "cat"),
        ("valid/cat/1.png", "validation", "cat"),
        ("validation/cat/1.png", "validation", "cat"),
        ("test/cat/1.png", "test", "cat"),
        ("TESTING/cat/1.png", "test", "cat"),
        ("oct/test/cat/1.png", "test", "cat"),
        ("a/b/test/cat/1.png", "train", "cat"),
        ("cat/1.png", "train", "cat"),
        ("1.png", "train", ""),
    ],
)
def test_folders_give_label_and_split_in_folders_and_archives_alike(
    tmp_path: Path, name: str, split: str, label: str
) -> None:
    put(tmp_path / "folder", {name: b"1"})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped, tarfile.open(tmp_path / "a.tgz", "w:gz") as tarred:
        zipped.write(tmp_path / "folder" / name, name)
        tarred.add(tmp_path / "folder", ".")
    for where in ("folder", "a.zip", "a.tgz"):
        assert [seen(entry)[2:] for entry in open_source(tmp_path / where).entries()] == [(label, split)]


@pytest.mark.parametrize("kind", ["a.zip", "a.tar", "a.tar.gz", "a.tar.bz2", "a.tar.xz", "without suffix"])
def test_an_archive_is_read_like_the_folder_it_holds(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "folder", FILES | {"__MACOSX/a/._one.png": b"rubbish", "notes.txt": b""})
    whole = [seen(entry) for entry in open_source(tmp_path / "folder").entries()]
    if kind == "a.zip":
        with zipfile.ZipFile(tmp_path / kind, "w") as zipped:
            for path in sorted((tmp_path / "folder").rglob("*")):  # folders too
                zipped.write(path, path.relative_to(tmp_path / "folder"))
    else:
        with tarfile.open(tmp_path / kind, f"w:{kind.partition('.tar.')[2]}") as tarred:  # type: ignore[call-overload]
            tarred.add(tmp_path / "folder", ".")
    source = open_source(tmp_path / kind)
    assert isinstance(source, ArchiveSource)
    assert sorted(seen(entry) for entry in source.entries()) == whole
    assert source.count() in (None, len(whole))
    assert (source.count() is None) == (kind != "a.zip")


def test_a_tar_that_ends_with_a_zip_is_read_as_a_tar(tmp_path: Path) -> None:
    put(tmp_path / "folder", {"1.png": b"1"})
    with zipfile.ZipFile(tmp_path / "folder" / "labels.xlsx", "w") as table:
        table.writestr("xl/2.png", b"no picture of ours")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("1.png", "labels.xlsx"):
            archive.add(tmp_path / "folder" / name, name)
    assert names(open_source(tmp_path / "a.tar")) == ["1.png"]


def images(count: int, *shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


@pytest.mark.parametrize(("one", "labels"), [("images", "labels"), ("x_train", "y_train")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_with_labels_are_read_from_an_npz(
    tmp_path: Path, one: str, labels: str, save: Callable[..., None]
) -> None:
    array = images(3, 8, 8)
    save(tmp_path / "data.npz", **{one: array, labels: np.array([2, 0, 1])})
    source = open_source(tmp_path / "data.npz")
    assert [entry.label for entry in source.entries()] == ["2", "0", "1"]
    assert names(source) == ["0", "1", "2"]
    assert np.array_equal(pixels(source), array)
    assert source.count() == 3


def test_the_test_part_of_an_npz_is_of_the_test_split(tmp_path: Path) -> None:
    train, test = images(3, 8, 8), images(2, 8, 8) ^ 1
    np.savez(
        tmp_path / "data.npz", x_train=train, y_train=np.array(["a", "b", "c"]), x_test=test, y_test=np.array([4, 5])
    )
    source = open_source(tmp_path / "data.npz")
    assert [(entry.split, entry.label) for entry in source.entries()] == [
        *(("train", "a"), ("train", "b"), ("train", "c")),
        *(("test", "4"), ("test", "5")),
    ]
    assert np.array_equal(pixels(source), np.concatenate([train, test]))
    assert source.count() == 5
    assert names(source) == ["0", "1", "2", "3", "4"]


def test_a_single_array_of_any_name_is_taken_and_labels_may_be_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", anything=images(3, 8, 8))
    np.savez(tmp_path / "two.npz", images=images(3, 8, 8), others=images(4, 8, 8))
    for name in ("one.npz", "two.npz"):
        source = open_source(tmp_path / name)
        assert [(entry.label, entry.split) for entry in source.entries()] == [("", "train")] * 3


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (1, 8, 8), (8, 8, 3), (3, 8, 8), (5, 9), (3, 5, 9), (2, 2)])
def test_arrays_are_read_in_every_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = images(4, *shape)
    np.save(tmp_path / "data.npy", array)
    np.savez_compressed(tmp_path / "data.npz", images=array)
    last = np.moveaxis(array, 1, 3) if len(shape) == 3 and shape[0] in (1, 3) else array
    for name in ("data.npy", "data.npz"):
        source = open_source(tmp_path / name)
        assert isinstance(source, ArraySource)
        assert np.array_equal(pixels(source), last)
        assert source.count() == 4
        digests = [entry.read()[0] for entry in source.entries()]
        assert digests == [hashlib.sha256(one.tobytes()).digest() for one in last]


def saved(array: NDArray[Any], version: tuple[int, int] | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


def test_npy_files_of_another_version_are_read(tmp_path: Path) -> None:
    array = images(2, 8, 8)
    (tmp_path / "a.npy").write_bytes(saved(array, (2, 0)))
    assert np.array_equal(pixels(open_source(tmp_path / "a.npy")), array)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.float32), r"needs uint8 images \(N, H, W\[, C\]\), found float32 \(3, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), r"needs uint8 images .* found uint8 \(8, 8\)"),
        (np.zeros((2, 3, 4, 5, 6), np.uint8), "needs uint8 images"),
        (np.zeros((), np.uint8), "needs uint8 images"),
        (np.zeros((3, 8, 8), bool), "needs uint8 images"),
        (np.zeros((3, 8, 8, 4), np.uint8), "4 channels; give 1 or 3"),
        (np.zeros((0, 8, 8), np.uint8), "holds no images"),
        (np.zeros((3, 0, 8), np.uint8), "holds no images"),
        (np.array([{"a": 1}], dtype=object), "it holds Python objects, not pixels"),
        (np.asfortranarray(images(3, 8, 8)), "Fortran order: save np.ascontiguousarray"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused_by_name(tmp_path: Path, array: NDArray[Any], message: str) -> None:
    (tmp_path / "data.npy").write_bytes(saved(array))
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("images.npy", saved(array))
    for name in ("data.npy", "data.npz"):
        with pytest.raises(DataError, match=f"--prior-data .*{name}.*{message}"):
            open_source(tmp_path / name, "--prior-data")


def test_labels_that_do_not_match_the_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=images(3, 8, 8), labels=np.zeros(2))
    with pytest.raises(DataError, match=r"data\.npz: 3 images but labels of shape \(2,\)"):
        open_source(tmp_path / "data.npz")


def test_labels_that_are_python_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=images(1, 8, 8), labels=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"data\.npz cannot be read"):
        open_source(tmp_path / "data.npz")


def test_an_npz_without_a_recognisable_array_names_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", left=np.zeros(1), right=np.zeros(1))
    with pytest.raises(DataError, match=r"holds left, right: name the array of images 'images'"):
        open_source(tmp_path / "data.npz")


@pytest.mark.parametrize(
    "shape",
    ["(9, 4000000000, 4000000000)", "(9, 4000000000, 4000000000, 3)", "(9, 40000, 40000)", "(9, -8, 8)", "(-9, 8, 8)"],
)
def test_shapes_that_cannot_be_are_refused_unread(tmp_path: Path, shape: str) -> None:
    header = saved(images(9, 8, 8))
    claimed = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s, }" % shape.encode()
    (tmp_path / "a.npy").write_bytes(header[:10] + claimed.ljust(117) + b"\n" + header[128:])
    with pytest.raises(DataError, match=r"a\.npy(: images of .* are larger than a picture can be| holds no images)"):
        open_source(tmp_path / "a.npy")


def test_an_array_that_is_cut_off_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(saved(images(3, 8, 8))[:-1])
    source = open_source(tmp_path / "a.npy")
    with pytest.raises(DataError, match=r"a\.npy is cut off: copy it again"):
        names(source)


def archived() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content * 50)
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(name)
            info.size = 50
            archive.addfile(info, io.BytesIO(content * 50))
    return buffer.getvalue()


def with_labels(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, images=images(3, 8, 8), labels=np.arange(3))
    return buffer.getvalue()


KINDS = {
    "a.npy": saved(images(3, 8, 8)),
    "plain.npz": with_labels(np.savez),
    "packed.npz": with_labels(np.savez_compressed),
    "a.zip": archived(),
    "a.tar": tarred(),
    "a.tgz": gzip.compress(tarred()),
}


@given(
    name=st.sampled_from(list(KINDS)),
    where=st.floats(0, 1, exclude_max=True),
    value=st.binary(min_size=1, max_size=6),
    kind=st.sampled_from(["set", "cut", "insert", "end"]),
)
@settings(max_examples=250)
def test_damage_of_any_kind_is_one_line_with_the_name(
    tmp_path_factory: pytest.TempPathFactory, name: str, where: float, value: bytes, kind: str
) -> None:
    path = tmp_path_factory.getbasetemp() / name
    data = KINDS[name]
    at = int(where * len(data))
    after = {"set": at + len(value), "cut": at + 10 * len(value), "insert": at, "end": len(data)}[kind]
    path.write_bytes(data[:at] + (value if kind in ("set", "insert") else b"") + data[after:])
    try:
        source = open_source(path, "--prior-data")
        for entry in source.entries():
            try:
                entry.read()
            except DataError:
                continue
        source.count(), source.fingerprint()
    except DataError as error:
        message = str(error)
    else:
        return
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "does not exist: give a folder, zip, tar"),
        ("missing.zip", None, "does not exist"),
        ("broken.npz", b"neither this nor that", "cannot be read"),
        ("broken.npy", b"neither this nor that", "cannot be read"),
        ("empty.npy", b"", "cannot be read"),
        ("broken.zip", b"neither this nor that", "is not a whole archive: copy it again"),
        ("broken.tar", b"", "is not a whole archive"),
        ("broken.tgz", b"\x1f\x8b\x08\x00damaged", "is not a whole archive"),
        ("a.csv", b"1,2", "is neither a folder, a zip, a tar, an .npz, an .npy nor a packed corpus"),
    ],
)
def test_what_is_no_source_is_refused_by_option_and_name(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^--prior-data .*{name}.*{message}"):
        open_source(tmp_path / name, "--prior-data")


def test_sources_without_images_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "folder", {"notes.txt": b"", ".hidden/a.png": b""})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped, tarfile.open(tmp_path / "a.tar", "w") as tar:
        zipped.writestr("notes.txt", b"")
        tar.add(tmp_path / "folder" / "notes.txt", "notes.txt")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    for name in ("folder", "a.zip", "a.tar", "empty.zip"):
        with pytest.raises(DataError, match=f"--data .*{name} holds no images .*\\.png"):
            open_source(tmp_path / name)


def test_every_source_gives_the_same_entries_again_and_counts_them(tmp_path: Path) -> None:
    for name, data in KINDS.items():
        (tmp_path / name).write_bytes(data)
    put(tmp_path / "folder", FILES)
    packed = pack(open_source(tmp_path / "a.npy"), tmp_path / "packed", PixelPolicy(image_size=8, channels=1))
    for name in (*KINDS, "folder", "packed"):
        source = open_source(tmp_path / name)
        assert source.path == tmp_path / name
        first, again = ([(entry.name, *entry.read()[:1], entry.label) for entry in source.entries()] for _ in range(2))
        assert first == again
        assert len(first) == (len(packed) if name == "packed" else 4 if "np" not in name else 3)
        assert source.count() in ([None] if name in ("a.tar", "a.tgz") else [len(first)])
        assert source.fingerprint() == open_source(tmp_path / name).fingerprint()


def test_a_folders_fingerprint_changes_with_its_pictures_and_with_nothing_else(tmp_path: Path) -> None:
    put(tmp_path, FILES)
    fingerprint = FolderSource(tmp_path).fingerprint
    known = [fingerprint()]

    def changed() -> bool:
        known.append(fingerprint())
        return known[-1] not in known[:-1]

    for entry in FolderSource(tmp_path).entries():
        entry.read()
    assert known[0] == fingerprint()
    put(tmp_path, {"notes.txt": b"", ".DS_Store": b"", "a/.hidden/a.png": b""})
    assert known[0] == fingerprint()
    put(tmp_path, {"added.png": b""})
    assert changed()
    (tmp_path / "added.png").rename(tmp_path / "renamed.png")
    assert changed()
    times = (tmp_path / "a" / "one.PNG").stat()
    (tmp_path / "a" / "one.PNG").write_bytes(b"resized")
    os.utime(tmp_path / "a" / "one.PNG", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed()
    os.utime(tmp_path / "top.png", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert changed()
    (tmp_path / "a" / "one.PNG").rename(tmp_path / "b" / "one.PNG")
    assert changed()
    (tmp_path / "top.png").unlink()
    assert changed()
    (tmp_path / "top.png").symlink_to("gone.png")
    assert changed()
    put(tmp_path / "elsewhere.d", {"1.png": b""})
    assert changed()


def test_a_copy_of_a_folder_with_its_times_has_its_fingerprint(tmp_path: Path) -> None:
    put(tmp_path / "here", FILES)
    subprocess.run(["cp", "-a", str(tmp_path / "here"), str(tmp_path / "there")], check=True)
    assert FolderSource(tmp_path / "here").fingerprint() == FolderSource(tmp_path / "there").fingerprint()


@pytest.mark.parametrize("name", list(KINDS))
def test_a_files_fingerprint_changes_with_its_size_and_time_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(KINDS[name])
    os.utime(path, ns=(1, 10**18))
    source = open_source(path)
    first = source.fingerprint()
    os.utime(path, ns=(2, 10**18))  # it was only read
    assert source.fingerprint() == first
    os.utime(path, ns=(2, 10**18 + 1))
    assert source.fingerprint() != first
    path.write_bytes(KINDS[name] + b"\0")
    os.utime(path, ns=(2, 10**18))
    assert source.fingerprint() != first


@given(texts=st.sets(st.text(), min_size=2, max_size=20))
def test_groups_are_equal_for_equal_texts_and_never_none(texts: set[str]) -> None:
    numbers = {group_of(text) for text in texts}
    assert numbers == {group_of(text) for text in texts}
    assert len(numbers) == len(texts)
    assert all(0 < number < 1 << 64 for number in numbers)
