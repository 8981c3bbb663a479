"""What the server makes of Flower messages, hostile ones among them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from maskdm.tensorfile import pack
from maskdm_server.app import PACKED, _inflate, _parcel

UPDATE = {"a": np.arange(3, dtype=np.uint16), "b": np.zeros((2, 2), np.uint16)}
NUMBERS = {"outcome": 0, "loss_after": 0.5}


def packed(document: bytes, name: str = "packed", kind: str = PACKED) -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(document),), kind, document)})


def test_a_reply_becomes_a_parcel_with_its_arrays_and_numbers() -> None:
    parcel = _parcel(RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(pack(UPDATE))}))
    assert parcel is not None
    assert dict(parcel.scalars) == NUMBERS
    assert {name: array.tolist() for name, array in parcel.arrays.items()} == {
        "a": [0, 1, 2],
        "b": [[0, 0], [0, 0]],
    }


def test_a_reply_without_an_update_has_no_arrays() -> None:
    parcel = _parcel(RecordDict({"report": MetricRecord(dict(NUMBERS))}))
    assert parcel is not None
    assert not parcel.arrays


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"update": packed(pack(UPDATE))}),
        RecordDict({"report": ConfigRecord({"outcome": "text"})}),
        RecordDict({"report": MetricRecord({"outcome": [0, 1]})}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "more": ConfigRecord({"file": "name"})}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": MetricRecord({"a": 1})}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(bytes(4))}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(pack(UPDATE), kind="numpy.ndarray")}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(pack(UPDATE), name="a")}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": ArrayRecord({})}),
        RecordDict(
            {
                "report": MetricRecord(dict(NUMBERS)),
                # What NumPy would have to unpickle is never loaded.
                "update": ArrayRecord({"packed": Array("uint8", (1,), "numpy.ndarray", b"\x80\x04K\x01.")}),
            }
        ),
    ],
)
def test_anything_else_is_no_parcel(content: RecordDict) -> None:
    assert _parcel(content) is None


def a_message(packed_array: Array) -> Message:
    TaskIdentity.task_id, TaskIdentity.node_id, TaskIdentity.run_id = 1, 2, 3
    record = ArrayRecord()
    record["packed"] = packed_array
    content = RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": record})
    return Message(content, 5, "train")


def objects_of(message: Message) -> dict[str, bytes]:
    return {name: found.deflate() for name, found in get_all_nested_objects(message).items()}


def test_a_message_is_put_together_from_its_objects_as_it_was() -> None:
    document = pack({"a": np.arange(5_000_000, dtype=np.uint16)})  # two chunks
    message = a_message(Array("uint8", (len(document),), PACKED, document))
    found = _inflate(get_object_tree(message), objects_of(message).__getitem__, len(document))
    parcel = _parcel(found.content)
    assert parcel is not None
    assert (parcel.arrays["a"] == np.arange(5_000_000, dtype=np.uint16)).all()
    assert dict(parcel.scalars) == NUMBERS


def test_one_part_that_is_named_often_makes_no_large_array() -> None:
    array = Array("uint8", (1000,), PACKED, bytes(1000))
    array.__dict__["_chunks"] = array.slice_array() * 1000
    message = a_message(array)
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        _inflate(get_object_tree(message), objects_of(message).__getitem__, 10_000)
