"""Which images of a site take part: stable, as large as asked, and no patient on both sides."""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from maskdm.data.duplicates import near_duplicates, thumbnail
from maskdm.data.preparation.slices import Found, Slice, choose, divide, look_alike, survey
from maskdm.data.sources.groups import with_groups
from maskdm.data.sources.source import Entry, open_source
from maskdm.errors import DataError
from maskdm_server.lab.faces import draw_faces


def site(count: int, labels: str = "a", groups: list[int] | None = None) -> Found:
    """A site with images whose content is their number."""
    digests = [number.to_bytes(32, "big") for number in range(count)]
    return Found(
        names={digest: str(i) for i, digest in enumerate(digests)},
        labels={digest: labels[i % len(labels)] for i, digest in enumerate(digests)},
        groups={digest: {groups[i]} - {0} if groups else set() for i, digest in enumerate(digests)},
        total=count,
    )


def smaller(found: Found, count: int) -> Found:
    kept = list(found.names)[:count]
    return Found(
        names={digest: found.names[digest] for digest in kept},
        labels={digest: found.labels[digest] for digest in kept},
        groups={digest: found.groups[digest] for digest in kept},
        total=count,
    )


def sides(parted: Slice) -> dict[bytes, str]:
    return {
        bytes.fromhex(digest): side
        for side, images in (("train", parted.train), ("held_out", parted.held_out), ("left_out", parted.left_out))
        for digest in images
    }


@given(fraction=st.floats(0.2, 1), held_out=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
def test_a_slice_and_its_two_sides_are_about_as_large_as_asked(fraction: float, held_out: float, seed: int) -> None:
    found = site(1000)
    chosen = choose(found, fraction, seed=seed)
    parted = divide(chosen, found, held_out=held_out, seed=seed)
    assert not parted.train.keys() & parted.held_out.keys()
    assert len(parted.train) + len(parted.held_out) == len(chosen)
    assert len(chosen) / 1000 == pytest.approx(fraction, abs=5 * (0.25 / 1000) ** 0.5)
    assert len(parted.held_out) / len(chosen) == pytest.approx(held_out, abs=5 * (0.25 / len(chosen)) ** 0.5)


@given(
    before=st.integers(2, 120),
    added=st.integers(0, 120),
    fraction=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
    max_images=st.none() | st.integers(2, 60),
    stratify=st.booleans(),
)
def test_every_earlier_member_stays_and_stays_on_its_side_when_images_are_added(
    before: int, added: int, fraction: float, seed: int, max_images: int | None, stratify: bool
) -> None:
    after = site(before + added, labels="abc")
    first_site = smaller(after, before)
    first = choose(first_site, fraction, seed=seed, max_images=max_images, stratify=stratify)
    parted = divide(first, first_site, seed=seed)
    second = choose(after, fraction, seed=seed, max_images=max_images, stratify=stratify, earlier=sides(parted))
    again = divide(second, after, seed=seed, earlier=sides(parted))
    assert sides(parted).items() <= sides(again).items()
    if max_images is not None:
        assert len(second) <= max(max_images, 2)


@given(before=st.integers(30, 120), added=st.integers(0, 120), fraction=st.floats(0.3, 1), seed=st.integers(0, 1000))
def test_without_a_record_too_the_choice_depends_on_nothing_else_that_is_there(
    before: int, added: int, fraction: float, seed: int
) -> None:
    after = site(before + added)
    first, second = choose(smaller(after, before), fraction, seed=seed), choose(after, fraction, seed=seed)
    assert set(first) <= set(second)
    old = set(smaller(after, before).names)
    assert set(second) & old == set(first)


def test_renamed_moved_and_added_files_leave_every_earlier_member_in(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for i in range(120):
        put(before / f"{i:03}.png", i)
        put(after / f"{i % 7}" / f"renamed-{120 - i:03}.png", i)
    for i in range(120, 160):
        put(after / f"{i:03}.png", i)
    first, second = survey(open_source(before)), survey(open_source(after))
    chosen = choose(first, 0.4, seed=1)
    assert set(chosen) <= set(choose(second, 0.4, seed=1))
    old_sides = sides(divide(chosen, first, seed=1))
    assert old_sides.items() <= sides(divide(choose(second, 0.4, seed=1), second, seed=1)).items()


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)


@given(
    groups=st.lists(st.integers(0, 12), min_size=4, max_size=100),
    links=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=6),
    held_out=st.floats(0.05, 0.95),
    seed=st.integers(0, 1000),
)
def test_no_patient_and_no_near_duplicate_ever_stands_on_both_sides(
    groups: list[int], links: list[tuple[int, int]], held_out: float, seed: int
) -> None:
    found = site(len(groups), groups=groups)
    digests = list(found.names)
    alike = [(digests[a % len(digests)], digests[b % len(digests)]) for a, b in links]
    try:
        side = sides(divide(digests, found, held_out=held_out, seed=seed, alike=alike))
    except DataError:
        return  # all one unit, which the next test is about
    for group in set(groups) - {0}:
        assert len({side[d] for d in digests if group in found.groups[d]}) == 1
    assert all(side[first] == side[second] for first, second in alike)
    assert set(side.values()) == {"train", "held_out"}
    assert set(side) == set(digests)


def test_images_that_all_belong_together_cannot_be_parted() -> None:
    found = site(10, groups=[7] * 10)
    with pytest.raises(DataError, match="belong to one group or are near-duplicates"):
        divide(list(found.names), found)


@given(groups=st.lists(st.integers(1, 9), min_size=8, max_size=60), added=st.lists(st.integers(1, 9), max_size=40))
def test_a_patient_stays_on_one_side_when_more_images_of_patients_come(groups: list[int], added: list[int]) -> None:
    if len(set(groups)) < 2:
        return
    after = site(len(groups) + len(added), groups=groups + added)
    before = smaller(after, len(groups))
    earlier = sides(divide(list(before.names), before))
    later = sides(divide(list(after.names), after, earlier=earlier))
    assert earlier.items() <= later.items()
    for group in set(groups):
        assert len({later[d] for d in after.names if group in after.groups[d]}) == 1


def test_an_image_that_resembles_both_sides_is_left_out() -> None:
    found = site(20)
    digests = list(found.names)
    before = sides(divide(digests[:19], smaller(found, 19)))
    train, held = (next(d for d in digests if before.get(d) == side) for side in ("train", "held_out"))
    parted = divide(digests, found, earlier=before, alike=[(digests[19], train), (digests[19], held)])
    assert list(parted.left_out) == [digests[19].hex()]
    assert {digest: side for digest, side in sides(parted).items() if digest != digests[19]} == before
    again = divide(digests, found, earlier=sides(parted))  # though nothing says now that it resembles others
    assert sides(again) == sides(parted)


def test_images_of_both_sides_that_turn_out_to_be_one_patients_are_measured_on_no_more() -> None:
    found = site(20)
    digests = list(found.names)
    before = sides(divide(digests, found))
    train, held = (next(d for d in digests if before[d] == side) for side in ("train", "held_out"))
    known = site(20)
    known.groups[train].add(5)
    known.groups[held].add(5)
    after = sides(divide(digests, known, earlier=before))
    assert after == before | {held: "left_out"}


def test_a_file_that_two_patients_share_ties_them_together() -> None:
    groups = [1] * 6 + [2] * 6 + [3] * 6
    found = site(18, groups=groups)
    digests = list(found.names)
    found.groups[digests[0]].add(2)
    for seed in range(20):
        side = sides(divide(digests, found, seed=seed, held_out=0.5))
        assert len({side[digest] for digest in digests[:12]}) == 1


@pytest.mark.parametrize("size", [1, 10, 30])
def test_large_units_are_held_out_no_more_often_than_small_ones(size: int) -> None:
    units = 3000 // size
    found = site(units * size)
    digests = list(found.names)
    alike = [(digests[u * size], digests[u * size + i]) for u in range(units) for i in range(1, size)]
    shares = [len(divide(digests, found, seed=seed, alike=alike).held_out) / len(digests) for seed in range(8)]
    assert np.mean(shares) == pytest.approx(0.2, abs=5 * (0.16 / units / 8) ** 0.5)


def test_images_that_are_absent_for_a_while_keep_their_places() -> None:
    everything = site(30)
    chosen = choose(everything, 1.0, max_images=10)
    here = smaller(everything, 15)
    kept = [digest for digest in chosen if digest in here.names]
    found = choose(here, 1.0, max_images=10, earlier=chosen, absent=len(chosen) - len(kept))
    assert found == kept


@given(fraction=st.floats(0.05, 1), seed=st.integers(0, 100))
def test_stratified_slices_take_the_fraction_of_each_label(fraction: float, seed: int) -> None:
    found = site(300, labels="aaaaaaaaab")
    chosen = choose(found, fraction, stratify=True, seed=seed)
    for label, count in (("a", 270), ("b", 30)):
        assert sum(found.labels[d] == label for d in chosen) == max(1, round(fraction * count))


@given(count=st.integers(2, 60), fraction=st.floats(1e-6, 1), seed=st.integers(0, 1000))
def test_even_the_smallest_slice_has_an_image_on_each_side(count: int, fraction: float, seed: int) -> None:
    found = site(count)
    parted = divide(choose(found, fraction, seed=seed), found, seed=seed)
    assert parted.train
    assert parted.held_out


def test_another_seed_chooses_another_slice() -> None:
    assert set(choose(site(100), 0.5, seed=0)) != set(choose(site(100), 0.5, seed=1))


def test_a_site_with_a_single_different_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.png", 0)
    put(tmp_path / "b.png", 0)
    found = survey(open_source(tmp_path))
    assert (found.total, len(found.names)) == (2, 1)
    with pytest.raises(DataError, match="at least two are needed"):
        choose(found, 1.0)


def test_files_that_cannot_be_read_are_named_and_left_out(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "images" / f"{i}.png", i)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "images").iterdir()):
            archive.write(path, path.name)
    data = bytearray((tmp_path / "all.zip").read_bytes())
    data[60] ^= 0xFF  # inside the first picture: its checksum no longer fits
    (tmp_path / "all.zip").write_bytes(data)
    found = survey(open_source(tmp_path / "all.zip"))
    assert found.unreadable == ["0.png"]
    assert sorted(found.names.values()) == ["1.png", "2.png", "3.png"]


class Pictures:
    """A source of pictures at hand."""

    path = Path("pictures")

    def __init__(self, pictures: list[Image.Image]) -> None:
        self.pictures = pictures

    def entries(self) -> Iterator[Entry]:
        for number, picture in enumerate(self.pictures):
            yield Entry(str(number), np.asarray(picture))

    def count(self) -> int:
        return len(self.pictures)

    def fingerprint(self) -> bytes:
        return b""


def test_copies_that_were_resized_brightened_or_recoded_are_found_and_different_faces_are_not() -> None:
    faces = [Image.fromarray(pixels) for pixels in draw_faces(120, size=64, seed=3)]
    copies = [
        faces[0].resize((48, 48)),
        ImageEnhance.Brightness(faces[1]).enhance(1.1),
        ImageEnhance.Contrast(faces[2]).enhance(0.9),
        faces[3].quantize(64).convert("RGB"),
    ]
    source = Pictures([*faces, *copies])
    found = survey(source)
    alike = look_alike(source, list(found.names), found)
    pairs = {tuple(sorted((int(found.names[a]), int(found.names[b])))) for a, b in alike}
    assert {(0, 120), (1, 121), (2, 122), (3, 123)} <= pairs
    assert len(pairs) <= 6


@given(st.integers(0, 500))
def test_near_duplicates_agree_with_a_comparison_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (12, 1, 32, 32), dtype=np.uint8)
    noisy = (base[:6].astype(int) + rng.integers(-4, 5, base[:6].shape)).clip(0, 255).astype(np.uint8)
    thumbnails = np.stack([thumbnail(pixels) for pixels in [*base, *noisy]])
    flat = thumbnails.reshape(len(thumbnails), -1)
    wanted = {(int(a), int(b)) for a, b in np.argwhere(flat @ flat.T >= 0.985) if a < b}  # each picture has one copy
    assert set(near_duplicates(thumbnails)) == wanted == {(i, 12 + i) for i in range(6)}


def test_many_pictures_alike_are_joined_by_as_few_links_as_that_takes() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (3, 1, 32, 32))
    noisy = [(base[i % 3] + rng.integers(-4, 5, base[0].shape)).clip(0, 255).astype(np.uint8) for i in range(2400)]
    links = near_duplicates(np.stack([thumbnail(pixels) for pixels in noisy]))
    assert len(links) == 2400 - 3
    assert all(first % 3 == second % 3 for first, second in links)


def test_uniform_pictures_are_not_taken_for_one_another() -> None:
    assert near_duplicates(np.stack([thumbnail(np.full((1, 32, 32), v, np.uint8)) for v in (0, 100, 200)])) == []


def test_groups_come_from_a_part_of_the_path(tmp_path: Path) -> None:
    for name in ("BloodImage_00001_0.png", "BloodImage_00001_1.png", "BloodImage_00002_0.png", "other.png"):
        put(tmp_path / "cells" / name, len(name))
    groups = {e.name: e.group for e in with_groups(open_source(tmp_path), r"BloodImage_(\d+)").entries()}
    assert groups["cells/BloodImage_00001_0.png"] == groups["cells/BloodImage_00001_1.png"]
    assert groups["cells/BloodImage_00001_0.png"] != groups["cells/BloodImage_00002_0.png"]
    assert groups["cells/other.png"] == 0


@pytest.mark.parametrize("key", ["scans/{}.png", "{}.png", "{}"])
def test_groups_come_from_a_column_of_a_table(tmp_path: Path, key: str) -> None:
    lines = ["image,ward,patient", *(f"{key.format(i)},w,p{i // 2}" for i in range(6))]
    (tmp_path / "patients.csv").write_text("\n".join(lines))
    for i in range(7):
        put(tmp_path / "images" / "scans" / f"{i}.png", i)
    source = with_groups(open_source(tmp_path / "images"), table=f"{tmp_path}/patients.csv:patient")
    groups = [entry.group for entry in source.entries()]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert groups[6] == 0


def test_images_that_fit_no_group_are_told_of_and_keep_the_group_they_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("patient1.png", "patient2.png", "other.png"):
        put(tmp_path / name, len(name))
    groups = [entry.group for entry in with_groups(open_source(tmp_path), r"patient(\d)").entries()]
    assert groups.count(0) == 1
    assert "1 of 3 images belong to no group" in capsys.readouterr().err


def test_arrays_whose_images_have_no_names_take_no_groups(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 8, 8), np.uint8))
    with pytest.raises(DataError, match="have no names"):
        with_groups(open_source(tmp_path / "images.npy"), r"\d")


def test_a_table_that_puts_one_image_into_two_groups_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "images" / "1.png", 1)
    (tmp_path / "patients.csv").write_text("image,patient\n1.png,A\n1.png,A\n1.png,B\n")
    with pytest.raises(DataError, match="one image is in two groups: name the images by their whole paths"):
        with_groups(open_source(tmp_path / "images"), table=f"{tmp_path}/patients.csv:patient")


@pytest.mark.parametrize(
    ("regex", "table", "message"),
    [
        ("(", None, r"--group-regex \("),
        ("nothing like it", None, "fits none of the images' names"),
        (None, "patients.csv", "give FILE.csv:COLUMN"),
        (None, "nowhere.csv:patient", "nowhere.csv cannot be read"),
        (None, "patients.csv:doctor", "no column 'doctor'; there are image, patient"),
        (None, "patients.csv:patient", "fits none of the images' names"),
        ("a", "patients.csv:patient", "exclude each other"),
    ],
)
def test_groups_that_cannot_be_found_are_an_error_that_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regex: str | None, table: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "patients.csv").write_text("image,patient\nfoo.png,1\n")
    put(tmp_path / "images" / "bar.png", 0)
    with pytest.raises(DataError, match=message):
        with_groups(open_source(tmp_path / "images"), regex, table)
