"""Federated evaluation with real processes: sites whose policy lets its figures out, others, and simulations."""

import json
from pathlib import Path

import pytest

from maskdm.evaluation.extractors.feature_net import FeatureNet, FeatureNetConfig, save_feature_net
from maskdm.federated.parcel import NUMBER_NAMES, QUALITY_NAMES, REPORT_NAMES
from maskdm.federated.policy import UNATTENDED
from maskdm.run.processes import free_port
from maskdm.run.runfolder import read_lines

from .conftest import RecordingProxy, Started, make_kits, write_faces

pytestmark = pytest.mark.slow


def test_sites_send_the_figures_that_their_policy_lists_and_no_image(workplace: Path, prior: Path) -> None:
    secret = "SMITH-1961-ward7"
    write_faces(workplace / "local", 240, "clinic", secret)
    write_faces(workplace / "other", 240, "workshop", "other")
    config = FeatureNetConfig(name="faces", image_size=16, channels=3, classes=2)
    save_feature_net(workplace / "faces.safetensors", FeatureNet(config), config)
    listed = ", ".join(f'"{name}"' for name in NUMBER_NAMES)
    policy = UNATTENDED.replace(
        UNATTENDED[UNATTENDED.index("metrics = [") : UNATTENDED.index("]") + 1], f"metrics = [{listed}]"
    )
    (workplace / "policy.toml").write_text(policy)
    port = free_port()
    make_kits(workplace / "kits", port, "hospital-a", "hospital-b")
    command = ["maskdm-server", "serve", "--prior", str(prior), "--out", "fed", "--tls", "kits/server"]
    command += ["--evaluate", "24", "--evaluate-features", "faces.safetensors", "--evaluate-steps", "4"]
    server = Started(command, workplace, "serve", MASKDM_MIN_CLIENTS="2")
    server.until("listening on")
    proxy = RecordingProxy(port, workplace / "kits" / "server")
    join = ["maskdm-client", "--data", "./local", "--kit", "kits/hospital-a.zip", "--out", "site-a"]
    join += ["--policy", "policy.toml", "--features", "faces.safetensors", "--server", f"127.0.0.1:{proxy.port}"]
    first = Started(join, workplace, "first")
    strict = ["maskdm-client", "--data", "./other", "--kit", "kits/hospital-b.zip", "--out", "site-b"]
    second = Started([*strict, "--features", "faces.safetensors"], workplace, "second")
    assert server.wait() == 0, server.output() + first.output()
    assert first.wait() == 0, first.output()
    assert second.wait() == 0, second.output()
    proxy.close()

    lines = read_lines(workplace / "fed" / "quality.jsonl")
    assert [(line["round"], line["sites"], list(line["by_site"])) for line in lines] == [
        (0, 1, ["hospital-a"]),
        (2, 1, ["hospital-a"]),
    ]
    assert all(line["quality"].keys() == set(QUALITY_NAMES[1:]) for line in lines)
    assert all(line["quality_images"] >= 10 for line in lines)
    result = json.loads((workplace / "fed" / "result.json").read_text())
    assert (result["quality_prior"], result["quality_final"]) == tuple(lines)
    assert result["clients"] == 2
    assert "the prior: kernel distance" in server.output()
    assert "the model of round 2: kernel distance" in server.output()
    assert all(line["clients"] == 2 for line in read_lines(workplace / "fed" / "rounds.jsonl"))

    released = {
        site: [
            set(line["scalars"])
            for line in read_lines(workplace / site / "audit.jsonl")
            if line["direction"] == "out" and line["scalars"]["outcome"] == 0
        ]
        for site in ("site-a", "site-b")
    }
    assert released["site-a"] == [set(NUMBER_NAMES), *[set(REPORT_NAMES)] * 2, set(NUMBER_NAMES), set(REPORT_NAMES)]
    assert released["site-b"] == [set(REPORT_NAMES)] * 5
    assert "gets only its held-out loss: the policy lists none of the numbers" in second.output()
    sent = bytes(proxy.sent)
    for private in (secret, str(workplace), "faces"):
        assert private.encode() not in sent, f"{private} left the site"


def test_a_simulation_evaluates_with_features_of_random_weights(workplace: Path, prior: Path) -> None:
    write_faces(workplace / "local", 480, "clinic", "face")
    command = ["maskdm-server", "simulate", "--prior", str(prior), "--data", "local", "--out", "fed", "--clients", "2"]
    run = Started([*command, "--rounds", "1", "--evaluate", "16", "--evaluate-steps", "3"], workplace, "simulate")
    assert run.wait() == 0, run.output()
    lines = read_lines(workplace / "fed" / "quality.jsonl")
    assert [(line["round"], line["sites"]) for line in lines] == [(0, 2), (1, 2)]
