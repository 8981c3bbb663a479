"""The figures of docs/method.md: small files that stand alone and show what the library computes."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from maskdm.config import MaskConfig, ModelConfig
from maskdm.networks.masking import effective_ratio, visible_count

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = runpy.run_path(str(DOCS / "figures.py"))["FIGURES"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_whole_small_and_reaches_for_nothing_outside(name: str) -> None:
    for text in (FIGURES[name](), (DOCS / "images" / f"{name}.svg").read_text()):
        assert len(text.encode()) < 100_000
        root = ElementTree.fromstring(text)
        assert root[0].tag.endswith("title")
        assert root[0].text
        outside = [value for part in root.iter() for key, value in part.attrib.items() if key.endswith("href")]
        assert all(value.startswith("data:image/png;base64,") for value in outside)
        assert "script" not in text
        assert "prefers-color-scheme:dark" in text


def test_the_figure_of_masks_says_how_much_is_really_hidden() -> None:
    text = (DOCS / "images" / "masks.svg").read_text()
    grid = ModelConfig.preset("S", image_size=64, channels=3).grid
    for kind in ("block", "patch", "crop"):
        for ratio in (0.5, 0.75, 0.9):
            mask = MaskConfig.model_validate({"kind": kind, "ratio": ratio})
            assert f"{ratio:.0%} asked, {effective_ratio(mask, grid):.1%} hidden" in text
            assert f">{visible_count(mask, grid)} of {grid**2}<" in text


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_shown_in_a_page(name: str) -> None:
    assert any(f"images/{name}.svg" in page.read_text() for page in DOCS.rglob("*.md"))
