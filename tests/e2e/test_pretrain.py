"""`pretrain` as a real process: what it leaves, and that stopping it costs nothing."""

from pathlib import Path

import pytest

from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint

from .conftest import Started, wait_until

pytestmark = pytest.mark.slow


def command(corpus: Path, out: str) -> list[str]:
    return ["maskdm-server", "pretrain", "--data", str(corpus), "--out", out, "--save-every", "0.2"]


def test_a_killed_run_continues_to_the_very_weights_of_an_uninterrupted_one(
    workplace: Path, public_corpus: Path
) -> None:
    whole = Started(command(public_corpus, "whole"), workplace, "whole")
    assert whole.wait() == 0, whole.output()
    killed = Started(command(public_corpus, "killed"), workplace, "killed")
    saved = workplace / "killed" / "state" / "training.safetensors"
    metrics = workplace / "killed" / "metrics.jsonl"
    wait_until(lambda: saved.exists() and len(read_lines(metrics)) >= 1, killed.output)
    killed.kill()
    assert (read_lines(metrics) or [{"images": 0}])[-1]["images"] < 4000, "it was over before it could be killed"
    again = Started(command(public_corpus, "killed"), workplace, "again")
    assert again.wait() == 0, again.output()
    assert "continuing at" in again.output()
    weights, metadata = load_checkpoint(workplace / "whole" / "prior.safetensors")
    resumed, resumed_metadata = load_checkpoint(workplace / "killed" / "prior.safetensors")
    assert resumed_metadata.images_seen == metadata.images_seen >= 4000
    assert all(weights[name].equal(resumed[name]) for name in weights)
    images = [line["images"] for line in read_lines(metrics)]
    assert images == sorted(set(images)), "lines of the lost part were kept"


def test_a_run_leaves_what_the_design_says_and_its_loss_falls(prior: Path) -> None:
    run = prior.parent
    for name in ("config.json", "metrics.jsonl", "prior.safetensors", "state"):
        assert (run / name).exists(), name
    assert list((run / "samples").glob("*.png"))
    lines = read_lines(run / "metrics.jsonl")
    assert all({"images", "loss", "images_per_s", "data_wait"} <= line.keys() for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_ctrl_c_saves_the_state_and_exits_with_130(workplace: Path, public_corpus: Path) -> None:
    run = Started([*command(public_corpus, "run"), "--images", "10M"], workplace, "run")
    metrics = workplace / "run" / "metrics.jsonl"
    wait_until(lambda: len(read_lines(metrics)) >= 1, run.output)
    assert run.interrupt() == 130
    assert "run the same command again" in run.output().splitlines()[-1]
    assert (workplace / "run" / "state" / "training.safetensors").exists()
    assert load_checkpoint(workplace / "run" / "prior.safetensors")[1].images_seen > 0
