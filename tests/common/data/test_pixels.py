"""One policy for pixels: what any picture becomes, and that damage of any kind is one error and nothing printed."""

import io
import itertools
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from pydantic import ValidationError

from maskdm.data import pixels as images
from maskdm.data.pixels import Decoded, IsColour, PixelPolicy, Pixels, TooSmall, decode, from_array
from maskdm.errors import DataError

GREY = PixelPolicy(image_size=8, channels=1)
COLOUR = PixelPolicy(image_size=8, channels=3)


def picture(seed: int = 0, height: int = 8, width: int = 8, channels: int = 1) -> Pixels:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image | Pixels, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int, channels: int = 3) -> Pixels:
    """A picture that JPEG hardly changes."""
    small = Image.fromarray(picture(width * height, 4, 5, channels))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def grey(found: Decoded) -> Pixels:
    assert found.grey
    one: Pixels = found.pixels[0]
    return one


def test_pixels_are_channels_first_and_of_eight_bits() -> None:
    found = decode(encoded(picture(channels=3)), COLOUR)
    assert found.pixels.shape == (3, 8, 8)
    assert found.pixels.dtype == np.uint8
    assert np.array_equal(found.pixels.transpose(1, 2, 0), picture(channels=3))
    assert found[1:] == (8, 8, False)


def test_grey_is_repeated_for_a_colour_model() -> None:
    found = decode(encoded(picture()), COLOUR)
    assert found.pixels.shape == (3, 8, 8)
    assert all(np.array_equal(channel, picture()) for channel in found.pixels)
    assert found.grey


def test_a_grey_jpeg_stored_as_colour_is_grey() -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8).repeat(4, axis=0).repeat(4, axis=1)
    data = encoded(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "RGB"
    found = decode(data, PixelPolicy(image_size=32, channels=1))
    assert found.pixels.shape == (1, 32, 32)
    assert float(np.abs(grey(found).astype(int) - ramp).mean()) < 4


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_a_colour_picture_is_refused_for_one_channel(kind: str) -> None:
    with pytest.raises(IsColour, match="colour, but the model has one channel"):
        decode(encoded(smooth(16, 16), kind), GREY)
    with pytest.raises(IsColour):
        from_array(picture(channels=3), GREY)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_the_fast_way_through_a_jpeg_gives_pillows_pixels_exactly(
    mode: str, subsampling: int, progressive: bool, fit: images.Fit
) -> None:
    policy = PixelPolicy(image_size=8, channels=3, fit=fit)
    factors = set()
    for (width, height), quality in itertools.product(
        [(8, 8), (16, 17), (31, 33), (32, 32), (63, 65), (64, 100), (127, 128), (129, 130), (200, 131), (257, 300)],
        [30, 95],
    ):
        original = Image.fromarray(smooth(width, height)).convert(mode)
        data = encoded(original, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        fast = images._plain_jpeg(data, policy)
        assert fast
        with Image.open(io.BytesIO(data)) as opened:
            slow, is_grey = images._fit(images._flat(images._load(opened, policy, None), None), policy)
            factors.add(round(width / opened.width))
        assert np.array_equal(fast.pixels, slow)
        assert fast[1:] == (width, height, is_grey)
        assert (mode == "L") == is_grey
        assert np.array_equal(decode(data, policy).pixels, slow)
    assert factors == {1, 2, 4, 8}


def test_a_jpeg_in_rgb_and_one_with_remarks_of_the_decoder_are_read() -> None:
    pixels = smooth(64, 48)
    unusual = encoded(pixels, "JPEG", keep_rgb=True, quality=95)
    assert simplejpeg.decode_jpeg_header(unusual)[2] == "RGB"
    whole = encoded(pixels, "JPEG", quality=95)
    start = whole.index(b"\xff\xda")
    remarked = whole[:start] + b"\0\0\0" + whole[start:]  # "extraneous bytes before marker"
    assert images._plain_jpeg(remarked, COLOUR) is None
    expected = decode(whole, COLOUR).pixels.astype(int)
    for data in (unusual, remarked):
        assert np.abs(decode(data, COLOUR).pixels.astype(int) - expected).max() < 12


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """How a picture of that EXIF orientation is meant to be seen."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4, 7, 8) else pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_is_applied(orientation: int, kind: str) -> None:
    pixels = smooth(24, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(pixels, kind, exif=exif, **options), PixelPolicy(image_size=24, channels=3, fit="pad"))
    upright = turned(pixels, orientation)
    assert (found.width, found.height) == upright.shape[1::-1]
    sheet = np.zeros((24, 24, 3), np.uint8)
    top, left = (24 - upright.shape[0]) // 2, (24 - upright.shape[1]) // 2
    sheet[top : top + upright.shape[0], left : left + upright.shape[1]] = upright
    assert np.abs(found.pixels.transpose(1, 2, 0).astype(int) - sheet).max() <= (6 if kind == "JPEG" else 0)


def test_an_orientation_said_by_xmp_alone_is_applied() -> None:
    pixels = smooth(24, 16, 1)
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    found = decode(encoded(pixels, "JPEG", quality=98, xmp=xmp), PixelPolicy(image_size=16, channels=1))
    assert (found.width, found.height) == (16, 24)
    assert np.abs(grey(found).astype(int) - turned(pixels, 6)[4:20]).max() <= 4


def test_an_orientation_far_behind_in_a_jpeg_is_applied() -> None:
    pixels = smooth(24, 16, 1)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(pixels, "JPEG", quality=98, exif=exif)
    remarks = (b"\xff\xfe" + struct.pack(">H", 65535) + b"r" * 65533) * 3
    found = decode(data[:2] + remarks + data[2:], PixelPolicy(image_size=16, channels=1))
    assert np.abs(grey(found).astype(int) - turned(pixels, 6)[4:20]).max() <= 4


@pytest.mark.parametrize("value", [0, 9, 6000])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    pixels = picture(0, 8, 12)
    found = decode(encoded(pixels, exif=exif), GREY)
    assert (found.width, found.height) == (12, 8)
    assert np.array_equal(grey(found), pixels[:, 2:10])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight_bits(kind: str) -> None:
    pixels = picture(5)
    assert np.array_equal(grey(decode(encoded(Image.fromarray(pixels.astype(np.uint16) * 257), kind), GREY)), pixels)


def test_sixteen_bits_of_which_eight_are_used_are_not_darkened() -> None:
    pixels = picture(5)
    assert np.array_equal(grey(decode(encoded(Image.fromarray(pixels.astype(np.uint16))), GREY)), pixels)


def test_big_endian_sixteen_bits_and_whole_numbers_are_scaled_too() -> None:
    pixels = picture(5)
    wide = pixels.astype(np.uint16) * 257
    big = Image.frombytes("I;16B", (8, 8), wide.astype(">u2").tobytes())
    assert np.array_equal(grey(decode(encoded(big, "TIFF"), GREY)), pixels)
    assert np.array_equal(grey(decode(encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"), GREY)), pixels)


def test_a_window_says_what_is_black_and_white_in_pictures_of_more_than_eight_bits() -> None:
    values = np.zeros((8, 8), np.uint16)
    values[0, :6] = [0, 999, 1000, 1255, 1510, 60000]
    policy = PixelPolicy(image_size=8, channels=1, window=(1000, 1510))
    for kind in ("PNG", "TIFF"):
        assert grey(decode(encoded(Image.fromarray(values), kind), policy))[0, :6].tolist() == [0, 0, 0, 128, 255, 255]
    assert np.array_equal(grey(decode(encoded(picture()), policy)), picture())  # of 8 bits: as it is
    fractions = Image.fromarray(np.full((8, 8), 0.25, np.float32))
    policy = PixelPolicy(image_size=8, channels=1, window=(0, 1))
    assert grey(decode(encoded(fractions, "TIFF"), policy))[0, 0] == 64


def test_what_is_no_number_is_black_and_what_is_infinite_is_white() -> None:
    values = np.full((8, 8), 100, np.float32)
    values[0, :4] = [np.nan, np.inf, -np.inf, 300]
    assert grey(decode(encoded(Image.fromarray(values), "TIFF"), GREY))[0, :5].tolist() == [0, 255, 0, 255, 100]


def test_a_window_upside_down_is_refused() -> None:
    with pytest.raises(ValidationError, match="window 5,5: the first must be below the second"):
        PixelPolicy(image_size=8, channels=1, window=(5, 5))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_are_resolved_to_their_colours(kind: str) -> None:
    image = Image.fromarray((np.arange(64, dtype=np.uint8) % 2).reshape(8, 8)).convert("P")
    image.putpalette([250, 10, 20, 30, 200, 60])
    assert decode(encoded(image, kind), COLOUR).pixels[:, 0, :2].T.tolist() == [[250, 10, 20], [30, 200, 60]]


def test_a_palette_of_greys_fits_a_grey_model() -> None:
    image = Image.fromarray(picture()).convert("P")
    assert np.array_equal(grey(decode(encoded(image, "GIF"), GREY)), picture())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(kind: str) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[:4, :, 3] = 255
    pixels[4, :, 3] = 51
    options: dict[str, Any] = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = decode(encoded(pixels, kind, **options), COLOUR).pixels
    assert found[:, 0, 0].tolist() == [200, 0, 0]
    assert found[:, 4, 0].tolist() == [244, 204, 204]
    assert found[:, 7, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("policy", [GREY, COLOUR])
def test_grey_with_transparency_is_grey(policy: PixelPolicy) -> None:
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4] = 255
    found = decode(encoded(Image.merge("LA", (Image.fromarray(picture()), Image.fromarray(alpha)))), policy)
    assert found.grey
    assert np.array_equal(found.pixels[0, :4], picture()[:4])
    assert (found.pixels[:, 4:] == 255).all()


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_colour_of_a_palette_is_white(transparency: int | bytes) -> None:
    image = Image.fromarray((np.arange(64, dtype=np.uint8) % 2).reshape(8, 8)).convert("P")
    image.putpalette([250, 10, 20, 30, 200, 60])
    kinds = ["PNG", "GIF"] if isinstance(transparency, int) else ["PNG"]
    for kind in kinds:
        found = decode(encoded(image, kind, transparency=transparency), COLOUR).pixels
        assert found[:, 0, :2].T.tolist() == [[250, 10, 20], [255, 255, 255]]


def test_a_transparent_value_of_a_grey_or_colour_picture_is_white() -> None:
    pixels = picture()
    pixels[0, 0], pixels[0, 1] = 7, 8
    found = decode(encoded(pixels, transparency=7), GREY)
    assert grey(found)[0, :2].tolist() == [255, 8]
    colours = pixels[..., None].repeat(3, axis=2)
    assert decode(encoded(colours, transparency=(7, 7, 7)), COLOUR).pixels[:, 0, :2].T.tolist() == [[255] * 3, [8] * 3]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_print_colours_become_screen_colours(kind: str) -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind)
    red, green, blue = decode(data, COLOUR).pixels.mean(axis=(1, 2))
    assert red > 240
    assert max(green, blue) < 20


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM"])
def test_black_and_white_bitmaps_are_grey(kind: str) -> None:
    bits = picture(6) > 127
    assert np.array_equal(grey(decode(encoded(Image.fromarray(bits), kind), GREY)), bits * np.uint8(255))


@pytest.mark.parametrize("mode", ["LAB", "YCbCr", "RGBX", "HSV"])
def test_other_colour_models_are_read_or_refused(mode: str) -> None:
    try:
        data = encoded(Image.new(mode, (9, 9)), "TIFF")
    except OSError:
        return  # Pillow does not write it
    with suppress(DataError):
        assert decode(data, COLOUR).pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("filter", ["lanczos", "area"])
def test_large_pictures_are_cropped_to_their_centre_and_reduced(filter: images.Filter) -> None:
    wide = np.full((16, 48), 255, np.uint8)
    wide[:, 16:32] = 100  # the centre
    policy = PixelPolicy(image_size=8, channels=1, filter=filter)
    for pixels in (wide, wide.T):
        found = grey(decode(encoded(pixels), policy))
        assert found.shape == (8, 8)
        assert np.abs(found.astype(int) - 100).max() <= (10 if filter == "lanczos" else 0)  # which rings at edges


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_a_whole_factor_is_the_mean_of_each_cell(factor: int) -> None:
    pixels = picture(3, 8 * factor, 8 * factor)
    mean = pixels.reshape(8, factor, 8, factor).mean(axis=(1, 3))
    for policy in (GREY, PixelPolicy(image_size=8, channels=1, filter="area")):
        assert np.abs(grey(decode(encoded(pixels), policy)) - mean).max() <= 1  # rounded in either direction


@pytest.mark.parametrize("side", [9, 11, 15])
def test_below_twice_the_size_lanczos_is_pillows(side: int) -> None:
    pixels = picture(3, side, side)
    expected = Image.fromarray(pixels).resize((8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(grey(decode(encoded(pixels), GREY)), np.asarray(expected))


def test_a_smooth_picture_looks_the_same_at_any_size() -> None:
    wanted = np.asarray(Image.fromarray(smooth(600, 600)).resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    policy = PixelPolicy(image_size=32, channels=3)
    for side in (64, 100, 200, 333, 600):
        source = np.asarray(Image.fromarray(smooth(600, 600)).resize((side, side), Image.Resampling.LANCZOS))
        found = decode(encoded(source), policy).pixels.transpose(1, 2, 0)
        assert np.abs(found - wanted).mean() < 4


@pytest.mark.parametrize(("height", "width"), [(8, 24), (24, 8), (16, 48), (7, 60), (1, 80)])
def test_pad_shows_all_of_the_picture_on_black(height: int, width: int) -> None:
    found = grey(
        decode(encoded(np.full((height, width), 200, np.uint8)), PixelPolicy(image_size=8, channels=1, fit="pad"))
    )
    rows, columns = (found == 200).any(axis=1).sum(), (found == 200).any(axis=0).sum()
    long = max(height, width)
    assert (rows, columns) == (max(1, round(8 * height / long)), max(1, round(8 * width / long)))
    assert sorted(set(found.ravel().tolist())) == [0, 200]
    top = int((found == 200).any(axis=1).argmax())
    assert abs(top - (8 - rows - top)) <= 1  # in the middle


def test_pad_and_crop_are_one_for_a_square() -> None:
    for size in (8, 20):
        data = encoded(picture(1, size, size))
        crop, pad = (decode(data, PixelPolicy(image_size=8, channels=1, fit=fit)).pixels for fit in ("crop", "pad"))
        assert np.array_equal(crop, pad)


def test_small_pictures_are_refused_unless_enlarging_is_allowed() -> None:
    data = encoded(np.full((5, 9), 77, np.uint8))
    with pytest.raises(TooSmall, match="smaller than 8x8"):
        decode(data, GREY)
    found = decode(data, PixelPolicy(image_size=8, channels=1, upscale=True))
    assert found.pixels.tolist() == [[[77] * 8] * 8]
    assert (found.width, found.height) == (9, 5)
    assert decode(data, PixelPolicy(image_size=8, channels=1, fit="pad")).pixels.max() == 77  # the long side is enough
    with pytest.raises(TooSmall):
        from_array(np.zeros((5, 5), np.uint8), GREY)
    one = decode(encoded(np.full((1, 1), 9, np.uint8)), PixelPolicy(image_size=8, channels=1, upscale=True))
    assert (one.pixels == 9).all()


def test_a_box_says_which_part_of_the_picture_to_use() -> None:
    pixels = picture(2, 40, 60)
    found = decode(encoded(pixels), GREY, (30, 20, 38, 28))
    assert np.array_equal(grey(found), pixels[20:28, 30:38])
    assert (found.width, found.height) == (60, 40)


def test_what_lies_beyond_the_picture_is_black() -> None:
    pixels = np.full((40, 60), 200, np.uint8)
    found = grey(decode(encoded(pixels), GREY, (-4, -4, 4, 4)))
    assert found[:4].max() == found[:, :4].max() == 0
    assert found[4:, 4:].min() == 200
    found = grey(decode(encoded(pixels), GREY, (56, 36, 64, 44)))
    assert found[:4, :4].min() == 200
    assert found[4:].max() == found[:, 4:].max() == 0


@pytest.mark.parametrize("box", [(100, 20, 108, 28), (60, 20, 68, 28), (20, 40, 28, 48), (-8, 0, 0, 8), (0, -8, 8, 0)])
def test_a_box_outside_of_the_picture_is_refused(box: images.Box) -> None:
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DataError, match="a box outside of the picture"):
            decode(encoded(picture(0, 40, 60), kind), GREY, box)


@pytest.mark.parametrize("box", [(5, 5, 5, 13), (5, 5, 13, 5), (13, 5, 5, 13)])
@pytest.mark.parametrize("upscale", [False, True])
def test_an_empty_box_is_refused(box: images.Box, upscale: bool) -> None:
    for kind in ("PNG", "JPEG"):
        with pytest.raises(DataError, match="an empty box"):
            decode(encoded(picture(0, 40, 60), kind), PixelPolicy(image_size=8, channels=1, upscale=upscale), box)


def test_a_huge_box_is_refused_and_takes_no_memory() -> None:
    with pytest.raises(DataError, match=r"more than 180,000,000 pixels"):
        decode(encoded(picture(0, 40, 60)), GREY, (0, 0, 1 << 20, 1 << 20))


def test_a_box_of_a_large_jpeg_is_decoded_finely_enough() -> None:
    pixels = smooth(1024, 768)
    data = encoded(pixels, "JPEG", quality=97, subsampling=0)
    for size in (8, 64, 512):
        box = (400, 100, 400 + size, 100 + size)
        found = decode(data, COLOUR, box)
        expected = Image.fromarray(pixels).crop(box).resize((8, 8), Image.Resampling.LANCZOS)
        assert np.abs(found.pixels.transpose(1, 2, 0).astype(int) - np.asarray(expected)).max() <= 12
        assert (found.width, found.height) == (1024, 768)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_only_the_part_in_the_box_decides_on_colour_and_size(kind: str) -> None:
    pixels = picture(0, 40, 40, 3)
    pixels[:20, :20] = 100
    data = encoded(pixels, kind, quality=95, subsampling=0)
    assert abs(float(grey(decode(data, GREY, (0, 0, 16, 16))).mean()) - 100) < 1
    with pytest.raises(IsColour):
        decode(data, GREY, (24, 24, 40, 40))
    with pytest.raises(TooSmall):
        decode(data, GREY, (0, 0, 7, 40))
    small = encoded(np.full((4, 4), 100, np.uint8), kind)
    assert decode(small, GREY, (-2, -2, 6, 6)).pixels.shape == (1, 8, 8)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_box_is_cut_from_the_stored_picture_which_is_turned_then(orientation: int) -> None:
    pixels = picture(2, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encoded(pixels, exif=exif), GREY, (30, 20, 38, 28))
    assert np.array_equal(grey(found), turned(pixels[20:28, 30:38], orientation))


def measured(*files: Path) -> list[int]:
    """How many kilobytes a fresh process needs for each file beyond what it needs at all."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from maskdm.data.pixels import PixelPolicy, decode\n"
        "policy = PixelPolicy(image_size=64, channels=1)\n"
        "for name in sys.argv[1:]:\n"
        "    found = decode(Path(name).read_bytes(), policy)\n"
        "    assert found.pixels.mean() == 77, found\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    command = [sys.executable, "-c", script, *map(str, files)]
    sizes = [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]
    return [later - sizes[0] for later in sizes[1:]]


def test_huge_jpegs_are_decoded_in_modest_memory(tmp_path: Path) -> None:
    sizes = [(64, 64), (20_000, 300), (20_000, 9_000), (20_001, 9_001)]  # whole: 6, 180 and 180 MB
    paths = [tmp_path / f"{width}x{height}.jpg" for width, height in sizes]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("L", size, 77).save(path, "JPEG")
    assert max(measured(*paths)) < 40_000
    for path, (width, height) in zip(paths, sizes, strict=True):
        found = decode(path.read_bytes(), GREY)
        assert found[1:] == (width, height, True)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    chunks = [
        (b"IHDR", struct.pack(">2L5B", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize(("width", "height"), [(20_000, 9_001), (100_000, 100_000), (2_000_000_000, 2)])
def test_a_png_that_claims_too_many_pixels_is_refused(width: int, height: int) -> None:
    with pytest.raises(DataError, match=r"more than 180,000,000 pixels"):
        decode(png_header(width, height), GREY)


def test_a_file_that_claims_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm.data.pixels.MAX_PIXELS", 63)
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"):
        with pytest.raises(DataError, match="more than 63 pixels"):
            decode(encoded(picture(), kind), GREY)


def test_a_progressive_jpeg_is_refused_at_its_full_size_and_others_at_the_reduced_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("maskdm.data.pixels.MAX_PIXELS", 9_999)
    pixels = smooth(100, 100)
    assert decode(encoded(pixels, "JPEG"), COLOUR)[1:3] == (100, 100)
    with pytest.raises(DataError, match="more than 9,999 pixels"):
        decode(encoded(pixels, "JPEG", progressive=True), COLOUR)
    with pytest.raises(DataError, match="more than 9,999 pixels"):
        decode(encoded(pixels, "JPEG"), PixelPolicy(image_size=64, channels=3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"not a picture at all", "not a readable picture"),
        (b"\xff\xd8\xff" + b"text named .jpg", "not a readable picture"),
        (b"\x89PNG\r\n\x1a\n", "not a readable picture"),
        (bytes(500), "not a readable picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable picture"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode(data, GREY)


def test_a_postscript_file_starts_no_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(DataError, match="not a readable picture"):
        decode(encoded(picture(channels=3), "EPS"), GREY)
    assert not (tmp_path / "started").exists()


def test_what_pillow_has_to_say_of_a_file_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(encoded(picture(channels=3), "TIFF"))
    struct.pack_into("<H", data, data.index(struct.pack("<2HL", 277, 3, 1)) + 8, 99)  # samples a pixel
    with pytest.raises(DataError):
        decode(bytes(data), GREY)
    assert not caplog.records


def test_a_decoded_array_follows_the_same_policy() -> None:
    pixels = picture(0, 20, 30, 3)
    assert np.array_equal(from_array(pixels, COLOUR).pixels, decode(encoded(pixels), COLOUR).pixels)
    assert from_array(pixels, COLOUR)[1:] == (30, 20, False)
    for one in (picture(), picture()[..., None]):
        assert np.array_equal(grey(from_array(one, GREY)), picture())
    values = np.array([[-3.0, 0.4, 0.6, 254.6], [255.4, 999.0, 127.5, 128.5]]).repeat(4, axis=0).repeat(2, axis=1)
    assert sorted(set(grey(from_array(values, GREY)).ravel().tolist())) == [0, 1, 128, 255]


@contextmanager
def nothing_printed(path: Path) -> Iterator[None]:
    """Libraries in C write past Python."""
    kept = [os.dup(1), os.dup(2)]
    try:
        with path.open("wb") as file:
            for target in (1, 2):
                os.dup2(file.fileno(), target)
            yield
    finally:
        for target, old in zip((1, 2), kept, strict=True):
            os.dup2(old, target)
            os.close(old)
    assert path.read_bytes() == b""


def _files() -> dict[str, bytes]:
    pixels = picture(7, 18, 21, 3)
    image = Image.fromarray(pixels)
    palette = image.quantize(16)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker"
    return {
        "jpeg": encoded(image, "JPEG", quality=60),
        "grey jpeg": encoded(image.convert("L"), "JPEG", quality=60),
        "progressive jpeg": encoded(image, "JPEG", progressive=True, quality=60),
        "turned jpeg": encoded(image, "JPEG", exif=exif, quality=60),
        "cmyk jpeg": encoded(image.convert("CMYK"), "JPEG", quality=60),
        "png": encoded(image),
        "turned png": encoded(image, exif=exif),
        "16-bit png": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)),
        "palette png": encoded(palette, transparency=bytes(range(16))),
        "gif": encoded(palette, "GIF"),
        "tiff": encoded(image, "TIFF"),
        "turned tiff": encoded(image, "TIFF", exif=exif),
        "lzw tiff": encoded(image.convert("L"), "TIFF", compression="tiff_lzw"),
        "deflated tiff": encoded(image.convert("L"), "TIFF", compression="tiff_deflate"),
        "jpeg tiff": encoded(image, "TIFF", compression="jpeg"),
        "fax tiff": encoded(image.convert("1"), "TIFF", compression="group4"),
        "float tiff": encoded(Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF"),
        "webp": encoded(image, "WEBP"),
        "lossless webp": encoded(image.convert("RGBA"), "WEBP", lossless=True, exif=exif),
        "bmp": encoded(image, "BMP"),
        "palette bmp": encoded(palette, "BMP"),
        "ppm": encoded(image, "PPM"),
    }


FILES = _files()


@pytest.mark.parametrize("name", FILES)
def test_a_picture_cut_anywhere_is_refused_or_whole(tmp_path: Path, name: str) -> None:
    data = FILES[name]
    whole = decode(data, COLOUR).pixels
    with nothing_printed(tmp_path / "printed"):
        for cut in range(0, len(data), 3):
            try:
                found = decode(data[:cut], COLOUR).pixels
            except DataError:
                continue
            assert np.array_equal(found, whole)
            assert cut > 0.9 * len(data)


@given(
    name=st.sampled_from(list(FILES)),
    changes=st.lists(
        st.tuples(
            st.sampled_from(["set", "insert", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=5), st.booleans()
        ),
        min_size=1,
        max_size=3,
    ),
    policy=st.sampled_from([GREY, COLOUR, PixelPolicy(image_size=8, channels=3, upscale=True, fit="pad")]),
    box=st.sampled_from([None, (2, 2, 14, 14)]),
)
@settings(max_examples=300)
def test_damage_of_any_kind_is_one_error_and_nothing_is_printed(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[str, float, bytes, bool]],
    policy: PixelPolicy,
    box: images.Box | None,
) -> None:
    data = FILES[name]
    for kind, where, value, early in changes:
        at = int(where * (min(120, len(data)) if early else len(data)))  # headers are hit most often
        after = {"set": at + len(value), "insert": at, "cut": at + 3 * len(value)}[kind]
        data = data[:at] + (b"" if kind == "cut" else value) + data[after:]
    with nothing_printed(tmp_path_factory.getbasetemp() / "printed"):
        try:
            found = decode(data, policy, box)
        except DataError:
            return
    assert found.pixels.shape == (policy.channels, 8, 8)
    assert found.pixels.dtype == np.uint8
    assert min(found.width, found.height) > 0


def test_grey_stored_as_colour_counts_as_grey_for_a_colour_model_too() -> None:
    stored = np.repeat(picture(7, 8, 8)[:, :, None], 3, axis=2)
    assert decode(encoded(stored), COLOUR).grey
    stored[7, 7] = (200, 10, 10)
    assert not decode(encoded(stored), COLOUR).grey
