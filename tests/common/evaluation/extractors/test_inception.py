"""Inception from a file: the names FID and KID, the same features as torchmetrics', and nothing unpickled."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskdm.errors import UsageError
from maskdm.evaluation.extractors import inception
from maskdm.evaluation.extractors.features import open_extractor
from maskdm.run.runfolder import sha256_of

fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as the published one, old format included, with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda url, progress: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = fidelity.FeatureExtractorInceptionV3("random", ["2048"])
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def pinned(weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_of(weights)[:8])
    return weights


def images(channels: int) -> Tensor:
    return torch.randint(0, 256, (2, channels, 24, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_features_are_those_of_torch_fidelity_and_distances_are_called_fid_and_kid(pinned: Path) -> None:
    extractor = open_extractor(pinned)
    assert (extractor.frechet, extractor.kernel) == ("FID", "KID")
    assert extractor.sha256 == sha256_of(pinned)
    theirs = fidelity.FeatureExtractorInceptionV3("theirs", ["2048"], str(pinned))(images(3))[0]
    assert extractor.features(images(3)).shape == (2, 2048)
    assert torch.allclose(extractor.features(images(3)), theirs, rtol=1e-4, atol=1e-5)


def test_grey_images_are_seen_as_grey_colours(pinned: Path) -> None:
    extractor = open_extractor(pinned)
    grey = images(1)
    assert torch.equal(extractor.features(grey), extractor.features(grey.expand(-1, 3, -1, -1)))


def test_a_file_of_another_hash_is_not_taken_for_inception(weights: Path) -> None:
    with pytest.raises(UsageError, match="is no feature network that MaskDM knows"):
        open_extractor(weights)


class Evil:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.trace,))


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"fc.weight": Evil(trace)}, path)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_of(path)[:8])
    with pytest.raises(UsageError, match="holds no weights of Inception v3"):
        open_extractor(path)
    path.write_bytes(pickle.dumps(Evil(trace), protocol=2))
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_of(path)[:8])
    with pytest.raises(UsageError, match="holds no weights of Inception v3"):
        open_extractor(path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it would have


def test_weights_of_another_network_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, path)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_of(path)[:8])
    with pytest.raises(UsageError, match="holds no weights of Inception v3"):
        open_extractor(path)


def test_without_torch_fidelity_the_remedy_is_named(pinned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UsageError, match=r"pip install 'maskdm\[fid\]'"):
        open_extractor(pinned)
