"""Federations of virtual clients: the same rounds in one process, and under Flower's Ray runtime."""

import json
from pathlib import Path

import pytest

from maskdm.run.runfolder import read_lines

from .conftest import Started, processes_with, wait_until, write_faces

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_virtual_clients_train_a_federated_model_and_leave_no_process(
    workplace: Path, prior: Path, engine: str
) -> None:
    write_faces(workplace / "local", 120, "clinic", "face")
    command = ["maskdm-server", "simulate", "--prior", str(prior), "--data", "local", "--out", "fed", "--clients", "4"]
    run = Started([*command, "--engine", engine, "--lr", "1e-3"], workplace, engine)
    assert run.wait() == 0, run.output()
    lines = read_lines(workplace / "fed" / "rounds.jsonl")
    assert [(line["round"], line["clients"], line["rejected"]) for line in lines] == [(1, 4, 0), (2, 4, 0)]
    result = json.loads((workplace / "fed" / "result.json").read_text())
    assert result["loss_final"] < result["loss_prior"]
    for number in (1, 2, 3, 4):
        audit = read_lines(workplace / "fed" / "sites" / f"site-{number}" / "client" / "audit.jsonl")
        assert [line["verdict"] for line in audit if line["direction"] == "out"] == ["released"] * 3
    wait_until(lambda: not processes_with(str(workplace)), lambda: str(processes_with(str(workplace))))
