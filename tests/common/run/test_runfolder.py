"""Folders of runs: whole files, one owner, one configuration."""

import errno
import json
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from maskdm.errors import UsageError
from maskdm.run.runfolder import (
    LineReader,
    append_line,
    atomic_write,
    claim,
    close_to_others,
    flatten,
    is_owned,
    keep_lines,
    open_lock,
    owned,
    read_lines,
    write_json,
)


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_run_is_closed_to_other_users_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    with owned(tmp_path / "deep" / "new"):
        assert mode(tmp_path / "deep" / "new") == 0o700
    (tmp_path / "old").mkdir(mode=0o755)
    for _ in range(2):  # an empty folder that was there, and one that an earlier version had left open
        (tmp_path / "old").chmod(0o755)
        with owned(tmp_path / "old"):
            claim(tmp_path / "old", "test", {})
        assert mode(tmp_path / "old") == 0o700


def test_a_folder_with_other_things_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    with owned(tmp_path), pytest.raises(UsageError, match="already holds"):
        claim(tmp_path, "test", {})
    assert mode(tmp_path) == 0o755


def test_a_folder_of_another_user_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a volume that is mounted into a container."""
    tmp_path.chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    close_to_others(tmp_path)
    assert mode(tmp_path) == 0o777


@pytest.mark.parametrize("kind", ["link", "dangling link", "FIFO", "folder"])
def test_what_lies_in_the_place_of_a_lock_is_not_followed_and_not_touched(tmp_path: Path, kind: str) -> None:
    """A link would have another user's process empty, or make, any file; a FIFO would have it wait for ever."""
    folder, victim = tmp_path / "run", tmp_path / "victim"
    folder.mkdir()
    if kind == "link":
        victim.write_text("precious")
    if kind.endswith("link"):
        (folder / ".lock").symlink_to(victim)
    elif kind == "FIFO":
        os.mkfifo(folder / ".lock")
    else:
        (folder / ".lock").mkdir()
    with pytest.raises(UsageError, match="cannot be written"), owned(folder):
        pass
    assert not is_owned(folder)
    assert victim.read_text() == "precious" if kind == "link" else not victim.exists()


def test_a_lock_keeps_what_is_in_it_and_is_only_this_users(tmp_path: Path) -> None:
    with open_lock(tmp_path / "lock") as lock:
        lock.write(b"x")
    assert mode(tmp_path / "lock") == 0o600
    with open_lock(tmp_path / "lock"), open_lock(tmp_path / "lock", os.O_RDONLY) as lock:
        assert lock.read() == b"x"
    with pytest.raises(FileNotFoundError):
        open_lock(tmp_path / "none", os.O_RDWR)


def test_a_written_file_is_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    atomic_write(tmp_path / "deep" / "a.txt", "first ü")
    atomic_write(tmp_path / "deep" / "a.txt", b"second")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == b"second"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_after_the_content_its_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def fsync(descriptor: int) -> None:
        what = "folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file"
        synced.append((what, (tmp_path / "a.txt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    atomic_write(tmp_path / "a.txt", "content")
    assert synced == [("file", False), ("folder", True)]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_knows_no_such_thing_will_do_and_one_that_fails_will_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with nullcontext() if passes else pytest.raises(OSError, match="Input/output"):
        atomic_write(tmp_path / "a.txt", "content")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    atomic_write(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a.txt", "new")
    monkeypatch.undo()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_pieces_are_written_one_after_another(tmp_path: Path) -> None:
    array = np.arange(3, dtype=np.float32)
    pieces: list[bytes | memoryview] = [b"head", memoryview(b""), array.view(np.uint8).data, b"tail"]
    atomic_write(tmp_path / "a", iter(pieces))
    assert (tmp_path / "a").read_bytes() == b"head" + array.tobytes() + b"tail"
    atomic_write(tmp_path / "a", ())
    assert (tmp_path / "a").read_bytes() == b""


def test_only_one_piece_is_in_memory_at_a_time(tmp_path: Path) -> None:
    seen: list[weakref.ref[NDArray[np.uint8]]] = []

    def piece(number: int) -> memoryview:
        made = np.full(100_000, number, np.uint8)  # more than the file's own buffer
        seen.append(weakref.ref(made))
        return made.data

    def pieces() -> Iterator[memoryview]:
        for number in range(4):
            assert all(made() is None for made in seen)
            yield piece(number)

    atomic_write(tmp_path / "a", pieces())
    assert (tmp_path / "a").stat().st_size == 400_000


def test_readers_see_the_old_file_until_all_pieces_are_written(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        assert (tmp_path / "a").read_bytes() == b"old"
        yield (tmp_path / "a").read_bytes()  # a new file may be made out of the old one

    atomic_write(tmp_path / "a", pieces())
    assert (tmp_path / "a").read_bytes() == b"newold"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_piece_that_cannot_be_made_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half of the new" * 10_000
        raise error

    atomic_write(tmp_path / "a", b"old")
    with pytest.raises(error):
        atomic_write(tmp_path / "a", pieces())
    with pytest.raises(error):
        atomic_write(tmp_path / "b", pieces())
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_lines_are_appended_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines(path) == []
    append_line(path, {"a": 1, "text": "ü\nü"})
    append_line(path, {"a": 2})
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1, "text": "ü\nü"}, {"a": 2}]
    keep_lines(path, read_lines(path)[:1])
    append_line(path, {"a": 4})
    assert [line["a"] for line in read_lines(path)] == [1, 4]


@pytest.mark.parametrize(
    "text",
    [
        '\r\n \t \\ " \0 \x0b\x0c\x1c\x1d\x1e 日本語 🙂',
        pytest.param(
            "\x85 \u2028 \u2029",
        ),
    ],
)
def test_any_text_comes_back_from_a_line(tmp_path: Path, text: str) -> None:
    reader = LineReader(tmp_path / "a.jsonl")
    for record in ({"text": text}, {text: "twice"}):
        append_line(tmp_path / "a.jsonl", record)
    expected = [{"text": text}, {text: "twice"}]
    assert reader.new() == expected
    assert read_lines(tmp_path / "a.jsonl") == expected


def test_lines_are_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    append_line(tmp_path / "a.jsonl", {"name": "Zürich"})
    assert (tmp_path / "a.jsonl").read_bytes() == '{"name": "Zürich"}\n'.encode()


def test_a_record_that_is_not_json_is_refused_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_line(tmp_path / "a.jsonl", {"loss": float("nan")})
    assert read_lines(tmp_path / "a.jsonl") == []


def test_a_reader_starts_at_the_end_and_takes_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_line(path, {"n": 0})
    reader = LineReader(path)
    assert reader.new() == []
    with path.open("a") as file:
        file.write('{"n": 1}\n{"n": ')
    assert reader.new() == [{"n": 1}]
    assert reader.new() == []
    with path.open("a") as file:
        file.write('2, "word": "ü"}\n')
    assert reader.new() == [{"n": 2, "word": "ü"}]


def test_a_reader_can_wait_for_a_file_that_does_not_exist_yet(tmp_path: Path) -> None:
    reader = LineReader(tmp_path / "a.jsonl")
    assert reader.new() == []
    append_line(tmp_path / "a.jsonl", {"n": 1})
    assert reader.new() == [{"n": 1}]


def test_a_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with owned(folder), pytest.raises(UsageError, match="in use by a running process"), owned(folder):
        pytest.fail("two owners")
    with owned(folder):  # free again
        pass


def test_the_owner_of_a_folder_lets_go_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError), owned(tmp_path / "run"):
        raise KeyError
    with owned(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--site .* cannot be written"), owned(tmp_path / "file" / "run", "--site"):
        pytest.fail("a folder in a file")


def test_the_first_claim_writes_the_configuration_and_the_same_claim_continues(tmp_path: Path) -> None:
    config = {"lr": 0.1, "model": {"size": 8, "betas": (0.9, 0.99)}}
    assert claim(tmp_path, "pretrain", config) is False
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "pretrain"
    assert claim(tmp_path, "pretrain", config) is True


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("pretrain", {"model": {"size": 16}, "lr": 0.1}, r"model\.size is 8 there and 16 here"),
        ("serve", {"model": {"size": 8}, "lr": 0.1}, "kind is 'pretrain' there and 'serve' here"),
        ("pretrain", {"model": {"size": 8}}, "lr is 0.1 there and None here"),
        ("pretrain", {"model": {"size": 9}, "lr": 0.2}, "lr is 0.1 there and 0.2 here"),
    ],
)
def test_another_run_is_refused_with_the_first_difference(
    tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    claim(tmp_path, "pretrain", {"model": {"size": 8}, "lr": 0.1})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UsageError, match=message):
        claim(tmp_path, kind, config)
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_may_change_is_taken_over_when_a_run_continues(tmp_path: Path) -> None:
    claim(tmp_path, "serve", {"site": {"device": "cpu", "seed": 1}})
    assert claim(tmp_path, "serve", {"site": {"device": "cuda", "seed": 1}}, may_change=("site.device",))
    assert json.loads((tmp_path / "config.json").read_text())["site"]["device"] == "cuda"
    with pytest.raises(UsageError, match=r"site\.seed"):
        claim(tmp_path, "serve", {"site": {"device": "cpu", "seed": 2}}, may_change=("site.device",))


def test_a_folder_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match=r"already holds 'thesis\.tex'"):
        claim(tmp_path, "pretrain", {})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_configuration_is_the_users_to_put_right(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError, match="not readable"):
        claim(tmp_path, "pretrain", {})


def test_json_files_are_readable_by_people(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "Zürich"})
    assert (tmp_path / "a.json").read_text() == '{\n  "name": "Zürich"\n}\n'


LEAVES = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
KEYS = st.text(st.characters(codec="ascii", exclude_characters="."), min_size=1, max_size=3)


@given(st.dictionaries(KEYS, st.one_of(LEAVES, st.dictionaries(KEYS, LEAVES, min_size=1, max_size=3)), max_size=4))
def test_flattening_keeps_every_leaf_under_its_dotted_name(document: dict[str, Any]) -> None:
    for dotted, value in flatten(document).items():
        found: Any = document
        for part in dotted.split("."):
            found = found[part]
        assert found == value
    leaves = sum(len(value) if isinstance(value, dict) else 1 for value in document.values())
    assert len(flatten(document)) == leaves
