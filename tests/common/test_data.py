"""Any folder, zip or array becomes uint8 images; a slice of them is stable; batches continue where they stopped."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from maskdm.data import batch_rows, batches, choose_slice, class_numbers, load_images, open_source
from maskdm.errors import DataError
from maskdm.images import IsColour, TooSmall, decode, from_array

Pixels = NDArray[np.uint8]


def picture(seed: int = 0, size: int = 8, channels: int = 1) -> Pixels:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(Image.fromarray(pixels)))


def test_a_folder_is_read_to_any_depth_with_folders_as_labels(tmp_path: Path) -> None:
    put(tmp_path / "top.png", picture(0))
    put(tmp_path / "a" / "one.PNG", picture(1))
    put(tmp_path / "a" / "b" / "c" / "two.png", picture(2))
    put(tmp_path / ".hidden" / "no.png", picture(3))
    (tmp_path / "notes.txt").write_text("no picture")
    images = load_images(open_source(tmp_path), 8, 1)
    assert images.names == ["a/b/c/two.png", "a/one.PNG", "top.png"]
    assert images.labels == ["c", "a", ""]
    assert images.pixels.shape == (3, 1, 8, 8)
    assert images.pixels.dtype == torch.uint8
    assert np.array_equal(images.pixels[1, 0].numpy(), picture(1))


def test_a_zip_is_read_like_the_folder_it_holds(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "folder" / f"label{i}" / f"{i}.png", picture(i))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "folder").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "folder"))
        archive.writestr("__MACOSX/label0/._0.png", b"rubbish")
    folder, zipped = (load_images(open_source(tmp_path / name), 8, 1) for name in ("folder", "all.zip"))
    assert zipped.names == folder.names
    assert zipped.labels == folder.labels
    assert torch.equal(zipped.pixels, folder.pixels)
    assert zipped.digest() == folder.digest()


@pytest.mark.parametrize("names", [("images", "labels"), ("x_train", "y_train")])
def test_arrays_with_labels_are_read_from_an_npz(tmp_path: Path, names: tuple[str, str]) -> None:
    pixels = np.stack([picture(i) for i in range(3)])
    np.savez(tmp_path / "data.npz", allow_pickle=False, **{names[0]: pixels, names[1]: np.array([2, 0, 1])})
    images = load_images(open_source(tmp_path / "data.npz"), 8, 1)
    assert np.array_equal(images.pixels[:, 0].numpy(), pixels)
    assert images.labels == ["2", "0", "1"]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 1), (3, 1, 8, 8)])
def test_grey_arrays_are_read_from_an_npy_in_every_layout(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.stack([picture(i) for i in range(3)])
    np.save(tmp_path / "data.npy", pixels.reshape(shape))
    source = open_source(tmp_path / "data.npy")
    assert source.channels() == 1
    assert np.array_equal(load_images(source, 8, 1).pixels[:, 0].numpy(), pixels)


@pytest.mark.parametrize("channels_first", [True, False])
def test_colour_arrays_are_read_in_both_layouts(tmp_path: Path, channels_first: bool) -> None:
    pixels = np.stack([picture(i, channels=3) for i in range(4)])
    np.save(tmp_path / "data.npy", np.moveaxis(pixels, 3, 1) if channels_first else pixels)
    source = open_source(tmp_path / "data.npy")
    assert source.channels() == 3
    assert np.array_equal(load_images(source, 8, 3).pixels.permute(0, 2, 3, 1).numpy(), pixels)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), np.float32), "needs uint8 images"),
        (np.zeros((8, 8), np.uint8), "needs uint8 images"),
        (np.zeros((3, 8, 8, 4), np.uint8), "4 channels"),
        (np.zeros((0, 8, 8), np.uint8), "holds no images"),
        (np.array([{"a": 1}], dtype=object), "cannot be read"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(tmp_path: Path, array: NDArray[np.generic], message: str) -> None:
    np.save(tmp_path / "data.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        open_source(tmp_path / "data.npy")


def test_labels_that_do_not_match_the_images_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(2))
    with pytest.raises(DataError, match="3 images but labels of shape"):
        open_source(tmp_path / "data.npz")


def test_an_npz_without_a_recognisable_array_names_what_it_holds(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", left=np.zeros(1), right=np.zeros(1))
    with pytest.raises(DataError, match=r"holds left, right: name the array of images 'images'"):
        open_source(tmp_path / "data.npz")


@pytest.mark.parametrize("name", ["broken.npz", "broken.npy", "broken.zip", "missing", "empty"])
def test_a_source_that_is_missing_empty_or_broken_is_refused_by_name(tmp_path: Path, name: str) -> None:
    if name.startswith("broken"):
        (tmp_path / name).write_bytes(b"neither this nor that")
    elif name == "empty":
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"--prior-data .*{name}"):
        open_source(tmp_path / name, "--prior-data")


def test_files_that_cannot_be_used_are_skipped_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "good.png", picture(0))
    put(tmp_path / "small.png", picture(1, size=5))
    put(tmp_path / "colour.png", picture(2, channels=3))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "rubbish.jpg").write_bytes(b"not a picture at all")
    whole = encoded(Image.fromarray(picture(3, size=64)))
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    images = load_images(open_source(tmp_path), 8, 1)
    assert images.names == ["good.png"]
    assert images.skipped == {
        "small.png": "smaller than 8x8",
        "colour.png": "colour, but the model has one channel",
        "empty.png": "not a readable picture",
        "rubbish.jpg": "not a readable picture",
        "torn.png": "not a readable picture",
    }
    assert "1 images of 8x8" in images.summary()
    assert "3 skipped: not a readable picture" in images.summary()


def test_a_folder_with_nothing_usable_says_why_and_what_to_do(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0, size=5))
    with pytest.raises(DataError, match=r"none of 1 images can be used \(1: smaller than 8x8\).*--upscale"):
        load_images(open_source(tmp_path), 8, 1)


def test_a_mostly_colour_folder_is_refused_for_a_one_channel_model(tmp_path: Path) -> None:
    put(tmp_path / "grey.png", picture(0))
    for i in range(3):
        put(tmp_path / f"colour{i}.png", picture(i, channels=3))
    source = open_source(tmp_path)
    assert source.channels() == 3
    with pytest.raises(DataError, match="3 colour images, but the model has one channel"):
        load_images(source, 8, 1)


def test_grey_pictures_are_repeated_for_a_colour_model_and_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.png", picture(0))
    put(tmp_path / "b.png", picture(1, channels=3))
    images = load_images(open_source(tmp_path), 8, 3)
    assert images.repeated_grey == 1
    assert all(np.array_equal(images.pixels[0, c].numpy(), picture(0)) for c in range(3))
    assert "1 grey ones repeated over 3 channels" in images.summary()


def test_a_grey_jpeg_stored_as_colour_is_grey(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8).repeat(4, axis=0).repeat(4, axis=1)
    data = encoded(Image.fromarray(smooth).convert("RGB"), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "RGB"
    found = decode(data, 32, 1)
    assert found.shape == (1, 32, 32)
    assert float(np.abs(found[0].astype(int) - smooth).mean()) < 4
    (tmp_path / "a.jpg").write_bytes(data)
    assert open_source(tmp_path).channels() == 1


def test_a_colour_picture_is_refused_for_one_channel() -> None:
    with pytest.raises(IsColour):
        decode(encoded(Image.fromarray(picture(channels=3))), 8, 1)
    with pytest.raises(IsColour):
        from_array(picture(channels=3), 8, 1)


def test_exif_orientation_is_applied() -> None:
    pixels = picture(4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by a quarter
    data = encoded(Image.fromarray(pixels), exif=exif)
    assert np.array_equal(decode(data, 8, 1)[0], np.rot90(pixels, -1))


def test_sixteen_bit_grey_is_scaled_to_eight_bits() -> None:
    pixels = picture(5)
    data = encoded(Image.fromarray(pixels.astype(np.uint16) * 257))
    assert np.array_equal(decode(data, 8, 1)[0], pixels)


def test_palettes_are_resolved_to_their_colours() -> None:
    image = Image.fromarray((np.arange(64, dtype=np.uint8) % 2).reshape(8, 8)).convert("P")
    image.putpalette([250, 10, 20, 30, 200, 60])
    found = decode(encoded(image), 8, 3)
    assert found[:, 0, :2].T.tolist() == [[250, 10, 20], [30, 200, 60]]


def test_transparency_is_laid_over_white() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:4, :, 3] = 255
    found = decode(encoded(Image.fromarray(pixels)), 8, 3)
    assert found[:, 0, 0].tolist() == [200, 0, 0]
    assert found[:, 7, 0].tolist() == [255, 255, 255]


def test_print_colours_become_screen_colours() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    found = decode(encoded(image, "JPEG", quality=95), 8, 3)
    red, green, blue = found.mean(axis=(1, 2))
    assert red > 240
    assert max(green, blue) < 20


def test_black_and_white_bitmaps_are_grey() -> None:
    bits = picture(6) > 127
    assert np.array_equal(decode(encoded(Image.fromarray(bits)), 8, 1)[0], bits * np.uint8(255))


def test_large_pictures_are_cropped_to_their_centre_and_reduced() -> None:
    wide = np.full((16, 48), 255, np.uint8)
    wide[:, 16:32] = 100  # the centre
    found = decode(encoded(Image.fromarray(wide)), 8, 1)[0]
    assert found.shape == (8, 8)
    assert np.abs(found.astype(int) - 100).max() <= 10  # the filter may ring at the edges


def test_small_pictures_are_refused_unless_enlarging_is_allowed() -> None:
    data = encoded(Image.fromarray(np.full((5, 9), 77, np.uint8)))
    with pytest.raises(TooSmall, match="9x5"):
        decode(data, 8, 1)
    assert decode(data, 8, 1, upscale=True).tolist() == [[[77] * 8] * 8]
    with pytest.raises(TooSmall):
        from_array(np.zeros((5, 5), np.uint8), 8, 1)


def test_a_file_that_claims_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.images.MAX_PIXELS", 63)
    with pytest.raises(DataError, match="more than the limit"):
        decode(encoded(Image.fromarray(picture())), 8, 1)


def contents(folder: Path, names: list[str]) -> set[bytes]:
    return {(folder / name).read_bytes() for name in names}


def test_the_slice_does_not_depend_on_names_or_on_what_is_added(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for i in range(120):
        put(before / f"{i:03}.png", picture(i))
        put(after / f"{i % 7}" / f"renamed-{120 - i:03}.png", picture(i))
    for i in range(120, 160):
        put(after / f"{i:03}.png", picture(i))
    first = choose_slice(open_source(before), 0.4, seed=1)
    second = choose_slice(open_source(after), 0.4, seed=1)
    for side in ("train", "held_out"):
        assert contents(before, getattr(first, side)) <= contents(after, getattr(second, side))
    old = contents(before, [f"{i:03}.png" for i in range(120)])
    assert contents(after, second.train) & old == contents(before, first.train)
    assert contents(after, second.held_out) & old == contents(before, first.held_out)


@given(fraction=st.floats(0.2, 1), held_out=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
def test_the_two_sides_of_a_slice_are_disjoint_and_about_as_large_as_asked(
    fraction: float, held_out: float, seed: int
) -> None:
    source = Listed([bytes([i % 256, i // 256]) for i in range(1000)])
    chosen = choose_slice(source, fraction, held_out=held_out, seed=seed)
    both = len(chosen.train) + len(chosen.held_out)
    assert chosen.total == 1000
    assert len({*chosen.train, *chosen.held_out}) == both
    assert both / 1000 == pytest.approx(fraction, abs=5 * (0.25 / 1000) ** 0.5)
    assert len(chosen.held_out) / both == pytest.approx(held_out, abs=5 * (0.25 / both) ** 0.5)


@given(copies=st.lists(st.integers(0, 30), min_size=2, max_size=80), seed=st.integers(0, 1000))
def test_equal_images_are_on_the_same_side(copies: list[int], seed: int) -> None:
    if len(set(copies)) < 2:
        return
    source = Listed([bytes([value]) for value in copies])
    chosen = choose_slice(source, 1.0, held_out=0.5, seed=seed)
    train, held_out = ({copies[int(name)] for name in side} for side in (chosen.train, chosen.held_out))
    assert train
    assert held_out
    assert not train & held_out
    assert train | held_out == set(copies)


@given(count=st.integers(2, 60), fraction=st.floats(1e-6, 1), seed=st.integers(0, 1000))
def test_even_the_smallest_slice_has_an_image_on_each_side(count: int, fraction: float, seed: int) -> None:
    chosen = choose_slice(Listed([bytes([i]) for i in range(count)]), fraction, seed=seed)
    assert chosen.train
    assert chosen.held_out


def test_another_seed_chooses_another_slice() -> None:
    source = Listed([bytes([i]) for i in range(100)])
    assert choose_slice(source, 0.5, seed=0).train != choose_slice(source, 0.5, seed=1).train


def test_a_site_with_a_single_image_is_refused() -> None:
    with pytest.raises(DataError, match="at least two are needed"):
        choose_slice(Listed([b"same", b"same"]), 1.0)


def test_files_that_cannot_be_read_are_named_and_left_out_of_the_slice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for i in range(4):
            archive.writestr(f"{i}.png", encoded(Image.fromarray(picture(i))))
    data = bytearray((tmp_path / "all.zip").read_bytes())
    data[60] ^= 0xFF  # inside the first picture: its checksum no longer fits
    (tmp_path / "all.zip").write_bytes(data)
    chosen = choose_slice(open_source(tmp_path / "all.zip"), 1.0)
    assert chosen.unreadable == ["0.png"]
    assert sorted([*chosen.train, *chosen.held_out]) == ["1.png", "2.png", "3.png"]


@given(count=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(count: int, epochs: int, seed: int) -> None:
    rows = batch_rows(count, count * epochs, 0, seed).reshape(epochs, count)
    assert (np.sort(rows, axis=1) == np.arange(count)).all()


@given(count=st.integers(1, 30), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), start=st.integers(0, 99))
def test_any_division_into_batches_gives_the_same_sequence(count: int, sizes: list[int], start: int) -> None:
    whole = batch_rows(count, sum(sizes), start, 3)
    parts, seen = [], start
    for size in sizes:
        parts.append(batch_rows(count, size, seen, 3))
        assert len(parts[-1]) == size
        seen += size
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(whole, batch_rows(count, start + sum(sizes), 0, 3)[start:])


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second = batch_rows(50, 100, 0, 0).reshape(2, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, batch_rows(50, 50, 0, 1))


def test_batches_hold_the_rows_of_the_sequence() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8)
    order = batches(pixels, 4, 8, 1)
    found = [row for _ in range(3) for row in next(order)[0][:, 0, 0, 0].tolist()]
    assert found == batch_rows(10, 12, 8, 1).tolist()


def test_classes_come_with_their_images_and_processes_share_each_batch() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    whole, _ = next(batches(pixels, 6, 0, 1))
    parts = [next(batches(pixels, 6, 0, 1, classes=torch.arange(10) * 7, share=(i, 3))) for i in range(3)]
    assert all(len(images) == 2 for images, _ in parts)
    assert sorted(torch.cat([images for images, _ in parts]).flatten().tolist()) == sorted(whole.flatten().tolist())
    for images, kinds in parts:
        assert kinds is not None
        assert kinds.tolist() == [7 * value for value in images.flatten().tolist()]


def test_labels_become_the_numbers_of_the_models_classes() -> None:
    found = class_numbers(["cat", "dog", "", "cat"], ("cat", "dog"))
    assert found is not None
    assert found.tolist() == [0, 1, -1, 0]
    assert class_numbers(["cat"], ()) is None


class Listed:
    """A source of contents alone, without pixels."""

    def __init__(self, contents: list[bytes]) -> None:
        self._contents = contents
        self.names = [str(i) for i in range(len(contents))]

    def label(self, name: str) -> str:
        return ""

    def content(self, name: str) -> bytes:
        return self._contents[int(name)]

    def pixels(self, name: str, size: int, channels: int, upscale: bool) -> tuple[Pixels, bool]:
        raise NotImplementedError

    def channels(self) -> int:
        return 1
