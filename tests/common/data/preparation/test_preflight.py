"""What a person is told about a corpus before it is trained on."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from maskdm.config import ModelConfig
from maskdm.data.corpus import in_memory
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.pack import pack
from maskdm.data.preparation.preflight import compare, inspect, lines, write_report
from maskdm.data.sources.source import open_source
from maskdm.metadata import CheckpointMetadata
from maskdm_server.lab.faces import draw_faces

Pixels = NDArray[np.uint8]


def faces(count: int = 200) -> Pixels:
    return np.moveaxis(draw_faces(count, size=16), 3, 1)


@pytest.fixture
def prior(metadata: CheckpointMetadata) -> CheckpointMetadata:
    """Of colour faces of 16×16 pixels."""
    model = ModelConfig(image_size=16, channels=3, patch_size=4, dim=16, depth=2, heads=2)
    return metadata.model_copy(update={"model": model, "corpus": in_memory(faces()).manifest.statistics})


def test_images_of_the_priors_own_kind_pass_without_a_warning(prior: CheckpointMetadata) -> None:
    others = np.moveaxis(draw_faces(150, "clinic", size=16, seed=9), 3, 1)
    report = inspect(in_memory(others), prior)
    assert report.warnings == ()
    assert (report.images, report.near_duplicates >= 0) == (150, True)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (lambda pixels: pixels // 8, "intensities are unlike the prior's"),
        (lambda pixels: np.repeat(pixels[:, :1], 3, axis=1), "most images are grey, and the prior saw colour ones"),
        (lambda pixels: np.full_like(pixels, 7), "nearly uniform"),
        (lambda pixels: pixels[:20], "only 20 images"),
        (lambda pixels: np.concatenate([pixels, pixels[:40] // 2 * 2]), "nearly repeat one another"),
        (lambda pixels: np.concatenate([pixels, pixels[:40]]), "40 files repeat another one byte by byte"),
    ],
)
def test_images_unlike_what_the_prior_saw_are_warned_of(
    prior: CheckpointMetadata, change: Callable[[Pixels], Pixels], warning: str
) -> None:
    pixels = change(faces())
    corpus = in_memory(pixels)
    if "grey" in warning:
        corpus.index["grey"] = 1
        statistics = corpus.manifest.statistics.model_copy(update={"grey": 1.0})
        object.__setattr__(corpus, "manifest", corpus.manifest.model_copy(update={"statistics": statistics}))
    assert any(warning in found for found in inspect(corpus, prior).warnings)


@pytest.mark.parametrize(("size", "warning"), [(8, "smaller than the model's 16x16"), (400, "small details vanish")])
def test_originals_of_another_resolution_are_warned_of(
    tmp_path: Path, prior: CheckpointMetadata, size: int, warning: str
) -> None:
    for number, pixels in enumerate(draw_faces(6, size=16)):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((size, size)).save(path)
    policy = PixelPolicy(image_size=16, channels=3, upscale=True)
    corpus = pack(open_source(tmp_path / "images"), tmp_path / "corpus", policy)
    assert any(warning in found for found in compare(corpus, prior))


def test_the_report_counts_everything_and_leaves_a_sheet_to_look_at(tmp_path: Path) -> None:
    for number, pixels in enumerate(draw_faces(12, size=16)):
        path = tmp_path / "images" / f"label{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((16 + number, 16)).save(path)
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    policy = PixelPolicy(image_size=16, channels=3)
    corpus = pack(open_source(tmp_path / "images"), tmp_path / "corpus", policy)
    report = inspect(corpus)
    assert report.labels == {"label0": 6, "label1": 6}
    assert report.skipped == {"not a readable picture": 1}
    assert (report.smallest, report.largest) == ((16, 16), (27, 16))
    assert any("1 of 13 files cannot be used" in warning for warning in report.warnings)
    shown = "\n".join(lines(report, policy))
    for part in ("12 at 16x16", "16x16 to 27x16", "label0 6, label1 6", "skipped      1: not a readable picture"):
        assert part in shown
    assert "broken.png" not in shown
    write_report(corpus, tmp_path / "corpus", report)
    with Image.open(tmp_path / "corpus" / "contact-sheet.png") as sheet:
        assert sheet.width >= 4 * 96
    assert "broken.png" not in (tmp_path / "corpus" / "preflight.json").read_text()
