"""The process that does a site's work: every request is answered once, whatever happens between."""

import errno
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from maskdm.federated import auditlog
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.policy import SitePolicy
from maskdm.run.processes import Child
from maskdm.run.runfolder import read_lines
from maskdm.run.tensorfile import pack
from maskdm_client.agent import worker
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.gate.approval import APPROVALS
from maskdm_client.refusals import Superseded
from maskdm_client.work.answer import answer
from maskdm_client.work.weights import PlanWithWeights

Ask = Callable[..., tuple[str, bytes]]
MakeSite = Callable[..., Path]


class Idle(Exception):
    """The worker found nothing to do, and nothing more will come."""


class Killed(BaseException):
    """What a crash is to the code that it ends."""


def work(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], None]) -> None:
    """Run the worker; each time it has nothing to do, the next step is taken, and after the last one it is ended."""
    left = iter(steps)

    def sleep(_: float) -> None:
        step = next(left, None)
        if step is None:
            raise Idle
        step()

    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=sleep))
    with pytest.raises(Idle):
        worker.work(folder)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exchanges of the requests that were worked on, rather than answered from what lay there."""
    begun: list[int] = []

    def counted(came: PlanWithWeights, folder: Path, box: Mailbox, exchange: int) -> Parcel:
        begun.append(exchange)
        return answer(came, folder, box, exchange)

    monkeypatch.setattr(worker, "answer", counted)
    return begun


def reply_to(exchange: int, folder: Path) -> Parcel:
    found = Mailbox(folder).wait(exchange, 0.0)
    assert found is not None
    return found


def bytes_of(parcel: Parcel) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in parcel.arrays.items()}


def test_requests_are_answered_one_after_another_and_each_once(
    make_site: MakeSite, ask: Ask, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    box, replies = Mailbox(folder), []

    def ask_next(number: int) -> Callable[[], None]:
        return lambda: box.ask(number, *ask(local_images=8, exchange=number, round=number))

    def look() -> None:
        replies.append(box.replied())

    work(folder, monkeypatch, look, ask_next(1), look, look, ask_next(2), look)
    assert answers == [1, 2]
    assert replies[0] is None
    assert [found[0] for found in replies[1:] if found] == [1, 1, 2]
    assert reply_to(2, folder).scalars["exchange"] == 2


def test_a_worker_that_starts_again_does_nothing_twice(
    make_site: MakeSite, ask: Ask, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=1))
    work(folder, monkeypatch)
    before = reply_to(1, folder)
    work(folder, monkeypatch)
    assert answers == [1]
    assert bytes_of(reply_to(1, folder)) == bytes_of(before)


def test_the_same_work_under_another_number_gets_the_same_reply_without_doing_it_again(
    make_site: MakeSite, ask: Ask, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    box = Mailbox(folder)
    box.ask(1, *ask(local_images=8, exchange=1))
    work(folder, monkeypatch)
    first = reply_to(1, folder)
    for number in (2, 3):  # also by a worker that started again, and of a reply that was relabelled before
        box.ask(number, *ask(local_images=8, exchange=number))
        work(folder, monkeypatch)
        again = reply_to(number, folder)
        assert bytes_of(again) == bytes_of(first)
        assert again.scalars == {**first.scalars, "exchange": number}
    assert answers == [1]


def test_other_work_is_done_even_where_only_the_weights_differ(
    make_site: MakeSite, ask: Ask, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    document, weights = ask(local_images=8, exchange=1)
    Mailbox(folder).ask(1, document, weights)
    work(folder, monkeypatch)
    other = bytearray(weights)
    other[-1] ^= 1  # the sign or a bit of the exponent of the last weight
    Mailbox(folder).ask(2, ask(local_images=8, exchange=2)[0], bytes(other))
    work(folder, monkeypatch)
    Mailbox(folder).ask(3, *ask(local_images=8, exchange=3, seed=1))
    work(folder, monkeypatch)
    assert answers == [1, 2, 3]


def test_what_is_no_plan_is_refused_under_its_own_number(
    make_site: MakeSite, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    for number, document in enumerate(("no plan", "no plan either"), start=1):
        Mailbox(folder).ask(number, document, b"")
        work(folder, monkeypatch)
        refused = {"outcome": int(Outcome.PLAN_REFUSED), "round": 1, "exchange": number}
        assert reply_to(number, folder) == Parcel({}, refused)
    assert answers[0] == 1


def test_what_is_no_plan_is_refused_as_such_also_after_a_failure(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    (folder.parent / "hospital-data.npz").unlink()
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=1))
    work(folder, monkeypatch)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DATA_UNUSABLE
    Mailbox(folder).ask(2, "no plan", b"")
    work(folder, monkeypatch)
    assert reply_to(2, folder).scalars["outcome"] == Outcome.PLAN_REFUSED


def test_work_that_failed_is_tried_again_when_it_is_asked_for_again(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    (folder.parent / "hospital-data.npz").rename(folder.parent / "away.npz")
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=1))
    work(folder, monkeypatch)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DATA_UNUSABLE
    (folder.parent / "away.npz").rename(folder.parent / "hospital-data.npz")  # a share that was away for a moment
    Mailbox(folder).ask(2, *ask(local_images=8, exchange=2))  # the server's next attempt at the round
    work(folder, monkeypatch)
    assert reply_to(2, folder).scalars["outcome"] == Outcome.DONE


def test_work_in_progress_is_dropped_for_a_newer_request_and_nothing_of_it_leaves(
    make_site: MakeSite, ask: Ask, answers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    box = Mailbox(folder)
    box.ask(1, *ask(exchange=1))
    asked = Mailbox.asked
    looks: list[None] = []

    def asked_meanwhile(self: Mailbox) -> int | None:
        looks.append(None)
        if len(looks) == 6:  # some steps into the first training
            self.ask(2, *ask(exchange=2, round=2))
        return asked(self)

    monkeypatch.setattr(Mailbox, "asked", asked_meanwhile)
    work(folder, monkeypatch)
    assert answers == [1, 2]
    assert reply_to(2, folder).scalars["outcome"] == Outcome.DONE
    assert Mailbox(folder).wait(1, 0.0) is None
    told = [line["event"] for line in read_lines(folder / "events.jsonl")]
    assert told.count("superseded") == told.count("round") == 1


def test_a_request_that_comes_while_another_is_answered_is_next(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look for a newer request was before it came: both are answered."""
    folder, begun = make_site(), []
    box = Mailbox(folder)
    box.ask(1, *ask(exchange=1))

    def answered(came: PlanWithWeights, folder: Path, box: Mailbox, exchange: int) -> None:
        begun.append(exchange)
        if exchange == 1:
            box.ask(2, *ask(exchange=2, round=2))
        box.reply(exchange, came.key, Parcel({}, {"outcome": 0, "round": exchange, "exchange": exchange}))

    monkeypatch.setattr(worker, "answer", answered)
    work(folder, monkeypatch)
    assert begun == [1, 2]
    assert reply_to(2, folder).scalars["exchange"] == 2


def test_a_plan_that_contradicts_its_message_about_the_exchange_does_not_keep_the_worker_busy_for_ever(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, begun = make_site(), []

    def counted(came: PlanWithWeights, folder: Path, box: Mailbox, exchange: int) -> Parcel:
        begun.append(exchange)
        if len(begun) > 1:
            raise Idle
        return answer(came, folder, box, exchange)

    monkeypatch.setattr(worker, "answer", counted)
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=2))
    work(folder, monkeypatch)
    assert begun == [1]
    assert reply_to(1, folder).scalars["exchange"] == 1


def test_a_worker_that_dies_in_the_middle_goes_on_where_it_was_saved(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    monkeypatch.setattr("maskdm_client.folder.unfinished.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("maskdm_client.folder.unfinished.SAVE_SHARE", 0)
    monkeypatch.setattr("maskdm_client.work.fine_tuning.REPORT_SECONDS", 0.0)
    box = Mailbox(folder)
    box.ask(1, *ask(exchange=1))
    progressed = Mailbox.progressed

    def killed(self: Mailbox, exchange: int, round_number: int, images: int) -> None:
        progressed(self, exchange, round_number, images)
        if images == 96:
            raise Killed

    monkeypatch.setattr(Mailbox, "progressed", killed)
    with pytest.raises(Killed):
        worker.work(folder)
    monkeypatch.setattr(Mailbox, "progressed", progressed)
    assert box.replied() is None
    assert box.progress(1) == (1, 96)
    work(folder, monkeypatch)
    resumed = reply_to(1, folder)
    measured = [line for line in read_lines(folder / "events.jsonl") if line["event"] == "measured"]
    assert [line["images"] for line in measured] == [0, 88]
    assert resumed.scalars["images_seen"] == 160

    (folder / "work" / "reply.bin").unlink()
    work(folder, monkeypatch)  # all of it anew, in one go
    assert bytes_of(reply_to(1, folder)) == bytes_of(resumed)


@pytest.fixture
def saves_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskdm_client.folder.unfinished.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("maskdm_client.folder.unfinished.SAVE_SHARE", 0)
    monkeypatch.setattr("maskdm_client.work.fine_tuning.REPORT_SECONDS", 0.0)


def fail_to_reply(monkeypatch: pytest.MonkeyPatch, times: int, error: BaseException) -> None:
    """Leaving a reply fails so often."""
    reply, failed = Mailbox.reply, list[int]()

    def fails(self: Mailbox, exchange: int, key: str, parcel: Parcel) -> None:
        if len(failed) < times:
            failed.append(exchange)
            raise error
        reply(self, exchange, key, parcel)

    monkeypatch.setattr(Mailbox, "reply", fails)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


@pytest.mark.usefixtures("saves_each_step")
def test_a_worker_that_dies_between_training_and_reply_does_not_train_again(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    Mailbox(folder).ask(1, *ask(exchange=1))
    fail_to_reply(monkeypatch, 1, Killed())
    with pytest.raises(Killed):
        worker.work(folder)
    assert not events(folder, "round")
    work(folder, monkeypatch)
    assert [event["images"] for event in events(folder, "measured")] == [0, 160]
    assert len(events(folder, "round")) == 1
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DONE
    assert not list((folder / "work").glob("training*"))


@pytest.mark.usefixtures("saves_each_step")
def test_a_reply_that_finds_no_room_is_tried_again_and_that_is_said_once(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    Mailbox(folder).ask(1, *ask(exchange=1))
    fail_to_reply(monkeypatch, 3, OSError(errno.ENOSPC, "No space left", "reply.bin"))
    work(folder, monkeypatch, *[lambda: None] * 3)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DONE
    assert [event["reason"] for event in events(folder, "waiting")] == ["No space left: reply.bin"]
    assert [event["images"] for event in events(folder, "measured")] == [0, 160, 160, 160]


def test_a_decision_that_finds_no_room_in_the_audit_log_is_taken_again_until_there_is(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site(policy=SitePolicy(max_norm=1e-9))
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=1))
    replied: list[object] = []

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left", "audit.jsonl")

    def look() -> None:
        replied.append(Mailbox(folder).replied())

    with monkeypatch.context() as patch:
        patch.setattr(auditlog, "append", full)
        work(folder, monkeypatch, look, look, patch.undo)
    assert replied == [None, None]
    assert reply_to(1, folder).scalars["outcome"] == Outcome.GATE_REFUSED
    assert ["max-norm" in line["verdict"] for line in read_lines(folder / "audit.jsonl")] == [True]


def kill(monkeypatch: pytest.MonkeyPatch, folder: Path, times: int) -> None:
    """So many workers die over what they are asked."""

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(worker, "answer", dies)
        for _ in range(times):
            with pytest.raises(Killed):
                worker.work(folder)


def test_work_that_ends_the_process_twice_is_given_up_and_the_next_one_is_done(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    box = Mailbox(folder)
    box.ask(1, *ask(local_images=8, exchange=1))
    kill(monkeypatch, folder, 2)
    work(folder, monkeypatch)
    assert reply_to(1, folder) == Parcel({}, {"outcome": int(Outcome.FAILED), "round": 1, "exchange": 1})
    assert "ended 2 times over this work" in events(folder, "failed")[0]["reason"]
    box.ask(2, *ask(local_images=8, exchange=2, round=2))
    kill(monkeypatch, folder, 1)
    work(folder, monkeypatch)
    assert reply_to(2, folder).scalars["outcome"] == Outcome.DONE


def test_starts_before_a_save_do_not_count(make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_site()
    Mailbox(folder).ask(1, *ask(local_images=8, exchange=1))
    for _ in range(3):
        kill(monkeypatch, folder, 2)
        about = folder / "work" / "training.json"
        about.write_text("{}")
        os.utime(about, ns=(0, time.time_ns()))
    work(folder, monkeypatch)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DONE


def test_a_part_whose_rest_is_not_there_is_followed_by_the_whole_under_the_same_number(
    make_site: MakeSite, ask: Ask, weights: dict[str, Tensor], make_plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site()
    box, plan = Mailbox(folder), make_plan(train="norm-bias", local_images=8, exchange=1)
    box.ask(1, plan.model_dump_json(), pack({name: weights[name].numpy() for name in plan.changed()}))
    work(folder, monkeypatch)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.UNKNOWN
    box.ask(1, *ask(train="norm-bias", local_images=8, exchange=1))
    assert box.wait(1, 0.0) is None
    work(folder, monkeypatch)
    assert reply_to(1, folder).scalars["outcome"] == Outcome.DONE


@pytest.mark.parametrize(
    ("key", "value", "outcome"),
    [
        ("max_bytes_per_round", 1000, Outcome.TOO_LARGE),
        ("require_dp", True, Outcome.POLICY),
        ("approve_first_round", True, Outcome.NOT_APPROVED),
    ],
)
def test_a_reply_that_the_site_would_not_let_out_any_more_is_not_sent_again(
    make_site: MakeSite, ask: Ask, monkeypatch: pytest.MonkeyPatch, key: str, value: int, outcome: Outcome
) -> None:
    folder = make_site()
    box = Mailbox(folder)
    box.ask(1, *ask(local_images=8, exchange=1))
    work(folder, monkeypatch)
    config = json.loads((folder / "config.json").read_text())
    config["site"]["policy"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    decided = json.loads((folder / APPROVALS).read_text()) if outcome == Outcome.NOT_APPROVED else {}
    (folder / APPROVALS).write_text(json.dumps({name: one | {"approved": False} for name, one in decided.items()}))
    box.ask(2, *ask(local_images=8, exchange=2))
    work(folder, monkeypatch)
    found = reply_to(2, folder)
    assert (found.arrays, found.scalars["outcome"]) == ({}, outcome)


def test_the_process_answers_and_after_it_was_killed_knows_what_it_answered(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    box = Mailbox(folder)
    command = [sys.executable, "-m", "maskdm_client.agent.worker", str(folder)]
    box.ask(1, *ask(local_images=8, exchange=1))
    with Child(command, log=folder / "logs" / "worker.log"):
        first = box.wait(1, 120)
    assert first is not None
    box.ask(2, *ask(local_images=8, exchange=2))
    with Child(command, log=folder / "logs" / "worker.log") as process:
        again = box.wait(2, 120)
        assert process.exit_code() is None
    assert again is not None
    assert bytes_of(again) == bytes_of(first)
    assert again.scalars == {**first.scalars, "exchange": 2}
    told = [line["event"] for line in read_lines(folder / "events.jsonl")]
    assert told.count("round") == 1


def test_superseded_work_is_no_failure(make_site: MakeSite, ask: Ask) -> None:
    folder = make_site()
    box = Mailbox(folder)
    box.ask(2, *ask(exchange=2, round=2))
    with pytest.raises(Superseded):
        answer(PlanWithWeights(*ask(exchange=1)), folder, box, 1)
    assert [line["event"] for line in read_lines(folder / "events.jsonl")] == [
        "agreed",
        "data",
        "measured",
        "superseded",
    ]
    assert box.replied() is None
