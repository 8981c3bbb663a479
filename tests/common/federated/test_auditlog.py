"""The audit log: every change to it shows, and no crash of a writer looks like one."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm.federated import auditlog
from maskdm.federated.auditlog import FIRST, append, lines, message_of, record, verify
from maskdm.federated.parcel import Parcel
from maskdm.run.tensorfile import digest_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def write(path: Path, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        append(path, {"text": f"entry {number} ü\n"})


def raw(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def rewrite(path: Path, pieces: list[bytes]) -> None:
    path.write_bytes(b"".join(pieces))


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw(path)]


def test_every_line_names_its_number_and_the_hash_of_the_line_before_it(path: Path) -> None:
    write(path, 3)
    written = raw(path)
    assert [entry["number"] for entry in entries(path)] == [1, 2, 3]
    hashes = [hashlib.sha256(line.rstrip(b"\n")).hexdigest() for line in written]
    assert [entry["previous"] for entry in entries(path)] == [FIRST, *hashes[:2]]
    found = verify(path)
    assert (found.lines, found.head, found.unreadable, found.problem) == (3, hashes[2], (), "")


def test_a_log_of_no_lines_is_whole(path: Path) -> None:
    path.touch()
    assert (verify(path).lines, verify(path).head, verify(path).problem) == (0, FIRST, "")
    write(path, 1)
    assert not verify(path).problem


def test_a_line_says_what_a_message_held_and_when_it_went(path: Path) -> None:
    arrays: dict[str, Any] = {"b": np.zeros((2, 3), np.uint16), "a": np.ones((), np.float32)}
    record(path, "out", "coordinator", 3, "released", message_of(Parcel(arrays, {"round": 3, "outcome": 0})))
    (entry,) = entries(path)
    assert {name: entry[name] for name in ("direction", "peer", "round", "verdict", "bytes")} == {
        **{"direction": "out", "peer": "coordinator", "round": 3, "verdict": "released", "bytes": 12 + 4 + 16}
    }
    assert entry["time"].endswith("+00:00")
    assert (entry["scalars"], entry["arrays"]) == ({"outcome": 0, "round": 3}, {"a": [], "b": [2, 3]})
    digest = hashlib.sha256(b"a" + arrays["a"].tobytes() + b"b" + arrays["b"].tobytes()).hexdigest()
    assert entry["sha256"] == digest == digest_of(arrays)


def swap(pieces: list[bytes], place: int) -> list[bytes]:
    return [*pieces[: place - 1], pieces[place], pieces[place - 1], *pieces[place + 1 :]]


def without(pieces: list[bytes], place: int) -> list[bytes]:
    return [*pieces[: place - 1], *pieces[place:]]


def twice(pieces: list[bytes], place: int) -> list[bytes]:
    return [*pieces[:place], *pieces[place - 1 :]]


def changed(pieces: list[bytes], place: int) -> list[bytes]:
    return [*pieces[: place - 1], pieces[place - 1].replace(b"entry", b"entri"), *pieces[place:]]


def garbled(pieces: list[bytes], place: int) -> list[bytes]:
    return [*pieces[: place - 1], b"?" + pieces[place - 1][1:], *pieces[place:]]


def other_past(pieces: list[bytes], place: int) -> list[bytes]:
    entry = json.loads(pieces[place - 1]) | {"previous": 64 * "1"}
    return [*pieces[: place - 1], json.dumps(entry).encode() + b"\n", *pieces[place:]]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (swap, "line 4 is not in its order: it was written as line 5"),
        (without, "lines were removed before line 4: it was written as line 5"),
        (twice, "line 5 was inserted, or a line before it was: it was written as line 4"),
        (changed, "line 4 was changed after line 5 was chained to it"),
        (garbled, "line 4 (or line 3) was changed after line 5 was chained to it"),
        (other_past, "line 4 was changed: it does not fit the lines before and after it"),
    ],
)
def test_the_first_line_that_is_not_as_it_was_written_is_named(
    path: Path, tamper: Callable[[list[bytes], int], list[bytes]], message: str
) -> None:
    write(path, 8)
    rewrite(path, tamper(raw(path), 4))
    assert verify(path).problem == message


def test_the_beginning_cannot_be_cut_off(path: Path) -> None:
    write(path, 4)
    rewrite(path, raw(path)[2:])
    assert verify(path).problem == "lines were removed before line 1: it was written as line 3"


def test_a_forged_line_shows_where_the_true_ones_go_on(path: Path, tmp_path: Path) -> None:
    write(path, 6)
    forged = tmp_path / "forged.jsonl"
    true = raw(path)
    rewrite(forged, true[:3])
    append(forged, {"text": "nothing to see"})
    rewrite(path, [*raw(forged), *true[3:]])
    assert verify(path).problem == "line 5 was inserted, or a line before it was: it was written as line 4"
    rewrite(path, [*raw(forged), *true[5:]])
    assert verify(path).problem == "lines were removed before line 5: it was written as line 6"


@given(st.data())
def test_no_byte_before_the_last_line_can_be_changed_without_a_word(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    write(path, 4)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - len(raw(path)[-1]) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    path.write_bytes(content)
    assert verify(path).problem


def test_a_noted_head_tells_whether_the_end_was_cut_off_or_everything_written_anew(path: Path) -> None:
    write(path, 4)
    noted, lines_then = verify(path).head, raw(path)
    write(path, 2, start=4)
    assert not verify(path, noted).problem
    rewrite(path, lines_then[:3])
    assert not verify(path).problem, "nothing in the file can tell"
    assert "cut off, or all of it was written anew" in verify(path, noted).problem
    path.unlink()
    write(path, 6, start=1)
    assert not verify(path).problem
    assert "was noted" in verify(path, noted).problem


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_line_stays_is_chained_over_and_is_no_tampering(path: Path, cut: int) -> None:
    write(path, 3)
    noted = verify(path).head
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    found = verify(path)
    assert (found.problem, found.unreadable) == ("", () if cut == 1 else (3,)), "without its newline a line is whole"
    write(path, 2, start=3)
    assert path.read_bytes().startswith(torn + b"\n")
    found = verify(path, noted if cut == 1 else found.head)
    assert (found.lines, found.problem, found.unreadable) == (5, "", () if cut == 1 else (3,))
    assert [line.entry["number"] for line in lines(path) if line.entry][-2:] == [4, 5]


def test_what_is_before_a_torn_line_is_covered_too(path: Path) -> None:
    write(path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    write(path, 1, start=3)
    path.write_bytes(path.read_bytes()[:-9])
    write(path, 3, start=4)
    assert verify(path).unreadable == (3, 4)
    assert not verify(path).problem
    for place in (2, 3, 4):
        pieces = raw(path)
        pieces[place - 1] = pieces[place - 1].replace(b"entry", b"entri")
        if pieces[place - 1] == raw(path)[place - 1]:
            pieces[place - 1] = b"?" + pieces[place - 1][1:]
        tampered = path.with_name(f"{place}.jsonl")
        rewrite(tampered, pieces)
        assert "was changed after line 5" in verify(tampered).problem


def test_a_last_line_that_cannot_be_read_and_is_not_torn_was_changed(path: Path) -> None:
    write(path, 3)
    rewrite(path, garbled(raw(path), 3))
    assert verify(path).problem == "line 3 was changed: it cannot be read, and it is not torn"


def test_lines_that_are_older_than_the_chain_are_covered_by_it(path: Path) -> None:
    path.write_text('{"direction": "out"}\n{"direction": "in"}\n')
    write(path, 2)
    found = verify(path)
    assert (found.lines, found.unreadable, found.problem) == (4, (1, 2), "")
    rewrite(path, [raw(path)[0].replace(b"out", b"in "), *raw(path)[1:]])
    assert "line 1 (or line 2) was changed after line 3" in verify(path).problem


@pytest.mark.parametrize("length", [1, 100, 2**16, 2**18 + 1])
def test_only_the_end_of_the_file_is_read_to_append(path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    write(path, 20)
    append(path, {"text": length * "x"})
    write(path, 1)
    looked: list[int] = []
    tails = auditlog._tails

    def counted(file: Any, size: int) -> Any:
        for tail, whole in tails(file, size):
            looked.append(len(tail))
            yield tail, whole

    monkeypatch.setattr(auditlog, "_tails", counted)
    monkeypatch.setattr(auditlog, "BLOCK", 600)
    write(path, 1)
    assert looked == [600]
    rewrite(path, raw(path)[:21])
    write(path, 1)
    assert not verify(path).problem
    assert verify(path).lines == 22


def test_a_full_disk_leaves_the_log_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, 2)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(path, 1)
    assert path.read_bytes() == before
    write(path, 1)
    assert not verify(path).problem


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_without_room_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left"):
        append(Path("/dev/full"), {})


def test_what_is_no_json_is_refused_and_not_written(path: Path) -> None:
    write(path, 1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        append(path, {"loss": float("nan")})
    assert path.read_bytes() == before


def test_processes_that_write_at_the_same_time_make_one_chain(path: Path) -> None:
    program = f"""
        import sys
        from pathlib import Path
        from maskdm.federated.auditlog import append

        sys.stdin.read()
        for number in range(60):
            append(Path({str(path)!r}), {{"text": "x" * 500, "of": sys.argv[1]}})
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    writers = [subprocess.Popen([*command, str(number)], stdin=subprocess.PIPE) for number in range(4)]
    for writer in writers:
        assert writer.stdin
        writer.stdin.close()  # all begin
    assert [writer.wait() for writer in writers] == [0] * 4
    assert (verify(path).lines, verify(path).problem) == (240, "")
