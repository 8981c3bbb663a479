"""Every event is a class: what its line holds and says, lines of older and newer versions, and no other way left."""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from maskdm.run.events import EVENTS, Event, append_event, parsed
from maskdm.run.runfolder import append_line, read_lines
from maskdm_client.folder import events as of_site
from maskdm_server.federation import events as of_federation

ROOT = Path(__file__).parents[1]
PRODUCT = [path for house in ("common", "server", "client") for path in sorted((ROOT / house).rglob("*.py"))]

LINE: dict[str, Any] = {
    **{"clients": 2, "examples": 20, "images_seen": 64, "loss_before": None, "loss_after": 0.25, "bytes_down": 9},
    **{"bytes_up": 2_500_000, "seconds": 1.5, "rejected": 0, "silent": 0, "late": 0, "attempts": 1},
    "updates": {"a": {"norm_ratio": 1.0, "cosine": None}},
}
RESULT: dict[str, Any] = {
    **{"rounds": 3, "model_of_round": 3, "stopped_by_patience": 0, "clients": 2, "loss_prior": 0.5, "loss_final": None},
    **{"quality_prior": None, "quality_final": None, "bytes_down": 1, "bytes_up": 1},
}
QUALITY: dict[str, Any] = {
    **{"round": 0, "images": 20, "features": "f", "sampler": "dpmpp", "steps": None, "sites": 1, "quality_images": 10},
    **{"quality": {"coverage": 0.25, "kernel": 0.5}, "by_site": {"a": {"quality_images": 10, "kernel": 0.5}}},
    **{"bytes_down": 1, "bytes_up": 1},
}
REPORT: dict[str, Any] = {
    **{"outcome": 0, "round": 1, "exchange": 7, "examples": 10, "images_seen": 64, "loss_before": 0.5},
    **{"loss_after": 0.25, "seconds": 3.0, "skipped_steps": 0},
}
REASON = {"round": 1, "site": "a", "reason": "too long"}
APPROVAL = {"round": 1, "fingerprint": "f", "folder": "site"}

# Lines as every version writes them, and what is said of them.
FEDERATION: list[tuple[dict[str, Any], str]] = [
    (
        {"event": "start", "round": 2, "bytes_down": 2_000_000, "bytes_down_later": 1_000_000, "bytes_up": 500_000},
        "each round sends 2.0 MB to a client at first, then 1.0 MB to a client and gets 0.5 MB back; 2 rounds done "
        "before",
    ),
    ({"event": "waiting", "clients": 1, "needed": 2}, "1 of 2 clients are there; waiting"),
    (
        {"event": "sent", "round": 1, "rounds": 3, "exchange": 7, "clients": 2, "action": "train"},
        "round 1/3: 2 clients at work",
    ),
    (
        {"event": "sent", "round": 1, "rounds": 3, "exchange": 7, "clients": 2, "action": "evaluate"},
        "2 clients evaluate a model",
    ),
    ({"event": "sent", "round": 1, "rounds": 3, "exchange": 7, "clients": 2, "action": "finish"}, ""),
    ({"event": "rejected", **REASON}, "round 1: the reply of site a was rejected: too long"),
    ({"event": "silent", **REASON}, "round 1: site a is not waited for any more: too long"),
    (
        {"event": "late", "round": 1, "site": "a"},
        "round 1: a reply of site a to an earlier question was dropped",
    ),
    (
        {"event": "working", "round": 1, "site": "a", "images": 1000, "all": 3000},
        "round 1: site a is at 1,000 images, all at 3,000",
    ),
    (
        {"event": "rests", "round": 1, "site": "a", "until": 4},
        "site a failed again and again; it is left alone until round 4",
    ),
    (
        {"event": "against", "round": 1, "site": "a", "norm_ratio": 2.5, "cosine": -1.0},
        "round 1: the update of site a points against those of the others (cosine -1.00, 2.5 times the usual length) "
        "and was let in",
    ),
    (
        {"event": "retry", "round": 1, "attempt": 1, "accepted": 1, "needed": 2},
        "round 1: 1 usable updates, 2 needed; trying again",
    ),
    (
        {"event": "round", "rounds": 3, "round": 1, **LINE},
        "round 1/3: held-out loss untold → 0.2500 at 2 clients, 64 images, 2 s, 2.5 MB up",
    ),
    (
        {"event": "quality", **QUALITY},
        "the prior: kernel distance 0.5, coverage 0.25 between 20 drawn images and 10 held out at 1 sites",
    ),
    ({"event": "disk full", "round": 1, "seconds": 600.0}, "round 1: the disk is full; make room within 10 minutes"),
    ({"event": "crashed", "reason": "bug"}, "the process that runs the rounds failed: bug"),
    ({"event": "failed", "reason": "gone"}, ""),  # whoever follows raises it
    ({"event": "finished", **RESULT}, "held-out loss: prior 0.5000 → final untold"),
    (
        {"event": "finished", **RESULT, "clients": 0},
        "WARNING: no client was there at the end: the final model was not measured, and none of them has it",
    ),
]
SITE: list[tuple[dict[str, Any], str]] = [
    (
        {"event": "superseded", "round": 1},
        "round 1: the server asks for something newer; this work is dropped",
    ),
    (
        {"event": "data", "summary": "20 images", "train": 1000, "held_out": 10},
        "20 images; training on 1,000, held out 10",
    ),
    ({"event": "data warning", "reason": "dark"}, "WARNING: dark"),
    ({"event": "dropped", "reason": "moments cannot be used"}, "WARNING: moments cannot be used"),
    (
        {"event": "measured", "loss": 0.5, "round": 1, "rounds": 3},
        "round 1/3: held-out loss 0.5000 with the model that came",
    ),
    (
        {"event": "measured", "loss": 0.5, "round": 1, "rounds": 3, "images": 1000},
        "round 1/3: held-out loss 0.5000 with the model that came\nround 1: going on at 1,000 images",
    ),
    ({"event": "training", "round": 1, "images": 1000, "of": 2000}, "round 1: 1,000/2,000 images"),
    ({"event": "drawing", "round": 1, "images": 10, "of": 20}, "evaluating a model: 10/20 images drawn"),
    (
        {"event": "evaluated", "round": 1, "drawn": 20, "quality": {"quality_images": 10, "kernel": 0.5}},
        "a model was evaluated with 20 images that it drew: quality_images 10, kernel 0.5",
    ),
    (
        {"event": "not evaluated", "round": 1, "reason": "no network"},
        "the coordinator wanted a model evaluated, which gets only its held-out loss: no network",
    ),
    (
        {"event": "loss kept", "round": 1},
        "round 1: one held-out image's loss is unlike all others', so no loss leaves",
    ),
    ({"event": "waiting", "reason": "full"}, "WARNING: full; trying again until it can be written"),
    (
        {"event": "code refused", "reason": "other code"},
        "WARNING: other code; it was not unpacked, and the server is told only CODE_REFUSED",
    ),
    (
        {"event": "joined late", "round": 2},
        "round 2: this site has not seen the prior itself, only what became of it",
    ),
    (
        {"event": "agreed", "how": "by hand", "fingerprint": "f"},
        "the terms of this federation were agreed to by hand; their fingerprint is f",
    ),
    (
        {"event": "asks", **APPROVAL},
        "round 1: the terms of this federation wait for your approval, nothing leaves before: maskdm-client approve "
        "--out site (fingerprint f)",
    ),
    (
        {"event": "held", "action": "train", **APPROVAL},
        "round 1: the first update waits for your approval: maskdm-client approve --out site (or --deny); the terms "
        "have the fingerprint f",
    ),
    (
        {"event": "round", "rounds": 3, "bytes": 2_500_000, **REPORT},
        "round 1/3: held-out loss 0.5000 → 0.2500, 64 images in 3 s, 2.5 MB sent",
    ),
    (
        {"event": "failed", "round": 1, "outcome": "FAILED", "reason": "memory"},
        "round 1: memory (the server is told only FAILED)",
    ),
    (
        {"event": "finished", "round": 3, "rounds": 3, "loss": 0.5},
        "the federation ended; held-out loss of the final model 0.5000",
    ),
    (
        {"event": "finished", "round": 3, "outcome": "FAILED", "reason": "no images"},
        "the federation ended; the final model was not measured: no images",
    ),
]
BOTH = [(of_federation, *case) for case in FEDERATION] + [(of_site, *case) for case in SITE]


@pytest.mark.parametrize(("module", "line", "words"), BOTH)
def test_a_line_is_read_said_and_written_as_it_was(
    module: ModuleType, line: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (event,) = module.known([line])
    assert event.words() == words
    append_event(tmp_path, event)
    (written,) = read_lines(tmp_path / EVENTS)
    assert written.pop("time") > 0
    assert written == line
    (newer,) = module.known([{**line, "time": 1.0, "of a newer version": [1]}])
    assert newer == event.model_copy()


@pytest.mark.parametrize(("module", "cases"), [(of_federation, FEDERATION), (of_site, SITE)])
def test_every_kind_is_known_once_and_one_of_a_newer_version_is_passed_over(
    module: ModuleType, cases: list[tuple[dict[str, Any], str]]
) -> None:
    kinds = get_args(get_args(module.AnyEvent)[0])
    names = [kind.model_fields["event"].default for kind in kinds]
    assert len(set(names)) == len(names)
    assert {line["event"] for line, _ in cases} == set(names)
    defined = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Event)]
    assert {kind for kind in defined if not kind.model_fields["event"].is_required()} == set(kinds)
    assert list(module.known([{"event": "of a newer version"}])) == []


@pytest.mark.parametrize("line", [b"[]", b"{}", b"not json", b'{"event": "rejected"}', b"\xff"])
def test_a_damaged_line_is_no_event(line: bytes) -> None:
    with pytest.raises(ValidationError):
        parsed(of_federation.KINDS, line) or pytest.fail("it was passed over")


def test_lines_of_older_versions_are_read(tmp_path: Path) -> None:
    """Updates were not compared, numbers of exchanges and what an evaluation asked for not written."""
    old = {name: value for name, value in LINE.items() if name not in ("updates", "attempts", "late", "silent")}
    append_line(tmp_path / EVENTS, {"time": 1.0, "event": "round", "rounds": 3, "round": 1, **old})
    append_line(
        tmp_path / EVENTS,
        {"time": 1.0, "event": "sent", "round": 1, "rounds": 3, "clients": 2, "action": "train"},
    )
    said = [event.words() for event in of_federation.known(read_lines(tmp_path / EVENTS))]
    assert said == [FEDERATION[12][1], FEDERATION[2][1]]


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.stem)
def test_no_event_is_a_dictionary(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        keys = node.keys if isinstance(node, ast.Dict) else []
        keys = [node.slice] if isinstance(node, ast.Subscript) else keys
        named = [key.lineno for key in keys if isinstance(key, ast.Constant) and key.value == "event"]
        assert not named, f"lines {named}: an event is one of the classes of an events.py"
