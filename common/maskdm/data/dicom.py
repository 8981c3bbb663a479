"""DICOM files through pydicom (extra `dicom`): pixels only. Elements that name a person are never parsed.

Modality transform, then the window (the site's own, the file's, or the picture's full range) to 0…255 (DICOM PS3.3
C.11), MONOCHROME1 turned so that bright is dense, palettes and YBR to RGB.
"""

import io
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

# Decompression bombs: a picture that would need more pixels than this in memory is refused. 4 bytes each at most.
MAX_PIXELS = 180_000_000

# All that is read of a file.
_ELEMENTS = [
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *("ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
]


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are those of a DICOM file."""
    return data[128:132] == b"DICM"


def decode(data: bytes, window: tuple[float, float] | None = None) -> NDArray[Any]:
    """Decode a file of one frame into (H, W) float in [0, 255], or (H, W, 3) uint8.

    Args:
        window: values, after the modality transform, that become black and white; the file's own where None.

    Raises:
        DataError: pydicom is not installed, or the file holds no single frame that it can decode. The message names
            nothing that the file says.
    """
    try:
        import pydicom
    except ImportError as error:
        raise DataError("a DICOM file: pip install 'maskdm[dicom]' to read it") from error
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)  # what it and its parts log quotes values of the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=_ELEMENTS)
            if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
                raise DataError("a DICOM file without an image")
            if int(dataset.get("NumberOfFrames") or 1) > 1:
                raise DataError("a DICOM file of several frames: export the ones to use")
            if int(dataset.Rows) * int(dataset.Columns) > MAX_PIXELS:
                raise DataError(f"more than {MAX_PIXELS:,} pixels")
            return _pixels(dataset, window)
        except DataError:
            raise
        except (NotImplementedError, RuntimeError) as error:  # what pydicom raises where a decoder is missing
            raise DataError(
                "DICOM compression that cannot be read: pip install pylibjpeg[all], or export it"
            ) from error
        except Exception as error:  # a damaged file may break any part of the parser
            raise DataError("not a readable DICOM file") from error


def _pixels(dataset: Any, window: tuple[float, float] | None) -> NDArray[Any]:
    from pydicom.pixels import apply_color_lut, apply_modality_lut

    stored = dataset.pixel_array  # YBR becomes RGB on the way
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])  # 8 may be stored in 16
        return np.asarray(colours >> max(0, bits - 8), np.uint8)
    if stored.ndim == 3:
        return np.asarray(stored >> max(0, int(dataset.BitsStored) - 8), np.uint8)
    if stored.ndim != 2 or not kind.startswith("MONOCHROME"):
        raise DataError("not a readable DICOM file")
    values: NDArray[np.float64] = apply_modality_lut(stored, dataset).astype(np.float64)
    window = window or _window(dataset)
    if window is None and dataset.get("VOILUTSequence"):
        values, window = _looked_up(values, dataset.VOILUTSequence[0], dataset.file_meta.TransferSyntaxUID)
    known = np.isfinite(values)
    if not known.any():
        raise DataError("not a readable DICOM file")
    low, high = window or (float(values[known].min()), float(values[known].max()))
    scaled: NDArray[np.float64] = (np.nan_to_num(values.clip(low, high), nan=low) - low) * (
        255.0 / max(high - low, 1e-9)
    )
    return 255.0 - scaled if kind == "MONOCHROME1" else scaled


def _window(dataset: Any) -> tuple[float, float] | None:
    """The edges of the file's window (PS3.3 C.11.2.1.2.1 and C.11.2.1.3.2); None where it has none that is valid."""
    center, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if center is None or width is None:
        return None
    if str(dataset.get("VOILUTFunction") or "LINEAR").upper() == "LINEAR_EXACT":
        return (center - width / 2, center + width / 2) if width > 0 else None
    return (center - 0.5 - (width - 1) / 2, center - 0.5 + max(width - 1, 1e-6) / 2) if width >= 1 else None


def _first(value: Any) -> float | None:
    """A file may offer several windows; the first is the default one."""
    values = value if isinstance(value, Sequence) else [value]
    return float(values[0]) if len(values) and values[0] is not None else None


def _looked_up(values: NDArray[Any], table: Any, syntax: Any) -> tuple[NDArray[Any], tuple[float, float]]:
    """Values after the file's table, and the range of its output (PS3.3 C.11.2.1.1)."""
    entries, first, bits = (int(number) for number in table.LUTDescriptor)
    entries = entries or 1 << 16
    outputs = table.LUTData
    if isinstance(outputs, bytes):
        wide = np.dtype(np.uint16).newbyteorder("<" if syntax.is_little_endian else ">")
        outputs = np.frombuffer(outputs, wide if len(outputs) >= 2 * entries else np.uint8)
    outputs = np.asarray(outputs, np.float64)[:entries]
    places = (values.round() - first).clip(0, len(outputs) - 1)
    return outputs[places.astype(np.int64)], (0.0, 2.0**bits - 1)
