"""What the ServerApps make of the Grid that Flower hands them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskdm.errors import FederationError
from maskdm_server.federation.transport import Link
from maskdm_server.flower import server_app, simulated_app
from maskdm_server.flower.grid import GridLink

from ..conftest import config, events


def context(folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps({"federation": config(folder).model_dump(mode="json")}))
    return SimpleNamespace(run_config={"federation": str(folder)})


def test_a_grid_that_cannot_stream_ends_the_federation_and_is_not_used_in_another_way(folder: Path) -> None:
    with pytest.raises(FederationError, match=r"lacks SimpleNamespace\._runtime_client and 2 more, .* pip install"):
        server_app.main(SimpleNamespace(), context(folder))
    (failed,) = events(folder, "failed")
    assert "lacks SimpleNamespace._runtime_client" in failed["reason"]


def test_in_flowers_simulation_messages_go_in_one_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[Any]()

    def run(link: Link, *_: object) -> None:
        found.append(type(link))

    monkeypatch.setattr(server_app, "run_federation", run)
    simulated_app.main(SimpleNamespace(), context(folder))
    assert found == [GridLink]


def test_what_nobody_expected_is_told_as_a_crash_and_stands_in_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    (folder / "logs").mkdir(exist_ok=True)
    monkeypatch.setattr(server_app, "run_federation", run)
    with pytest.raises(ZeroDivisionError):
        simulated_app.main(SimpleNamespace(), context(folder))
    (crashed,) = events(folder, "crashed")
    assert crashed["reason"] == "unexpected ZeroDivisionError: by zero"
    assert "Traceback" in (folder / "logs" / "rounds.log").read_text()
