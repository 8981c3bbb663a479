"""docs/extending.md: each section's edits fit the code as it is, and its example then runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_, *PARTS = re.split(r"^## (.+)\n", (ROOT / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def apply(edits: str, house: Path) -> None:
    """Make the edits of a block: `--- FILE`, then `@@` before each place, whose lines must stand there exactly once."""
    for part in re.split(r"^--- ", edits, flags=re.MULTILINE)[1:]:
        name, *places = re.split(r"^@@\n", part, flags=re.MULTILINE)
        path = house / name.strip()
        for place in places:
            lines = place.splitlines()
            old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
            new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
            assert path.read_text().count(f"\n{old}") == 1, f"{name} does not hold, once:\n{old}"
            path.write_text(path.read_text().replace(f"\n{old}", f"\n{new}"))


def extended(title: str, house: Path) -> list[str]:
    """A copy of the code with what a section adds; returns what the section says to try."""
    for side in ("common", "server"):
        shutil.copytree(ROOT / side, house / side, ignore=shutil.ignore_patterns("__pycache__"))
    examples = []
    for language, text in BLOCK.findall(SECTIONS[title]):
        first = text.partition("\n")[0]
        if language == "diff":
            apply(text, house)
        elif first.startswith(("# common/", "# server/")):
            (house / first.removeprefix("# ")).write_text(text)
        else:
            examples.append(text)
    return examples


def test_each_thing_that_can_be_added_has_a_section() -> None:
    things = ["network", "mask", "sampler", "aggregation rule", "server optimiser", "corpus layout"]
    assert [title.split(maxsplit=1)[1] for title in SECTIONS] == things


@pytest.mark.parametrize("title", SECTIONS)
def test_the_edits_of_a_section_fit_the_code_as_it_is(title: str, tmp_path: Path) -> None:
    assert len(extended(title, tmp_path)) == 1
    for path in tmp_path.rglob("*.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_what_a_section_adds_works(title: str, tmp_path: Path) -> None:
    (example,) = extended(title, tmp_path)
    (tmp_path / "example.py").write_text(example)
    paths = os.pathsep.join(str(tmp_path / side) for side in ("common", "server"))
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
