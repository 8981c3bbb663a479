"""Sites to attack, one open to all plans and one with the default policy, and what comes without asking."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.attacks.site import FLOORS, Coordinator, Images, make_site, no_leak, prior_of, undefended

from maskdm.config import ModelConfig
from maskdm.federated.policy import SIMULATED
from maskdm_server.lab.faces import draw_faces

SMALL = ModelConfig(image_size=16, channels=3, patch_size=4, dim=64, depth=2, heads=2)
ONE_TOKEN = ModelConfig(image_size=8, channels=1, patch_size=8, dim=128, depth=2, heads=2)
Make = Callable[..., Coordinator]


@pytest.fixture(scope="session")
def images() -> Images:
    return draw_faces(240, "clinic", size=16, seed=5)


@pytest.fixture(scope="session")
def public() -> Images:
    """What an attacker has anyway."""
    return draw_faces(600, "public", size=16, seed=7)


@pytest.fixture(scope="session")
def free(images: Images, public: Images) -> float:
    """dB that come without asking anything."""
    return no_leak(images, public)


@pytest.fixture
def attacker(tmp_path: Path, images: Images) -> Iterator[Make]:
    """Of a site with a policy that lets every plan in, and without defences; keywords change the attacker."""

    def make(labels: list[str] | None = None, **changes: Any) -> Coordinator:
        policy = SIMULATED.model_copy(update={"share_labels": tuple(sorted(set(labels or ())))})
        folder = make_site(tmp_path / "site", images, labels or (), policy=policy, secret_seed=0)
        return Coordinator(folder, prior_of(SMALL), **{"secret_seed": 0, **changes})

    with undefended():  # a defence of all sites would leave nothing to see the attacks work at
        yield make


@pytest.fixture
def outsider(tmp_path: Path, images: Images) -> Make:
    """Of a site with the default policy, whose draws it does not know, with plans as short as that lets in."""

    def make(labels: list[str] | None = None, **changes: Any) -> Coordinator:
        folder = make_site(tmp_path / "site", images, labels or (), secret_seed=11)  # which is told nobody
        return Coordinator(folder, prior_of(SMALL), FLOORS, **changes)

    return make
