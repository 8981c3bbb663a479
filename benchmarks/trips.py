"""How often each byte is handled on three ways: counted, not timed, so that the figures are the same everywhere.

    python benchmarks/trips.py --json trips.json

An image from `maskdm-client --data` to the first step; an update from the file that the door leaves to the sum that
becomes the next model; weights from `maskdm-server serve` to the network of a site. The commands, the rounds, the
ClientApp and the worker are the real ones, without a network between them. Counted are calls of the operating system,
of hashlib and of the decoder, and what is read of files; `benchmarks/results/trips.json` holds what they were before
images and weights were followed (commit 1e5c87a, in its rooms) and what they are now.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import safetensors
import torch
from PIL import Image

from maskdm.commands import command_line
from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig
from maskdm.data import pixels
from maskdm.federated.flower_records import Asked
from maskdm.federated.parcel import Parcel
from maskdm.federated.plan import RoundPlan
from maskdm.metadata import CheckpointMetadata
from maskdm.networks.model import build_model
from maskdm.run import runfolder, tensorfile
from maskdm.run.runfolder import write_json
from maskdm.training.checkpoint import save_checkpoint
from maskdm_client.agent import worker
from maskdm_client.commands import app as client
from maskdm_client.commands import join_command
from maskdm_client.flower import client_app
from maskdm_client.folder.mailbox import Mailbox
from maskdm_client.folder.settings import load_settings
from maskdm_client.work import fine_tuning
from maskdm_client.work.local_data import local_images, read_slice
from maskdm_server.commands import serve_command
from maskdm_server.commands.app import app as server
from maskdm_server.federation.folder import begin
from maskdm_server.federation.rounds import run_federation
from maskdm_server.federation.settings import FederationConfig
from maskdm_server.federation.transport import Question, Reply
from maskdm_server.lab.faces import draw_faces

UPDATES = ("arrived", "waiting", "held")  # how their files are called at the server
IMAGES, CHOSEN, SITES, LONG_AGO = 40, 17, 3, 1_000_000_000
MODEL = ModelConfig(image_size=16, channels=3, patch_size=4, dim=96, depth=2, heads=2)
# Floors that so few images pass; nothing else of the usual policy is changed.
POLICY = """
min-images = 1
min-images-per-update = 1
min-batch = 1
min-steps = 1
min-held-out = 1
approve-first-round = false
"""
Table = dict[str, dict[str, dict[str, float]]]  # way → step → what → how often


class Counts:
    """What was done since it was last asked, by thread: the worker of a site is one of its own."""

    def __init__(self, images: Collection[bytes]) -> None:
        self.images = images  # their files
        self._done: dict[str, Counter[str]] = {}

    def add(self, what: str, count: int = 1) -> None:
        self._done.setdefault(threading.current_thread().name, Counter())[what] += count

    def take(self, thread: str = "MainThread") -> Counter[str]:
        return self._done.pop(thread, Counter())


class Digest:
    """A sha256 that tells how much it was given."""

    def __init__(self, counts: Counts, content: Any = b"", **options: Any) -> None:
        self._counts, self._digest = counts, SHA256(**options)
        self.update(content)

    def update(self, content: Any) -> None:
        self._counts.add("bytes hashed", memoryview(content).nbytes)
        self._counts.add("images hashed", bytes(content) in self._counts.images)
        self._digest.update(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._digest, name)


SHA256, OPEN, SAFE_OPEN, FROMFILE = hashlib.sha256, Path.open, safetensors.safe_open, np.fromfile


@contextmanager
def counted(data: Path) -> Iterator[Counts]:
    """Count what is done to images below `data`, and to files of weights."""
    counts = Counts({path.read_bytes() for path in data.rglob("*.png")})
    scandir, decode, file_digest = os.scandir, pixels.decode, hashlib.file_digest
    head, parse, loads = tensorfile._read, RoundPlan.model_validate_json, json.loads

    def on_open(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event == "open" and str(arguments[0]).startswith(f"{data}/"):
            counts.add("images opened")

    def scanned(path: Any = ".") -> Any:
        if str(path) == str(data):
            counts.add("folder listed")
        return scandir(path)

    def decoded(*arguments: Any) -> Any:
        counts.add("images decoded")
        return decode(*arguments)

    def digest_of_file(file: Any, kind: Any) -> Any:
        counts.add("bytes hashed", os.fstat(file.fileno()).st_size)
        return file_digest(file, kind)

    def from_file(file: Any, *arguments: Any, **options: Any) -> Any:
        found = FROMFILE(file, *arguments, **options)
        ours = Path(getattr(file, "name", file)).name.startswith(UPDATES)  # older code gave paths
        counts.add("bytes of updates read" if ours else "bytes read", found.nbytes)
        return found

    def opened(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors" and mode == "rb":
            return BufferedReader(Read(path))
        return OPEN(path, mode, *arguments, **options)

    class Read(FileIO):
        """A file of weights as it is read."""

        def readinto(self, buffer: Any) -> int | None:
            found = super().readinto(buffer)
            counts.add("bytes read", found or 0)
            return found

        def readall(self) -> bytes:
            found = super().readall()
            counts.add("bytes read", len(found))
            return found

    class Opened:
        """What the safetensors package hands out of a file."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            counts.add("documents parsed")
            self._file: Any = SAFE_OPEN(*arguments, **options)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def get_tensor(self, name: str) -> Any:
            found = self._file.get_tensor(name)
            counts.add("bytes read", found.nbytes)
            return found

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def header(*arguments: Any) -> Any:
        counts.add("documents parsed")
        return head(*arguments)

    def plan(document: Any, *arguments: Any, **options: Any) -> RoundPlan:
        counts.add("plans parsed")
        return parse(document, *arguments, **options)

    def from_json(text: Any, **options: Any) -> Any:
        found = loads(text, **options)
        if isinstance(found, dict) and "local_images" in found:
            counts.add("plans parsed")
        return found

    watching = [True]
    sys.addaudithook(on_open)
    with (
        patch.object(os, "scandir", scanned),
        patch.object(hashlib, "sha256", lambda *content, **options: Digest(counts, *content, **options)),
        patch.object(runfolder, "file_digest", digest_of_file),
        patch.object(pixels, "decode", decoded),
        patch.object(np, "fromfile", from_file),
        patch.object(Path, "open", opened),
        patch.object(safetensors, "safe_open", Opened),
        patch.object(tensorfile, "_read", header),
        patch.object(RoundPlan, "model_validate_json", plan),
        patch.object(json, "loads", from_json),
    ):
        yield counts
    watching.clear()


def times(done: Mapping[str, int], size: int, *names: str) -> dict[str, float]:
    """How often; of bytes, how often so many of them, to a tenth."""
    return {name: round(done.get(name, 0) / size, 1) if "bytes" in name else done.get(name, 0) for name in names}


def of_images(data: Path, folder: Path, kit: Path) -> Table:
    """To the first step: at the join, and when the first plan has come."""
    found: Table = {}

    def join(out: Path, *options: str) -> None:
        arguments = ["--data", str(data), "--out", str(out), "--fraction", "0.5", "--threads", "1", *options]
        left = patch.object(join_command, "forget_pixels", lambda *_: None)  # the federation is not over
        with patch.object(join_command, "work", lambda *_: None), left:
            assert not command_line.run(client.app, "maskdm-client", arguments)

    for name, options in (("no kit names the model", ()), ("the kit names the model", ("--kit", str(kit)))):
        out, steps = folder / name, dict[str, dict[str, float]]()
        for step in ("join", "first plan", "next join"):
            with counted(data) as counts:
                if step == "first plan":
                    local_images(load_settings(out), out, MODEL.image_size, MODEL.channels)
                else:
                    join(out, *options)
                done = counts.take()
            steps[step] = {
                what: float(done[what])
                for what in ("folder listed", "images opened", "images hashed", "images decoded")
            }
        chosen = read_slice(out)
        assert len(chosen.train) + len(chosen.held_out) == CHOSEN
        found[f"image, where {name}"] = steps
    return found


class Way:
    """Sites that are asked and answer as over a network: through files, a ClientApp and a worker for each."""

    may_lose = False

    def __init__(self, folders: Sequence[Path], scratch: Path, counts: Counts) -> None:
        self._folders, self._arrived, self._counts = folders, scratch / "arrived.safetensors", counts
        self._asked: list[tuple[int, Question]] = []
        self.at_site: list[tuple[str, Counter[str], Counter[str]]] = []  # what, ClientApp, worker
        self.first: Counter[str] | None = None  # of the server, until it asks
        self.at_server: Counter[str] = Counter()
        self.hashed = self.update_bytes = 0  # of replies

    def sites(self) -> list[int]:
        return list(range(1, len(self._folders) + 1))

    def name(self, site: int) -> str:
        return str(site)

    def carried(self) -> Mapping[int, int]:
        return {}

    def ask(self, sites: Sequence[int], question: Question, seconds: float) -> None:
        self.first = self.first or self._server()
        self._asked += [(site, question) for site in sites]

    def receive(self) -> Iterator[Reply]:
        asked, self._asked = self._asked, []
        for site, question in asked:
            self._server()
            assert question.weights is not None
            weights = (question.changes or question.weights).read_bytes()
            self._counts.take()
            parcel = self._answer(question, weights, self._folders[site - 1])
            if parcel.arrays:
                self._arrived.write_bytes(tensorfile.pack(parcel.arrays))
                self.update_bytes = self._arrived.stat().st_size
                kind = getattr(tensorfile, "Hashed", tensorfile.Stored)  # which was not there before
                parcel = Parcel(kind(self._arrived), parcel.scalars)
            self._counts.take()
            yield Reply(site, parcel, question=question)
            self.hashed += self._server()["bytes hashed"]

    def _server(self) -> Counter[str]:
        done = self._counts.take()
        self.at_server.update(done)
        return done

    def _answer(self, question: Question, weights: bytes, folder: Path) -> Parcel:
        box, plan = Mailbox(folder), json.loads(question.document)
        self._counts.take()

        def work() -> None:
            while box.asked() != question.exchange:
                threading.Event().wait(0.01)
            worker._answer(box, "", folder)

        other = threading.Thread(target=work, name="worker")
        other.start()
        parcel = client_app.carry(Asked(question.exchange, 600.0, question.document, weights), folder)
        other.join()
        what = "first round" if plan["round"] == 1 and plan["action"] == "train" else "later"
        self.at_site.append((what, self._counts.take(), self._counts.take("worker")))
        return parcel


def of_weights(data: Path, prior: Path, folder: Path, rule: str, encoding: str) -> Table:
    """From `serve` to the network of a site, and of updates back; two rounds of three sites."""
    folders, out = [], folder / f"{rule}-{encoding}"
    for number in range(SITES):
        folders.append(out / "sites" / str(number))
        (folder / "policy.toml").write_text(POLICY)
        arguments = ["--data", str(data), "--fraction", "0.5", "--seed", str(number), "--device", "cpu"]
        arguments += ["--policy", str(folder / "policy.toml"), "--threads", "1"]
        left = patch.object(join_command, "forget_pixels", lambda *_: None)  # the federation is not over
        with patch.object(join_command, "work", lambda *_: None), left:
            assert not command_line.run(client.app, "maskdm-client", [*arguments, "--out", str(folders[-1])])
    arguments = ["serve", "--insecure", "--prior", str(prior), "--out", str(out / "fed"), "--rounds", "2"]
    arguments += ["--min-clients", str(SITES), "--min-replies", str(SITES), "--byzantine", "0", "--local-images", "16"]
    arguments += ["--batch-size", "8", "--aggregation", rule, "--encoding", encoding]
    size, fed, configs = prior.stat().st_size, out / "fed", list[FederationConfig]()

    def serve(prior: Path, out: Path, config: FederationConfig, **_: Any) -> Path:
        begin(prior, out, config, {}, 1)
        configs.append(config)
        return out

    with counted(data) as counts:
        with patch.object(serve_command, "serve", serve):
            assert not command_line.run(server, "maskdm-server", arguments)
        (config,), start, way = configs, counts.take(), Way(folders, out, counts)
        with patch.object(fine_tuning, "HELD_OUT_DRAWS", 16):
            run_federation(way, fed, config, pause=lambda _: None)
        way.at_server.update(counts.take())
    read, site = ("bytes read", "bytes hashed"), ("documents parsed", "bytes hashed", "plans parsed")
    of_updates = {"bytes read": way.at_server["bytes of updates read"], "bytes hashed": way.hashed}
    steps = {"from the file to the sum": times(of_updates, 2 * SITES * way.update_bytes, *read)}
    found: Table = {f"update, {rule}, {encoding}": steps}
    if (rule, encoding) == ("mean", "bf16"):
        assert way.first is not None
        steps = {"serve, before the rounds": times(start, size, *read)}
        steps["rounds, until the first question"] = times(way.first, size, *read)
        steps["two rounds and the end, in all"] = times(way.at_server, size, *read)
        for what in ("first round", "later"):
            first = next(counts for counts in way.at_site if counts[0] == what)
            steps[f"site, {what}: ClientApp"] = times(first[1], size, *site)
            steps[f"site, {what}: worker"] = times(first[2], size, *site)
        found["weights"] = steps
    return found


def measure(folder: Path) -> Table:
    """All three ways, in a folder of their own."""
    torch.set_num_threads(1)
    data, prior, kits = folder / "data", folder / "prior.safetensors", folder / "kits"
    data.mkdir()
    for number, face in enumerate(draw_faces(IMAGES)):
        Image.fromarray(face).save(data / f"{number}.png")
        os.utime(data / f"{number}.png", (LONG_AGO, LONG_AGO))
    about = CheckpointMetadata(
        model=MODEL,
        diffusion=DiffusionConfig(timesteps=10),
        mask=MaskConfig(kind="none", ratio=0),
        effective_mask_ratio=0.0,
        images_seen=1,
        seed=0,
    )
    save_checkpoint(prior, {name: p.detach() for name, p in build_model(MODEL, seed=0).named_parameters()}, about)
    (folder / "kits-policy.toml").write_text(POLICY)
    arguments = ["provision", "--out", str(kits), "--server", "127.0.0.1:8000", "--client", "a", "--prior", str(prior)]
    arguments += ["--policy", str(folder / "kits-policy.toml")]
    assert not command_line.run(server, "maskdm-server", arguments)
    found = of_images(data, folder, kits / "a.zip")
    for rule, encoding in (("mean", "bf16"), ("median", "bf16"), ("krum", "bf16")):
        found |= of_weights(data, prior, folder, rule, encoding)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, help="where to write the counts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    for way, steps in found.items():
        for step, counts in steps.items():
            print(f"{way} | {step} | " + ", ".join(f"{what} {count:g}" for what, count in counts.items()))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
