"""What a user who makes a mistake sees: one line that names the option and the remedy, exit code 2, nothing lost."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskdm.commands import command_line as cli
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.processes import free_port
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.commands.app import app as server_app
from maskdm_server.lab.faces import draw_faces

from .conftest import Run

MODEL = ModelConfig(image_size=16, channels=3, patch_size=4, dim=16, depth=2, heads=2)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    np.savez(tmp_path / "faces.npz", images=draw_faces(40, size=16))
    return "faces.npz"


@pytest.fixture
def prior(tmp_path: Path) -> str:
    metadata = CheckpointMetadata(
        model=MODEL,
        diffusion=DiffusionConfig(),
        mask=MaskConfig(kind="none", ratio=0),
        effective_mask_ratio=0,
        images_seen=1,
        seed=0,
    )
    save_checkpoint(tmp_path / "prior.safetensors", dict(build_model(MODEL).named_parameters()), metadata)
    return "prior.safetensors"


SMALL = ("--size", "tiny", "--image-size", "16", "--block-size", "2", "--mask-ratio", "0.5", "--batch-size", "8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--data"),
        (("--data", "nowhere"), "--data nowhere does not exist"),
        (("--data", "empty"), "--data empty holds no images"),
        (("--data", "text.txt"), "--data text.txt is neither a folder"),
        (("--data", "broken.npz"), "--data broken.npz cannot be read"),
        (("--data", "faces.npz", "--block-size", "3"), "--block-size 3 does not divide the 4x4 grid"),
        (("--data", "faces.npz", "--block-size", "4", "--mask-ratio", "0.9"), "smaller --block-size"),
        (("--data", "faces.npz", "--mask", "patch", "--mask-ratio", "1"), "--mask-ratio 1.0 leaves nothing visible"),
        (("--data", "faces.npz", "--mask-ratio", "1.5"), "--mask-ratio 1.5"),
        (("--data", "faces.npz", "--image-size", "18"), "does not divide image size 18"),
        (("--data", "faces.npz", "--image-size", "32", "--block-size", "2"), "smaller than 32x32"),
        (("--data", "faces.npz", "--channels", "1"), "colour images"),
        (("--data", "faces.npz", "--images", "many"), "--images many"),
        (("--data", "faces.npz", "--lr", "fast"), "--lr"),
        (("--data", "faces.npz", "--device", "cuda:77"), "--device cuda:77 is not available"),
        (("--data", "faces.npz", "--colour", "3"), "--colour"),
    ],
)
def test_a_mistake_in_pretrain_is_one_line_and_leaves_nothing(
    run: Run, corpus: str, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no image")
    (tmp_path / "broken.npz").write_bytes((tmp_path / corpus).read_bytes()[:500])
    code, error = run("maskdm-server", "pretrain", "--out", "run", *SMALL, *arguments)
    assert code == 2
    assert expected in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "run" / "config.json").exists()


def test_another_run_in_out_is_named_and_left_alone(run: Run, corpus: str, tmp_path: Path) -> None:
    first = ("pretrain", "--data", corpus, "--out", "run", *SMALL, "--images", "16")
    assert run("maskdm-server", *first)[0] == 0
    before = (tmp_path / "run" / "prior.safetensors").read_bytes()
    code, error = run("maskdm-server", *first, "--lr", "0.5")
    assert code == 2
    assert "training.lr is 0.0002 there and 0.5 here" in error
    code, error = run("maskdm-server", *first, "--resume", "never")
    assert (code, "--resume never" in error) == (2, True)
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"mine")
    code, error = run("maskdm-server", *first, "--out", "holiday")
    assert (code, "already holds 'photo.jpg'" in error) == (2, True)
    assert (tmp_path / "run" / "prior.safetensors").read_bytes() == before
    assert [path.name for path in (tmp_path / "holiday").iterdir() if path.name[0] != "."] == ["photo.jpg"]


def test_corrupt_images_are_skipped_and_counted_and_the_run_goes_on(run: Run, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number, pixels in enumerate(draw_faces(12, size=16)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "torn.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:100])
    (tmp_path / "images" / "fake.jpg").write_text("not an image")
    code, error = run("maskdm-server", "pretrain", "--data", "images", "--out", "run", *SMALL, "--images", "16")
    assert code == 0
    assert "12 images of 16x16 pixels; 2 skipped: not a readable picture" in error


@pytest.mark.parametrize(
    ("content", "expected"), [("missing", "does not exist"), ("torn", "not a whole safetensors file")]
)
def test_a_missing_or_truncated_checkpoint_is_refused(
    run: Run, prior: str, tmp_path: Path, content: str, expected: str
) -> None:
    if content == "torn":
        (tmp_path / "torn.safetensors").write_bytes((tmp_path / prior).read_bytes()[:1000])
    for command in (("sample", "--model"), ("serve", "--out", "fed", "--prior")):
        code, error = run("maskdm-server", *command, f"{content}.safetensors")
        assert (code, expected in error) == (2, True), error


def test_a_foreign_checkpoint_is_refused(run: Run, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    code, error = run("maskdm-server", "sample", "--model", "foreign.safetensors")
    assert (code, "was not written by MaskDM" in error) == (2, True)


def test_serve_refuses_a_port_in_use_and_to_serve_in_the_clear_unasked(run: Run, prior: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, error = run("maskdm-server", "serve", "--prior", prior, "--out", "fed", "--insecure", "--port", port)
    assert (code, f"--port {port}" in error) == (2, True)
    code, error = run("maskdm-server", "serve", "--prior", prior, "--out", "fed2")
    assert (code, "or --insecure to try it on one machine" in error) == (2, True)
    code, error = run("maskdm-server", "serve", "--prior", prior, "--out", "fed3", "--tls", "nowhere")
    assert (code, "holds no ca.crt" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "--data is missing"),
        (("--data", "nowhere"), "--data nowhere does not exist"),
        (("--data", "faces.npz", "--server", "somewhere"), "give HOST:PORT"),
        (("--data", "faces.npz", "--fraction", "0"), "--fraction 0.0"),
        (("--data", "faces.npz", "--kit", "nowhere"), "give the zip that the coordinator made for you"),
        (("--data", "faces.npz", "--kit", "faces.npz"), "--kit faces.npz is no kit"),
        (("--data", "faces.npz", "--kit", "k.zip", "--insecure"), "--kit and --insecure exclude each other"),
        (("--data", "faces.npz", "--server", "example.org:80"), "give the --kit that its coordinator made for you"),
        (("--data", "faces.npz", "--policy", "strict.toml"), "images to train on"),
        (("--data", "faces.npz", "--policy", "typo.toml"), "typo.toml: unknown key 'min-image'"),
    ],
)
def test_a_mistake_at_the_client_is_one_line(run: Run, corpus: str, arguments: tuple[str, ...], expected: str) -> None:
    Path("strict.toml").write_text("min-images = 1000\n")
    Path("typo.toml").write_text("min-image = 1000\n")
    code, error = run("maskdm-client", *arguments)
    assert code == 2
    assert expected in error.splitlines()[-1]


def test_an_absent_server_ends_the_client_after_its_patience(run: Run, public_corpus: Path) -> None:
    port = free_port()
    code, error = run("maskdm-client", "--data", str(public_corpus), "--server", f"127.0.0.1:{port}", "--wait", "0.2")
    assert (code, "did not answer" in error) == (1, True)


def test_flags_beat_the_environment_and_the_environment_beats_the_file(
    run: Run, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "options.toml").write_text('lr = 0.1\nbatch-size = 7\nimages = "30"\n')
    monkeypatch.setenv("MASKDM_LR", "0.2")
    monkeypatch.setenv("MASKDM_BATCH_SIZE", "8")
    flags = ("--config", "options.toml", "--data", corpus, "--out", "run", "--lr", "0.3", "--dry-run")
    code = cli.run(server_app, "maskdm-server", ["pretrain", *flags, "--image-size", "16", "--mask", "patch"])
    printed = capsys.readouterr().out
    assert code == 0
    assert all(text in printed for text in ('"lr": 0.3', '"batch_size": 8', '"images": 30')), printed
    (tmp_path / "options.toml").write_text("learning-rate = 0.1\n")
    code, error = run("maskdm-server", "pretrain", *flags)
    assert (code, "unknown key 'learning-rate'" in error) == (2, True)
