"""Folder → what is known: real rounds with sites that fail, in every state, and files that are not whole."""

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Stage, TrainingConfig
from maskdm.errors import FederationError
from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.run.runfolder import append_line, owned, write_json
from maskdm.training.pretrain import Run
from maskdm_server.report.gather import Federation, FederationFolder, grids, look_at_run
from maskdm_server.report.sites import Participation, SiteHistory, Sites

from ..conftest import InProcess, config, federate, learner, parcel, silent


def poisoned(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
    """Fails in the second round."""
    value = float("nan") if plan.round == 2 and plan.action == "train" else 0.2
    return parcel(plan, {name: torch.full(shape, value) for name, shape in plan.shapes().items()})


def configured(folder: Path, **changes: int) -> Path:
    """FED with the config.json that serve would have written."""
    document = {"kind": "federation", "federation": config(folder, **changes).model_dump(mode="json")}
    write_json(folder / "config.json", document | {"simulation": {}})
    return folder


def look(folder: Path) -> Federation:
    found = FederationFolder(folder).look()
    assert found is not None
    return found


def parts(site: SiteHistory, rounds: int) -> list[Participation]:
    return [site.part(number) for number in range(1, rounds + 1)]


@pytest.fixture
def finished(folder: Path) -> Path:
    """Three rounds: one site is always good, one sends NaN in the second round, one never answers."""
    federate(InProcess({1: learner(0.1), 2: poisoned, 3: silent}), configured(folder))
    return folder


def test_a_finished_federation_is_known_in_full(finished: Path) -> None:
    found = look(finished)
    assert (found.state, found.done(), found.planned()) == ("finished", 3, 3)
    assert [line.clients for line in found.rounds] == [2, 1, 2]
    assert found.losses() == (0.5, 0.5)
    sites = found.sites.by_name
    assert parts(sites["1"], 3) == [Participation.ACCEPTED] * 3
    assert parts(sites["2"], 3) == [Participation.ACCEPTED, Participation.REJECTED, Participation.ACCEPTED]
    assert parts(sites["3"], 3)[0] == Participation.SILENT
    assert (sites["1"].images, sites["2"].images) == (3 * 64, 2 * 64)
    assert sites["1"].times(Participation.ACCEPTED) == sites["1"].asked() == 3
    assert found.audit is not None
    assert found.audit.problem == ""
    assert found.audit.lines == sum(found.sites.verdicts.values())
    assert found.happened.counted["rejected"] == sum(line.rejected for line in found.rounds) == 1
    assert found.happened.counted["silent"] >= sum(line.silent for line in found.rounds) >= 1
    assert len(found.model_sha256) == 64
    assert found.model is not None
    assert found.model.rounds == 3
    assert not found.unreadable


def test_looking_again_reads_on_and_comes_to_the_same(folder: Path) -> None:
    live = FederationFolder(configured(folder))
    before = live.look(thorough=False)
    assert before is not None
    assert (before.state, before.done(), before.audit) == ("interrupted", 0, None)
    federate(InProcess({1: learner(0.1), 2: learner(0.1)}), folder)
    seen, fresh = live.look(), look(folder)
    assert seen is not None
    assert seen.sites.by_name == fresh.sites.by_name
    assert vars(seen.happened) == vars(fresh.happened)


def test_a_federation_that_failed_says_why(folder: Path) -> None:
    def never(plan: RoundPlan, weights: dict[str, Tensor]) -> None:
        return None

    with suppress(FederationError):
        federate(InProcess({1: never, 2: never}), configured(folder))
    append_line(folder / "events.jsonl", {"time": 5.0, "event": "failed", "reason": "round 1: fewer than 1 usable"})
    assert (look(folder).state, look(folder).happened.failure) == ("failed", "round 1: fewer than 1 usable")


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "starting"),
        ([{"event": "waiting", "clients": 1, "needed": 2}], "waiting"),
        ([{"event": "sent", "round": 1, "rounds": 3, "clients": 2, "action": "train"}], "running"),
        ([{"event": "failed", "reason": "gone"}], "starting"),  # and somebody has started it again
    ],
)
def test_while_a_process_holds_the_folder_the_state_follows_the_events(
    folder: Path, events: list[dict[str, object]], state: str
) -> None:
    configured(folder)
    start = {"event": "start", "round": 0, "bytes_down": 1, "bytes_down_later": 1, "bytes_up": 1}
    for event in [start, *events] if events else []:
        append_line(folder / "events.jsonl", {"time": 1.0, **event})
    with owned(folder):
        assert look(folder).state == state
    assert look(folder).state in ("interrupted", "failed")


def test_a_log_that_was_tampered_with_is_called_broken(finished: Path) -> None:
    path = finished / "audit.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join([*lines[:3], lines[3].replace('"accepted"', '"rejected"').replace('"sent', '"SENT'), *lines[4:]])
    )
    found = look(finished)
    assert found.audit is not None
    assert "line 4" in found.audit.problem


def test_damaged_lines_and_documents_are_counted_and_passed_over(finished: Path) -> None:
    for name in ("events.jsonl", "rounds.jsonl", "audit.jsonl"):
        with (finished / name).open("a") as file:
            file.write('{"event": "rejected"}\nnot json\n[]\n{"event": "late", "time": "x"}\n')
    (finished / "result.json").write_text("{}")
    (finished / "model.safetensors").write_bytes(b"none")
    found = look(finished)
    assert found.unreadable == {"events.jsonl": 4, "rounds.jsonl": 4, "audit.jsonl": 4}
    assert (found.done(), found.model, found.result) == (3, None, None)
    assert FederationFolder(finished / "rounds").look() is None


def test_what_a_site_did_in_the_last_attempt_at_a_round_counts(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    good = Message(10, {"images_seen": 64, "loss_before": 0.5, "loss_after": 0.4}, {}, "")
    for direction, verdict, message in (
        ("out", "sent: train", Message(100, {}, {}, "")),
        ("in", "working", Message(1, {}, {}, "")),
        ("in", "accepted", good),
        ("out", "sent: train", Message(100, {}, {}, "")),
        ("in", "accepted", good),
        ("in", "rejected: too long", auditlog.NOTHING),
        ("out", "sent: finish", Message(100, {}, {}, "")),
        ("in", "accepted", good),
    ):
        auditlog.record(path, direction, "a", 4, verdict, message)
    sites = Sites()
    for line in path.read_bytes().splitlines():
        sites.take(line)
    site = sites.by_name["a"]
    assert parts(site, 5) == [
        Participation.NONE,
        Participation.NONE,
        Participation.NONE,
        Participation.REJECTED,
        Participation.NONE,
    ]
    assert (site.images, site.bytes_up, site.asked()) == (0, 31, 1)
    assert sites.verdicts["in", "accepted"] == 3
    assert sites.verdicts["out", "sent: train"] == 2


def test_the_same_fault_again_and_again_is_one_line(folder: Path) -> None:
    for second in range(5):
        event = {"time": float(second), "event": "disk full", "round": 2, "seconds": 600}
        append_line(configured(folder) / "events.jsonl", event)
    happened = look(folder).happened
    (fault,) = happened.faults
    assert (fault.times, fault.first, fault.last) == (5, 0.0, 4.0)
    assert happened.counted == {"disk full": 5}


def test_of_many_grids_evenly_chosen_ones_and_the_last_are_shown(tmp_path: Path) -> None:
    for number in range(1, 101):
        (tmp_path / f"round-{number:06d}.png").touch()
    for name in ("before.png", "round-last.png", "round-.png"):
        (tmp_path / name).touch()
    numbers = [number for number, _ in grids(tmp_path, "round-")]
    assert numbers[-1] == 100
    assert len(numbers) <= 12
    assert len({second - first for first, second in pairwise(numbers)}) == 1


def test_a_pre_training_run_in_progress_and_after(tmp_path: Path, tiny: ModelConfig) -> None:
    training = TrainingConfig(images=100, batch_size=32)
    stage = Stage(mask=MaskConfig(kind="patch", ratio=0.5), training=training)
    run = Run(tiny, DiffusionConfig(), (stage, stage))
    write_json(tmp_path / "config.json", {"kind": "pretrain", **run.describe()})
    for images in (32, 64):
        line = {
            "images": images,
            "loss": None if images == 32 else 0.5,
            "lr": 1e-3,
            "images_per_s": 9.0,
            "data_wait": 0.1,
        }
        append_line(tmp_path / "metrics.jsonl", {**line, "skipped": 0})
    with owned(tmp_path):
        found = look_at_run(tmp_path)
    assert found is not None
    assert (found.state, found.seen(), found.begins()) == ("running", 64, [0, 128, 256])
    assert found.begins() == run.begins()
    stopped = look_at_run(tmp_path)
    assert stopped is not None
    assert stopped.state == "interrupted"
    assert look_at_run(tmp_path / "missing") is None


NewFolder = Callable[[str], Path]


def test_a_federation_stopped_by_patience_is_called_so(new_folder: NewFolder) -> None:
    folder = configured(new_folder("fed"), patience=1)
    federate(InProcess({1: learner(0.1), 2: learner(0.1)}), folder, patience=1)
    assert json.loads((folder / "result.json").read_text())["stopped_by_patience"] == 1
    assert look(folder).state == "stopped by patience"
