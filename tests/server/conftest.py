"""What tests of the coordinator share: a federation in memory, with a clock that runs only while somebody waits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.federated.encoding import encode
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.runfolder import read_lines, sha256_of
from maskdm.run.tensorfile import unpack
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.federation.rounds import run_federation
from maskdm_server.federation.settings import FederationConfig
from maskdm_server.federation.transport import Question, Reply

# What a site does with a plan and weights; None stands for a transport that lost it.
Site = Callable[[RoundPlan, dict[str, Tensor]], Parcel | None]
Answering = Callable[[RoundPlan, dict[str, Tensor]], Parcel]


class Time:
    """A clock that `pause` moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def clock(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds


class InProcess:
    """A link to functions; `before_round` may raise, as an interruption does. A silent site never answers."""

    may_lose = False

    def __init__(self, sites: Mapping[int, Site], before_round: Callable[[int], None] = lambda number: None) -> None:
        self._sites = dict(sites)
        self._before_round = before_round
        self._asked: list[tuple[int, Question]] = []
        self.sent: list[tuple[RoundPlan, dict[str, Tensor]]] = []  # one for each question, whoever got it
        self.asked: list[tuple[int, list[int]]] = []  # round and sites of each question

    def sites(self) -> list[int]:
        return sorted(self._sites)

    def name(self, site: int) -> str:
        return str(site)

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        assert question.weights is not None
        plan = RoundPlan.model_validate_json(question.document)
        assert plan.exchange == question.exchange
        self._before_round(plan.round)
        self.sent.append((plan, weights_of(question.weights)))
        self.asked.append((plan.round, list(sites)))
        self._asked += [(site, question) for site in sites if self._sites[site] is not silent]

    def receive(self) -> Iterator[Reply]:
        asked, self._asked = self._asked, []
        for site, question in asked:
            assert question.weights is not None
            plan = RoundPlan.model_validate_json(question.document)
            parcel = self._sites[site](plan, weights_of(question.weights))
            yield Reply(site, parcel) if parcel else Reply(site, None, "the site was lost", lost=True)

    def carried(self) -> Mapping[int, int]:
        return {}


def weights_of(path: Path) -> dict[str, Tensor]:
    """The weights of a file, in memory of their own."""
    return {name: torch.from_numpy(array.copy()) for name, array in unpack(path.read_bytes()).items()}


def numbers(plan: RoundPlan, **changes: float) -> dict[str, int | float]:
    """A good report on a plan."""
    return {
        "outcome": 0,
        "round": plan.round,
        "exchange": plan.exchange,
        "examples": 10,
        "images_seen": plan.local_images if plan.action == "train" else 0,
        "loss_before": 0.5,
        "loss_after": 0.25,
        "seconds": 0.1,
        "skipped_steps": 0,
        **changes,
    }


def parcel(plan: RoundPlan, update: Mapping[str, Tensor], **changes: float) -> Parcel:
    """A good reply to a plan: `update` encoded as it wants, nothing where it wants nothing."""
    arrays = encode(update, plan.encoding, plan.topk_share) if plan.action == "train" else {}
    return Parcel(arrays, numbers(plan, **changes))


def learner(step: float, **changes: float) -> Answering:
    """Moves every weight by `step` times the number of the round."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        update = {name: torch.full(shape, step * plan.round) for name, shape in plan.shapes().items()}
        return parcel(plan, update, **changes)

    return act


def drawing(seed: int, **changes: float) -> Answering:
    """An update that depends on the round and, where they are of its shape, on the weights that came."""

    def act(plan: RoundPlan, weights: dict[str, Tensor]) -> Parcel:
        randomness = torch.Generator().manual_seed(plan.round * 1000 + seed)
        update = {}
        for name, shape in plan.shapes().items():
            update[name] = 0.1 * torch.randn(shape, generator=randomness)
            if name in weights:
                update[name] -= 0.1 * weights[name]
        return parcel(plan, update, **changes)

    return act


def silent(plan: RoundPlan, weights: dict[str, Tensor]) -> None:
    raise AssertionError("never asked")


def config(folder: Path, **changes: Any) -> FederationConfig:
    """Three rounds of 64 images in batches of 8."""
    values = {
        "prior_sha256": sha256_of(folder / "prior.safetensors"),
        "federation": "0123456789abcdef",
        "rounds": 3,
        "local_images": 64,
        "batch_size": 8,
        "join_deadline": 60.0,
        "round_deadline": 30.0,
    }
    return FederationConfig.model_validate(values | changes)


def federate(link: InProcess, folder: Path, time: Time | None = None, **changes: Any) -> None:
    """Run a federation to its end."""
    time = time or Time()
    run_federation(link, folder, config(folder, **changes), pause=time.pause, clock=time.clock)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What the rounds said, of one kind."""
    return [event for event in read_lines(folder / "events.jsonl") if event["event"] == kind]


@pytest.fixture(scope="session")
def small(metadata: CheckpointMetadata) -> CheckpointMetadata:
    """A masked prior of one block: rounds are tested by the hundred, and do not care what the weights are of."""
    shape = ModelConfig(image_size=4, channels=1, patch_size=2, dim=8, depth=1, heads=1)
    return metadata.model_copy(update={"model": shape})


@pytest.fixture(scope="session")
def prior(small: CheckpointMetadata) -> dict[str, Tensor]:
    """Its weights, large enough for the long steps of these tests to be short beside them; nobody may change them."""
    return {name: 32 * p.detach() for name, p in build_model(small.model, seed=1).named_parameters()}


@pytest.fixture
def new_folder(tmp_path: Path, prior: dict[str, Tensor], small: CheckpointMetadata) -> Callable[[str], Path]:
    """Makes a FED with a masked prior."""

    def make(name: str) -> Path:
        save_checkpoint(tmp_path / name / "prior.safetensors", prior, small)
        return tmp_path / name

    return make


@pytest.fixture
def folder(new_folder: Callable[[str], Path]) -> Path:
    """FED with a masked prior."""
    return new_folder("fed")


@pytest.fixture
def plan(small: CheckpointMetadata) -> RoundPlan:
    """The second of three rounds."""
    return RoundPlan(
        federation="0123456789abcdef",
        exchange=77,
        action="train",
        round=2,
        rounds=3,
        local_images=64,
        batch_size=8,
        lr=1e-3,
        seed=0,
        model=small,
    )
