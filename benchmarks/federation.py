"""What a round costs the coordinator, beside Flower's own aggregation and strategy, on one machine.

    python benchmarks/federation.py --json benchmarks/results/federation.json

aggregation: 10 updates of the S model, ours beside `flwr.serverapp.strategy.strategy_utils.aggregate_arrayrecords`,
alternating, medians; memory that aggregating takes for 3, 10 and 100 clients. round: two rounds of a model of
100 million weights with two clients over a real SuperLink, beside Flower's FedAvg with clients that only send back what
came. encodings: held-out loss after ten rounds for each. clients: 1,000 virtual ones in one process. `--only` one of
these; the file keeps the rows of the others.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.federated.encoding import encode, size
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.networks.trainable import expected_shapes
from maskdm.run.processes import Child, flower_environment, free_port, port_is_taken, script
from maskdm.run.runfolder import read_lines, write_json
from maskdm.run.tensorfile import pack, unpack
from maskdm.training.checkpoint import save_checkpoint
from maskdm_server.aggregation.updates import StreamingMean, Update
from maskdm_server.federation.intake import Intake, UpdateNorm
from maskdm_server.lab.faces import draw_faces

REPEATS = 5
FLOWER = Path(__file__).with_name("flower_peer")


def metadata_of(shape: ModelConfig) -> CheckpointMetadata:
    return CheckpointMetadata(
        model=shape,
        diffusion=DiffusionConfig(prediction="x0"),
        mask=MaskConfig(kind="block", ratio=0.5, block_size=2),
        effective_mask_ratio=0.5,
        images_seen=0,
        seed=0,
    )


def peak_rss(pid: int | str = "self") -> float:
    """MiB that a process ever had in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def forget_peak() -> float:
    """Start to measure the peak anew, without what was freed; returns what is in memory now, in MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


def s_plan(encoding: str) -> RoundPlan:
    return RoundPlan.model_validate(
        {
            **{"federation": "0" * 16, "exchange": 1, "action": "train", "round": 1, "rounds": 1, "local_images": 64},
            **{"batch_size": 32, "lr": 1e-4, "seed": 0, "encoding": encoding},
            "model": metadata_of(ModelConfig.preset("S", image_size=64, channels=3)),
        }
    )


def packed_update(plan: RoundPlan, seed: int) -> bytes:
    rng = torch.Generator().manual_seed(seed)
    update = {name: 1e-4 * torch.randn(shape, generator=rng) for name, shape in plan.shapes().items()}
    return pack(encode(update, plan.encoding, plan.topk_share))


def ours(plan: RoundPlan, updates: list[bytes], clients: int) -> None:
    """What the coordinator does with bytes as they come: parse, check, judge, add; and the mean at the end."""
    known = [UpdateNorm(norm=0.7, images=64)] * 3
    numbers = {
        **{"outcome": 0, "round": 1, "exchange": 1, "examples": 10, "images_seen": 64, "loss_before": 1.0},
        **{"loss_after": 1.0, "seconds": 1.0, "skipped_steps": 0},
    }
    mean = StreamingMean()
    intake = Intake(plan, mean, known, 3.0, 100.0, 0, Path())
    for number in range(clients):
        intake.offer(number, Parcel(unpack(updates[number % len(updates)]), numbers), None)
    assert mean.count == clients
    for _ in mean.result():
        pass


def only_the_mean(plan: RoundPlan, updates: list[bytes]) -> None:
    """The same without the checks, of which Flower's aggregation has none."""
    mean = StreamingMean()
    for update in updates:
        mean.add(Update(unpack(update), plan), 64.0)
    for _ in mean.result():
        pass


def flower_records() -> list[Any]:
    """Ten replies as Flower's strategies hold them."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    rng = np.random.default_rng(0)
    shapes = expected_shapes(ModelConfig.preset("S", image_size=64, channels=3)).items()
    records = []
    for _ in range(10):
        arrays = {n: Array(rng.standard_normal(s, dtype=np.float32) * np.float32(1e-4)) for n, s in shapes}
        numbers = MetricRecord({"num-examples": 64})
        records.append(RecordDict({"arrays": ArrayRecord(arrays), "metrics": numbers}))
    return records


def aggregation() -> list[dict[str, Any]]:
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    plan = s_plan("bf16")
    updates = [packed_update(plan, seed) for seed in range(10)]
    records = flower_records()
    variants: dict[str, Callable[[], Any]] = {
        "flower, fp32": lambda: aggregate_arrayrecords(records, "num-examples"),
        "ours, bf16": lambda: ours(plan, updates, 10),
        "ours, bf16, without checks": lambda: only_the_mean(plan, updates),
    }
    for encoding in ("fp32", "int8"):
        other = s_plan(encoding)
        those = [packed_update(other, seed) for seed in range(10)]
        variants[f"ours, {encoding}"] = lambda o=other, t=those: ours(o, t, 10)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(REPEATS):
        for name, act in variants.items():
            started = time.perf_counter()
            act()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    rows = [
        {"what": "aggregation of 10 x S", "variant": name, "seconds": round(seconds, 4),
         "times_faster_than_flower": round(medians["flower, fp32"] / seconds, 2)}
        for name, seconds in medians.items()
    ]  # fmt: skip
    ours(plan, updates, 3)
    for clients in (3, 10, 100):
        before = forget_peak()
        ours(plan, updates, clients)
        rows.append({"what": "memory of aggregating", "clients": clients, "extra_mib": round(peak_rss() - before)})
    records.clear()
    before = forget_peak()
    aggregate_arrayrecords(flower_records(), "num-examples")
    rows.append({"what": "memory of aggregating", "clients": "10, flower", "extra_mib": round(peak_rss() - before)})
    return rows


class Watch(threading.Thread):
    """Peak memory of a process by its command line, while it lives."""

    def __init__(self, text: str, folder: Path) -> None:
        super().__init__(daemon=True)
        self._text, self._folder, self.peak, self.stop = text, str(folder), 0.0, False

    def run(self) -> None:
        while not self.stop:
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if self._text in command and self._folder in (entry / "environ").read_text(errors="replace"):
                        self.peak = max(self.peak, peak_rss(entry.name))
                except OSError:
                    continue
            time.sleep(0.1)


def one_round() -> list[dict[str, Any]]:
    """Ours, with the journal, less what the slowest client says to have trained; theirs: nobody trains.

    The first round has the start of Flower's apps in it. Four patches an image, so that there is little to train.
    """
    folder = Path(tempfile.mkdtemp(prefix="round-"))
    shape = ModelConfig.preset("B", image_size=16, channels=3, patch_size=8)
    weights = {name: p.detach() for name, p in build_model(shape).named_parameters()}
    parameters = sum(p.numel() for p in weights.values())
    save_checkpoint(folder / "prior.safetensors", weights, metadata_of(shape))
    del weights
    np.savez(folder / "images.npz", images=draw_faces(80, size=16))
    watch = Watch("flwr-serverapp", folder)
    watch.start()
    command = [script("maskdm-server"), "simulate", "--prior", str(folder / "prior.safetensors"), "--clients", "2"]
    command += [
        "--data",
        str(folder / "images.npz"),
        "--data",
        str(folder / "images.npz"),
        "--out",
        str(folder / "fed"),
    ]
    command += ["--rounds", "2", "--local-images", "1", "--batch-size", "1", "--fraction", "0.2"]
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    watch.stop = True
    events = read_lines(folder / "fed" / "events.jsonl")
    local = [read_lines(folder / "fed" / "sites" / f"site-{site}" / "client" / "events.jsonl") for site in (1, 2)]
    seconds = []
    for number in (1, 2):
        began = next(e["exchange"] for e in events if e["event"] == "sent" and e["round"] == number) / 1e9  # its number
        ended = next(e["time"] for e in events if e["event"] == "round" and e["round"] == number)
        worked = max(e["seconds"] for site in local for e in site if e["event"] == "round" and e["round"] == number)
        seconds.append(round(ended - began - worked, 1))
    what = f"a round, {parameters:,} weights, 2 clients"
    rows = [
        {"what": what, "variant": "ours", "seconds_first_and_second": seconds, "server_peak_mib": round(watch.peak)}
    ]
    rows.append({"what": what, "variant": "flower FedAvg", **flower_round(folder, parameters)})
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def flower_round(folder: Path, parameters: int) -> dict[str, Any]:
    """The same amount of weights through Flower's FedAvg, two nodes, two rounds."""
    home, port, result = folder / "peer", free_port(), folder / "peer.json"
    home.mkdir()
    around = {
        **flower_environment(home / ".flwr"),
        "PYTHONPATH": str(FLOWER),
        "PEER_RESULT": str(result),
        "PEER_PARAMETERS": str(parameters),
        "OMP_NUM_THREADS": "1",
    }
    (home / ".flwr").mkdir()
    (home / ".flwr" / "config.toml").write_text(f'[superlink.peer]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    watch = Watch("flwr-serverapp", folder)
    watch.start()
    link = [script("flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with Child(
        [*link, "--disable-runtime-dependency-installation"], log=home / "superlink.log", environment=around
    ) as superlink:
        while not port_is_taken("127.0.0.1", port):
            time.sleep(0.1)
        node = [script("flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{port}"]
        nodes = [
            Child([*node, "--port", str(free_port())], log=home / f"node-{n}.log", environment=around) for n in range(2)
        ]
        run = [script("flwr"), "run", str(FLOWER), "peer"]
        subprocess.run(run, env={**os.environ, **around}, check=True, stdout=subprocess.DEVNULL)
        while not result.exists() and superlink.exit_code() is None:
            time.sleep(0.2)
        for child in nodes:
            child.close()
    watch.stop = True
    times = json.loads(result.read_text())
    seconds = [round(after - before, 1) for before, after in itertools.pairwise(times)]
    return {"seconds_first_and_second": seconds, "server_peak_mib": round(watch.peak)}


def encodings() -> list[dict[str, Any]]:
    """Ten rounds of three clients from the same prior; the same draws measure every model."""
    folder = Path(tempfile.mkdtemp(prefix="encodings-"))
    np.savez(folder / "public.npz", images=draw_faces(1600, size=16))
    np.savez(folder / "local.npz", images=draw_faces(600, "clinic", size=16))
    pretrain = [
        "pretrain",
        "--data",
        "public.npz",
        "--out",
        "run",
        "--size",
        "tiny",
        "--image-size",
        "16",
        "--block-size",
    ]
    pretrain += ["2", "--mask-ratio", "0.5", "--images", "64K", "--prediction", "x0", "--batch-size", "64"]
    run(folder, *pretrain, "--lr", "1e-3", "--betas", "0.9,0.95")
    shape = ModelConfig.preset("tiny", image_size=16, channels=3)
    rows = []
    for encoding, share in (("fp32", 1.0), ("bf16", 1.0), ("int8", 1.0), ("topk", 0.1), ("topk", 0.01)):
        out = f"fed-{encoding}-{share}"
        options = ["--engine", "inline", "--rounds", "10", "--local-images", "512", "--lr", "3e-4", "--fraction", "0.5"]
        run(
            folder,
            *("simulate", "--prior", "run/prior.safetensors", "--data", "local.npz", "--out", out, *options),
            *("--encoding", encoding, "--topk-share", str(share)),
        )
        result = json.loads((folder / out / "result.json").read_text())
        up = size(expected_shapes(shape), encoding, share)  # type: ignore[arg-type]
        rows.append(
            {"what": "10 rounds, 3 clients, tiny", "variant": encoding + (f" {share}" if encoding == "topk" else ""),
             "bytes_of_fp32": round(up / (4 * sum(p.numel() for p in build_model(shape).parameters())), 4),
             "loss_prior": result["loss_prior"], "loss_final": result["loss_final"]}
        )  # fmt: skip
    for row in rows:
        row["loss_against_fp32"] = round(row["loss_final"] / rows[0]["loss_final"] - 1, 5)
    shutil.rmtree(folder, ignore_errors=True)
    return rows


def run(folder: Path, *arguments: str) -> None:
    command = [script("maskdm-server"), *arguments]
    subprocess.run(command, check=True, cwd=folder, stderr=subprocess.DEVNULL)


def clients() -> list[dict[str, Any]]:
    """A thousand virtual clients, all in every round, in one process whose memory is looked at after each round."""
    folder = Path(tempfile.mkdtemp(prefix="clients-"))
    shape = ModelConfig(image_size=8, channels=1, patch_size=4, dim=16, depth=2, heads=2)
    save_checkpoint(
        folder / "prior.safetensors",
        {name: p.detach() for name, p in build_model(shape).named_parameters()},
        metadata_of(shape).model_copy(update={"mask": MaskConfig(kind="none", ratio=0), "effective_mask_ratio": 0.0}),
    )
    np.savez(folder / "images.npz", images=draw_faces(8000, size=8).mean(axis=3).astype(np.uint8))
    log = folder / "memory.json"
    code = """
import json, sys
from pathlib import Path
from maskdm.commands import command_line as cli
from maskdm_server.federation import rounds
from maskdm_server.commands.app import app

seen, commit = [], rounds.Rounds._commit
def watched(self, *given):
    commit(self, *given)
    seen.append(round(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20, 1))
rounds.Rounds._commit = watched
done = cli.run(app, "maskdm-server", sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps(seen))
sys.exit(done)
"""
    command = [sys.executable, "-c", code, str(log), "simulate", "--prior", "prior.safetensors", "--data", "images.npz"]
    command += ["--out", "fed", "--engine", "inline", "--clients", "1000", "--rounds", "3", "--local-images", "8"]
    command += ["--batch-size", "4", "--fraction", "1"]
    started = time.monotonic()
    subprocess.run(
        command, check=True, cwd=folder, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    seconds = time.monotonic() - started
    lines = read_lines(folder / "fed" / "rounds.jsonl")
    row = {
        "what": "1,000 virtual clients, 3 rounds, inline",
        "rss_mib_after_each_round": json.loads(log.read_text()),
        "clients": [line["clients"] for line in lines],
        "seconds": round(seconds),
        "seconds_a_round": [round(line["seconds"]) for line in lines],
    }
    shutil.rmtree(folder, ignore_errors=True)
    return [row]


PARTS = {"aggregation": aggregation, "round": one_round, "encodings": encodings, "clients": clients}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    for name in [arguments.only] if arguments.only else PARTS:
        rows = [{"part": name} | row | machine for row in PARTS[name]()]
        for row in rows:
            print(json.dumps(row), flush=True)
        if arguments.json:  # what other parts wrote stays
            earlier = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
            write_json(arguments.json, [row for row in earlier if row["part"] != name] + rows)


if __name__ == "__main__":
    main()
