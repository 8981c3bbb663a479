"""A site and its server: when it joins, when it goes on waiting, when it leaves; whole federations are in tests/e2e."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from maskdm.commands.command_line import run
from maskdm.config import ModelConfig
from maskdm.errors import FederationError
from maskdm.federated.parcel import Parcel
from maskdm.federated.policy import UNATTENDED
from maskdm_client.agent import connection as supervision
from maskdm_client.commands import join_command
from maskdm_client.commands.app import app
from maskdm_client.folder.mailbox import Mailbox
from maskdm_server.kits.provision import provision


class World:
    """A server, a connection, and a clock that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.there, self.lets_in, self.alive = 1000.0, True, True, True
        self.finished = False
        self.said: list[str] = []
        self.starts: list[float] = []
        self.looks = 0
        self.meanwhile: Callable[[float], None] = lambda passed: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self.now - 1000.0)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()

    class Together:
        """Both the connection and whoever looks after the worker."""

        log = Path("supernode.log")

        def __init__(self, *arguments: Any) -> None:
            if len(arguments) == 4:
                found.starts.append(found.now - 1000.0)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @property
        def finished(self) -> bool:
            return found.finished

        def look(self) -> None:
            found.looks += 1

        def pause(self, seconds: float) -> None:
            self.look()
            found.sleep(max(seconds, 0.1))

        def is_alive(self) -> bool:
            return found.alive

        def is_let_in(self) -> bool:
            return found.lets_in

    for name in ("Caretaker", "SuperNode"):
        monkeypatch.setattr(supervision, name, Together)
    monkeypatch.setattr(supervision, "time", found)
    monkeypatch.setattr(supervision, "say", found.said.append)
    monkeypatch.setattr(supervision, "reachable", lambda *_, **__: found.there)
    return found


def work(folder: Path, wait: float = 600.0) -> None:
    supervision.work(folder, "host", 8000, None, wait, lambda: None)


def test_a_site_joins_works_and_leaves_when_the_server_has_its_last_reply(tmp_path: Path, world: World) -> None:
    def meanwhile(passed: float) -> None:
        world.there, world.finished = 3 < passed < 4000, passed > 3600

    world.there, world.meanwhile = False, meanwhile
    work(tmp_path)
    assert world.said == [
        "no server at host:8000; trying for 600 s",
        "joined host:8000; waiting for work",
    ]
    assert 3720 <= world.now - 1000 <= 3722
    assert world.looks > 1000


def test_a_site_that_is_let_in_time_and_again_is_not_kept_out(tmp_path: Path, world: World) -> None:
    """However short its connections are."""

    def meanwhile(passed: float) -> None:
        world.alive, world.finished = passed % 23 < 20, passed > 3600

    world.meanwhile = meanwhile
    work(tmp_path)
    assert len(world.starts) > 10


@pytest.mark.parametrize("gone_at", [-1.0, 300.0])
def test_a_server_that_is_gone_for_good_ends_the_site_after_its_patience(
    tmp_path: Path, world: World, gone_at: float
) -> None:
    def meanwhile(passed: float) -> None:
        world.there = passed < gone_at

    world.meanwhile = meanwhile
    world.there = gone_at > 0
    with pytest.raises(FederationError, match="--server host:8000 did not answer for 600 s"):
        work(tmp_path)
    assert max(gone_at, 0) + 600 <= world.now - 1000 <= max(gone_at, 0) + 610
    assert world.looks >= 600


def test_a_server_that_comes_back_in_time_is_waited_for_with_the_same_connection(tmp_path: Path, world: World) -> None:
    def meanwhile(passed: float) -> None:
        world.there, world.finished = passed % 700 > 500, passed > 2800

    world.meanwhile = meanwhile
    work(tmp_path)
    assert world.starts == [0.0]


def test_nobody_claims_to_have_joined_a_server_that_does_not_let_it_in(tmp_path: Path, world: World) -> None:
    world.lets_in = False
    with pytest.raises(FederationError, match="answers but does not let this site in"):
        work(tmp_path, wait=100.0)
    assert 100 <= world.now - 1000 <= 101
    assert not world.said


def test_nor_does_one_whose_connections_end_at_once(tmp_path: Path, world: World) -> None:
    world.alive = False
    with pytest.raises(FederationError, match="answers but does not let this site in"):
        work(tmp_path, wait=100.0)
    assert [round(after) for after in world.starts] == [0, 2, 6, 14, 30, 62, 122]


@pytest.mark.parametrize("there", [0.0, 200.0])
def test_a_site_that_was_killed_after_it_took_the_final_model_leaves_well(
    tmp_path: Path, world: World, there: float
) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, '{"action": "finish"}', b"weights")
    box.reply(5, "key", Parcel({}, {"outcome": 0}))

    def meanwhile(passed: float) -> None:
        world.there = passed < there

    world.meanwhile, world.there = meanwhile, there > 0
    work(tmp_path)
    assert there + 120 <= world.now - 1000 <= there + 130


def test_a_federation_that_goes_on_is_joined_again(tmp_path: Path, world: World) -> None:
    box = Mailbox(tmp_path)
    box.ask(5, '{"action": "finish"}', b"weights")
    box.reply(5, "key", Parcel({}, {"outcome": 0}))

    def meanwhile(passed: float) -> None:
        world.there = 30 < passed < 500
        if world.starts:
            box.ask(6, '{"action": "train"}', b"weights")

    world.meanwhile, world.there = meanwhile, False
    with pytest.raises(FederationError, match="did not answer for 600 s"):
        work(tmp_path)
    assert len(world.starts) == 1


def test_what_killed_processes_left_half_written_is_removed_at_the_start(
    make_site: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_site(np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8))  # none alike
    out = tmp_path / "out"
    monkeypatch.setattr(join_command, "work", lambda *_: None)
    command = ["--data", str(tmp_path / "hospital-data.npz"), "--out", str(out), "--fraction", "1"]
    assert run(app, "maskdm-client", command) == 0
    (out / "work").mkdir()
    left = [out / ".model.safetensors.17.tmp", out / "work" / ".request.bin.17.tmp"]
    kept = [out / "work" / "request.bin", out / "notes.tmp"]
    for path in (*left, *kept):
        path.write_bytes(b"x")
    assert run(app, "maskdm-client", command) == 0
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in kept)


def test_when_a_federation_is_over_no_pixels_stay_and_a_later_start_makes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 1), np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pictures)
    model = ModelConfig(image_size=32, channels=1, patch_size=8, dim=16, depth=2, heads=2)
    provision(tmp_path / "kits", "127.0.0.1:8000", ["a"], policy=UNATTENDED.encode(), model=model)
    out, during = tmp_path / "out", list[bool]()

    def work(*_: object) -> None:
        during.append((out / "corpus").exists())
        box = Mailbox(out)
        box.ask(5, '{"action": "finish"}', b"weights")
        box.reply(5, "key", Parcel({}, {"outcome": 0}))

    monkeypatch.setattr(join_command, "work", work)
    kit = str(tmp_path / "kits" / "a.zip")
    command = ["--data", str(tmp_path / "pictures.npz"), "--out", str(out), "--kit", kit, "--fraction", "1"]
    for _ in range(2):
        assert run(app, "maskdm-client", command) == 0
        assert not (out / "corpus").exists()
    assert during == [True, False]
