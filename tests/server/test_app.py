"""What the server makes of Flower messages, hostile ones among them."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from maskdm.protocol import pack
from maskdm_server.app import _parcel

UPDATE = {"a": np.arange(3, dtype=np.uint16), "b": np.zeros((2, 2), np.uint16)}
NUMBERS = {"outcome": 0, "loss_after": 0.5}


def packed(array: np.ndarray) -> ArrayRecord:
    return ArrayRecord({"packed": Array(array)})


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
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(np.zeros(4, np.uint8))}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": packed(np.zeros(4, np.float32))}),
        RecordDict({"report": MetricRecord(dict(NUMBERS)), "update": ArrayRecord({"a": Array(pack(UPDATE))})}),
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
