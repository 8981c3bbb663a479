"""`simulate --engine inline`: a whole federation in one process, with the real client code."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from maskdm_server.commands.app import app
from maskdm_server.federation import folder
from maskdm_server.lab import in_process as inline

PER_CLIENT = 20


@pytest.fixture
def prior(tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata) -> Path:
    path = tmp_path / "prior.safetensors"
    save_checkpoint(path, {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}, metadata)
    return path


@pytest.fixture
def simulate(tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command on small grey pictures; returns the exit code."""

    def draw(load: Callable[[], Checkpoint], picture: Path, *_: Any) -> None:
        """Sampling is tested elsewhere and takes longer than all the rest."""
        load()
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(b"")

    monkeypatch.setattr(folder, "draw_samples", draw)
    monkeypatch.setattr("maskdm_client.work.fine_tuning.HELD_OUT_DRAWS", 16)
    torch.set_num_threads(1)

    def run(out: Path, clients: int = 3, *options: str, data: Path | None = None) -> int:
        images = data or tmp_path / f"{clients}.npz"
        if not images.exists():
            pixels = np.random.default_rng(0).integers(0, 256, (PER_CLIENT * clients, 8, 8, 1), dtype=np.uint8)
            np.savez(images, images=pixels)
        arguments = ["simulate", "--engine", "inline", "--prior", str(prior), "--data", str(images), "--out", str(out)]
        arguments += ["--clients", str(clients), "--fraction", "0.5", "--rounds", "3", "--local-images", "16"]
        return cli.run(app, "maskdm-server", [*arguments, "--batch-size", "8", "--lr", "0.001", *options])

    return run


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "model.safetensors")[0]


def assert_same_model(first: Path, second: Path) -> None:
    weights, others = weights_of(first), weights_of(second)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def test_a_whole_federation_runs_in_this_process(
    simulate: Callable[..., int], tmp_path: Path, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fed"
    assert simulate(out) == 0
    lines = read_lines(out / "rounds.jsonl")
    assert [(line["round"], line["clients"], line["rejected"]) for line in lines] == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]
    assert all(line["images_seen"] == 3 * 16 for line in lines)
    result = json.loads((out / "result.json").read_text())
    assert (result["rounds"], result["clients"], result["model_of_round"]) == (3, 3, 3)
    final, metadata = load_checkpoint(out / "model.safetensors")
    assert metadata.rounds == 3
    before, _ = load_checkpoint(prior)
    assert not torch.equal(final["head.weight"], before["head.weight"])
    for number in (1, 2, 3):
        site = out / "sites" / f"site-{number}" / "client"
        assert (site / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        exchanged = [line["direction"] for line in read_lines(site / "audit.jsonl")]
        assert exchanged == ["in", "out"] * 4
    said = capsys.readouterr().err
    assert "round 3/3: held-out loss" in said
    assert str(out / "model.safetensors") in said
    assert not (out / ".flwr").exists()


@pytest.mark.parametrize(
    "options", [(), ("--encoding", "topk", "--server-optimizer", "fedadam", "--server-ema", "0.9")]
)
def test_a_federation_that_was_interrupted_goes_on_to_the_same_model(
    simulate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """After the first round, and again in the middle of the next one: some sites have answered it by then."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert simulate(whole, 3, *options) == 0
    answers: list[int] = []
    receive = inline.InlineLink.receive

    def interrupted(link: inline.InlineLink) -> Any:
        for reply in receive(link):
            answers.append(reply.site)
            if len(answers) in (3, 8):
                os.kill(os.getpid(), signal.SIGINT)
            yield reply

    monkeypatch.setattr(inline.InlineLink, "receive", interrupted)
    for done in (0, 1):
        assert simulate(cut, 3, *options) == 130
        journalled = len(list((cut / "rounds").glob("??????.safetensors"))) if (cut / "rounds").exists() else 0
        assert journalled in (done, done + 1)
        assert not (cut / "result.json").exists()
    assert simulate(cut, 3, *options) == 0
    assert_same_model(whole, cut)
    assert [line["round"] for line in read_lines(cut / "rounds.jsonl")] == [1, 2, 3]


def test_a_finished_federation_is_not_run_again_but_with_more_rounds_it_goes_on(
    simulate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, once = tmp_path / "fed", tmp_path / "once"
    assert simulate(out) == 0
    before = (out / "events.jsonl").read_bytes()
    assert simulate(out) == 0
    assert (out / "events.jsonl").read_bytes() == before
    assert "all rounds are done" in capsys.readouterr().err
    assert simulate(out, 3, "--rounds", "4") == 0
    assert simulate(once, 3, "--rounds", "4") == 0
    assert_same_model(out, once)


def test_another_federation_does_not_go_into_the_same_folder(
    simulate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fed"
    assert simulate(out, 3, "--rounds", "1") == 0
    for option, value, name in (("--lr", "0.5", "federation.lr"), ("--fraction", "0.25", "simulation.fraction")):
        assert simulate(out, 3, "--rounds", "1", option, value) == 2
        assert name in capsys.readouterr().err


def test_thirty_virtual_clients_five_a_round(simulate: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "fed"
    assert simulate(out, 30, "--clients-per-round", "5", "--rounds", "4", "--local-images", "8") == 0
    assert [line["clients"] for line in read_lines(out / "rounds.jsonl")] == [5, 5, 5, 5]
    assert json.loads((out / "result.json").read_text())["clients"] == 30
    rounds = []
    for number in range(1, 31):
        lines = read_lines(out / "sites" / f"site-{number}" / "client" / "audit.jsonl")
        rounds.append({line["round"] for line in lines if line["direction"] == "in" and line["verdict"] == "train"})
        assert (out / "sites" / f"site-{number}" / "client" / "model.safetensors").exists()
    assert sum(len(found) for found in rounds) == 20
    assert len([found for found in rounds if found]) > 10, "not the same five each time"


@pytest.mark.parametrize(
    "options",
    [
        ("--train", "adapters", "--adapter-rank", "2", "--encoding", "int8"),
        ("--train", "norm-bias", "--aggregation", "median"),
        ("--local-minutes", "0.0001", "--proximal", "0.1"),
        ("--patience", "1"),
    ],
)
def test_other_ways_to_federate_run_too(simulate: Callable[..., int], tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "fed"
    assert simulate(out, 3, "--rounds", "2", *options) == 0
    assert all(line["rejected"] == 0 for line in read_lines(out / "rounds.jsonl"))
    assert len(weights_of(out)) > 0


def test_virtual_clients_evaluate_also_where_the_option_came_later(
    simulate: Callable[..., int], tmp_path: Path
) -> None:
    out, data = tmp_path / "fed", tmp_path / "more.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (240, 8, 8, 1), dtype=np.uint8)
    np.savez(data, images=pixels)
    options = ("--evaluate", "12", "--evaluate-steps", "2")
    assert simulate(out, 2, "--rounds", "1", data=data) == 0
    assert simulate(out, 2, "--rounds", "2", *options, data=data) == 0
    lines = read_lines(out / "quality.jsonl")
    assert [(line["round"], line["sites"]) for line in lines] == [(0, 2), (2, 2)]
    assert all(line["quality_images"] >= 2 * 10 for line in lines)
    assert json.loads((out / "result.json").read_text())["quality_final"] == lines[1]


def test_a_client_without_usable_images_is_rejected_and_the_others_go_on(
    simulate: Callable[..., int], tmp_path: Path, prior: Path
) -> None:
    paths = []
    for number, shape in enumerate(((20, 8, 8, 1), (20, 8, 8, 1), (20, 8, 8, 3))):
        paths.append(tmp_path / f"own-{number}.npz")
        np.savez(paths[-1], images=np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))
    more = [part for path in paths[1:] for part in ("--data", str(path))]
    out = tmp_path / "fed"
    assert simulate(out, 3, "--rounds", "1", "--min-replies", "2", *more, data=paths[0]) == 0
    (line,) = read_lines(out / "rounds.jsonl")
    assert (line["clients"], line["rejected"]) == (2, 1)
    reasons = [event["reason"] for event in read_lines(out / "events.jsonl") if event["event"] == "rejected"]
    assert "the site reports WRONG_CHANNELS: its images are in colour, the model is not" in reasons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clients", "40"), "too few for --clients 40"),
        (("--split", "label"), "--split label needs labels"),
        (("--min-replies", "4", "--clients-per-round", "3"), "--clients-per-round 3 is less than --min-replies"),
    ],
)
def test_a_mistake_is_one_line(
    simulate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert simulate(tmp_path / "fed", 3, *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "fed" / "config.json").exists()
