"""`--log`: what TensorBoard's own reader and MLflow's own client find of a run, and what a run does not suffer from."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from maskdm.commands import command_line as cli
from maskdm.config import ModelConfig
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run.pictures import save_png
from maskdm.run.processes import free_port
from maskdm.run.runfolder import append_line, keep_lines, read_lines, write_json
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.commands.app import app
from maskdm_server.tracking import follow as tracking
from maskdm_server.tracking.follow import FEDERATION, PRETRAINING, Files, Log, follow

ROOT = Path(__file__).parents[3]
SINKS: list[Log] = ["tensorboard", "mlflow"]
Points = dict[str, list[tuple[int, float]]]  # by name
NewRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("MASKDM_", "MLFLOW_TRACKING", "MLFLOW_EXPERIMENT")):
            monkeypatch.delenv(name)


@pytest.fixture
def new_run(tmp_path: Path) -> NewRun:
    """Makes the folder of a run that has begun."""

    def make(name: str = "run", **config: Any) -> Path:
        write_json(tmp_path / name / "config.json", {"kind": "federation", "federation": {"rounds": 3}, **config})
        return tmp_path / name

    return make


def in_tensorboard(out: Path) -> EventAccumulator:
    return EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def mlflow_client(out: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{out / 'mlflow' / 'mlflow.db'}")


def in_mlflow(out: Path) -> tuple[Any, Any]:
    """The client of the run's own store, and the one run in it."""
    client = mlflow_client(out)
    (run,) = client.search_runs([client.get_experiment_by_name("maskdm").experiment_id])
    return client, run


def logged(out: Path, log: Log) -> Points:
    """All points that a reader finds, sorted by x."""
    if log == "tensorboard":
        reader = in_tensorboard(out)
        return {tag: [(p.step, float(p.value)) for p in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    client, run = in_mlflow(out)
    names = set(run.data.metrics) - {"step"}
    histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: sorted((p.step, p.value) for p in history) for name, history in histories.items()}


def expected(out: Path, files: Files) -> dict[str, list[tuple[int, Any]]]:
    """All numbers of a run's lines, as exact as TensorBoard's fp32."""
    points: dict[str, list[tuple[int, Any]]] = {}
    for line in read_lines(out / files.lines):
        for name, value in line.items():
            if name != files.x and isinstance(value, int | float):
                points.setdefault(f"{files.kind}/{name}", []).append((line[files.x], pytest.approx(value, rel=1e-6)))
    return points


def add_rounds(out: Path, *numbers: int) -> None:
    for number in numbers:
        line = {"round": number, "clients": 2, "loss_before": 1 / number, "loss_after": None if number == 2 else 0.5}
        append_line(out / "rounds.jsonl", line)


def finish(out: Path, files: Files, log: Log) -> None:
    """Log what is there."""
    with follow(out, files, log):
        pass


@pytest.mark.parametrize("log", SINKS)
def test_every_number_of_every_line_is_a_point_and_a_run_that_goes_on_adds_to_them(log: Log, new_run: NewRun) -> None:
    out = new_run()
    add_rounds(out, 1, 2)
    finish(out, FEDERATION, log)
    assert logged(out, log) == expected(out, FEDERATION)
    assert [x for x, _ in logged(out, log)["federation/loss_after"]] == [1], "what was not measured is no point"
    for numbers in ((), (3,), (4, 5)):
        with follow(out, FEDERATION, log):
            add_rounds(out, *numbers)
        assert logged(out, log) == expected(out, FEDERATION)


@pytest.mark.parametrize("log", SINKS)
def test_what_a_crash_takes_back_is_logged_once_as_it_was_done_again(
    log: Log, new_run: NewRun, metadata: CheckpointMetadata, tiny: ModelConfig
) -> None:
    out = new_run()
    weights = {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}

    def train(images: range, loss: float, saved: int) -> None:
        for seen in images:
            append_line(out / "metrics.jsonl", {"images": seen, "loss": loss, "images_per_s": 10.0})
        save_checkpoint(out / "prior.safetensors", weights, metadata.model_copy(update={"images_seen": saved}))

    train(range(1, 6), 1.0, saved=3)
    finish(out, PRETRAINING, log)
    if log == "mlflow":
        assert [x for x, _ in logged(out, log)["pretrain/loss"]] == [1, 2, 3], "it could not be taken back"
    keep_lines(out / "metrics.jsonl", read_lines(out / "metrics.jsonl")[:3])  # as `pretrain` does
    with follow(out, PRETRAINING, log):
        train(range(4, 9), 2.0, saved=8)
    assert logged(out, log) == expected(out, PRETRAINING)
    assert [x for x, _ in logged(out, log)["pretrain/loss"]] == list(range(1, 9))


def test_tensorboard_shows_the_configuration_and_the_grids_of_samples(new_run: NewRun) -> None:
    out = new_run(seed=7)
    add_rounds(out, 1, 2, 3)
    for name, shade in (("before", 10), ("after", 200)):
        save_png(out / "samples" / f"{name}.png", Image.new("L", (6, 4), shade))
    finish(out, FEDERATION, "tensorboard")
    reader = in_tensorboard(out)
    pictures = reader.Images("samples")
    assert [(p.step, p.width, p.height) for p in pictures] == [(3, 6, 4), (0, 6, 4)]
    assert pictures[1].encoded_image_string == (out / "samples" / "before.png").read_bytes()
    (text,) = reader.Tensors("config")
    assert '"seed": 7' in make_ndarray(text.tensor_proto).item().decode()
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_a_grid_of_a_round_stands_at_that_round_though_later_ones_are_done(new_run: NewRun) -> None:
    out = new_run(seed=7)
    add_rounds(out, 1, 2, 3, 4, 5)
    save_png(out / "samples" / "round-000003.png", Image.new("L", (6, 4), 10))
    finish(out, FEDERATION, "tensorboard")
    assert [picture.step for picture in in_tensorboard(out).Images("samples")] == [3]


def test_mlflow_shows_the_configuration_the_grids_and_how_the_run_ended(new_run: NewRun) -> None:
    out = new_run(seed=7)
    add_rounds(out, 1)
    save_png(out / "samples" / "000000640.png", Image.new("L", (6, 4), 10))
    with pytest.raises(RuntimeError, match="diverged"), follow(out, FEDERATION, "mlflow"):
        raise RuntimeError("diverged")
    client, run = in_mlflow(out)
    assert run.info.status == "FAILED"
    assert run.info.run_name == "run"
    assert run.data.params == {"kind": "federation", "seed": "7", "federation.rounds": "3"}
    kept = Path(client.download_artifacts(run.info.run_id, "samples/000000640.png"))
    assert kept.read_bytes() == (out / "samples" / "000000640.png").read_bytes()
    write_json(out / "config.json", {"kind": "federation", "seed": 7, "federation": {"rounds": 5}})
    finish(out, FEDERATION, "mlflow")
    client, run = in_mlflow(out)
    assert run.info.status == "FINISHED"
    config = json.loads(Path(client.download_artifacts(run.info.run_id, "config.json")).read_text())
    assert config["federation"]["rounds"] == 5, "the newest one; MLflow's parameters stay what they were"


def test_a_run_that_was_deleted_in_mlflow_is_logged_anew(new_run: NewRun) -> None:
    out = new_run()
    add_rounds(out, 1, 2)
    finish(out, FEDERATION, "mlflow")
    client, run = in_mlflow(out)
    client.delete_run(run.info.run_id)
    finish(out, FEDERATION, "mlflow")
    assert in_mlflow(out)[1].info.run_id != run.info.run_id
    assert logged(out, "mlflow") == expected(out, FEDERATION)


def test_a_server_that_is_not_there_is_one_warning_and_no_end(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = new_run()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    with follow(out, FEDERATION, "mlflow"):
        add_rounds(out, 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("WARNING: --log mlflow: MlflowException")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    finish(out, FEDERATION, "mlflow")
    assert logged(out, "mlflow") == expected(out, FEDERATION)


def test_after_a_full_disk_everything_is_logged(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, full, failed = new_run(), threading.Event(), threading.Event()
    full.set()
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.01)
    usual: Callable[[Log, Path], Any] = tracking.open_sink

    def open_sink(log: Log, folder: Path) -> Any:
        sink = usual(log, folder)
        if full.is_set():
            failed.set()
            sink._file.close()
            sink._file = sink._records._writer = Path("/dev/full").open("wb")  # noqa: SIM115
        return sink

    monkeypatch.setattr(tracking, "open_sink", open_sink)
    add_rounds(out, 1, 2)
    with follow(out, FEDERATION, "tensorboard"):
        assert failed.wait(60)
        add_rounds(out, 3)
        full.clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device; the run goes on" in line
    assert logged(out, "tensorboard") == expected(out, FEDERATION)


@pytest.mark.parametrize("log", SINKS)
def test_a_missing_package_is_said_before_any_work(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for command in (
        ["pretrain", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
        ["serve", "--prior", "nowhere", "--out", str(tmp_path / "out")],
        ["simulate", "--prior", "nowhere", "--data", str(tmp_path), "--out", str(tmp_path / "out")],
    ):
        assert cli.run(app, "maskdm-server", [*command, "--log", log]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--log {log} needs " in line
        assert line.endswith(f"pip install 'maskdm[{log}]'")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8))
    return path


def pretrain(images: Path, out: Path, *options: str) -> list[str]:
    """A command of a few steps."""
    shape = ["--size", "tiny", "--image-size", "8", "--patch-size", "2", "--block-size", "1", "--mask-ratio", "0.5"]
    work = ["--images", "96", "--batch-size", "16", "--precision", "fp32", "--device", "cpu"]
    return ["pretrain", "--data", str(images), "--out", str(out), *shape, *work, *options]


def test_off_imports_nothing_and_leaves_nothing(images: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from maskdm.commands import command_line as cli\n"
        "from maskdm_server.commands.app import app\n"
        "assert cli.run(app, 'maskdm-server', sys.argv[1:]) == 0\n"
        "sys.exit(str([n for n in sys.modules if n.split('.')[0] in ('tensorboard', 'mlflow')] or 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *pretrain(images, tmp_path / "out")],
        env={name: value for name, value in os.environ.items() if not name.startswith("MASKDM_")},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "0", done.stderr
    assert not {"tensorboard", "mlflow"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("log", SINKS)
def test_pretraining_is_logged_while_it_runs_and_when_it_goes_on(
    log: Log, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskdm.training.pretrain.METRICS_EVERY", 0.0)
    out = tmp_path / "out"
    assert cli.run(app, "maskdm-server", pretrain(images, out, "--log", log)) == 0
    assert len(read_lines(out / "metrics.jsonl")) == 6
    assert logged(out, log) == expected(out, PRETRAINING)
    assert {"pretrain/loss", "pretrain/lr", "pretrain/images_per_s", "pretrain/data_wait"} <= logged(out, log).keys()
    assert cli.run(app, "maskdm-server", pretrain(images, out, "--images", "160", "--log", log)) == 0
    assert [x for x, _ in logged(out, log)["pretrain/loss"]] == list(range(16, 161, 16))
    assert logged(out, log) == expected(out, PRETRAINING)
    if log == "tensorboard":
        assert {picture.step for picture in in_tensorboard(out).Images("samples")} >= {96, 160}


@pytest.mark.parametrize("log", SINKS)
def test_a_federation_is_logged_round_by_round(
    log: Log, images: Path, tmp_path: Path, tiny: ModelConfig, metadata: CheckpointMetadata
) -> None:
    prior, out = tmp_path / "prior.safetensors", tmp_path / "fed"
    save_checkpoint(prior, {name: p.detach() for name, p in build_model(tiny, seed=1).named_parameters()}, metadata)
    command = ["simulate", "--engine", "inline", "--prior", str(prior), "--data", str(images), "--out", str(out)]
    command += ["--clients", "2", "--fraction", "0.5", "--local-images", "8", "--batch-size", "4", "--log", log]
    for rounds in ("1", "2"):
        assert cli.run(app, "maskdm-server", [*command, "--rounds", rounds]) == 0
        assert len(read_lines(out / "rounds.jsonl")) == int(rounds)
        assert logged(out, log) == expected(out, FEDERATION)
    wanted = {"loss_before", "loss_after", "clients", "bytes_up", "bytes_down", "seconds", "rejected"}
    assert {f"federation/{name}" for name in wanted} <= logged(out, log).keys()
    if log == "tensorboard":
        assert {picture.step for picture in in_tensorboard(out).Images("samples")} >= {0, 2}
    sites = [path for path in (out / "sites").rglob("*") if path.name in ("tensorboard", "mlflow")]
    assert not sites


def test_neither_the_library_nor_the_client_knows_of_it() -> None:
    for side in ("common", "client"):
        for path in (ROOT / side).rglob("*.py"):
            assert not {name for name in ("tensorboard", "mlflow") if name in path.read_text().lower()}, path
