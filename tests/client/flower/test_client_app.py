"""What the ClientApp answers to a message: one that our coordinator sends, and any other."""

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, Metadata, MetricRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from maskdm.federated.flower_records import LONGEST_PLAN, LONGEST_WAIT, PACKED
from maskdm.federated.parcel import REPORT_NAMES, Outcome, Parcel, Report
from maskdm.federated.policy import SitePolicy
from maskdm.run.runfolder import read_lines
from maskdm.run.tensorfile import pack, unpack
from maskdm_client.flower import client_app as client_app
from maskdm_client.flower import simulated_app as simulated
from maskdm_client.folder.failures import LOG
from maskdm_client.folder.mailbox import Mailbox

MakeSite = Callable[..., Path]

DOCUMENT = '{"a": "plan"}'
PACKED_WEIGHTS = pack({"a": np.zeros(2, np.float32)})


def weights(packed: bytes = PACKED_WEIGHTS, stype: str = PACKED) -> Any:
    return ArrayRecord({"packed": Array("uint8", (len(packed),), stype, packed)})


def question(**changes: Any) -> RecordDict:
    """What a coordinator asks; keywords change the plan, None removes an entry."""
    values = {"exchange": 5, "wait": 0.0, "document": DOCUMENT} | changes
    return ConfigRecord({name: value for name, value in values.items() if value is not None})


def with_weights(**changes: Any) -> RecordDict:
    return RecordDict({"plan": question(**changes), "weights": weights()})


def without_weights(**changes: Any) -> RecordDict:
    return RecordDict({"plan": question(**{"document": "", **changes})})


def answered(content: RecordDict, folder: Path, kind: str = "train", **run_config: str) -> Any:
    """The content of the reply, as Flower would get it."""
    context = Context(1, 2, {"site": str(folder), "partition-id": 0}, RecordDict({}), run_config)
    message = Message(content, metadata=Metadata(1, "", 1, 2, "", "", time.time(), 3600.0, kind))
    reply = (simulated.app if run_config else client_app.app)(message, context)
    assert not reply.has_error()
    return reply.content


def numbers_alone(content: Any) -> dict[str, int | float]:
    assert set(content) == {"report"}
    return dict(content["report"])


FOREIGN = {
    "nothing": RecordDict({}),
    "no plan": RecordDict({"weights": weights()}),
    "a plan of numbers": RecordDict({"plan": MetricRecord({"exchange": 5, "wait": 0.0}), "weights": weights()}),
    "weights that are text": RecordDict({"plan": question(), "weights": ConfigRecord({"packed": b"1"})}),
    "weights that are numbers": RecordDict({"plan": question(), "weights": MetricRecord({"packed": 1})}),
    "a plan without weights": without_weights(document=DOCUMENT),
    "weights without a plan": with_weights(document=""),
    "weights of NumPy": RecordDict({"plan": question(), "weights": ArrayRecord({"packed": Array(np.zeros(9))})}),
    "weights of a stranger": RecordDict({"plan": question(), "weights": weights(stype="pickle")}),
    "no exchange": with_weights(exchange=None),
    "a fraction of an exchange": with_weights(exchange=5.0),
    "an exchange that is text": with_weights(exchange="5"),
    "an exchange that is true": with_weights(exchange=True),
    "many exchanges": with_weights(exchange=[5]),
    "an exchange below zero": with_weights(exchange=-1),
    "an exchange beyond 63 bits": with_weights(exchange=2**63),
    "no wait": with_weights(wait=None),
    "a wait that is whole": with_weights(wait=1),
    "a wait that is text": with_weights(wait="1"),
    "a wait below zero": with_weights(wait=-0.5),
    "too long a wait": with_weights(wait=LONGEST_WAIT + 1),
    "a wait for ever": with_weights(wait=float("inf")),
    "a wait that is no number": with_weights(wait=float("nan")),
    "no document": RecordDict({"plan": question(document=None)}),
    "a document of bytes": with_weights(document=DOCUMENT.encode()),
    "a document of numbers": with_weights(document=1),
    "too long a document": with_weights(document=" " * (LONGEST_PLAN + 1)),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_message_is_answered_with_a_code_and_nothing_else(content: RecordDict, tmp_path: Path) -> None:
    refused = {"outcome": int(Outcome.PLAN_REFUSED), "round": 1, "exchange": 0}
    assert numbers_alone(answered(content, tmp_path)) == refused
    came, left = read_lines(tmp_path / "audit.jsonl")
    assert (came["direction"], came["verdict"]) == ("in", "refused: not what a coordinator sends")
    assert (left["direction"], left["scalars"]) == ("out", refused)
    assert Mailbox(tmp_path).asked() is None


@pytest.mark.parametrize("kind", ["evaluate", "query"])
def test_a_message_of_another_kind_is_foreign_whatever_it_holds(kind: str, make_site: MakeSite) -> None:
    folder = make_site()
    refused = {"outcome": int(Outcome.PLAN_REFUSED), "round": 1, "exchange": 0}
    assert numbers_alone(answered(with_weights(), folder, kind)) == refused
    assert [line["direction"] for line in read_lines(folder / "audit.jsonl")] == ["in", "out"]
    assert Mailbox(folder).asked() is None


def test_a_plan_reaches_the_mailbox_as_it_came(make_site: MakeSite) -> None:
    folder = make_site()
    answered(with_weights(), folder)
    request = Mailbox(folder).request()
    assert request is not None
    assert (request.exchange, request.document, bytes(request.weights)) == (5, DOCUMENT, PACKED_WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "verdict", "round_number"),
    [({}, "train", 3), ({"protocol": 99}, "no plan", 1), ({"round": 0}, "no plan", 1), ({"more": 1}, "no plan", 1)],
)
def test_what_comes_is_written_down_by_what_it_asks_for_or_as_no_plan(
    make_site: MakeSite,
    ask: Callable[..., tuple[str, bytes]],
    changes: dict[str, Any],
    verdict: str,
    round_number: int,
) -> None:
    folder = make_site()
    document, packed = ask(round=3, rounds=3)
    changed = json.dumps(json.loads(document) | changes)
    answered(RecordDict({"plan": question(document=changed), "weights": weights(packed)}), folder)
    came = read_lines(folder / "audit.jsonl")[0]
    assert (came["direction"], came["verdict"], came["round"]) == ("in", verdict, round_number)


def test_a_site_that_needs_longer_says_how_far_it_is(make_site: MakeSite) -> None:
    folder = make_site()
    working = {"outcome": int(Outcome.WORKING), "exchange": 5}
    assert numbers_alone(answered(with_weights(), folder)) == working | {"round": 1, "images_seen": 0}
    Mailbox(folder).progressed(5, 3, 64)
    assert numbers_alone(answered(without_weights(), folder)) == working | {"round": 3, "images_seen": 64}
    lines = read_lines(folder / "audit.jsonl")
    assert [line["verdict"] for line in lines] == ["no plan", "released", "how far", "released"]
    assert [line["scalars"].get("images_seen") for line in lines] == [None, 0, None, 64]
    assert [line["round"] for line in lines] == [1, 1, 3, 3]


@pytest.mark.parametrize("listed", [(), ("round",), ("exchange", "images_seen"), ("loss_before",)])
def test_a_sign_of_life_holds_of_its_numbers_those_that_the_policy_lists(
    make_site: MakeSite, listed: tuple[str, ...]
) -> None:
    folder = make_site(policy=SitePolicy(metrics=listed))
    numbers = {"round": 1, "exchange": 5, "images_seen": 0}
    allowed = {name: number for name, number in numbers.items() if name in listed}
    assert numbers_alone(answered(with_weights(), folder)) == {"outcome": int(Outcome.WORKING)} | allowed


def test_a_question_about_work_that_never_came_is_answered_as_unknown(make_site: MakeSite) -> None:
    folder = make_site()
    for asked in (None, 4, 6):
        if asked is not None:
            Mailbox(folder).ask(asked, DOCUMENT, b"")
        unknown = {"outcome": int(Outcome.UNKNOWN), "round": 1, "exchange": 5}
        assert numbers_alone(answered(without_weights(), folder)) == unknown
        assert Mailbox(folder).asked() == asked
    directions = [line["direction"] for line in read_lines(folder / "audit.jsonl")]
    assert directions == ["in", "out"] * 3


REPORT = Report(
    round=3,
    exchange=5,
    examples=10,
    images_seen=64,
    loss_before=0.1 + 0.2,
    loss_after=1 / 3,
    seconds=2.0,
    skipped_steps=0,
)


@pytest.mark.parametrize("content", [with_weights(), without_weights()], ids=["the plan again", "how far"])
def test_a_reply_leaves_bit_for_bit_as_the_gate_released_it_as_often_as_it_is_asked_for(
    make_site: MakeSite, content: RecordDict
) -> None:
    folder, random = make_site(), np.random.default_rng(0)
    arrays = {
        "a": random.integers(0, 2**16, (3, 5), np.uint16),
        "a.scale": random.normal(size=7).astype(np.float32),
        "b": np.zeros((), np.int8),
    }
    box = Mailbox(folder)
    box.ask(5, DOCUMENT, PACKED_WEIGHTS)
    box.reply(5, "key", Parcel(arrays, REPORT.model_dump(mode="json")))
    for _ in range(2):
        found = answered(content, folder)
        assert set(found) == {"report", "update"}
        assert dict(found["report"]) == REPORT.model_dump(mode="json")
        assert set(found["update"]) == {"packed"}
        packed = found["update"]["packed"]
        assert (packed.stype, packed.dtype, packed.shape) == (PACKED, "uint8", (len(packed.data),))
        sent = unpack(packed.data)
        assert {name: (array.dtype, array.shape, array.tobytes()) for name, array in sent.items()} == {
            name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()
        }
    came, left, came_again, left_again = read_lines(folder / "audit.jsonl")
    assert [line["direction"] for line in (came, left, came_again, left_again)] == ["in", "out", "in", "out"]
    assert (left["verdict"], left["round"], left["peer"]) == ("released", 3, "coordinator")
    assert left["arrays"] == {"a": [3, 5], "a.scale": [7], "b": []}
    for name in ("bytes", "scalars", "arrays", "sha256"):
        assert left_again[name] == left[name], "every repetition is written down"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
GOOD_NUMBERS = REPORT.model_dump(mode="json")
NUMBERS = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from([*REPORT_NAMES, "patient", "/data/scan 7.dcm"]), JSON, max_size=4),
    st.tuples(st.dictionaries(st.sampled_from(REPORT_NAMES), JSON, max_size=2)).map(lambda few: GOOD_NUMBERS | few[0]),
)
LEFT = st.dictionaries(
    st.sampled_from(["head.weight", "a", "../scan.dcm", "C:\\scan", "Jane Doe", ""]),
    st.sampled_from([np.zeros((2, 3), np.uint16), np.zeros(3, np.uint8), np.zeros((), np.float32)]),
    max_size=2,
)


@given(numbers=NUMBERS, arrays=LEFT)
@example(numbers=GOOD_NUMBERS, arrays={"head.weight": np.zeros((2, 3), np.uint16)})
@example(numbers=GOOD_NUMBERS, arrays={"../scan.dcm": np.zeros((2, 3), np.uint16)})
@example(numbers=GOOD_NUMBERS | {"skipped_steps": 2**62}, arrays={})
def test_whatever_lies_there_as_a_reply_only_what_the_policy_lists_or_a_code_leaves(
    tmp_path_factory: pytest.TempPathFactory, numbers: Any, arrays: dict[str, Any]
) -> None:
    """As if something at the site had made a reply past the gate of the worker."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "config.json").write_text('{"site": {"data": "pictures"}}')
    box = Mailbox(folder)
    box.ask(5, DOCUMENT, PACKED_WEIGHTS)
    text = json.dumps(numbers).encode()
    body = pack(arrays) if arrays else b""
    gap = bytes(-(80 + len(text)) % 64)
    head = (5).to_bytes(8, "little") + len(text).to_bytes(8, "little") + bytes(64)
    (folder / "work" / "reply.bin").write_bytes(head + text + (gap + body if body else b""))
    found = answered(without_weights(), folder)
    left = dict(found["report"])
    assert set(left) <= set(REPORT_NAMES)
    assert all(type(value) in (int, float) for value in left.values())
    if left["outcome"] == Outcome.DONE:
        assert left == numbers
        assert Report.model_validate(left)
        sent = unpack(found["update"]["packed"].data) if arrays else {}
        assert {name: array.tobytes() for name, array in sent.items()} == {n: a.tobytes() for n, a in arrays.items()}
        assert not set(sent) & {"../scan.dcm", "C:\\scan", "Jane Doe", ""}
        assert all(array.dtype != np.uint8 for array in sent.values())
    else:
        assert set(found) == {"report"}
        assert set(left) <= {"outcome", "round", "exchange"} or left["outcome"] == Outcome.WORKING
    last = read_lines(folder / "audit.jsonl")[-1]
    assert (last["verdict"], last["scalars"]) == ("released", left)


def test_a_reply_that_the_policy_does_not_allow_any_more_stays(make_site: MakeSite) -> None:
    folder = make_site(policy=SitePolicy(max_bytes_per_round=5))
    box = Mailbox(folder)
    box.ask(5, DOCUMENT, PACKED_WEIGHTS)
    box.reply(5, "key", Parcel({"a": np.zeros(3, np.uint16)}, REPORT.model_dump(mode="json")))
    refused = {"outcome": int(Outcome.GATE_REFUSED), "round": 1, "exchange": 5}
    assert numbers_alone(answered(without_weights(), folder)) == refused
    _, stopped, left = read_lines(folder / "audit.jsonl")
    assert "max-bytes-per-round allows 5" in stopped["verdict"]
    assert (stopped["bytes"], stopped["arrays"], left["scalars"]) == (0, {}, refused)


def test_a_reply_of_an_earlier_exchange_is_not_sent_for_a_newer_one(make_site: MakeSite) -> None:
    folder = make_site()
    Mailbox(folder).ask(4, DOCUMENT, b"")
    Mailbox(folder).reply(4, "key", Parcel({}, {"outcome": 0, "exchange": 4}))
    assert numbers_alone(answered(with_weights(), folder))["outcome"] == Outcome.WORKING


def test_where_what_happens_cannot_be_written_down_a_code_leaves_all_the_same(make_site: MakeSite) -> None:
    folder = make_site()
    (folder / "work").write_text("in the way")
    (folder / "events.jsonl").mkdir()
    assert numbers_alone(answered(with_weights(), folder))["outcome"] == Outcome.FAILED


def words_of(content: Any) -> str:
    return " ".join([*content, *(f"{name} {value}" for record in content.values() for name, value in record.items())])


def no_folder_for_work(folder: Path) -> None:
    (folder / "work").write_text("in the way")


def a_damaged_request(folder: Path) -> None:
    (folder / "work").mkdir()
    (folder / "work" / "request.bin").write_bytes(b"\x08\0\0\0\0\0\0\0")


def a_damaged_reply(folder: Path) -> None:
    (folder / "work").mkdir()
    (folder / "work" / "reply.bin").write_bytes(b"\x02\0\0\0\0\0\0\0{}")


def no_settings(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("spoil", [no_folder_for_work, a_damaged_request, a_damaged_reply, no_settings])
def test_of_a_failure_only_a_code_leaves(make_site: MakeSite, spoil: Callable[[Path], None]) -> None:
    folder = make_site()
    spoil(folder)
    found = answered(with_weights(), folder)
    assert numbers_alone(found) == {"outcome": int(Outcome.FAILED), "round": 1, "exchange": 5}
    assert str(folder) not in words_of(found)
    assert read_lines(folder / "audit.jsonl")[-1]["scalars"]["outcome"] == Outcome.FAILED
    assert str(LOG) in read_lines(folder / "events.jsonl")[-1]["reason"]
    assert "in carry" in (folder / LOG).read_text()


@pytest.mark.parametrize("content", [with_weights(), RecordDict({})], ids=["a plan", "no plan"])
def test_where_the_audit_log_cannot_be_written_no_path_leaves(make_site: MakeSite, content: RecordDict) -> None:
    folder = make_site()
    (folder / "audit.jsonl").mkdir()
    words = ""
    try:
        words = words_of(answered(content, folder))
    except RuntimeError as error:
        words = str(error)  # Flower sends type and text of what is raised
    assert str(folder) not in words


def test_carrying_messages_does_not_need_pytorch_which_takes_seconds_to_import(
    tmp_path: Path, ask: Callable[..., tuple[str, bytes]]
) -> None:
    document, packed = ask(exchange=6)
    (tmp_path / "plan.json").write_text(document)
    (tmp_path / "weights").write_bytes(packed)
    script = f"""
        import sys, time
        from pathlib import Path
        import numpy as np
        from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
        from maskdm.federated.flower_records import packed_record
        from maskdm.federated.parcel import Parcel
        from maskdm_client.flower.client_app import app
        from maskdm_client.folder.mailbox import Mailbox

        folder = Path({str(tmp_path)!r})

        def outcome(weights=None, **plan):
            content = RecordDict({{"plan": ConfigRecord({{"wait": 0.0, "document": "", **plan}})}})
            if weights:
                content["weights"] = packed_record(weights)
            context = Context(1, 2, {{"site": str(folder)}}, RecordDict({{}}), {{}})
            about = Metadata(1, "", 1, 2, "", "", time.time(), 3600.0, "train")
            reply = app(Message(content, metadata=about), context)
            return reply.content["report"]["outcome"]

        box = Mailbox(folder)
        found = [outcome(exchange="5"), outcome(exchange=5)]
        box.ask(5, "plan", b"")
        found.append(outcome(exchange=5))
        box.reply(5, "key", Parcel({{"a": np.zeros(3, np.uint16)}}, {{"outcome": 0}}))
        found.append(outcome(exchange=5))
        plan = (folder / "plan.json").read_text()
        found.append(outcome((folder / "weights").read_bytes(), exchange=6, document=plan))
        print(found, "torch" in sys.modules)
    """
    (tmp_path / "config.json").write_text(json.dumps({"site": {"data": "pictures"}}))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.stdout == "[5, 8, 7, 0, 7] False\n", ended.stderr


def test_in_flowers_simulation_a_virtual_site_does_the_work_when_it_is_asked(
    make_site: MakeSite, ask: Callable[..., tuple[str, bytes]], tmp_path: Path
) -> None:
    folder = tmp_path / "federation" / "sites" / "site-1" / "client"
    folder.parent.mkdir(parents=True)
    make_site(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)).rename(folder)  # none alike
    (folder / "slice.json").unlink()  # chosen at the first time
    document, packed = ask(local_images=8, exchange=6)
    content = RecordDict({"plan": question(exchange=6, document=document), "weights": weights(packed)})
    settings = json.loads((folder / "config.json").read_text())
    settings["site"]["fraction"] = 0.5
    (folder / "config.json").write_text(json.dumps(settings))
    found = answered(content, folder, federation=str(tmp_path / "federation"))
    assert found["report"]["outcome"] == Outcome.DONE
    assert found["report"]["exchange"] == 6
    assert set(found) == {"report", "update"}
    chosen = json.loads((folder / "slice.json").read_text())
    assert 0 < sum(len(side) for side in chosen.values()) < 40
    refused = answered(RecordDict({}), folder, federation=str(tmp_path / "federation"))
    assert numbers_alone(refused)["outcome"] == Outcome.PLAN_REFUSED
