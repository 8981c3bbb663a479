"""One version: of the package, of what it is cited as, and of the newest part of the changelog that has a date."""

import re
import tomllib
from datetime import date
from pathlib import Path

import yaml

from maskdm import __version__

ROOT = Path(__file__).parents[2]


def test_package_citation_and_changelog_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    source = (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text()
    assert re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE) == [__version__]

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == project["project"]["license"]
    assert citation["authors"] == [{"name": "The MaskDM authors"}]

    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = citation["date-released"]
    assert isinstance(released, date)
    assert headings[1] == f"[{__version__}] – {released.isoformat()}"
