"""Labels, groups, splits and crops of well-known corpora come from their own folders and annotation files."""

import hashlib
import io
import os
import pickle
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from maskdm.data.corpus import Corpus
from maskdm.data.pixels import PixelPolicy, Pixels
from maskdm.data.preparation.pack import pack
from maskdm.data.sources.layouts import LAYOUTS, with_layout
from maskdm.data.sources.source import Entry, Source, group_of
from maskdm.data.sources.tables import Table, read_table
from maskdm.errors import DataError

FORMS = pytest.mark.parametrize("form", ["folder", "zip", "tar"])


def encoded(pixels: Pixels, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return buffer.getvalue()


def flat(value: int = 128, width: int = 16, height: int = 16) -> bytes:
    return encoded(np.full((height, width), value, np.uint8))


def framed(width: int, height: int, *frames: tuple[tuple[int, int, int, int], int]) -> bytes:
    """A black picture with rectangles of one grey each."""
    pixels = np.zeros((height, width), np.uint8)
    for (left, top, right, bottom), value in frames:
        pixels[top:bottom, left:right] = value
    return encoded(pixels)


def lay_out(root: Path, form: str, pictures: dict[str, bytes], notes: dict[str, str] | None = None) -> Path:
    """A corpus as a folder with its annotation files in it, or as an archive with the files beside it."""
    path = root / "corpus" if form == "folder" else root / f"corpus.{form}"
    if form == "folder":
        for name, data in pictures.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    elif form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in pictures.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as tar:
            for name, data in pictures.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    for name, text in (notes or {}).items():
        ((path if form == "folder" else root) / name).write_text(text)
    return path


def by_name(source: Source) -> dict[str, Entry]:
    return {entry.name: entry for entry in source.entries()}


def packed(source: Source, out: Path, size: int, channels: int = 1) -> Corpus:
    return pack(source, out, PixelPolicy(image_size=size, channels=channels), workers=1)  # type: ignore[arg-type]


def test_auto_is_the_source_as_it_opens_by_itself(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"cat/1.jpg": flat()})
    assert [(e.label, e.split, e.group) for e in with_layout(path, "auto").entries()] == [("cat", "train", 0)]


@pytest.mark.parametrize("layout", ["imagenet", "", "torchvision", "torchvision:", "celeba:1"])
def test_an_unknown_layout_is_refused_with_those_there_are(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match=r"choose from auto, vggface2, celeba, celebahq, lsun, torchvision:NAME$"):
        with_layout(tmp_path, layout)


@pytest.mark.parametrize("layout", ["vggface2", "celeba", "celebahq", "lsun"])
def test_a_layout_of_files_is_refused_for_arrays(tmp_path: Path, layout: str) -> None:
    np.save(tmp_path / "data.npy", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match=f"--layout {layout}: .*data.npy is not a folder, zip or tar"):
        with_layout(tmp_path / "data.npy", layout)


@pytest.mark.parametrize("layout", LAYOUTS[:5])
def test_a_corpus_that_is_not_there_is_refused(tmp_path: Path, layout: str) -> None:
    with pytest.raises(DataError, match="gone does not exist"):
        with_layout(tmp_path / "gone", layout)


# VGGFace2


@FORMS
@pytest.mark.parametrize("root", ["", "VGGFace2/data/"])
def test_vggface2_says_identity_and_split(tmp_path: Path, form: str, root: str) -> None:
    names = ["train/n000002/0001_01.jpg", "train/n000002/0002_01.jpg", "test/n000001/0001_01.jpg", "cover.jpg"]
    source = with_layout(lay_out(tmp_path, form, {f"{root}{name}": flat() for name in names}), "vggface2")
    entries = by_name(source)
    found = {name: (e.label, e.split, e.group, e.box) for name in names if (e := entries[f"{root}{name}"])}
    assert found["train/n000002/0001_01.jpg"] == ("n000002", "train", group_of("n000002"), None)
    assert found["train/n000002/0002_01.jpg"] == found["train/n000002/0001_01.jpg"]
    assert found["test/n000001/0001_01.jpg"] == ("n000001", "test", group_of("n000001"), None)
    assert found["cover.jpg"][2] == 0
    assert source.count() == (None if form == "tar" else 4)
    corpus = packed(source, tmp_path / "out", 16)
    assert set(corpus.labels) >= {"n000001", "n000002"}
    assert corpus.manifest.splits == {"train": 3, "validation": 0, "test": 1}
    assert corpus.manifest.groups == 2


@FORMS
def test_vggface2_crops_to_the_box_and_three_tenths_more(tmp_path: Path, form: str) -> None:
    face, enlarged = (30, 20, 50, 40), (27, 17, 53, 43)
    picture = framed(80, 60, (enlarged, 100), (face, 200))
    path = lay_out(tmp_path, form, {"train/n000001/0001_01.jpg": picture, "train/n000001/0002_01.jpg": picture})
    boxes = tmp_path / "loose_bb_train.csv"
    boxes.write_text('NAME_ID,X,Y,W,H\n"n000007/0001_01",-4,0,9,9\n"n000001/0001_01",30,20,20,20\n')
    source = with_layout(path, "vggface2", boxes)
    assert [entry.box for entry in source.entries()] == [enlarged, None]
    cropped, whole = (image[0].astype(int) for image in packed(source, tmp_path / "out", 26).pixels)
    expected = np.full((26, 26), 100)
    expected[3:23, 3:23] = 200
    assert np.abs(cropped - expected).max() < 25
    assert whole[0].max() < 25  # the black that the box leaves out


def test_a_vggface2_box_may_reach_beyond_the_picture(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"train/n000001/0001_01.jpg": flat(200, 40, 40)})
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("NAME_ID,X,Y,W,H\nn000001/0001_01,-20,-20,40,40\n")
    image = packed(with_layout(path, "vggface2", boxes), tmp_path / "out", 13).pixels[0, 0]
    assert int(image[:6].max()) < 20
    assert int(image[9:, 9:].min()) > 180


def test_vggface2s_joined_boxes_repeat_the_header(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"test/n000001/0001_01.jpg": flat()})
    boxes = tmp_path / "loose_bb_all.csv"
    boxes.write_text("NAME_ID,X,Y,W,H\nn000002/0001_01,1,1,2,2\nNAME_ID,X,Y,W,H\nn000001/0001_01,0,0,10,10\n")
    assert [entry.box for entry in with_layout(path, "vggface2", boxes).entries()] == [(-2, -2, 12, 12)]


@pytest.mark.parametrize(
    "line", ["n000001/0001_01,1,2,3", "n000001/0001_01,a,2,3,4", "n000001/0001_01,1,2,0,4", "n1/1,1,2,99999999999,4"]
)
def test_a_malformed_box_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = lay_out(tmp_path, "folder", {"train/n000001/0001_01.jpg": flat()})
    (tmp_path / "boxes.csv").write_text(f"NAME_ID,X,Y,W,H\nn000001/0001_01,1,2,3,4\n{line}\n")
    with pytest.raises(DataError, match=r"--boxes .*boxes.csv, line 3 is malformed: it needs .*NAME_ID"):
        with_layout(path, "vggface2", tmp_path / "boxes.csv")


def test_boxes_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"train/n000001/0001_01.jpg": flat()})
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("NAME_ID,X,Y,W,H\nn000002/0001_01,1,2,3,4\n")
    with pytest.raises(DataError, match=r"--boxes .*boxes.csv names none of the images"):
        with_layout(path, "vggface2", boxes)
    with pytest.raises(DataError, match=r"--boxes .*gone.csv cannot be read"):
        with_layout(path, "vggface2", tmp_path / "gone.csv")
    boxes.write_bytes(b"n000002/\xff\xfe,1,2,3,4\n")
    with pytest.raises(DataError, match=r"--boxes .*boxes.csv cannot be read"):
        with_layout(path, "vggface2", boxes)
    with pytest.raises(DataError, match=r"--boxes .* goes with --layout vggface2, not with celeba"):
        with_layout(path, "celeba", boxes)


def test_images_without_identities_are_not_vggface2(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"train/cats/1.jpg": flat()})
    with pytest.raises(DataError, match=r"--layout vggface2: no image of .*such as train/n000001"):
        with_layout(path, "vggface2")


def test_a_changed_annotation_is_another_source(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"train/n000001/0001_01.jpg": flat()})
    boxes = tmp_path / "boxes.csv"
    prints = {with_layout(path, layout).fingerprint() for layout in ("auto", "vggface2", "celebahq")}
    for width in (10, 11):
        boxes.write_text(f"NAME_ID,X,Y,W,H\nn000001/0001_01,0,0,{width},10\n")
        prints.add(with_layout(path, "vggface2", boxes).fingerprint())
        assert with_layout(path, "vggface2", boxes).fingerprint() in prints
    for number in range(3):
        (path / "identity_CelebA.txt").write_text(f"0001_01.jpg {number}\n")
        prints.add(with_layout(path, "celeba").fingerprint())
    assert len(prints) == 8


def test_millions_of_boxes_take_24_bytes_each(tmp_path: Path) -> None:
    rows, file = 20_000, tmp_path / "boxes.csv"
    file.write_text("".join(f"n{i // 300:06}/{i % 300:04}_01,{i % 77},{i},40,{i + 1}\n" for i in range(rows)))

    def parse(fields: Any) -> tuple[str, list[int]]:
        return fields[0], [int(value) for value in fields[1:]]

    read_table(file, "--boxes", "i", "", parse)  # what stays of the first call is no part of the table
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        table = read_table(file, "--boxes", "i", "", parse)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 24 * rows + 10_000
    assert peak - before < 72 * rows
    assert all(table.get(group_of(f"n{i // 300:06}/{i % 300:04}_01")) == (i % 77, i, 40, i + 1) for i in range(rows))
    assert table.get(group_of("n999999/0001_01"), (5,)) == (5,)


def test_an_empty_file_is_a_table_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    table = read_table(tmp_path / "empty.csv", "--boxes", "i", "", lambda fields: (fields[0], [1]))
    assert isinstance(table, Table)
    assert table.get(group_of("a")) == ()


# CelebA and CelebA-HQ

PARTITION = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n000009.jpg 2\n"
IDENTITIES = "000001.jpg 2880\n000002.jpg 2937\n000003.jpg 2880\n"


@FORMS
@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_celeba_says_identity_split_and_crop(tmp_path: Path, form: str, suffix: str) -> None:
    face = framed(178, 218, ((25, 57, 153, 185), 200))
    pictures = {f"img_align_celeba/00000{i}.jpg": face for i in (1, 2, 3, 4)}
    csv = "image_id,partition\n" + PARTITION.replace(" ", ",")
    notes = {f"list_eval_partition.{suffix}": PARTITION if suffix == "txt" else csv, "identity_CelebA.txt": IDENTITIES}
    source = with_layout(lay_out(tmp_path, form, pictures, notes), "celeba")
    entries = list(source.entries())
    assert [entry.split for entry in entries] == ["train", "validation", "test", "train"]
    assert [entry.group for entry in entries] == [group_of("2880"), group_of("2937"), group_of("2880"), 0]
    corpus = packed(source, tmp_path / "out", 128)
    assert corpus.labels == ()
    assert corpus.manifest.splits == {"train": 2, "validation": 1, "test": 1}
    assert int(np.asarray(corpus.pixels)[:, :, 2:-2, 2:-2].min()) > 190  # the face, and nothing of the black about it
    assert int(np.asarray(corpus.pixels).min()) > 160


@pytest.mark.parametrize("place", ["Anno", "Eval"])
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_celebas_files_are_found_in_its_own_tree(tmp_path: Path, form: str, place: str) -> None:
    (tmp_path / "CelebA" / "Img").mkdir(parents=True)
    (tmp_path / "CelebA" / place).mkdir()
    (tmp_path / "CelebA" / place / "list_eval_partition.txt").write_text(PARTITION)
    path = lay_out(tmp_path / "CelebA" / "Img", form, {"000003.jpg": flat()})
    paths = [path, tmp_path / "CelebA"] if form == "folder" else [path]
    assert [[e.split for e in with_layout(path, "celeba").entries()] for path in paths] == [["test"]] * len(paths)


def test_celeba_without_its_files_is_all_for_training_and_only_aligned_ones_are_cropped(tmp_path: Path) -> None:
    pictures = {"img_celeba/000001.jpg": flat(), "img_align_celeba_png/000002.png": flat()}
    source = with_layout(lay_out(tmp_path, "zip", pictures), "celeba")
    assert [(e.label, e.split, e.group) for e in source.entries()] == [("", "train", 0)] * 2
    assert by_name(source)["img_celeba/000001.jpg"].box is None
    path = lay_out(tmp_path, "folder", {"000001.jpg": flat(), "wild/000002.jpg": flat()})
    aligned = path.rename(tmp_path / "img_align_celeba")
    assert [e.box for e in with_layout(aligned, "celeba").entries()] == [(25, 57, 153, 185), None]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("list_eval_partition.txt", "000001.jpg 0\n000002.jpg 3\n", 2),
        ("list_eval_partition.txt", "000001.jpg\n", 1),
        ("list_eval_partition.csv", "image_id,partition\n000001.jpg,0,1\n", 2),
        ("identity_CelebA.txt", "000001.jpg 5\n\n000002.jpg five\n", 3),
    ],
)
@pytest.mark.parametrize("layout", ["celeba", "celebahq"])
def test_a_malformed_line_of_celebas_files_is_named(
    tmp_path: Path, layout: str, name: str, text: str, line: int
) -> None:
    path = lay_out(tmp_path, "folder", {"000001.jpg": flat()}, {name: text})
    with pytest.raises(DataError, match=f"--data .*{name}, line {line} is malformed: it needs an image's name and"):
        with_layout(path, layout)


def test_celebas_files_that_list_none_of_the_images_are_refused(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"face1.jpg": flat()}, {"list_eval_partition.txt": PARTITION})
    with pytest.raises(DataError, match=r"--data .*list_eval_partition.txt lists none of its images"):
        with_layout(path, "celeba")


MAPPING = "idx    orig_idx   orig_file\n0      0          000001.jpg\n1      1          000002.jpg\n2   2 000003.jpg\n"


@FORMS
@pytest.mark.parametrize("first", [0, 1])
def test_celebahq_takes_identity_and_split_from_celeba(tmp_path: Path, form: str, first: int) -> None:
    names = ["CelebA-HQ-img/{}.jpg", "data256x256/{:05}.jpg"][first]
    pictures = {names.format(i + first): flat(10 * i) for i in range(3)}
    notes = {
        "CelebA-HQ-to-CelebA-mapping.txt": MAPPING,
        "list_eval_partition.txt": PARTITION,
        "identity_CelebA.txt": IDENTITIES,
    }
    entries = list(with_layout(lay_out(tmp_path, form, pictures, notes), "celebahq").entries())
    assert [entry.split for entry in entries] == ["train", "validation", "test"]
    assert [entry.group for entry in entries] == [group_of(i) for i in ("2880", "2937", "2880")]
    assert {(entry.label, entry.box) for entry in entries} == {("", None)}


def test_a_part_of_celebahq_counts_from_where_its_names_say(tmp_path: Path) -> None:
    notes = {"CelebA-HQ-to-CelebA-mapping.txt": MAPPING, "list_eval_partition.txt": PARTITION}
    pictures = {"2.jpg": flat(), "notes.jpg": flat(), "512.jpg": flat()}
    entries = by_name(with_layout(lay_out(tmp_path, "folder", pictures, notes), "celebahq"))
    assert {name: entry.split for name, entry in entries.items()} == {
        "2.jpg": "test",
        "notes.jpg": "train",
        "512.jpg": "train",
    }
    (tmp_path / "padded").mkdir()
    path = lay_out(tmp_path / "padded", "folder", {"00002.jpg": flat()}, notes)
    with pytest.raises(DataError, match=r"--data .*which of its images is which in .*mapping.txt cannot be told"):
        with_layout(path, "celebahq")


@pytest.mark.parametrize("notes", [{}, {"CelebA-HQ-to-CelebA-mapping.txt": MAPPING}])
def test_celebahq_alone_is_all_for_training(tmp_path: Path, notes: dict[str, str]) -> None:
    pictures = {f"test/faces/{i}.jpg": flat() for i in range(2)}
    source = with_layout(lay_out(tmp_path, "folder", pictures, notes), "celebahq")
    assert [(e.label, e.split, e.group, e.box) for e in source.entries()] == [("", "train", 0, None)] * 2


def test_a_malformed_mapping_is_named_by_its_line(tmp_path: Path) -> None:
    notes = {"CelebA-HQ-to-CelebA-mapping.txt": f"{MAPPING}3 3\n", "list_eval_partition.txt": PARTITION}
    path = lay_out(tmp_path, "folder", {"0.jpg": flat()}, notes)
    with pytest.raises(DataError, match=r"mapping.txt, line 5 is malformed: it needs idx, orig_idx and orig_file"):
        with_layout(path, "celebahq")


# LSUN


def put_lmdb(folder: Path, values: dict[bytes, bytes]) -> None:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


def test_lsuns_databases_say_category_and_split(tmp_path: Path) -> None:
    webp = encoded(np.full((20, 16), 90, np.uint8), "WEBP")
    put_lmdb(tmp_path / "lsun" / "dining_room_train_lmdb", {b"0a1b": flat(30), b"\xff\x00": webp})
    put_lmdb(tmp_path / "lsun" / "bedroom_val_lmdb", {b"c": flat(60)})
    put_lmdb(tmp_path / "lsun" / "test_lmdb", {b"d": flat(120)})
    (tmp_path / "lsun" / "category_list.txt").write_text("bedroom\n")
    source = with_layout(tmp_path / "lsun", "lsun")
    assert source.count() == 4
    assert {e.name: (e.label, e.split, e.group) for e in source.entries()} == {
        "bedroom/c": ("bedroom", "validation", 0),
        "dining_room/0a1b": ("dining_room", "train", 0),
        "dining_room/ff00": ("dining_room", "train", 0),
        "test/d": ("", "test", 0),
    }
    corpus = packed(source, tmp_path / "out", 16)
    assert corpus.labels == ("bedroom", "dining_room")
    assert [int(image.mean().round()) for image in corpus.pixels] == pytest.approx([60, 30, 90, 120], abs=2)
    (tmp_path / "elsewhere.mdb").hardlink_to(tmp_path / "lsun" / "test_lmdb" / "data.mdb")
    (tmp_path / "lsun" / "test_lmdb" / "data.mdb").unlink()
    (tmp_path / "lsun" / "test_lmdb" / "data.mdb").symlink_to(tmp_path / "elsewhere.mdb")
    assert with_layout(tmp_path / "lsun", "lsun").count() == 4
    alone = with_layout(tmp_path / "lsun" / "bedroom_val_lmdb", "lsun")
    assert [(e.label, e.split) for e in alone.entries()] == [("bedroom", "validation")]
    assert alone.fingerprint() != source.fingerprint()


def test_lsuns_databases_may_be_read_several_times_at_once(tmp_path: Path) -> None:
    put_lmdb(tmp_path / "bedroom_train_lmdb", {b"a": flat(), b"b": flat()})
    first, second = with_layout(tmp_path, "lsun"), with_layout(tmp_path / "bedroom_train_lmdb", "lsun")
    pairs = zip(first.entries(), first.entries(), second.entries(), strict=True)
    assert [{e.name for e in pair} for pair in pairs] == [{"bedroom/a"}, {"bedroom/b"}]


@pytest.mark.parametrize("size", [0, 100, 4096, 8192, -4096])
def test_an_lsun_database_that_is_cut_off_is_refused(tmp_path: Path, size: int) -> None:
    put_lmdb(tmp_path / "bedroom_train_lmdb", {b"%d" % i: flat(i, 64, 64) for i in range(40)})
    file = tmp_path / "bedroom_train_lmdb" / "data.mdb"
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(DataError, match=r"--data .*data.mdb is not a whole LMDB"):
        with_layout(tmp_path, "lsun")


def test_an_lsun_database_without_images_is_refused(tmp_path: Path) -> None:
    put_lmdb(tmp_path / "bedroom_train_lmdb", {})
    with pytest.raises(DataError, match=r"--data .* holds no images: its LMDB is empty"):
        with_layout(tmp_path, "lsun")


def test_lsun_without_the_package_for_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_lmdb(tmp_path / "bedroom_train_lmdb", {b"a": flat()})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(DataError, match=r"--layout lsun needs the package lmdb: pip install 'maskdm\[lsun\]'"):
        with_layout(tmp_path, "lsun")


@FORMS
def test_lsuns_exported_trees_are_read_too(tmp_path: Path, form: str) -> None:
    webp = encoded(np.full((20, 16), 90, np.uint8), "WEBP")
    pictures = {"lsun/bedroom_train/0/a/0a1b.webp": webp, "lsun/bedroom_val/7/7c.webp": webp, "lsun/cover.webp": webp}
    source = with_layout(lay_out(tmp_path, form, pictures), "lsun")
    assert {e.name: (e.label, e.split) for e in source.entries()} == {
        "lsun/bedroom_train/0/a/0a1b.webp": ("bedroom", "train"),
        "lsun/bedroom_val/7/7c.webp": ("bedroom", "validation"),
        "lsun/cover.webp": ("lsun", "train"),
    }
    assert len(packed(source, tmp_path / "out", 16)) == 3


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_one_exported_tree_of_lsun_has_its_category_in_its_own_name(tmp_path: Path, form: str) -> None:
    path = lay_out(tmp_path, form, {"0/a/0a1b.jpg": flat()})
    path = path.rename(path.with_name(f"church_outdoor_val{path.suffix}"))
    assert [(e.label, e.split) for e in with_layout(path, "lsun").entries()] == [("church_outdoor", "validation")]


def test_what_is_not_lsun_is_refused(tmp_path: Path) -> None:
    path = lay_out(tmp_path, "folder", {"cats/1.jpg": flat()})
    with pytest.raises(DataError, match=r"--layout lsun: .* holds no data.mdb and no folder such as bedroom_train"):
        with_layout(path, "lsun")
    zipped = lay_out(tmp_path, "zip", {"bedroom_train_lmdb/data.mdb": b"", "bedroom_train_lmdb/lock.mdb": b""})
    with pytest.raises(DataError, match=r"corpus.zip holds an LMDB, .*: unpack it"):
        with_layout(zipped, "lsun")


# torchvision


def put_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, evil: object = None) -> Pixels:
    """CIFAR-10 with two pictures a file, pickled as its authors did, and torchvision's checksums for it."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    sums = {}
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents: dict[str, dict[str, object]] = {
        name: {"data": pixels[2 * i : 2 * i + 2].reshape(2, -1), "labels": [1, 0]} for i, name in enumerate(files)
    }
    contents["batches.meta"] = {"label_names": ["airplane", "automobile"]}
    if evil is not None:
        contents["data_batch_2"]["data"] = evil
    for name, content in contents.items():
        data = pickle.dumps(content, protocol=2)
        data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # NumPy's name in their days
        data = data.replace(b"\x89\x88\x87", b"K\x00K\x01\x87")  # so were the truth values of a dtype
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in files[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return pixels


def test_torchvisions_datasets_are_read_as_they_lie_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = put_cifar10(tmp_path / "data", monkeypatch)
    source = with_layout(tmp_path / "data", "torchvision:CIFAR10")
    assert source.count() == 12
    assert [e.name for e in source.entries()][-3:] == ["train/9", "test/0", "test/1"]
    corpus = packed(source, tmp_path / "out", 32, 3)
    assert np.array_equal(corpus.pixels, pixels)
    assert [corpus.label(row) for row in range(12)] == ["automobile", "airplane"] * 6
    assert corpus.manifest.splits == {"train": 10, "validation": 0, "test": 2}


class Evil:
    """What a pickle of it does, is done by whoever reads it."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("call", [os.mkdir, os.system, eval, getattr, pickle.loads, __import__])
def test_a_pickle_that_would_run_code_is_refused_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    trace = tmp_path / "trace"
    arguments = {os.system: f"touch {trace}", eval: f"__import__('os').mkdir({str(trace)!r})"}.get(call, str(trace))
    put_cifar10(tmp_path / "data", monkeypatch, Evil(call, arguments))
    with pytest.raises(DataError, match=r"--layout torchvision:CIFAR10 .*a pickle asks for .*do not trust these"):
        with_layout(tmp_path / "data", "torchvision:CIFAR10")
    assert not trace.exists()


def test_pickles_of_others_are_read_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_cifar10(tmp_path / "data", monkeypatch)
    source = with_layout(tmp_path / "data", "torchvision:CIFAR10")
    for entry in source.entries():  # while the source waits to be asked for the next one
        assert pickle.loads(pickle.dumps(entry)).name == entry.name
    with pytest.raises(DataError):
        with_layout(tmp_path / "none", "torchvision:CIFAR10")
    assert pickle.loads(pickle.dumps(tmp_path)) == tmp_path


def test_torchvisions_splits_are_those_that_a_dataset_knows(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "valid", "test")):
        for country in ("AD", "CH"):
            path = tmp_path / "country211" / split / country / f"{number}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(flat(number))
    source = with_layout(tmp_path, "torchvision:Country211")
    assert [(e.name, e.label, e.split) for e in source.entries()] == [
        ("train/0", "AD", "train"),
        ("train/1", "CH", "train"),
        ("validation/0", "AD", "validation"),
        ("validation/1", "CH", "validation"),
        ("test/0", "AD", "test"),
        ("test/1", "CH", "test"),
    ]


def test_torchvisions_trainval_is_for_training_where_there_is_no_other(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (base / folder).mkdir(parents=True)
    for number, split in enumerate(("trainval", "test")):
        (base / "images" / f"Great_Dane_{number}.jpg").write_bytes(flat())
        (base / "annotations" / f"{split}.txt").write_text(f"Great_Dane_{number} 1 2 3\n")
    source = with_layout(tmp_path, "torchvision:OxfordIIITPet")
    assert [(e.label, e.split) for e in source.entries()] == [("Great Dane", "train"), ("Great Dane", "test")]


def test_a_torchvision_dataset_without_parts_is_all_for_training(tmp_path: Path) -> None:
    grey, colour = np.full((8, 8), 7, np.uint8), np.full((8, 8, 4), 9, np.uint8)
    for name, pixels in (("cat/1.png", grey), ("dog/2.png", colour)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(encoded(pixels, "PNG"))
    entries = list(with_layout(tmp_path, "torchvision:ImageFolder").entries())
    assert [(e.label, e.split) for e in entries] == [("cat", "train"), ("dog", "train")]
    contents = [e.content for e in entries]
    assert all(isinstance(c, np.ndarray) and c.dtype == np.uint8 and c.shape == (8, 8, 3) for c in contents)
    first = with_layout(tmp_path, "torchvision:ImageFolder").fingerprint()
    (tmp_path / "dog" / "3.png").write_bytes(encoded(colour, "PNG"))
    assert with_layout(tmp_path, "torchvision:ImageFolder").fingerprint() != first


def test_a_damaged_picture_of_torchvisions_is_an_error_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").write_bytes(flat())
    (tmp_path / "cat" / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"--layout torchvision:ImageFolder cannot be read from .*: cannot identify"):
        list(with_layout(tmp_path, "torchvision:ImageFolder").entries())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "has no dataset of that name"),
        ("utils", "has no dataset of that name"),
        ("wrap_dataset_for_transforms_v2", "has no dataset of that name"),
        ("CIFAR10", r"cannot be read from .*: Dataset not found or corrupted\.$"),
        ("MNIST", r"cannot be read from .*: Dataset not found\.$"),
        ("Country211", r"cannot be read from .*: Dataset not found\.$"),
        ("EMNIST", "holds no picture of a train, validation or test part"),
        ("CocoDetection", "it takes annFile: export it as a folder of pictures"),
        ("FakeData", "it takes no folder"),
        ("VisionDataset", "cannot be read from .*: NotImplementedError"),
    ],
)
def test_a_torchvision_dataset_that_cannot_be_read_says_why(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^--layout torchvision:{name}.*{message}") as caught:
        with_layout(tmp_path, f"torchvision:{name}")
    assert "\n" not in str(caught.value)


def test_torchvision_needs_the_folder_that_it_calls_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data .*corpus.zip is not a folder: --layout torchvision:CIFAR10 needs"):
        with_layout(lay_out(tmp_path, "zip", {"a.jpg": flat()}), "torchvision:CIFAR10")


def test_a_torchvision_dataset_of_other_things_than_labels_is_refused(tmp_path: Path) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 3, 8, 8), np.uint8))
    with pytest.raises(DataError, match=r"torchvision:MovingMNIST .*its items are not a picture and a label each"):
        with_layout(tmp_path, "torchvision:MovingMNIST")
