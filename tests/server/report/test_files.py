"""Files that somebody is writing, or that are none."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm_server.report.files import Followed, Row, read_row, read_rows, read_settings
from maskdm_server.report.page.pictures import WIDEST, read_picture


class Number(Row):
    number: int


class Numbers:
    def __init__(self) -> None:
        self.found: list[int] = []

    def take(self, line: bytes) -> None:
        self.found.append(int(line))


def test_a_growing_file_is_read_line_by_line_each_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    followed = Followed(path, Numbers)
    assert followed.now().found == []
    path.write_text("1\n2\n3")
    assert followed.now().found == [1, 2]  # the third is not whole yet
    with path.open("a") as file:
        file.write("4\n5\n")
    assert followed.now().found == [1, 2, 34, 5]
    assert followed.now().found == [1, 2, 34, 5]


@pytest.mark.parametrize("how", ["replaced", "cut"])
def test_another_file_in_its_place_is_read_from_its_beginning(tmp_path: Path, how: str) -> None:
    path = tmp_path / "lines"
    path.write_text("1\n2\n")
    followed = Followed(path, Numbers)
    assert followed.now().found == [1, 2]
    if how == "replaced":
        (tmp_path / "other").write_text("7\n8\n9\n")
        (tmp_path / "other").replace(path)
        assert followed.now().found == [7, 8, 9]
    else:
        path.write_text("7\n")
        assert followed.now().found == [7]


def test_lines_that_cannot_be_read_are_counted_and_newer_keys_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"number": 1, "new": {}}\nnot json\n{"number": "x"}\n{"number": 2}\n{"num')
    rows, unreadable = read_rows(path, Number)
    assert ([row.number for row in rows], unreadable) == ([1, 2], 2)
    assert read_rows(tmp_path / "missing", Number) == ([], 0)
    assert read_row(path, Number) is None


def test_settings_are_flat_and_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"kind": "x", "simulation": {"data": ["/home/jane/patients/a.npz", "b"], "alpha": 0.5}}))
    assert read_settings(path) == {"kind": "x", "simulation.data": ["…/a.npz", "b"], "simulation.alpha": 0.5}
    path.write_text("[]")
    assert read_settings(path) is None
    path.write_text(10_000 * "[")
    assert read_settings(path) is None


def test_a_small_picture_goes_in_as_it_is_and_a_large_one_smaller(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    Image.new("L", (30, 20)).save(small)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 2000, 3), dtype=np.uint8)).save(large)
    kept, shrunk = read_picture(small), read_picture(large)
    assert kept is not None
    assert shrunk is not None
    assert (kept.width, kept.height, kept.source[:15]) == (30, 20, "data:image/png;")
    assert (shrunk.width, shrunk.height, shrunk.source[:16]) == (WIDEST, WIDEST // 2, "data:image/webp;")
    assert len(shrunk.source) < 1_000_000 < large.stat().st_size


def test_what_is_no_png_is_no_picture(tmp_path: Path) -> None:
    whole = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(whole, format="PNG")
    (tmp_path / "torn.png").write_bytes(whole.getvalue()[:60])
    (tmp_path / "svg.png").write_text('<svg onload="alert(1)"/>')
    Image.new("RGB", (8, 8)).save(tmp_path / "gif.png", format="GIF")
    (tmp_path / "empty.png").touch()
    for name in ("torn", "svg", "gif", "empty", "missing"):
        assert read_picture(tmp_path / f"{name}.png") is None, name
