"""DICOM pixels follow the standard's transforms, and nothing that a file says of a person is ever repeated."""

import importlib.util
import io
import logging
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
)

from maskdm.data import dicom  # noqa: E402
from maskdm.data import pixels as images  # noqa: E402
from maskdm.data.pixels import IsColour, PixelPolicy, Pixels  # noqa: E402
from maskdm.errors import DataError  # noqa: E402

GREY = PixelPolicy(image_size=8, channels=1)
# What a file says of a person; none of it may ever be seen.
SECRETS = {
    "PatientName": "Zimmermann^Xaver",
    "PatientID": "PID-7391-QX",
    "PatientBirthDate": "19470813",
    "PatientAddress": "Quittenweg 17",
    "PatientComments": "Vorgeschichte: Keratose",
    "OtherPatientIDs": "ALT-5530-WV",
    "ReferringPhysicianName": "Obermoser^Yvonne",
    "InstitutionName": "Krankenhaus Zwiesel",
    "StudyDescription": "Kniegelenk rechts",
    "AccessionNumber": "ACC-88231",
    "StudyID": "STUDY-4471",
}


def picture(height: int = 8, width: int = 8, low: int = 0, high: int = 256, kind: Any = np.uint8) -> NDArray[Any]:
    return np.random.default_rng(0).integers(low, high, (height, width)).astype(kind)


def dataset(stored: NDArray[Any], kind: str = "MONOCHROME2", bits: int = 0, **elements: Any) -> Dataset:
    """An image as a scanner writes it, with everything that it says of a person."""
    made = Dataset()
    for name, text in SECRETS.items():
        setattr(made, name, text)
    made.Rows, made.Columns = stored.shape[:2]
    made.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    if stored.ndim == 3:
        made.PlanarConfiguration = 0
    made.PhotometricInterpretation = kind
    made.BitsAllocated = 8 * stored.dtype.itemsize
    made.BitsStored = bits or made.BitsAllocated
    made.HighBit = made.BitsStored - 1
    made.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in elements.items():
        setattr(made, name, value)
    return made


def written(made: Dataset, pixels: bytes | NDArray[Any] = b"", syntax: Any = ExplicitVRLittleEndian) -> bytes:
    """A whole file."""
    if isinstance(pixels, np.ndarray):
        kind = pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")
        pixels = pixels.astype(kind).tobytes()
    if pixels:
        made.PixelData = pixels + b"\0" * (len(pixels) % 2)
        made["PixelData"].VR = "OB" if made.BitsAllocated == 8 else "OW"
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = made.SOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = "1.2.3.4"
    buffer = io.BytesIO()
    FileDataset(
        buffer, made, bytes(128), meta, is_implicit_VR=syntax.is_implicit_VR, is_little_endian=syntax.is_little_endian
    ).save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def stored_as(stored: NDArray[Any], kind: str = "MONOCHROME2", bits: int = 0, **elements: Any) -> bytes:
    return written(dataset(stored, kind, bits, **elements), stored)


def rounded(data: bytes, window: tuple[float, float] | None = None) -> list[int]:
    """The first row as it reaches the model."""
    found = images.from_array(dicom.decode(data, window), GREY)
    return [int(value) for value in found.pixels[0, 0]]


def row(*values: int, kind: Any = np.int16) -> NDArray[Any]:
    """A picture whose first row is given; the others repeat it."""
    return np.array(values + (values[-1],) * (8 - len(values)), kind)[None].repeat(8, axis=0)


def test_the_linear_window_is_that_of_the_standard() -> None:
    """PS3.3 C.11.2.1.2.1 with center 40 and width 400: x <= -160 is black, x > 239 is white, and between them
    ((x - 39.5) / 399 + 0.5) * 255: 0.639 for -159, 127.820 for 40, 254.361 for 238."""
    stored = row(-2000, -160, -159, 40, 238, 239, 240, 3000)
    assert rounded(stored_as(stored, WindowCenter="40", WindowWidth="400")) == [0, 0, 1, 128, 254, 255, 255, 255]
    found = dicom.decode(stored_as(stored, WindowCenter="40", WindowWidth="400"))
    assert found[0, 2:5].tolist() == pytest.approx([0.6391, 127.8195, 254.3609], abs=1e-3)


def test_the_exact_linear_window_is_that_of_the_standard() -> None:
    """PS3.3 C.11.2.1.3.2 with center 40 and width 400: ((x - 40) / 400 + 0.5) * 255."""
    data = stored_as(
        row(-161, -160, -60, 40, 140, 240), WindowCenter=40, WindowWidth=400, VOILUTFunction="LINEAR_EXACT"
    )
    assert dicom.decode(data)[0, :6].tolist() == pytest.approx([0, 0, 63.75, 127.5, 191.25, 255])


@settings(max_examples=60)
@given(
    center=st.integers(-2000, 2000),
    width=st.integers(1, 4000),
    values=st.lists(st.integers(-4000, 4000), min_size=8, max_size=8),
)
def test_every_linear_window_agrees_with_pydicoms(center: int, width: int, values: list[int]) -> None:
    stored = row(*values)
    made = dataset(stored, WindowCenter=center, WindowWidth=width)
    expected = pydicom.pixels.apply_windowing(stored, made)  # from -32768 to 32767
    found = dicom.decode(written(made, stored))
    assert np.abs(found - (expected + 32768) * (255 / 65535)).max() < 1e-3


def test_a_window_of_one_value_is_a_threshold() -> None:
    """PS3.3 C.11.2.1.2.1 with width 1: x <= c - 0.5 is black, the others are white."""
    assert rounded(stored_as(row(-5, 99, 100, 101), WindowCenter=100, WindowWidth=1))[:4] == [0, 0, 255, 255]


def test_of_several_windows_the_first_counts() -> None:
    data = stored_as(row(0, 51, 102, 1000), WindowCenter=[51.5, 500], WindowWidth=[103, 1000])
    assert rounded(data)[:4] == [0, 128, 255, 255]


def test_the_rescaling_comes_before_the_window() -> None:
    data = stored_as(
        row(0, 1024, 1075, 1126, kind=np.uint16),
        bits=12,
        RescaleSlope=2,
        RescaleIntercept=-2048,
        WindowCenter=102.5,
        WindowWidth=205,
    )
    assert rounded(data)[:4] == [0, 0, 128, 255]


def test_without_a_window_the_whole_range_of_the_picture_is_used() -> None:
    assert rounded(stored_as(row(-102, 0, 102)))[:3] == [0, 128, 255]
    assert rounded(stored_as(row(-102, 0, 102), RescaleSlope=-1, RescaleIntercept=5))[:3] == [255, 128, 0]
    assert rounded(stored_as(row(7, 7))) == [0] * 8  # of one value


@pytest.mark.parametrize(
    ("center", "width"), [("", ""), ([], []), (None, None), (50, ""), ("", 50), (50, 0), (50, -3), (50, 0.5)]
)
def test_a_window_that_is_empty_or_invalid_is_none(center: Any, width: Any) -> None:
    data = stored_as(row(-102, 0, 102), WindowCenter=center, WindowWidth=width)
    assert rounded(data)[:3] == [0, 128, 255]


def test_the_sites_own_window_comes_before_the_files() -> None:
    data = stored_as(row(-102, 0, 102, 306), WindowCenter=0, WindowWidth=10, RescaleSlope=2, RescaleIntercept=0)
    assert rounded(data, (0.0, 408.0))[:4] == [0, 0, 128, 255]
    policy = PixelPolicy(image_size=8, channels=1, window=(0, 408))
    assert images.decode(data, policy).pixels[0, 0, :4].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 50.5, "WindowWidth": 101}])
def test_monochrome1_is_turned_so_that_high_values_are_dark(elements: dict[str, Any]) -> None:
    stored = row(0, 25, 100)
    dark = np.array(rounded(stored_as(stored, "MONOCHROME1", **elements)))
    assert (dark == 255 - np.array(rounded(stored_as(stored, "MONOCHROME2", **elements)))).all()
    assert dark[0] == 255
    assert rounded(stored_as(stored, "MONOCHROME1", **elements), (0.0, 50.0))[:3] == [255, 128, 0]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_every_width_and_byte_order_is_read(kind: Any, syntax: Any) -> None:
    limits = np.iinfo(kind)
    stored = np.linspace(limits.min, limits.max, 64).round().astype(kind).reshape(8, 8)
    found = images.decode(written(dataset(stored), stored, syntax), GREY)
    assert np.abs(found.pixels[0].astype(float) - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 0.6
    assert found[1:] == (8, 8, True)


def test_twelve_bits_are_read_with_their_sign() -> None:
    data = stored_as(row(-2048, 0, 2047), bits=12)
    assert dicom.decode(data)[0, :3].tolist() == pytest.approx([0, 127.53, 255], abs=0.01)


def table(values: NDArray[Any], first: int, bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, bits]
    item["LUTDescriptor"].VR = "SS"
    item.add_new("LUTData", "OW", values.astype("<u2" if values.dtype.itemsize == 2 else np.uint8).tobytes())
    return item


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_table_of_the_file_is_applied_where_there_is_no_window(kind: Any) -> None:
    """Of 1000 entries of 8 bits, stored in 8 or 16, over values that the rescaling makes negative."""
    inverted = (255 - np.arange(1000) // 4).clip(0, 255).astype(kind)
    data = stored_as(
        row(0, 24, 1023, 1024, 4000, kind=np.uint16),
        bits=12,
        RescaleSlope=1,
        RescaleIntercept=-1024,
        VOILUTSequence=[table(inverted, -1000, 8)],
    )
    assert rounded(data)[:5] == [255, 255, 6, 6, 6]
    assert rounded(data, (-1024.0, 2976.0))[:5] == [0, 2, 65, 65, 255]


def test_a_table_of_sixteen_bits_keeps_its_own_range() -> None:
    data = stored_as(
        row(0, 1, 2, kind=np.uint16), VOILUTSequence=[table(np.array([0, 32768, 40000], np.uint16), 0, 16)]
    )
    assert rounded(data)[:3] == [0, 128, 156]


def test_a_window_comes_before_a_table() -> None:
    values = table(np.array([9, 9, 9], np.uint16), 0, 16)
    data = stored_as(row(0, 51, 102), VOILUTSequence=[values], WindowCenter=51.5, WindowWidth=103)
    assert rounded(data)[:3] == [0, 128, 255]


def test_a_modality_table_is_applied() -> None:
    item = table(np.array([0, 1000, 4000], np.uint16), 0, 16)
    item.ModalityLUTType = "US"
    assert rounded(stored_as(row(0, 1, 2, kind=np.uint16), ModalityLUTSequence=[item]))[:3] == [0, 64, 255]


@pytest.mark.parametrize(("kind", "scale"), [(np.uint8, 1), (np.uint16, 257)])
@pytest.mark.parametrize("planar", [0, 1])
def test_colours_are_read_in_every_layout(kind: Any, scale: int, planar: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    stored = pixels.astype(kind) * kind(scale)
    made = dataset(stored, "RGB", PlanarConfiguration=planar)
    data = written(made, np.moveaxis(stored, 2, 0).copy() if planar else stored)
    assert np.array_equal(dicom.decode(data), pixels)
    found = images.decode(data, PixelPolicy(image_size=8, channels=3))
    assert found[1:] == (9, 8, False)
    with pytest.raises(IsColour):
        images.decode(data, GREY)


def test_luminance_and_chroma_become_colours() -> None:
    """PS3.3 C.7.6.3.1.2: Y, CB, CR of pure red, green and blue."""
    stored = np.array([[76, 85, 255], [150, 44, 21], [29, 255, 107]], np.uint8)[None].repeat(8, axis=0)
    found = dicom.decode(stored_as(stored, "YBR_FULL"))
    assert np.abs(found[0].astype(int) - 255 * np.eye(3, dtype=int)).max() <= 2


@pytest.mark.parametrize(("kind", "bits"), [(np.uint8, 8), (np.uint16, 16), (np.uint16, 8)])
def test_palettes_become_colours(kind: Any, bits: int) -> None:
    """Of 8 or 16 bits; those of 8 may be stored in 16."""
    colours = np.array([[250, 10, 20], [30, 200, 60], [1, 2, 3]])
    entries: dict[str, Any] = {}
    for name, values in zip(("Red", "Green", "Blue"), colours.T, strict=True):
        padded = np.append(values, 0)  # to a whole number of words
        scaled = padded * 257 if bits == 16 else padded
        entries[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, bits]
        entries[f"{name}PaletteColorLookupTableData"] = scaled.astype(kind).tobytes()
    found = dicom.decode(stored_as(row(0, 1, 2, kind=np.uint8), "PALETTE COLOR", **entries))
    assert found[0, :3].tolist() == colours.tolist()
    assert found.dtype == np.uint8


def test_fractions_are_read_and_what_is_no_number_is_the_lowest() -> None:
    stored = np.full((8, 8), 0.5, np.float32)
    stored[0, :6] = [0, 1, np.nan, np.inf, -np.inf, 0.25]
    made = dataset(stored.astype(np.float32))
    made.FloatPixelData = stored.tobytes()
    made.BitsAllocated = 32
    for name in ("BitsStored", "HighBit", "PixelRepresentation"):
        delattr(made, name)
    assert rounded(written(made))[:7] == [0, 255, 0, 255, 0, 64, 128]
    made.FloatPixelData = np.full((8, 8), np.nan, np.float32).tobytes()
    with pytest.raises(DataError, match="not a readable DICOM file"):
        dicom.decode(written(made))


def test_a_picture_encapsulated_as_jpeg_is_read() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(buffer, "JPEG")
    made = dataset(picture(), WindowCenter=128, WindowWidth=256)
    assert rounded(written(made, encapsulate([buffer.getvalue()]), JPEGBaseline8Bit)) == [99] * 8


def test_an_unknown_compression_names_the_remedy() -> None:
    data = written(dataset(picture()), encapsulate([b"\xff\xd8\xff\xf7" + bytes(60)]), JPEGLSLossless)
    if importlib.util.find_spec("pylibjpeg"):
        pytest.skip("it can be read here")
    with pytest.raises(DataError, match=r"DICOM compression that cannot be read: pip install pylibjpeg\[all\]"):
        dicom.decode(data)


def test_files_of_several_frames_are_refused() -> None:
    made = dataset(picture(), NumberOfFrames=2)
    with pytest.raises(DataError, match="a DICOM file of several frames: export the ones to use"):
        dicom.decode(written(made, np.stack([picture()] * 2)))
    assert dicom.decode(written(dataset(picture(), NumberOfFrames=1), picture())).shape == (8, 8)


def test_files_without_an_image_are_refused() -> None:
    with pytest.raises(DataError, match="a DICOM file without an image"):
        dicom.decode(written(dataset(picture())))


def test_files_that_claim_too_many_pixels_are_refused() -> None:
    made = dataset(picture())
    made.Rows = made.Columns = 60_000
    with pytest.raises(DataError, match="more than 180,000,000 pixels"):
        dicom.decode(written(made, picture()))


def test_fewer_bytes_than_the_picture_needs_are_damage() -> None:
    with pytest.raises(DataError, match="not a readable DICOM file"):
        dicom.decode(written(dataset(picture(9, 9)), picture()))


def test_a_missing_reader_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored_as(picture())
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for decode in (dicom.decode, lambda data: images.decode(data, GREY)):
        with pytest.raises(DataError) as found:
            decode(data)
        assert str(found.value) == "a DICOM file: pip install 'maskdm[dicom]' to read it"


def test_dicom_files_are_told_by_their_bytes() -> None:
    assert dicom.is_dicom(stored_as(picture()))
    assert not dicom.is_dicom(b"DICM")
    assert not dicom.is_dicom(bytes(200))


def test_nothing_is_read_of_a_file_but_what_pixels_need() -> None:
    names = {pydicom.datadict.tag_for_keyword(name) for name in dicom._ELEMENTS}
    assert None not in names
    assert not names & {pydicom.datadict.tag_for_keyword(name) for name in SECRETS}


TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
SHIPPED = sorted(path for path in TEST_FILES.rglob("*") if path.is_file()) if TEST_FILES.is_dir() else []


def test_the_files_that_pydicom_ships_are_read_or_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    if not SHIPPED:
        pytest.skip("this pydicom ships none")
    policy = PixelPolicy(image_size=8, channels=3, upscale=True)
    read = {}
    for path in SHIPPED:
        try:
            found = images.decode(path.read_bytes(), policy)
        except DataError as error:
            read[path.name] = str(error)
        else:
            assert found.pixels.shape == (3, 8, 8)
            read[path.name] = f"{found.width}x{found.height} {'grey' if found.grey else 'colour'}"
    for name, expected in {
        "CT_small.dcm": "128x128 grey",
        "MR_small.dcm": "64x64 grey",
        "MR_small_RLE.dcm": "64x64 grey",
        "MR_small_bigendian.dcm": "64x64 grey",
        "JPEG2000.dcm": "256x1024 grey",
        "SC_rgb_rle_16bit.dcm": "100x100 colour",
        "SC_ybr_full_422_uncompressed.dcm": "100x100 colour",
        "examples_palette.dcm": "800x350 colour",
        "image_dfl.dcm": "512x512 grey",
        "MR_truncated.dcm": "not a readable DICOM file",
        "SC_rgb_rle_2frame.dcm": "a DICOM file of several frames: export the ones to use",
        "DICOMDIR": "a DICOM file without an image",
        "rtplan.dcm": "a DICOM file without an image",
    }.items():
        assert read.get(name, expected) == expected
    assert all(len(text) < 100 and "\n" not in text for text in read.values())
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_bigendian.dcm", "MR_small.dcm"),
        ("MR_small_implicit.dcm", "MR_small.dcm"),
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb_rle_32bit.dcm"),
        ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm"),
    ],
)
def test_the_same_picture_stored_in_several_ways_is_the_same(name: str, like: str) -> None:
    if not (TEST_FILES / name).exists() or not (TEST_FILES / like).exists():
        pytest.skip("this pydicom ships none")
    one, other = (dicom.decode((TEST_FILES / file).read_bytes()) for file in (name, like))
    assert np.array_equal(one, other)


def _files() -> dict[str, bytes]:
    signed = picture(8, 8, -500, 500, np.int16)
    window: dict[str, Any] = {"WindowCenter": 20, "WindowWidth": 300, "RescaleSlope": 1, "RescaleIntercept": -100}
    red: dict[str, Any] = {f"{name}PaletteColorLookupTableDescriptor": [4, 0, 8] for name in ("Red", "Green", "Blue")}
    red |= {f"{name}PaletteColorLookupTableData": b"\1\2\3\4" for name in ("Red", "Green", "Blue")}
    colours = np.stack([picture()] * 3, axis=2)
    private = dataset(signed, bits=12, **window)
    private.add_new(0x00091010, "LO", "Hausarzt Dr. Quirin")
    block = Dataset()
    block.PatientName = SECRETS["PatientName"]
    private.ReferencedPatientSequence = [block]
    return {
        "window": written(private, signed),
        "implicit": written(dataset(signed, bits=12, **window), signed, ImplicitVRLittleEndian),
        "big": written(dataset(signed, bits=12, **window), signed, ExplicitVRBigEndian),
        "deflated": written(dataset(signed, bits=12, **window), signed, DeflatedExplicitVRLittleEndian),
        "table": stored_as(picture(), VOILUTSequence=[table(np.arange(256, dtype=np.uint16), 0, 8)]),
        "palette": stored_as(picture(high=4), "PALETTE COLOR", **red),
        "colour": stored_as(colours, "RGB"),
        "jpeg": written(dataset(picture()), encapsulate([_jpeg()]), JPEGBaseline8Bit),
    }


def _jpeg() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    return buffer.getvalue()


FILES = _files()
# Words that tell a person; single letters of them would be found by chance.
TELLING = [
    word
    for text in (*SECRETS.values(), "Hausarzt Dr. Quirin")
    for word in text.replace("^", " ").split()
    if len(word) > 3
]


class Heard(logging.Handler):
    """Everything that is logged while a file is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome(data: bytes) -> str:
    """What decoding says: an error's text, or nothing. It may log nothing and warn of nothing."""
    heard, root = Heard(), logging.getLogger()
    root.addHandler(heard)
    said = ""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for decode in (dicom.decode, lambda data: images.decode(data, GREY)):
                try:
                    decode(data)
                except DataError as error:
                    said = str(error)
    finally:
        root.removeHandler(heard)
    assert not heard.lines
    assert not caught
    return said


@pytest.mark.parametrize("name", FILES)
def test_whole_files_say_nothing_of_a_person(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert outcome(FILES[name]) in ("", "colour, but the model has one channel")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_one_error_that_says_nothing_of_a_person(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = FILES[name]
    said = {outcome(data[:cut]) for cut in range(0, len(data), 7)}
    assert len(said) <= 6  # always the same few lines
    assert not [word for word in TELLING for text in said if word in text]
    assert capfd.readouterr() == ("", "")


@given(
    name=st.sampled_from(list(FILES)),
    changes=st.lists(
        st.tuples(st.sampled_from(["set", "insert", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_of_any_kind_is_one_error_that_says_nothing_of_a_person(
    capfd: pytest.CaptureFixture[str], name: str, changes: list[tuple[str, float, bytes]]
) -> None:
    data = FILES[name]
    for kind, where, value in changes:
        at = 132 + int(where * (len(data) - 132))
        after = {"set": at + len(value), "insert": at, "cut": at + 3 * len(value)}[kind]
        data = data[:at] + (b"" if kind == "cut" else value) + data[after:]
    said = outcome(data)
    assert said in (
        "",
        "a DICOM file of several frames: export the ones to use",
        "a DICOM file without an image",
        "colour, but the model has one channel",
        "more than 180,000,000 pixels",
        "not a readable DICOM file",
        "not a readable picture",
        "smaller than 8x8",
        "DICOM compression that cannot be read: pip install pylibjpeg[all], or export it",
    )
    assert capfd.readouterr() == ("", "")


def test_elements_that_are_not_what_they_say_repeat_nothing_of_a_person(capfd: pytest.CaptureFixture[str]) -> None:
    """A name where a number is expected, which a parser would quote."""
    secret = b"Zimmermann^Xaver"
    for tag, kind in ((0x00281050, b"DS"), (0x00281053, b"DS"), (0x00280008, b"IS"), (0x00280010, b"US")):
        whole = stored_as(row(0, 50, 100), WindowCenter=5, WindowWidth=9, RescaleSlope=1, RescaleIntercept=0)
        element = struct.pack("<2H", tag >> 16, tag & 0xFFFF) + kind + struct.pack("<H", len(secret)) + secret
        at = whole.find(struct.pack("<2H", tag >> 16, tag & 0xFFFF), 300)
        at = at if at > 0 else whole.index(struct.pack("<2H", 0x0028, 0x0002), 300)
        said = outcome(whole[:at] + element + whole[at:])
        assert not [word for word in TELLING if word in said]
    assert capfd.readouterr() == ("", "")


def test_pixels_are_the_models_whatever_the_size() -> None:
    stored: Pixels = picture(20, 30)
    found = images.decode(stored_as(stored), GREY)
    assert found.pixels.shape == (1, 8, 8)
    assert found[1:] == (30, 20, True)
