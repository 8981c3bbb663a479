"""What images belong together (a patient, an identity, a slide), from a column of a CSV or from their names."""

import csv
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from maskdm.errors import DataError
from maskdm.sources import Entry, Source, group_of

Rule = Callable[[Entry], Entry | None]


class MappedSource:
    """A source whose entries are changed, or left out, by a rule."""

    def __init__(self, source: Source, rule: Rule, key: bytes) -> None:
        self.path = source.path
        self._source, self._rule, self._key = source, rule, key

    def entries(self) -> Iterator[Entry]:
        return (changed for entry in self._source.entries() if (changed := self._rule(entry)))

    def count(self) -> int | None:
        return self._source.count()

    def fingerprint(self) -> bytes:
        return hashlib.sha256(self._source.fingerprint() + self._key).digest()


def with_groups(source: Source, regex: str | None = None, table: str | None = None) -> Source:
    """The source with a group for each image.

    Args:
        regex: the group is its first parenthesis, or all it matches, in the image's path; no match, no group.
        table: `FILE.csv:COLUMN`; the group is that column's value in the row whose first column is the image's path,
            file name, or file name without suffix.

    Raises:
        DataError: both are given, one is malformed, or fits no image.
    """
    if regex is None and table is None:
        return source
    if regex is not None and table is not None:
        raise DataError("--group-regex and --group-csv exclude each other: give one")
    if regex is not None:
        option, find, key = f"--group-regex {regex}", _by_regex(regex), regex.encode()
    else:
        assert table is not None
        option, (find, key) = f"--group-csv {table}", _by_table(table)
    if not any(find(entry.name) for entry in source.entries()):
        raise DataError(f"{option}: fits none of the images' names")
    return MappedSource(source, lambda entry: replace(entry, group=find(entry.name)), key)


def _by_regex(regex: str) -> Callable[[str], int]:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise DataError(f"--group-regex {regex}: {error}") from error

    def find(name: str) -> int:
        match = pattern.search(name)
        text = match and (match.group(1) if pattern.groups else match.group(0))
        return group_of(text) if text else 0

    return find


def _by_table(table: str) -> tuple[Callable[[str], int], bytes]:
    path, _, column = table.rpartition(":")
    if not path or not column:
        raise DataError(f"--group-csv {table}: give FILE.csv:COLUMN")
    names: list[int] = []
    groups: list[int] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if column not in header:
                raise DataError(f"--group-csv {table}: no column {column!r}; there are {', '.join(header) or 'none'}")
            place = header.index(column)
            for row in rows:
                if len(row) > place and row[place]:
                    names.append(group_of(row[0]))
                    groups.append(group_of(row[place]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--group-csv {path} cannot be read: {error}") from error
    order = np.argsort(np.array(names, np.uint64), kind="stable")  # 16 bytes an image, where a dict takes 150
    keys, values = np.array(names, np.uint64)[order], np.array(groups, np.uint64)[order]

    def find(name: str) -> int:
        parts = PurePosixPath(name)
        for text in (name, parts.name, parts.stem):
            row = int(np.searchsorted(keys, np.uint64(group_of(text))))
            if row < len(keys) and keys[row] == group_of(text):
                return int(values[row])
        return 0

    return find, hashlib.sha256(keys.tobytes() + values.tobytes()).digest()
