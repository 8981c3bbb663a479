"""DICOM files through pydicom (extra `dicom`): pixels only. Elements that name a person are never parsed.

Modality transform, then the window (the site's own, the file's, or the picture's full range) to 0…255 (DICOM PS3.3
C.11), MONOCHROME1 turned so that bright is dense, palettes and YBR to RGB.
"""

import io
import logging
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskdm.errors import DataError

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
    logging.getLogger("pydicom").disabled = True  # its warnings quote values of the file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), specific_tags=_ELEMENTS)  # type: ignore[arg-type]
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
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    stored = dataset.pixel_array  # YBR becomes RGB on the way
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return (colours >> (8 * (colours.dtype.itemsize - 1))).astype(np.uint8)
    if stored.ndim == 3:
        return (stored >> max(0, int(dataset.BitsStored) - 8)).astype(np.uint8)
    if stored.ndim != 2 or not kind.startswith("MONOCHROME"):
        raise DataError("not a readable DICOM file")
    values = apply_modality_lut(stored, dataset).astype(np.float64)
    if window is None and "WindowCenter" in dataset and "WindowWidth" in dataset:
        window = _linear(_first(dataset.WindowCenter), _first(dataset.WindowWidth), dataset.get("VOILUTFunction"))
    elif window is None and "VOILUTSequence" in dataset:
        values = apply_voi_lut(values.astype(stored.dtype), dataset).astype(np.float64)
    low, high = window or (float(values.min()), float(values.max()))
    scaled = (values.clip(low, high) - low) * (255.0 / max(high - low, 1e-9))
    return 255.0 - scaled if kind == "MONOCHROME1" else scaled


def _first(value: Any) -> float:
    """A file may offer several windows; the first is the default one."""
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def _linear(center: float, width: float, function: Any) -> tuple[float, float]:
    """The window's edges (PS3.3 C.11.2.1.2.1 and C.11.2.1.3.2)."""
    if str(function or "LINEAR").upper() == "LINEAR_EXACT":
        return center - width / 2, center + width / 2
    return center - 0.5 - (width - 1) / 2, center - 0.5 + max(width - 1, 1e-6) / 2
