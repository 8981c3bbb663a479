"""The first update of a federation waits for a person, where the site's policy says so."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskdm.commands import command_line as cli
from maskdm.errors import TrainingDiverged, UsageError
from maskdm.federated.auditlog import verify
from maskdm.federated.parcel import Outcome
from maskdm.federated.plan import RoundPlan
from maskdm.federated.policy import SitePolicy
from maskdm.federated.terms import Terms, terms_of
from maskdm.run.runfolder import read_lines
from maskdm_client.commands.app import app
from maskdm_client.folder.events import known
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.gate import approval
from maskdm_client.gate.approval import check_not_denied, decision, wait_for_decision
from maskdm_client.refusals import NotApproved, Superseded
from maskdm_client.work import answer as site
from maskdm_client.work.answer import answer
from maskdm_client.work.fine_tuning import fine_tune
from maskdm_client.work.weights import PlanWithWeights

Ask = Callable[..., tuple[str, bytes]]
FEDERATION, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def held(make_site: Callable[..., Path]) -> Path:
    """The folder of a site whose policy wants an approval."""
    return make_site(policy=SitePolicy(approve_first_round=True))


def decide(folder: Path, *options: str) -> int:
    return cli.run(app, "maskdm-client", ["approve", "--out", str(folder), *options])


def while_waiting(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Each time the site looks for a decision and finds none, the next step is taken."""
    left = iter(steps)
    monkeypatch.setattr(approval, "time", SimpleNamespace(sleep=lambda _: next(left)()))


@pytest.fixture
def terms(make_plan: Callable[..., RoundPlan]) -> Terms:
    """Those of the plans below."""
    return terms_of(make_plan(local_images=8))


def outcome(folder: Path, asked: tuple[str, bytes], exchange: int) -> Outcome:
    box = Mailbox(folder)
    box.ask(exchange, *asked)
    return Outcome(int(answer(PlanWithWeights(*asked), folder, box, exchange).scalars["outcome"]))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


def verdicts(folder: Path) -> list[str]:
    return [line["verdict"] for line in read_lines(folder / "audit.jsonl")]


def test_an_update_waits_until_it_is_approved_and_those_after_it_do_not(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    box, seen = Mailbox(held), list[object]()

    def look() -> None:
        seen.append(box.replied())

    while_waiting(monkeypatch, look, look, lambda: decide(held))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert seen == [None, None], "nothing is left for the way out before"
    shown = capsys.readouterr().out
    for part in (
        FEDERATION,
        "1 of 2",
        "arrays",
        "bf16",
        "32 images",
        "loss_before",
        f"approved: federation {FEDERATION}",
    ):
        assert part in shown
    assert verdicts(held) == ["held until somebody here approves it", "approved by a person here"]
    assert not verify(held / "audit.jsonl").problem
    assert outcome(held, ask(local_images=8, exchange=2, round=2), 2) == Outcome.DONE


def test_what_would_leave_is_described_without_anything_of_the_images(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_waiting(monkeypatch, lambda: decide(held))
    box = Mailbox(held)
    box.ask(1, *ask(local_images=8, exchange=1))
    left = answer(PlanWithWeights(*ask(local_images=8, exchange=1)), held, box, 1)
    summary = json.loads((held / "work" / "approval.json").read_text())
    assert (summary["terms"]["federation"], summary["round"], summary["rounds"]) == (FEDERATION, 1, 2)
    assert (summary["bytes"], summary["arrays"]) == (left.size(), len(left.arrays))
    assert summary["numbers"] == left.scalars
    assert 0 < summary["norm"] < summary["norm_of_model"]
    (line,) = [line for line in read_lines(held / "audit.jsonl") if "held" in line["verdict"]]
    assert (line["sha256"], line["bytes"], line["scalars"]) == (summary["sha256"], left.size(), left.scalars)
    assert str(held.parent) not in json.dumps(summary)


def test_the_user_is_told_what_to_do(held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    while_waiting(monkeypatch, lambda: decide(held))
    outcome(held, ask(local_images=8, exchange=1), 1)
    (event,) = known(events(held, "held"))
    wanted = f"the first update waits for your approval: maskdm-client approve --out {held} (or --deny)"
    assert wanted in event.words()


def test_what_is_denied_stays_as_do_later_rounds_until_somebody_approves(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_waiting(monkeypatch, lambda: decide(held, "--deny"))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.NOT_APPROVED
    assert len(events(held, "training")) == 1
    for number, action in ((2, "train"), (3, "measure"), (4, "finish")):
        asked = ask(local_images=8, exchange=number, round=2, action=action)
        assert outcome(held, asked, number) == Outcome.NOT_APPROVED
    assert len(events(held, "training")) == 1, "what may not leave is not computed either"
    assert "denied by a person here" in verdicts(held)
    assert (held / "model.safetensors").exists(), "what came in may stay"
    assert decide(held) == 0
    assert outcome(held, ask(local_images=8, exchange=5, round=2), 5) == Outcome.DONE


def test_a_decision_counts_for_its_federation_alone(
    held: Path, ask: Ask, terms: Terms, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_waiting(monkeypatch, lambda: decide(held), lambda: decide(held, "--deny"))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert outcome(held, ask(local_images=8, exchange=2, federation=OTHER), 2) == Outcome.NOT_APPROVED
    others = terms.model_copy(update={"federation": OTHER})
    assert (decision(held, terms), decision(held, others)) == (True, False)


def test_who_waits_makes_way_for_what_is_asked_next(held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    box, newer = Mailbox(held), ask(local_images=8, exchange=2, round=2)
    while_waiting(monkeypatch, lambda: None, lambda: box.ask(2, *newer), lambda: None, lambda: decide(held))
    first = ask(local_images=8, exchange=1)
    box.ask(1, *first)
    with pytest.raises(Superseded):
        answer(PlanWithWeights(*first), held, box, 1)
    assert box.replied() is None
    assert answer(PlanWithWeights(*newer), held, box, 2).scalars["outcome"] == Outcome.DONE
    assert json.loads((held / "work" / "approval.json").read_text())["round"] == 2


def test_how_long_somebody_thinks_about_it_does_not_look_like_crashes_of_the_work(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = held / "work" / "starts.json"
    starts.parent.mkdir()
    starts.write_text("{}")
    seen: list[bool] = []
    while_waiting(monkeypatch, lambda: seen.append(starts.exists()), lambda: decide(held))
    outcome(held, ask(local_images=8, exchange=1), 1)
    assert seen == [False]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"%s": true}', '{"%s": {"approved": "yes"}}', '{"%s": {"approved": 1}}']
)
def test_what_cannot_be_read_approves_nothing(tmp_path: Path, terms: Terms, content: str) -> None:
    (tmp_path / "approvals.json").write_text(content.replace("%s", FEDERATION))
    assert decision(tmp_path, terms) is None
    check_not_denied(tmp_path, terms)
    assert not wait_for_decision(tmp_path, terms, lambda: True)


def test_a_denial_ends_the_wait(tmp_path: Path, terms: Terms) -> None:
    decided = {"approved": False, "terms": terms.model_dump(mode="json")}
    (tmp_path / "approvals.json").write_text(json.dumps({FEDERATION: decided}))
    with pytest.raises(NotApproved, match="maskdm-client approve lets them leave"):
        wait_for_decision(tmp_path, terms, lambda: False)


@pytest.mark.parametrize("left", [None, "", "{}", '{"federation": 3}'])
def test_where_nothing_waits_there_is_nothing_to_decide(
    tmp_path: Path, left: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if left is not None:
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "approval.json").write_text(left)
    assert decide(tmp_path) == 2
    said = capsys.readouterr().err
    assert ("nothing waits for approval" if left is None else "cannot be read") in said
    assert said.count(os.linesep) == 1
    assert not (tmp_path / "approvals.json").exists()


def test_decisions_that_cannot_be_read_are_not_overwritten(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    while_waiting(monkeypatch, lambda: decide(held))
    outcome(held, ask(local_images=8, exchange=1), 1)
    (held / "approvals.json").write_text("{")
    assert decide(held) == UsageError.exit_code
    assert "is damaged" in capsys.readouterr().err
    assert (held / "approvals.json").read_text() == "{"


def test_without_the_policy_nothing_waits(make_site: Callable[..., Path], ask: Ask) -> None:
    folder = make_site()
    assert outcome(folder, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert not (folder / "work" / "approval.json").exists()


def test_a_measurement_is_not_begun_before_somebody_approved(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    while_waiting(monkeypatch, lambda: seen.append(len(events(held, "measured"))), lambda: decide(held))
    assert outcome(held, ask(local_images=8, exchange=1, action="measure"), 1) == Outcome.DONE
    assert seen == [0]
    assert "fingerprint of these terms" in capsys.readouterr().out
    assert not (held / "updates.json").exists()
    assert len(json.loads((held / "measurements.json").read_text())) == 1


def test_how_the_work_on_images_failed_waits_for_approval_too(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Mailbox(held)

    def diverges(*_: object) -> None:
        raise TrainingDiverged("a crafted model met a bright image")

    seen = list[object]()
    monkeypatch.setattr(site, "fine_tune", diverges)
    while_waiting(monkeypatch, lambda: seen.append(box.replied()), lambda: decide(held))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DIVERGED
    assert seen == [None]


def test_before_approval_the_coordinator_is_not_told_how_far_the_work_is(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = Mailbox(held)
    while_waiting(monkeypatch, lambda: decide(held))
    asked = ask(local_images=8, exchange=1)
    monkeypatch.setattr(Mailbox, "progressed", lambda *_: pytest.fail("progress was told"))
    box.ask(1, *asked)
    answer(PlanWithWeights(*asked), held, box, 1)


def test_terms_that_change_after_an_approval_wait_again_and_the_change_is_shown(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    while_waiting(monkeypatch, lambda: decide(held), lambda: decide(held, "--deny"))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert outcome(held, ask(local_images=16, exchange=2, round=2), 2) == Outcome.DONE, "more images are no change"
    capsys.readouterr()
    assert outcome(held, ask(local_images=8, exchange=3, round=3, encoding="fp32"), 3) == Outcome.NOT_APPROVED
    assert "CHANGED     encoding was bf16, is fp32" in capsys.readouterr().out


def test_the_first_terms_are_taken_where_nobody_is_to_be_asked_and_others_are_refused_until_somebody_approves(
    make_site: Callable[..., Path], ask: Ask, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_site()
    assert outcome(folder, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    (agreed,) = known(events(folder, "agreed"))
    assert "as the first terms that came" in agreed.words()
    changed = ask(local_images=8, exchange=2, round=2, train="norm-bias")
    assert outcome(folder, changed, 2) == Outcome.NOT_APPROVED
    assert "train was all, is norm-bias" in events(folder, "failed")[0]["reason"]
    assert decide(folder) == 0
    assert "CHANGED     train was all, is norm-bias" in capsys.readouterr().out
    assert outcome(folder, changed, 2) == Outcome.DONE


def test_terms_whose_fingerprint_the_owner_knows_need_no_person_and_others_do(
    make_site: Callable[..., Path], ask: Ask, terms: Terms, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_site(policy=SitePolicy(approve_first_round=True), approve=terms.fingerprint())
    assert outcome(folder, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert json.loads((folder / "approvals.json").read_text())[FEDERATION]["how"] == "by its fingerprint"
    while_waiting(monkeypatch, lambda: decide(folder, "--deny"))
    assert outcome(folder, ask(local_images=8, exchange=2, federation=OTHER), 2) == Outcome.NOT_APPROVED


def test_who_never_approved_is_not_waited_for_when_the_federation_ends(held: Path, ask: Ask) -> None:
    assert outcome(held, ask(local_images=8, exchange=1, action="finish"), 1) == Outcome.NOT_APPROVED
    assert (held / "model.safetensors").exists()
    assert "nobody here approved this federation" in events(held, "finished")[0]["reason"]


@pytest.mark.parametrize("content", ["{", '{"%s": {"approved": false, "terms": {"more": 1}}}'])
def test_a_denial_that_cannot_be_read_is_no_agreement(make_site: Callable[..., Path], ask: Ask, content: str) -> None:
    folder = make_site()
    (folder / "approvals.json").write_text(content.replace("%s", FEDERATION))
    assert outcome(folder, ask(local_images=8, exchange=1), 1) == Outcome.NOT_APPROVED
    assert "is damaged" in events(folder, "failed")[0]["reason"]
    assert (folder / "approvals.json").read_text() == content.replace("%s", FEDERATION)


def test_a_person_can_decide_while_the_first_training_goes_on(
    held: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:

    def meanwhile(*given: Any) -> Any:
        assert decide(held) == 0
        return fine_tune(*given)

    monkeypatch.setattr(site, "fine_tune", meanwhile)
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert not events(held, "held")
    assert len(json.loads((held / "updates.json").read_text())) == 1
    asked = next(known(events(held, "asks")))
    assert "wait for your approval, nothing leaves before" in asked.words()


def test_only_the_terms_that_are_meant_are_approved(
    held: Path, ask: Ask, terms: Terms, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "-".join(["0000"] * 8)
    while_waiting(monkeypatch, lambda: decide(held, other), lambda: decide(held, terms.fingerprint()))
    assert outcome(held, ask(local_images=8, exchange=1), 1) == Outcome.DONE
    assert f"{other}: the terms that wait have the fingerprint {terms.fingerprint()}" in capsys.readouterr().err
