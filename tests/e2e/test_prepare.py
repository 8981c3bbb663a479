"""`prepare` and `doctor` as a user meets them, on images made here and, where they are, on real ones."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.data.corpus import Corpus, in_memory
from maskdm.data.sources.source import open_source
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.runfolder import read_lines
from maskdm.training.checkpoint import load_checkpoint, save_checkpoint
from maskdm_client.folder.settings import SiteSettings
from maskdm_client.work.local_data import choose_slice, local_images
from maskdm_server.lab.faces import draw_faces

from .conftest import Run, Started, documented, write_faces

REAL = Path(os.environ.get("MASKDM_DATA", Path(__file__).parents[3] / "shared" / "data"))
SMALL = ("--size", "tiny", "--block-size", "2", "--mask-ratio", "0.5", "--batch-size", "8", "--images", "16")


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Five pictures of each of 30 patients, and a file that is none."""
    for number, pixels in enumerate(draw_faces(150, size=16)):
        path = tmp_path / "hospital" / f"ward{number % 3}" / f"patient{number // 5:02}-{number % 5}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "hospital" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "hospital"


@pytest.mark.parametrize("program", ["maskdm-server", "maskdm-client"])
def test_both_programs_prepare_a_corpus_and_report_on_it(run: Run, hospital: Path, program: str) -> None:
    code, error = run(program, "prepare", "--data", "hospital", "--out", "corpus", "--image-size", "16")
    assert code == 0, error
    for line in ("150 at 16x16, 3 channels", "ward0 50, ward1 50, ward2 50", "1: not a readable picture"):
        assert line in error
    assert "broken.png" not in error
    assert len(Corpus.open(hospital.parent / "corpus")) == 150
    assert {"preflight.json", "contact-sheet.png"} <= {path.name for path in (hospital.parent / "corpus").iterdir()}
    assert run(program, "prepare", "--data", "hospital", "--out", "corpus", "--image-size", "16")[0] == 0


def test_a_prepared_corpus_trains_and_says_its_own_size(run: Run, hospital: Path, tmp_path: Path) -> None:
    assert run("maskdm-server", "prepare", "--data", "hospital", "--out", "corpus", "--image-size", "16")[0] == 0
    code, error = run("maskdm-server", "pretrain", "--data", "corpus", "--out", "run", *SMALL)
    assert code == 0, error
    assert "packing" not in error
    _, metadata = load_checkpoint(tmp_path / "run" / "prior.safetensors")
    assert (metadata.model.image_size, metadata.model.channels) == (16, 3)
    assert metadata.corpus == Corpus.open(tmp_path / "corpus").manifest.statistics
    code, error = run("maskdm-server", "pretrain", "--data", "corpus", "--out", "other", *SMALL, "--image-size", "32")
    assert (code, "was packed at 16x16" in error, "prepare --image-size 32" in error) == (2, True, True)


def test_a_corpus_changed_after_packing_does_not_train(run: Run, hospital: Path, tmp_path: Path) -> None:
    assert run("maskdm-server", "prepare", "--data", "hospital", "--out", "corpus", "--image-size", "16")[0] == 0
    data = bytearray((tmp_path / "corpus" / "images.npy").read_bytes())
    data[5000] ^= 1
    (tmp_path / "corpus" / "images.npy").write_bytes(data)
    code, error = run("maskdm-server", "pretrain", "--data", "corpus", "--out", "run", *SMALL)
    assert (code, "images.npy changed after it was packed" in error) == (2, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--data", "nowhere"), "--data nowhere does not exist"),
        (("--data", "empty"), "--data empty holds no images"),
        (("--data", "torn.zip"), "--data torn.zip is not a whole archive: copy it again"),
        (("--data", "hospital", "--channels", "2"), "--channels 2: give 1, 3 or auto"),
        (("--data", "hospital", "--channels", "1"), "colour images, but the model has one channel"),
        (("--data", "hospital", "--image-size", "64"), "none of 151 images can be used (150: smaller than 64x64)"),
        (("--data", "hospital", "--image-size", "3"), "--image-size 3"),
        (("--data", "hospital", "--window", "5"), "--window 5: give two numbers"),
        (("--data", "hospital", "--window", "9,1"), "window 9,1: the first must be below the second"),
        (("--data", "hospital", "--group-regex", "doctor"), "--group-regex doctor: fits none of the images' names"),
        (("--data", "hospital", "--layout", "unheard"), "--layout unheard"),
        (("--data", "hospital", "--prior", "none.safetensors"), "--prior none.safetensors does not exist"),
    ],
)
def test_a_mistake_in_prepare_is_one_line_and_leaves_no_corpus(
    run: Run, hospital: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.zip").write_bytes(b"PK\x03\x04 and then nothing")
    code, error = run("maskdm-server", "prepare", "--out", "corpus", "--image-size", "16", *arguments)
    assert code == 2, error
    assert expected in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "corpus" / "manifest.json").exists()


def test_doctor_is_green_for_fitting_images_and_red_for_others(run: Run, hospital: Path, tmp_path: Path) -> None:
    model = ModelConfig(image_size=16, channels=3, patch_size=4, dim=16, depth=2, heads=2)
    metadata = CheckpointMetadata(
        model=model,
        diffusion=DiffusionConfig(),
        mask=MaskConfig(kind="none", ratio=0),
        effective_mask_ratio=0,
        images_seen=1,
        seed=0,
        corpus=in_memory(np.moveaxis(draw_faces(60, size=16), 3, 1)).manifest.statistics,
    )
    save_checkpoint(tmp_path / "prior.safetensors", dict(build_model(model).named_parameters()), metadata)
    code, error = run("maskdm-client", "doctor", "--data", "hospital", "--prior", "prior.safetensors")
    assert (code, "warning" in error) == (0, False), error
    assert (tmp_path / "maskdm-doctor" / "contact-sheet.png").exists()
    np.save(tmp_path / "dark.npy", draw_faces(200, size=16) // 16)
    code, error = run("maskdm-client", "doctor", "--data", "dark.npy", "--prior", "prior.safetensors")
    assert (code, "intensities are unlike the prior's" in error) == (1, True), error


def settings(hospital: Path, **changes: object) -> SiteSettings:
    return SiteSettings.model_validate({"data": hospital, "fraction": 0.5, "device": "cpu", "threads": 1} | changes)


def test_no_patient_of_a_site_is_trained_on_and_measured_on(hospital: Path, tmp_path: Path) -> None:
    site = settings(hospital, group_regex=r"patient(\d+)")
    chosen, _ = choose_slice(open_source(site.data), site, tmp_path)
    train, held_out = ({name.split("/")[1][:9] for name in side.values()} for side in (chosen.train, chosen.held_out))
    assert train
    assert held_out
    assert not train & held_out


def test_a_site_that_gets_more_images_keeps_its_slice_and_decodes_only_that(hospital: Path, tmp_path: Path) -> None:
    site = settings(hospital, max_images=40, stratify=True)
    first, _ = choose_slice(open_source(site.data), site, tmp_path)
    for number, pixels in enumerate(draw_faces(50, size=16, seed=8)):
        Image.fromarray(pixels).save(hospital / "ward1" / f"later-{number}.png")
    (hospital / "ward0").rename(hospital / "moved")
    second, _ = choose_slice(open_source(site.data), site, tmp_path)
    assert first.train.keys() <= second.train.keys()
    assert first.held_out.keys() <= second.held_out.keys()
    assert len(second.train) + len(second.held_out) == 40
    images = local_images(site, tmp_path, 16, 3)
    assert (len(images.train), len(images.held_out)) == (len(second.train), len(second.held_out))
    assert len(images.corpus) == 40


def test_images_that_are_away_for_a_while_stay_in_the_record(hospital: Path, tmp_path: Path) -> None:
    site = settings(hospital)
    first, _ = choose_slice(open_source(site.data), site, tmp_path)
    (hospital / "ward1").rename(tmp_path / "unmounted")
    without, _ = choose_slice(open_source(site.data), site, tmp_path)
    assert len(without.train) < len(first.train)
    (tmp_path / "unmounted").rename(hospital / "ward1")
    again, _ = choose_slice(open_source(site.data), site, tmp_path)
    assert (again.train, again.held_out) == (first.train, first.held_out)


def test_rounds_go_on_while_the_images_are_away_and_measure_in_the_slices_order(hospital: Path, tmp_path: Path) -> None:
    site = settings(hospital)
    chosen, _ = choose_slice(open_source(site.data), site, tmp_path)
    first = local_images(site, tmp_path, 16, 3)
    hospital.rename(tmp_path / "unmounted")
    again = local_images(site, tmp_path, 16, 3)
    for rows, side in ((again.train, chosen.train), (again.held_out, chosen.held_out)):
        assert [bytes(again.corpus.index["sha256"][row]).hex() for row in rows] == list(side)
    assert np.array_equal(first.corpus.pixels, again.corpus.pixels)
    assert (tmp_path / "corpus").stat().st_mode & 0o077 == 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there")
@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("chestxray64.zip", 5808, ()),
        ("bloodcells64.zip", 4884, ("--group-regex", r"BloodImage_(\d+)")),
        ("portraits64.zip", 879, ()),
        ("fashion_mnist_25k.npz", 25_000, ("--image-size", "32", "--upscale")),
    ],
)
def test_real_images_prepare_and_train_from_their_packed_form(
    run: Run, tmp_path: Path, name: str, count: int, options: tuple[str, ...]
) -> None:
    code, error = run("maskdm-server", "prepare", "--data", str(REAL / name), "--out", "corpus", *options)
    assert code == 0, error
    corpus = Corpus.open(tmp_path / "corpus")
    assert len(corpus) == count
    assert corpus.manifest.groups == (364 if "blood" in name else 0)
    code, error = run("maskdm-server", "pretrain", "--data", "corpus", "--out", "run", *SMALL)
    assert code == 0, error
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["images"] == 16


@pytest.mark.slow
def test_the_documented_commands_prepare_train_and_examine(workplace: Path) -> None:
    write_faces(workplace / "public", 120, "public", "face")
    write_faces(workplace / "local", 120, "clinic", "face")
    for number, command in enumerate([*documented("prepare", "docs/data.md"), *documented("doctor", "docs/data.md")]):
        done = Started(command, workplace, str(number))
        assert done.wait() == 0, done.output()
    assert (workplace / "maskdm-doctor" / "contact-sheet.png").exists()
