"""The drawn corpus of the demonstration."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm_server.lab.faces import SITES, draw_faces, write_faces


def test_portraits_are_colour_pictures_that_the_same_seed_draws_again() -> None:
    first = draw_faces(4, size=16, seed=1)
    assert first.shape == (4, 16, 16, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, draw_faces(4, size=16, seed=1))
    assert not np.array_equal(first, draw_faces(4, size=16, seed=2))


def test_portraits_differ_from_each_other_and_have_contrast() -> None:
    faces = draw_faces(16, size=16, seed=0)
    assert len({face.tobytes() for face in faces}) == 16
    assert float(faces.reshape(16, -1).std(axis=1).min()) > 10


def test_large_corpora_are_drawn_in_whole_chunks() -> None:
    assert np.array_equal(draw_faces(5, size=8, chunk=2)[:4], draw_faces(4, size=8, chunk=2))
    assert draw_faces(5, size=8, chunk=2).shape == (5, 8, 8, 3)


@pytest.mark.parametrize("domain", SITES)
def test_each_institution_sees_something_of_its_own(domain: str) -> None:
    assert domain in ("clinic", "laboratory", "workshop")
    public, own = draw_faces(200, size=16), draw_faces(200, domain, size=16)  # type: ignore[arg-type]
    assert float(np.abs(public.mean(axis=0) - own.mean(axis=0)).max()) > 15


def test_portraits_are_written_as_pictures_once(tmp_path: Path) -> None:
    write_faces(tmp_path, 3, "clinic", size=16)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    drawn = draw_faces(3, "clinic", size=16)
    assert all(np.array_equal(np.asarray(Image.open(file)), one) for file, one in zip(files, drawn, strict=True))
    before = [file.stat().st_mtime_ns for file in files]
    write_faces(tmp_path, 3, "clinic", size=16)
    assert [file.stat().st_mtime_ns for file in files] == before
