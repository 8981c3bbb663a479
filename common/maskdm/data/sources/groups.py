"""What images belong together (a patient, an identity, a slide), from a column of a CSV or from their names."""

import csv
import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...errors import DataError
from ...run.reporting import say
from .source import ArraySource, MappedSource, PackedSource, Source, group_of
from .tables import Table


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
    if isinstance(source, ArraySource | PackedSource):
        raise DataError(f"{option}: images in {source.path} have no names; give groups when they are packed from files")
    with_group, count = 0, 0
    for entry in source.entries():
        with_group, count = with_group + bool(find(entry.name)), count + 1
    if not with_group:
        raise DataError(f"{option}: fits none of the images' names")
    if with_group < count:
        say(f"WARNING: {option}: {count - with_group:,} of {count:,} images belong to no group")
    return MappedSource(source, lambda entry: replace(entry, group=find(entry.name) or entry.group), key)


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
    names, groups = array("Q"), array("Q")
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
    known = Table(names, groups)
    if known.contradicts_itself():
        raise DataError(f"--group-csv {table}: one image is in two groups: name the images by their whole paths")

    def find(name: str) -> int:
        parts = PurePosixPath(name)
        return next((known.get(group_of(n))[0] for n in (name, parts.name, parts.stem) if known.get(group_of(n))), 0)

    return find, known.digest()
