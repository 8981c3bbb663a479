"""The Flower app bundle: the same bytes everywhere, and bytes that Flower takes."""

import hashlib
from pathlib import Path

import pytest

from maskdm.federated.bundle import bundle, bundle_sha256

NAMES = ("flower-app", "flower-simulation")


@pytest.mark.parametrize("name", NAMES)
def test_flower_installs_a_bundle_of_ours(name: str, tmp_path: Path) -> None:
    from flwr.cli.config_utils import get_fab_config
    from flwr.cli.install import install_from_fab

    assert get_fab_config(bundle(name))["project"]["dependencies"] == []
    installed = install_from_fab(bundle(name), tmp_path, skip_prompt=True)
    assert [path.name for path in installed.iterdir()] == ["pyproject.toml"]


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_is_known_by_the_hash_of_its_bytes(name: str) -> None:
    assert bundle_sha256(name) == hashlib.sha256(bundle(name)).hexdigest()
    bundle.cache_clear()
    assert bundle_sha256(name) == hashlib.sha256(bundle(name)).hexdigest()
