"""A coordinator with a prior of its own making, and a site with the default policy: real processes."""

from pathlib import Path

import pytest
from benchmarks.attacks.gradients import quiet
from benchmarks.attacks.site import fresh_weights, prior_of

from maskdm.config import ModelConfig
from maskdm.federated.parcel import Outcome
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import save_checkpoint

from .conftest import Started, wait_until, write_faces

pytestmark = pytest.mark.slow


def test_an_update_of_one_image_is_refused_whatever_prior_asks_for_it(workplace: Path) -> None:
    """In process the same plan and prior give the image, where the policy is open (tests/attacks)."""
    write_faces(workplace / "local", 90, "clinic", "face")
    model, port = ModelConfig(image_size=16, channels=3, patch_size=4, dim=64, depth=2, heads=2), free_port()
    save_checkpoint(workplace / "crafted.safetensors", quiet(fresh_weights(model)), prior_of(model))
    serve = ["maskdm-server", "serve", "--prior", "crafted.safetensors", "--out", "fed", "--min-clients", "1"]
    serve += ["--local-images", "1", "--batch-size", "1", "--encoding", "fp32", "--insecure", "--port", str(port)]
    server = Started(serve, workplace, "serve")
    server.until("listening on")
    joining = ["maskdm-client", "--data", "./local", "--server", f"127.0.0.1:{port}", "--insecure", "--out", "site"]
    site = Started(joining, workplace, "site")
    events = workplace / "site" / "events.jsonl"
    wait_until(
        lambda: events.exists() and any(line["event"] == "failed" for line in read_lines(events)),
        lambda: server.output() + site.output(),
    )
    refused = next(line for line in read_lines(events) if line["event"] == "failed")
    assert refused["outcome"] == Outcome.POLICY.name
    assert "min-batch" in refused["reason"]
    left = [line for line in read_lines(workplace / "site" / "audit.jsonl") if line["direction"] == "out"]
    assert all(line["scalars"].get("outcome") != Outcome.DONE for line in left if "scalars" in line)
    assert not list((workplace / "fed").glob("rounds/*/*.safetensors"))
