"""How often a site lists, hashes and decodes its images until the first step: counted, not timed."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskdm.config import ModelConfig
from maskdm.data import pixels
from maskdm.data.sources.source import open_source
from maskdm.errors import DataError
from maskdm_client.folder.hashes import HASHES
from maskdm_client.folder.settings import SiteSettings
from maskdm_client.work.local_data import CORPUS, choose_slice, local_images, read_slice
from maskdm_server.lab.faces import draw_faces

from ..conftest import LENIENT

IMAGES, LONG_AGO = 24, 1_000_000_000
MODEL = ModelConfig.preset("S", image_size=16, channels=3)

Count = Callable[[], Counter[str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Pictures in two folders, written long ago."""
    folder = tmp_path / "data"
    for number, face in enumerate(draw_faces(IMAGES)):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(face).save(path)
        os.utime(path, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def site(data: Path) -> SiteSettings:
    return SiteSettings(data=data, fraction=0.5, threads=1, policy=LENIENT)


@pytest.fixture
def count(data: Path, monkeypatch: pytest.MonkeyPatch) -> Count:
    """What was done to the images since it was last asked."""
    done: Counter[str] = Counter()
    scandir, sha256, decode, read = os.scandir, hashlib.sha256, pixels.decode, Path.read_bytes
    contents = {read(path) for path in data.rglob("*.png")}

    def scanned(path: Any = ".") -> Any:
        done["root listed"] += str(path) == str(data)
        return scandir(path)

    def hashed(content: Any = b"", **options: Any) -> Any:
        done["hashed"] += bytes(content) in contents
        return sha256(content, **options)

    def decoded(*asked: Any) -> Any:
        done["decoded"] += 1
        return decode(*asked)

    monkeypatch.setattr(os, "scandir", scanned)
    monkeypatch.setattr(hashlib, "sha256", hashed)
    monkeypatch.setattr(pixels, "decode", decoded)

    def asked() -> Counter[str]:
        found = +done
        done.clear()
        return found

    return asked


def join(site: SiteSettings, folder: Path, model: ModelConfig | None = None) -> int:
    """Join as the command does; how many images take part."""
    source = open_source(site.data)  # which looks whether there is any image at all
    chosen, _ = choose_slice(source, site, folder, model)
    return len(chosen.train) + len(chosen.held_out)


def test_where_the_model_is_known_images_are_listed_hashed_and_decoded_once_before_the_first_step(
    site: SiteSettings, tmp_path: Path, count: Count
) -> None:
    chosen = join(site, tmp_path, MODEL)
    assert 2 < chosen < IMAGES
    assert count() == {"root listed": 1 + 1, "hashed": IMAGES, "decoded": chosen}
    images = local_images(site, tmp_path, 16, 3)
    assert len(images.train) + len(images.held_out) == chosen
    assert not count(), "the pixels are there, and the images are needed no more"


def test_where_it_is_not_they_are_decoded_once_to_be_compared_and_once_when_it_is(
    site: SiteSettings, tmp_path: Path, count: Count
) -> None:
    chosen = join(site, tmp_path)
    assert count() == {"root listed": 1 + 1, "hashed": IMAGES, "decoded": chosen}
    local_images(site, tmp_path, 16, 3)
    assert count() == {"root listed": 1 + 1, "decoded": chosen}, "in another process, and later"


def test_whenever_pixels_are_packed_the_same_ones_stand_on_the_same_sides(site: SiteSettings, tmp_path: Path) -> None:
    early, late = tmp_path / "early", tmp_path / "late"
    join(site, early, MODEL)
    join(site, late)
    assert read_slice(early) == read_slice(late)
    first, second = (local_images(site, folder, 16, 3) for folder in (early, late))
    assert first.corpus.manifest.sha256 == second.corpus.manifest.sha256


def test_what_has_not_changed_is_not_hashed_at_the_next_join(
    site: SiteSettings, data: Path, tmp_path: Path, count: Count
) -> None:
    join(site, tmp_path, MODEL)
    count()
    before = read_slice(tmp_path)
    join(site, tmp_path, MODEL)
    assert count() == {"root listed": 1 + 1}
    assert read_slice(tmp_path) == before
    os.utime(data / "a" / "0.png", (LONG_AGO + 1, LONG_AGO + 1))
    join(site, tmp_path, MODEL)
    assert count()["hashed"] == 1
    (data / "a" / "2.png").write_bytes((data / "a" / "0.png").read_bytes())  # and was written just now
    for _ in range(2):
        join(site, tmp_path, MODEL)
        assert count()["hashed"] >= 1, "it could be written again within the same tick of the clock"


@pytest.mark.parametrize("damage", ["cut off", "turned", "empty"])
def test_hashes_that_are_damaged_are_made_anew(site: SiteSettings, tmp_path: Path, count: Count, damage: str) -> None:
    join(site, tmp_path)
    content = (tmp_path / HASHES).read_bytes()
    damaged = {"cut off": content[:-1], "turned": bytes([content[0] ^ 1]) + content[1:], "empty": b""}
    (tmp_path / HASHES).write_bytes(damaged[damage])
    count()
    join(site, tmp_path)
    assert count()["hashed"] == IMAGES
    assert (tmp_path / HASHES).read_bytes() == content


def test_hashes_are_for_this_user_alone_and_name_no_image(site: SiteSettings, tmp_path: Path) -> None:
    join(site, tmp_path)
    assert (tmp_path / HASHES).stat().st_mode & 0o777 == 0o600
    assert b"png" not in (tmp_path / HASHES).read_bytes()


def test_an_image_that_was_replaced_after_the_join_is_not_trained_on(
    site: SiteSettings, data: Path, tmp_path: Path
) -> None:
    chosen = join(site, tmp_path)
    name = next(iter(read_slice(tmp_path).train.values()))
    Image.fromarray(draw_faces(1, seed=9)[0]).save(data / name)
    images = local_images(site, tmp_path, 16, 3)
    assert len(images.train) + len(images.held_out) == chosen - 1


def test_an_image_that_was_replaced_before_the_next_join_is_packed_anew(
    site: SiteSettings, data: Path, tmp_path: Path
) -> None:
    everything = site.model_copy(update={"fraction": 1.0})
    join(everything, tmp_path, MODEL)
    Image.fromarray(draw_faces(1, seed=9)[0]).save(data / "a" / "0.png")
    join(everything, tmp_path, MODEL)
    images = local_images(everything, tmp_path, 16, 3)
    assert len(images.train) + len(images.held_out) == IMAGES


def test_a_join_that_is_refused_leaves_no_pixels(site: SiteSettings, tmp_path: Path) -> None:
    refused = site.model_copy(update={"policy": LENIENT.model_copy(update={"min_images": IMAGES})})
    with pytest.raises(DataError, match="min-images"):
        join(refused, tmp_path, MODEL)
    assert not (tmp_path / CORPUS).exists()


def test_a_model_of_so_many_channels_that_no_image_has_them_is_refused_in_one_line(
    site: SiteSettings, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no images for a model of 4 channels"):
        join(site, tmp_path, ModelConfig.preset("S", image_size=16, channels=4))


def test_a_file_that_was_exchanged_for_one_of_its_size_and_time_is_hashed_again(
    site: SiteSettings, tmp_path: Path, data: Path, count: Count
) -> None:
    """E.g. a copy from which a name was taken out, by a program that keeps times."""
    chosen = join(site, tmp_path)
    count()
    path, other = sorted(data.rglob("*.png"))[0], tmp_path / "other.png"
    other.write_bytes(path.read_bytes())
    os.utime(other, (LONG_AGO, LONG_AGO))
    other.replace(path)
    assert join(site, tmp_path) == chosen
    assert count()["hashed"] == 1
