"""Records of Flower's in both directions: what one side writes the other reads, and hostile ones are none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maskdm.federated.flower_records import (
    LONGEST_WAIT,
    PACKED,
    Asked,
    asked_in,
    nonce_in,
    packed_record,
    parcel_in,
    question_records,
    reply_to,
    size_in,
)
from maskdm.federated.parcel import Parcel
from maskdm.run.tensorfile import pack

UPDATE = {"a": np.arange(3, dtype=np.uint16), "b": np.zeros((2, 2), np.uint16)}
NUMBERS: dict[str, int | float] = {"outcome": 0, "loss_after": 0.5}
DOCUMENT = '{"a": "plan"}'
PACKED_WEIGHTS = pack({"a": np.zeros(2, np.float32)})


@pytest.fixture(autouse=True)
def _identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower lets only the process of a run make messages."""
    for name, value in (("_task_id", 1), ("_node_id", 2), ("_run_id", 3)):
        monkeypatch.setattr(TaskIdentity, name, value)


def packed(document: bytes, name: str = "packed", kind: str = PACKED) -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(document),), kind, document)})


def weights(stype: str = PACKED) -> Any:
    return packed(PACKED_WEIGHTS, kind=stype)


def content(update: ArrayRecord | None = None, **changes: Any) -> RecordDict:
    records = {"report": MetricRecord({**NUMBERS, **changes})}
    return RecordDict(records | ({"update": update} if update is not None else {}))


def good() -> RecordDict:
    return content(packed(pack(UPDATE)))


def values_of(parcel: Parcel | None) -> dict[str, Any]:
    """Types, shapes and bytes of a parcel's arrays."""
    assert parcel is not None
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in parcel.arrays.items()}


EXCHANGES, WAITS = st.integers(0, 2**63 - 1), st.floats(0, LONGEST_WAIT)
ARRAYS = st.dictionaries(
    st.text("abc._", min_size=1, max_size=5),
    hnp.arrays(st.sampled_from([np.uint16, np.float32, np.int8]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)),
    max_size=3,
)
FIGURES = st.dictionaries(
    st.text("abc_", min_size=1, max_size=5).filter(lambda name: name != "nonce"),
    st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    max_size=3,
)


@given(exchange=EXCHANGES, wait=WAITS, document=st.text(min_size=1), arrays=ARRAYS)
def test_a_site_reads_what_a_coordinator_writes(
    exchange: int, wait: float, document: str, arrays: dict[str, Any]
) -> None:
    packed_weights = pack(arrays)
    content = question_records(exchange, wait, document, packed_record(packed_weights))
    assert asked_in(content) == Asked(exchange, wait, document, packed_weights)
    assert asked_in(question_records(exchange, wait, "")) == Asked(exchange, wait, "", b"")


@given(arrays=ARRAYS, numbers=FIGURES)
def test_a_coordinator_reads_what_a_site_writes(arrays: dict[str, Any], numbers: dict[str, int | float]) -> None:
    question = Message(question_records(5, 1.0, ""), 5, "train")
    reply = reply_to(question, Parcel(arrays, numbers))
    found = parcel_in(reply.content)
    assert found is not None
    assert dict(found.scalars) == numbers
    assert values_of(found) == values_of(Parcel(arrays, {}))
    assert nonce_in(question.content)["nonce"] == reply.content["report"]["nonce"]


def test_a_reply_becomes_a_parcel_with_its_arrays_and_numbers() -> None:
    parcel = parcel_in(good())
    assert parcel is not None
    assert dict(parcel.scalars) == NUMBERS
    assert values_of(parcel) == values_of(Parcel(UPDATE, {}))


def test_a_reply_without_an_update_has_no_arrays() -> None:
    parcel = parcel_in(content())
    assert parcel is not None
    assert not parcel.arrays


def foreign(header: Any, body: bytes = b"") -> bytes:
    """A document with any header."""
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], **changes}}


DOCUMENTS = [
    b"",
    bytes(4),
    bytes(8),
    b"\xff" * 64,
    pack(UPDATE)[:-1],
    pack(UPDATE) + b"\0",
    foreign(b"not json"),
    foreign(b'"\xff"'),
    foreign(b"[" * 200_000),
    foreign(b"9" * 10_000),
    foreign([]),
    foreign(3),
    foreign(None),
    foreign({"a": 3}),
    foreign({"a": []}),
    foreign({"__metadata__": 3}),
    foreign({"__metadata__": {"a": 1}}),
    foreign(entry(dtype="F16")),
    foreign(entry(dtype=["U8"])),
    foreign(entry(shape=3)),
    foreign(entry(shape=[-1])),
    foreign(entry(shape=[True])),
    foreign(entry(shape=[0.0])),
    foreign(entry(shape=["0"])),
    foreign(entry(shape=[0, 10**30])),
    foreign(entry(shape=[0, 2**62, 2**62])),
    foreign(entry(shape=[0] * 65)),
    foreign(entry(shape=[10**30], data_offsets=[0, 10**30])),
    foreign(entry(data_offsets=[0])),
    foreign(entry(data_offsets=[0, 0, 0])),
    foreign(entry(data_offsets={"0": 0, "1": 0})),
    foreign(entry(data_offsets=[-8, -8])),
    foreign(entry(shape=[8], data_offsets=[0, 8]), bytes(4)),
    foreign(entry(more=1)),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_an_update_that_is_no_document_of_ours_is_noparcel_in(document: bytes) -> None:
    assert parcel_in(content(packed(document))) is None


@pytest.mark.parametrize(
    "records",
    [
        {},
        {"update": packed(pack(UPDATE))},
        {"report": ConfigRecord({"outcome": "text"})},
        {"report": MetricRecord({"outcome": [0, 1]})},
        {"report": packed(pack(UPDATE))},
        {"report": MetricRecord(dict(NUMBERS)), "more": ConfigRecord({"file": "name"})},
        {"report": MetricRecord(dict(NUMBERS)), "update": MetricRecord({"a": 1})},
        {"report": MetricRecord(dict(NUMBERS)), "update": packed(pack(UPDATE), kind="numpy.ndarray")},
        {"report": MetricRecord(dict(NUMBERS)), "update": packed(pack(UPDATE), name="a")},
        {"report": MetricRecord(dict(NUMBERS)), "update": ArrayRecord({})},
        {
            "report": MetricRecord(dict(NUMBERS)),
            "update": ArrayRecord({name: Array("uint8", (0,), PACKED, pack(UPDATE)) for name in ("packed", "more")}),
        },
        {
            "report": MetricRecord(dict(NUMBERS)),
            # What NumPy would have to unpickle is never loaded.
            "update": ArrayRecord({"packed": Array("uint8", (1,), "numpy.ndarray", b"\x80\x04K\x01.")}),
        },
    ],
)
def test_records_that_are_not_those_of_a_site_are_noparcel_in(records: dict[str, Any]) -> None:
    assert parcel_in(RecordDict(records)) is None


VALUES = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.text(max_size=3), st.binary(max_size=3))
PLANS = st.builds(
    ConfigRecord,
    st.fixed_dictionaries(
        {},
        optional={
            "exchange": st.integers(0, 2**63 - 1) | VALUES,
            "wait": st.floats(0, LONGEST_WAIT) | VALUES,
            "document": st.sampled_from(["", DOCUMENT]) | VALUES,
        },
    ),
)
RECORDS = st.sampled_from([weights(), weights(stype="pickle"), ArrayRecord({}), MetricRecord({}), ConfigRecord({})])
CONTENTS = st.fixed_dictionaries({}, optional={"plan": PLANS | RECORDS, "weights": RECORDS | PLANS})


@given(CONTENTS.map(RecordDict))
def test_whatever_a_message_holds_it_is_refused_or_of_known_types_and_ranges(content: RecordDict) -> None:
    asked = asked_in(content)
    if asked is not None:
        exchange, seconds, document, packed = asked
        assert type(exchange) is int
        assert 0 <= exchange < 2**63
        assert type(seconds) is float
        assert 0 <= seconds <= LONGEST_WAIT
        assert (type(document), type(packed)) == (str, bytes)
        assert bool(document) == ("weights" in content)
        assert packed in (b"", PACKED_WEIGHTS)


@given(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1)))
def test_the_number_of_a_question_is_sent_back(nonce: tuple[int, int]) -> None:
    plan = ConfigRecord({"exchange": 5, "wait": 1.0, "document": "", "nonce": list(nonce)})
    content = RecordDict({"plan": plan})
    assert asked_in(content) == (5, 1.0, "", b"")
    assert nonce_in(content) == {"nonce": list(nonce)}


@pytest.mark.parametrize(
    "nonce", [None, 5, "text", b"bytes", [1], [1, 2, 3], [-1, 0], [2**63, 0], [1.0, 2.0], ["a", "b"], [True, False]]
)
def test_what_is_no_such_number_is_not_sent_back(nonce: Any) -> None:
    plan = ConfigRecord({} if nonce is None else {"nonce": nonce})
    assert nonce_in(RecordDict({"plan": plan})) == {}
    assert nonce_in(RecordDict({"plan": MetricRecord({"nonce": [1, 2]})})) == {}


ANY_RECORD = st.one_of(
    st.builds(ConfigRecord, st.dictionaries(st.text(max_size=8), VALUES, max_size=3)),
    st.builds(
        MetricRecord, st.dictionaries(st.text(max_size=8), st.integers(-9, 9) | st.lists(st.floats()), max_size=3)
    ),
    st.builds(
        packed, st.binary(max_size=40), st.sampled_from(["packed", "other"]), st.sampled_from([PACKED, "pickle"])
    ),
    RECORDS,
)
NAMES = st.sampled_from(["plan", "weights", "report", "update", "other"])


@given(st.dictionaries(NAMES, ANY_RECORD).map(RecordDict))
def test_whatever_a_message_holds_reading_it_raises_nothing(content: RecordDict) -> None:
    found = parcel_in(content)
    assert found is None or set(content) <= {"report", "update"}
    asked_in(content)
    assert set(nonce_in(content)) <= {"nonce"}
    assert size_in(content) >= 0


@pytest.mark.parametrize("document", [b"", b"no document", pack(UPDATE)[:-1]])
def test_a_file_that_arrived_and_is_no_document_of_ours_is_no_parcel(document: bytes, tmp_path: Path) -> None:
    (tmp_path / "arrived").write_bytes(document)
    assert parcel_in(content(packed(b"")), tmp_path / "arrived") is None


def test_a_file_that_arrived_is_read_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "arrived").write_bytes(pack(UPDATE))
    assert values_of(parcel_in(content(packed(b"")), tmp_path / "arrived")) == values_of(Parcel(UPDATE, {}))
    with pytest.raises(OSError, match="nowhere"):
        parcel_in(content(packed(b"")), tmp_path / "nowhere")
