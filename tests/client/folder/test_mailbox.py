"""What lies between a ClientApp and its site's worker: whole files, the newest request, the reply of that very one."""

import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from maskdm.errors import plain
from maskdm.federated.parcel import Outcome, Parcel
from maskdm_client.folder import mailbox
from maskdm_client.folder.mailbox import Mailbox

EXCHANGES = st.integers(0, 2**63 - 1)
TYPES = st.sampled_from([np.float32, np.uint32, np.uint16, np.int8, np.uint8])
ARRAYS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    arrays_of.arrays(TYPES, arrays_of.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    max_size=4,
)
SCALARS = st.dictionaries(st.text(max_size=8), st.integers(0, 2**63 - 1) | st.floats(allow_nan=False), max_size=6)

PARCEL = Parcel({"a": np.arange(3, dtype=np.uint16)}, {"outcome": 0, "loss": 0.1})


@given(exchange=EXCHANGES, document=st.text(), weights=st.binary())
def test_a_request_reaches_the_worker_as_it_came(exchange: int, document: str, weights: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Mailbox(Path(folder)).ask(exchange, document, weights)
        box = Mailbox(Path(folder))  # of another process
        request = box.request()
        assert request is not None
        assert (request.exchange, request.document, bytes(request.weights)) == (exchange, document, weights)
        assert box.asked() == exchange


@given(exchange=EXCHANGES, key=st.sampled_from(["", "0f" * 32]), arrays=ARRAYS, scalars=SCALARS)
def test_a_reply_comes_back_bit_for_bit(
    exchange: int, key: str, arrays: dict[str, NDArray[np.generic]], scalars: dict[str, int | float]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Mailbox(Path(folder)).reply(exchange, key, Parcel(arrays, scalars))
        box = Mailbox(Path(folder))
        assert box.replied() == (exchange, key)
        found = box.take_reply()[1]
        assert found.arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
            assert found.arrays[name].tobytes() == array.tobytes()
        assert {name: (type(value), value) for name, value in found.scalars.items()} == {
            name: (type(value), value) for name, value in scalars.items()
        }
        assert found.document == ""


def test_an_empty_mailbox_holds_nothing_and_no_other_user_may_look_into_it(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    assert (box.asked(), box.request(), box.replied()) == (None, None, None)
    assert (tmp_path / "work").stat().st_mode & 0o777 == 0o700


def test_the_newest_request_wins(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    for exchange in (5, 9, 7):  # later is newer, whatever the number
        box.ask(exchange, f"plan {exchange}", b"w")
    request = box.request()
    assert request is not None
    assert (request.exchange, request.document) == (7, "plan 7")


def test_a_request_that_lies_there_already_is_not_written_again(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, "plan", b"w")
    before = (tmp_path / "work" / "request.bin").stat().st_ino
    box.ask(5, "plan", b"w")
    assert (tmp_path / "work" / "request.bin").stat().st_ino == before


def test_what_a_crash_left_half_written_is_never_read(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    for name in ("request.bin", "reply.bin", "progress.json"):
        (tmp_path / "work" / f".{name}.{os.getpid() + 1}.tmp").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert (box.asked(), box.request(), box.replied(), box.progress(5)) == (None, None, None, (1, 0))


def test_a_write_that_fails_leaves_the_old_file_whole_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, "plan", b"w")
    box.reply(5, "key", PARCEL)
    names = sorted(path.name for path in (tmp_path / "work").iterdir())

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: box.ask(6, "another", b"x"),
        lambda: box.reply(6, "another", Parcel({}, {})),
        lambda: box.progressed(6, 1, 8),
    ):
        with pytest.raises(OSError, match="no space left"):
            write()  # type: ignore[no-untyped-call]
    request = box.request()
    assert request is not None
    assert (request.exchange, bytes(request.weights), box.replied()) == (5, b"w", (5, "key"))
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == names


def test_who_reads_while_another_writes_finds_one_whole_request(tmp_path: Path) -> None:
    box, torn, over = Mailbox(tmp_path), [], threading.Event()
    box.ask(0, "0", b"")

    def read() -> None:
        while not over.is_set():
            found = Mailbox(tmp_path).request()
            if found is None or bytes(found.weights) != bytes([found.exchange]) * 10_000 * found.exchange:
                torn.append(found)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 40):
        box.ask(number, str(number), bytes([number]) * 10_000 * number)
    over.set()
    reader.join()
    assert not torn


class Clock:
    """Time that passes only where somebody sleeps; what is to happen meanwhile is done there."""

    def __init__(self, meanwhile: Callable[[float], None] = lambda now: None) -> None:
        self.now, self._meanwhile = 100.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self._meanwhile(self.now - 100.0)


def test_waiting_ends_at_its_deadline_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(mailbox, "time", clock)
    box = Mailbox(tmp_path)
    box.reply(4, "key", PARCEL)  # of another exchange
    assert box.wait(5, 30.0) is None
    assert 30.0 <= clock.now - 100.0 <= 30.0 + 2 * mailbox.POLL_SECONDS
    assert box.wait(5, 0.0) is None


def test_waiting_ends_with_the_next_look_after_the_reply_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Mailbox(tmp_path)
    clock = Clock(lambda now: box.reply(4 if now < 3 else 5, "key", PARCEL))
    monkeypatch.setattr(mailbox, "time", clock)
    found = box.wait(5, 30.0)
    assert found is not None
    assert found.scalars == PARCEL.scalars
    assert clock.now - 100.0 <= 3 + 2 * mailbox.POLL_SECONDS


def test_a_reply_that_lies_there_is_taken_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(mailbox, "time", clock)
    box = Mailbox(tmp_path)
    box.reply(5, "key", PARCEL)
    assert box.wait(5, 0.0) is not None
    assert clock.now == 100.0


def test_one_thread_gets_the_reply_that_another_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailbox, "POLL_SECONDS", 0.001)
    looked = threading.Event()
    found: list[Parcel | None] = []
    waiting, replied = Mailbox(tmp_path), Mailbox.replied

    def look(self: Mailbox) -> tuple[int, str] | None:
        looked.set()
        return replied(self)

    monkeypatch.setattr(Mailbox, "replied", look)
    thread = threading.Thread(target=lambda: found.append(waiting.wait(5, 60.0)), daemon=True)
    thread.start()
    assert looked.wait(30)
    Mailbox(tmp_path).reply(5, "key", PARCEL)
    thread.join(30)
    assert len(found) == 1
    assert found[0] is not None
    assert found[0].arrays["a"].tolist() == [0, 1, 2]


def test_a_reply_that_another_one_replaces_meanwhile_is_not_mistaken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailbox, "time", Clock())
    box, take = Mailbox(tmp_path), Mailbox.take_reply
    box.reply(5, "key", PARCEL)

    def too_late(self: Mailbox) -> tuple[int, Parcel]:
        self.reply(6, "another", Parcel({}, {"outcome": 6}))
        return take(self)

    monkeypatch.setattr(Mailbox, "take_reply", too_late)
    found = box.wait(5, 1.0)
    assert found is None or found.scalars == PARCEL.scalars


def test_progress_is_that_of_the_exchange_in_question(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    assert box.progress(5) == (1, 0)
    box.progressed(5, 3, 64)
    assert Mailbox(tmp_path).progress(5) == (3, 64)
    assert box.progress(6) == (1, 0)
    box.progressed(6, 4, 8)
    assert (box.progress(5), box.progress(6)) == ((1, 0), (4, 8))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"exchange": 5}'])
def test_progress_that_cannot_be_read_is_none_yet(tmp_path: Path, content: str) -> None:
    box = Mailbox(tmp_path)
    (tmp_path / "work" / "progress.json").write_text(content)
    assert box.progress(5) == (1, 0)


def test_a_request_whose_reply_says_that_something_was_missing_is_replaced_under_the_same_number(
    tmp_path: Path,
) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, "plan", b"part")
    box.reply(5, "", Parcel({}, {"outcome": int(Outcome.DIVERGED)}))
    box.ask(5, "plan", b"whole")
    assert box.replied() == (5, "")
    box.reply(5, "", Parcel({}, {"outcome": int(Outcome.UNKNOWN)}))
    box.ask(5, "plan", b"whole")
    request = box.request()
    assert request is not None
    assert (request.weights, box.replied()) == (b"whole", None)


def test_who_only_waits_reads_no_plan_and_no_weights(tmp_path: Path) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, "plan", b"weights")
    box.reply(4, "key", PARCEL)
    for name in ("request.bin", "reply.bin"):
        path = tmp_path / "work" / name
        path.write_bytes(path.read_bytes()[: mailbox.HEAD.size])
    assert (box.asked(), box.replied(), box.wait(5, 0.0)) == (5, (4, "key"), None)


@pytest.mark.parametrize(
    ("document", "exchange", "key", "over"),
    [
        ('{"action": "finish"}', 5, "key", True),
        ('{"action": "finish"}', 5, "", False),
        ('{"action": "finish"}', 4, "key", False),
        ('{"action": "train"}', 5, "key", False),
        ("no plan", 5, "", False),
    ],
)
def test_a_federation_is_over_when_its_final_model_was_taken(
    tmp_path: Path, document: str, exchange: int, key: str, over: bool
) -> None:
    box = Mailbox(tmp_path)
    assert not box.is_over()
    box.ask(5, document, b"weights")
    assert not box.is_over()
    box.reply(exchange, key, PARCEL)
    assert box.is_over() == over


def test_what_others_chose_is_shown_short_and_on_one_line() -> None:
    assert plain("\x1b[31mred\r\nand\x07 \u202eback é") == "?[31mred??and? ?back é"
    assert len(plain("x" * 10_000)) == 200
