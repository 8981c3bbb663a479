"""Columns of text files, kept in a few bytes a line: millions of names with a box, a split or a group each."""

import csv
import hashlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DataError
from .source import group_of

# First fields of the lines that name columns; where files were joined they stand in the middle too.
HEADERS = ("NAME_ID", "image_id", "idx")

Parse = Callable[[Sequence[str]], tuple[str, Sequence[int]]]


class Table:
    """Whole numbers for names, sorted by a hash of 8 bytes, where a dict takes 150 a name."""

    def __init__(self, keys: "array[int]", values: "array[int]") -> None:
        width = len(values) // max(1, len(keys))
        order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
        self._keys = np.frombuffer(keys, np.uint64)[order]
        self._values: NDArray[Any] = np.frombuffer(values, values.typecode).reshape(len(keys), width)[order]

    def get(self, key: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The numbers for a name's `group_of`."""
        row = int(np.searchsorted(self._keys, np.uint64(key)))
        found = row < len(self._keys) and int(self._keys[row]) == key
        return tuple(self._values[row].tolist()) if found else default

    def contradicts_itself(self) -> bool:
        """Whether one name has different numbers."""
        same = self._keys[1:] == self._keys[:-1]
        return bool(np.any(same & (self._values[1:] != self._values[:-1]).any(axis=1)))

    def digest(self) -> bytes:
        """Changes with the content."""
        return hashlib.sha256(self._keys.data).digest() + hashlib.sha256(self._values.data).digest()


def read_table(file: Path, option: str, code: str, columns: str, parse: Parse) -> Table:
    """Read a `.csv`, or a text with blanks between its columns, line by line.

    Args:
        option: what the user chose the file with.
        code: type of the numbers, as of `array`.
        columns: what a line holds, for the error.
        parse: a line's fields → name and numbers; ValueError where they are malformed.

    Raises:
        DataError: unreadable, or a malformed line.
    """
    keys, values, line = array("Q"), array(code), 0
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            for fields in csv.reader(text) if file.suffix.lower() == ".csv" else map(str.split, text):
                line += 1
                if fields and fields[0] not in HEADERS:
                    name, numbers = parse(fields)
                    values.extend(numbers)
                    keys.append(group_of(name))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{option} {file} cannot be read: {error}") from error
    except (ValueError, OverflowError) as error:
        raise DataError(f"{option} {file}, line {line} is malformed: it needs {columns}; get the file again") from error
    return Table(keys, values)
