"""What a client answers to Flower messages that no coordinator of ours would send."""

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from maskdm.protocol import REPORT_NAMES, Outcome, pack
from maskdm_client.app import _parcel
from maskdm_client.site import answer

WEIGHTS = ArrayRecord({"packed": Array(pack({"a": np.zeros(2, np.float32)}))})


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"plan": ConfigRecord({"document": "{}"})}),
        RecordDict({"plan": ConfigRecord({}), "weights": WEIGHTS}),
        RecordDict({"plan": MetricRecord({"document": 1}), "weights": WEIGHTS}),
        RecordDict({"plan": ConfigRecord({"document": "{}"}), "weights": ArrayRecord({})}),
        RecordDict(
            {
                "plan": ConfigRecord({"document": "{}"}),
                "weights": ArrayRecord({"packed": Array(np.zeros(9, np.uint8))}),
            }
        ),
        RecordDict({"plan": ConfigRecord({"document": "{}"}), "weights": WEIGHTS}),
    ],
)
def test_a_foreign_message_is_answered_with_a_code_and_nothing_else(content: RecordDict, tmp_path: Path) -> None:
    released = answer(_parcel(content), tmp_path)
    assert not released.arrays
    assert released.scalars["outcome"] == Outcome.PLAN_REFUSED
    assert set(released.scalars) <= set(REPORT_NAMES)
