"""The table of trips says what is so: the counts are made anew, with the real commands, and held against it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
KNOWN = json.loads((RESULTS / "trips.json").read_text())

pytestmark = pytest.mark.slow


def test_every_byte_is_handled_as_often_as_the_table_says(tmp_path: Path) -> None:
    script, out = RESULTS.parent / "trips.py", tmp_path / "trips.json"
    subprocess.run([sys.executable, script, "--json", out], check=True, capture_output=True)
    assert json.loads(out.read_text()) == KNOWN["after"]


def test_the_aims_are_met() -> None:
    after = KNOWN["after"]
    known, unknown = (after[f"image, where {name} the model"] for name in ("the kit names", "no kit names"))
    chosen = known["join"]["images decoded"]
    assert known["first plan"] == dict.fromkeys(known["first plan"], 0), "all is done at the join"
    assert unknown["first plan"]["images decoded"] == chosen
    assert known["next join"]["images hashed"] == unknown["next join"]["images hashed"] == 0
    for rule in ("mean", "median"):
        assert after[f"update, {rule}, bf16"]["from the file to the sum"]["bytes read"] == 2


def test_the_page_shows_these_counts() -> None:
    page = (RESULTS / "README.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", page.partition("## Trips")[2], re.MULTILINE)
    shown = {(way, step): (before, after) for way, step, before, after in rows}
    for way, steps in KNOWN["after"].items():
        for step, counts in steps.items():
            texts = (in_words(found[way][step]) for found in (KNOWN["before"], KNOWN["after"]))
            assert shown[way, step] == tuple(texts), (way, step)
            assert counts


def in_words(counts: dict[str, float]) -> str:
    return ", ".join(f"{what} {count:g}" for what, count in counts.items())
