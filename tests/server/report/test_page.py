"""Pages as whole documents: what they say, what strangers cannot do to them, how large they get."""

import json
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from maskdm.commands import command_line as cli
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Stage, TrainingConfig
from maskdm.federated import auditlog
from maskdm.federated.auditlog import Message
from maskdm.run.runfolder import append_line, write_json
from maskdm.training.pretrain import Run
from maskdm_server.commands.app import app
from maskdm_server.commands.report_command import page_of
from maskdm_server.federation.events import RoundLine
from maskdm_server.report.agreement import agreement
from maskdm_server.report.participation import MOST_COLUMNS, MOST_ROWS, columns, participation
from maskdm_server.report.sites import Participation, SiteHistory, Sites

from ..conftest import InProcess, federate, learner, silent
from .test_gather import configured, poisoned

EVIL = '</td><script>alert(1)</script><img src="http://evil.example/x" onerror=alert(1)>\u202e'
VOID = {"img", "meta"}
LINE = {
    **{"round": 1, "clients": 1, "examples": 1, "images_seen": 64, "loss_before": None, "loss_after": None},
    **{"bytes_down": 1, "bytes_up": 1, "seconds": 1.0, "rejected": 0},
}


class Document(HTMLParser):
    """Elements and text of a page; every element must be closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text.append(data)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [about for tag, about in self.elements if tag == name]


def read(folder: Path) -> Document:
    """The page as a reader and a screen reader get it: complete, and free of anything that loads or runs."""
    page = page_of(folder)
    document = Document(page)
    assert not document.named("script")
    assert not [name for _, about in document.elements for name in about if name.startswith("on")]
    assert all((about["src"] or "").startswith("data:image/") and about["alt"] for about in document.named("img"))
    assert not [about for _, about in document.elements if {"href", "srcset", "action"} & about.keys()]
    assert all(about.get("scope") in ("col", "row") for about in document.named("th"))
    assert len(document.named("h1")) == len(document.named("main")) == len(document.named("title")) == 1
    assert document.named("html") == [{"lang": "en"}]
    headings = {about["id"] for about in document.named("h2")}
    assert {about["aria-labelledby"] for about in document.named("section")} == headings
    assert len(headings) == len(document.named("h2"))
    return document


@pytest.fixture
def federation(folder: Path) -> Path:
    """A finished one with troubles and pictures."""
    federate(InProcess({1: learner(0.1), 2: poisoned, 3: silent}), configured(folder))
    for name in ("before", "after", "round-000001", "round-000002"):
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), "navy").save(folder / "samples" / f"{name}.png")
    return folder


def test_a_federation_page_says_what_a_person_wants_to_know(federation: Path) -> None:
    document = read(federation)
    said = " ".join(document.text)
    assert "The federation is finished. 3 of 3 rounds are done." in said
    assert "Held-out loss: 0.5000 for the prior, 0.5000 for the final model (0.0 %)." in said
    assert "No ε applies." in said
    assert "site 3 is not waited for any more: no progress for 30 s" in said
    assert "whole" in document.text
    assert json.loads((federation / "config.json").read_text())["federation"]["prior_sha256"] in said
    alts = [about["alt"] for about in document.named("img")]
    assert len(alts) == 4
    assert any("after round 2" in (alt or "") for alt in alts)
    labels = [about["aria-label"] or "" for about in document.named("svg") if about.get("role") == "img"]
    assert [label.partition(":")[0] for label in labels] == [
        *("Held-out denoising loss", "Updates", "Bytes carried", "Time of a round"),
    ]


def test_a_site_whose_update_points_against_the_others_is_seen_on_the_page(folder: Path) -> None:
    federate(InProcess({1: learner(0.1), 2: learner(0.1), 3: learner(0.1), 4: learner(-0.25)}), configured(folder))
    document = read(folder)
    said = " ".join(document.text)
    assert "How the updates agree" in document.text
    assert "the update of site 4 points against those of the others (cosine -1.00, 2.5 times the usual length)" in said
    assert "the update of site 1 points" not in said
    assert [about for about in document.named("td") if about.get("class") == "n rejected"] == [{"class": "n rejected"}]


def test_of_very_many_sites_those_that_agree_least_are_shown(folder: Path) -> None:
    updates = {f"site {i}": {"norm_ratio": 1.0, "cosine": i / 1000} for i in range(1000)} | {
        "alone": {"norm_ratio": 1.0}
    }
    line = RoundLine.model_validate(LINE | {"updates": updates})
    said = " ".join(Document(agreement([line, line])).text)
    assert "site 0 2" in said
    assert "site 39" in said
    assert "site 40" not in said
    assert "there are 961 more" in said
    assert agreement([RoundLine.model_validate(LINE)]) == "", "written before updates were compared"
    assert "–" in Document(agreement([RoundLine.model_validate(LINE | {"updates": {"1": {"norm_ratio": 1}}})])).text


def test_names_and_reasons_of_strangers_stay_text(federation: Path) -> None:
    auditlog.record(federation / "audit.jsonl", "out", EVIL, 1, "sent: train", Message(1, {}, {}, ""))
    auditlog.record(federation / "audit.jsonl", "in", EVIL, 1, f"rejected: {EVIL}")
    auditlog.record(federation / "audit.jsonl", "in", EVIL, 1, EVIL)
    for kind in ("rejected", "silent", "late"):
        event = {"time": 1.0, "event": kind, "round": 1, "site": EVIL, "reason": EVIL}
        append_line(federation / "events.jsonl", event)
    append_line(federation / "events.jsonl", {"time": 2.0, "event": "crashed", "reason": EVIL})
    append_line(
        federation / "rounds.jsonl", LINE | {"round": 3, "updates": {EVIL: {"norm_ratio": 1.0, "cosine": -1.0}}}
    )
    document = json.loads((federation / "config.json").read_text())
    document["federation"][EVIL] = EVIL
    (federation / "config.json").write_text(json.dumps(document))
    append_line(federation / "versions.jsonl", {"maskdm": EVIL})
    said = "".join(read(federation).text)
    assert said.count("<script>alert(1)</script>") >= 8
    assert "\u202e" not in said


def test_a_federation_that_has_not_begun_has_a_page_too(folder: Path) -> None:
    said = " ".join(read(configured(folder)).text)
    assert "0 of 3 rounds are done" in said


def test_a_damaged_picture_is_said(federation: Path) -> None:
    (federation / "samples" / "after.png").write_bytes(b"<svg onload=alert(1)>")
    assert "This picture cannot be read." in read(federation).text


def test_rounds_go_into_few_columns_which_cover_all_of_them() -> None:
    for rounds in (1, 2, MOST_COLUMNS, MOST_COLUMNS + 1, 500, 100_000):
        spans = columns(rounds)
        assert len(spans) <= MOST_COLUMNS
        assert spans[0][0] == 1
        assert all(before[1] + 1 == after[0] for before, after in pairwise(spans))
        assert spans[-1][1] == rounds


def test_a_thousand_sites_in_five_hundred_rounds_are_one_small_table_with_those_that_failed() -> None:
    sites = Sites()
    for number in range(1000):
        site = sites.by_name[f"site-{number}"] = SiteHistory()
        for round_number in range(1, 501):
            site.put(
                round_number, Participation.REJECTED if number == 700 and round_number > 250 else Participation.ACCEPTED
            )
    page = participation(sites, 500)
    assert len(page) < 200_000
    document = Document(page)
    assert "site-700" in document.text
    assert "all 1,000 sites" in document.text
    assert sum(about.get("scope") == "row" for about in document.named("th")) == 2 * MOST_ROWS + 1
    cells = [text for text in document.text if text in ("13/13", "0/13", "13000/13000", "12987/13000")]
    assert {"13/13", "0/13", "13000/13000", "12987/13000"} == set(cells)


def test_a_pre_training_page_shows_its_loss_on_a_logarithmic_axis_where_it_fell_far(
    tmp_path: Path, tiny: ModelConfig
) -> None:
    stage = Stage(mask=MaskConfig(kind="patch", ratio=0.5), training=TrainingConfig(images=256, batch_size=32))
    write_json(tmp_path / "config.json", {"kind": "pretrain", **Run(tiny, DiffusionConfig(), (stage,)).describe()})
    for step in range(1, 9):
        line = {"images": 32 * step, "loss": 2.0**-step, "lr": 1e-3, "images_per_s": 100.0, "data_wait": 0.25}
        append_line(tmp_path / "metrics.jsonl", {**line, "skipped": 0})
    (tmp_path / "samples").mkdir()
    for images in (128, 256):
        Image.new("L", (8, 8)).save(tmp_path / "samples" / f"{images:09d}.png")
    document = read(tmp_path)
    said = " ".join(document.text)
    assert "It has seen 256 of 256 images." in said
    assert "loss, logarithmic" in document.text
    assert "25.0 %" in document.text
    assert [about["alt"] for about in document.named("img")] == [
        "Grid of samples after 128 images",
        "Grid of samples after 256 images",
    ]


def test_the_command_writes_the_page_and_prints_where(federation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(app, "maskdm-server", ["report", str(federation)]) == 0
    assert capsys.readouterr().out == f"{federation / 'report.html'}\n"
    assert (federation / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("content", [None, "", "[]", '{"kind": "client"}', '{"kind": 5}', "{"])
def test_another_folder_is_a_mistake_in_one_line(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.run(app, "maskdm-server", ["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"RUN_OR_FED {tmp_path} is no folder of a run or a federation" in line
