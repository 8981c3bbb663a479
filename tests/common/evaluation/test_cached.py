"""Features of real images are computed once, and never taken from a file that is not exactly about them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from maskdm.data.corpus import Corpus
from maskdm.errors import UsageError
from maskdm.evaluation.cached import RealFeatures, real_features
from maskdm.evaluation.distances import moments
from maskdm.evaluation.extractors.features import Extractor

from .conftest import Counting

MakeCorpus = Callable[[int], Corpus]


@pytest.fixture
def compute(tmp_path: Path, make_corpus: MakeCorpus, extractor: Extractor) -> Callable[..., RealFeatures]:
    corpus = make_corpus(30)

    def run(rows: int = 20, by: Extractor = extractor) -> RealFeatures:
        return real_features(corpus, np.arange(rows), by, title="features", batch_size=7, cache=tmp_path / "cache")

    return run


def only_file(folder: Path) -> Path:
    (path,) = (folder / "cache" / "features").iterdir()
    return path


def test_the_second_time_nothing_is_computed_and_the_user_is_told(
    compute: Callable[..., RealFeatures], counting: Counting, capsys: pytest.CaptureFixture[str]
) -> None:
    first = compute()
    assert counting.images == 20
    assert "from the cache" not in capsys.readouterr().err
    again = compute()
    assert counting.images == 20
    assert "features: from the cache" in capsys.readouterr().err
    assert again.features.equal(first.features)
    assert all(a.equal(b) for a, b in zip(again.moments, moments(first.features), strict=True))


def test_other_images_and_other_networks_are_kept_apart(
    compute: Callable[..., RealFeatures], counting: Counting, extractor: Extractor
) -> None:
    compute()
    compute(rows=10)
    compute(by=replace(extractor, sha256="1" * 64))
    compute(by=replace(extractor, resize="otherwise"))
    assert counting.images == 20 + 10 + 20 + 20


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of others"])
def test_a_damaged_file_is_computed_again(
    compute: Callable[..., RealFeatures], counting: Counting, tmp_path: Path, damage: str
) -> None:
    wanted = compute()
    path = only_file(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file(load_file(path), path, {"maskdm.cached-features": "another key"})
    again = compute()
    assert counting.images == 40
    assert again.features.equal(wanted.features)
    compute()
    assert counting.images == 40


def test_a_cache_that_cannot_be_written_names_the_remedy(
    tmp_path: Path, make_corpus: MakeCorpus, extractor: Extractor
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="set MASKDM_CACHE to another folder"):
        real_features(make_corpus(9), np.arange(9), extractor, title="x", cache=tmp_path / "file")


def test_features_stand_in_the_order_of_the_rows(tmp_path: Path, make_corpus: MakeCorpus, extractor: Extractor) -> None:
    corpus, rows = make_corpus(9), np.array([7, 2, 5])
    found = real_features(corpus, rows, extractor, title="x", cache=tmp_path)
    assert found.features.equal(extractor.features(torch.from_numpy(corpus.pixels[rows])))
