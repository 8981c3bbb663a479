"""docs/quickstart.ipynb: its code runs from top to bottom, and it is committed without what it printed and drew."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CELLS = json.loads((DOCS / "quickstart.ipynb").read_text())["cells"]


def test_it_is_committed_without_outputs() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_its_links_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text)
    assert links
    assert [link for link in links if not (DOCS / link).exists()] == []


@pytest.mark.slow
def test_its_code_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
    (tmp_path / "quickstart.py").write_text("\n\n".join(cells))
    done = subprocess.run(
        [sys.executable, "quickstart.py"],
        cwd=tmp_path,
        env={**os.environ, "MASKDM_QUICKSTART_BUDGET": "0.01", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(prior|clinic alone|federation) ", done.stdout, re.MULTILINE) == [
        *("prior", "clinic alone", "federation")
    ]
    assert (tmp_path / "maskdm-quickstart" / "federation" / "model.safetensors").exists()
