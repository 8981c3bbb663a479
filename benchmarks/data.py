"""How fast images are packed and fed, beside what the research code does, in one process on one machine.

    python benchmarks/data.py --json benchmarks/results/data.json

Reading: images per CPU-second from a folder, a zip and a packed corpus of 64 px images whose sources are 64, 256 and
1024 px JPEGs, beside PIL + ToTensor in a DataLoader (jiachenlei/maskdm, `datasets/base.py`). The packed corpus is
measured at the sources' own size too, where the pixels are as many as the peer's. Preparation: `prepare` on all cores
beside `torchvision.io.decode_jpeg` + resize on all cores. Memory: `prepare` of 10,000 and 100,000 images.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import functional as transforms

from maskdm.data.batches import batches
from maskdm.data.corpus import Corpus
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.pack import decode_entries, pack
from maskdm.data.sources.source import open_source
from maskdm.run.runfolder import write_json

MODEL_SIZE = 64
COUNTS = {64: 4000, 256: 1500, 1024: 160}  # files that are read …
TIMES = 8  # … and how often as many are prepared, so that starting worker processes counts as little as it should


def write_photographs(folder: Path, count: int, size: int) -> None:
    """JPEGs with the spectrum of photographs (1/f noise), quality 90, a hundred different ones again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    frequency = np.maximum(np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))), 1 / size)
    for number in range(count):
        path = folder / f"{number:06}.jpg"
        if number >= 100:
            shutil.copyfile(folder / f"{number % 100:06}.jpg", path)
            continue
        planes = [np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) / frequency**1.2).real for _ in range(3)]
        planes = [planes[0] + 0.3 * plane for plane in planes]
        stacked = np.stack([128 + 48 * plane / plane.std() for plane in planes], axis=2)
        Image.fromarray(stacked.clip(0, 255).astype(np.uint8)).save(path, quality=90)


class Peer(Dataset[torch.Tensor]):
    """What the research code does with a file: PIL, to a float tensor, short side resized."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        tensor: torch.Tensor = transforms.to_tensor(Image.open(self.paths[index]).convert("RGB"))
        return tensor


def rates(ways: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median images per CPU-second (of this process's threads) of each way, in turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.process_time()
            images = way()
            found[name].append(images / (time.process_time() - started))
    return {name: statistics.median(values) for name, values in found.items()}


def reading(folder: Path, size: int, repeats: int) -> dict[str, Any]:
    """Images per CPU-second from files of one size."""
    images, archive = folder / "images", folder / "images.zip"
    policy = PixelPolicy(image_size=MODEL_SIZE, channels=3)
    full = PixelPolicy(image_size=size, channels=3)
    corpora = {
        f"packed, {edge} px": pack(open_source(images), folder / f"corpus-{edge}", wanted)
        for edge, wanted in {MODEL_SIZE: policy, size: full}.items()
    }

    def peer() -> int:
        return sum(len(batch) for batch in DataLoader(Peer(images), batch_size=64))

    def decoded(path: Path) -> Callable[[], int]:
        entries = list(open_source(path).entries())
        return lambda: decode_entries(entries, policy).entries

    def packed(name: str) -> Callable[[], int]:
        pixels = corpora[name].pixels

        def run() -> int:
            return sum(len(batch) for batch, _ in islice(batches(pixels, 64, 0, 0), 60))

        return run

    ways: dict[str, Callable[[], int]] = {
        "peer: PIL + ToTensor": peer,
        "folder": decoded(images),
        "zip": decoded(archive),
        **{name: packed(name) for name in corpora},
    }
    found = rates(ways, repeats)
    return {"measure": "reading", "source_px": size, **{name: round(rate) for name, rate in found.items()}}


def preparation(folder: Path, size: int, repeats: int, cores: int) -> dict[str, Any]:
    """Images per second of wall time on all cores: `prepare` (with start-up, hashes and writing), and the bare work."""
    source = folder / "many"
    write_photographs(source, TIMES * COUNTS[size], size)
    paths = sorted(source.iterdir())
    program = str(Path(sys.executable).with_name("maskdm-server"))

    def theirs(path: Path) -> torch.Tensor:
        pixels = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        resized: torch.Tensor = transforms.resize(pixels, [MODEL_SIZE, MODEL_SIZE], antialias=True)
        return resized

    def torchvision_pool() -> None:
        with ThreadPoolExecutor(cores) as pool:
            for _ in pool.map(theirs, paths, chunksize=16):
                pass

    def ours() -> None:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        policy = PixelPolicy(image_size=MODEL_SIZE, channels=3)
        pack(open_source(source), folder / "prepared", policy, workers=cores)

    def command() -> None:
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        arguments = ["--data", str(source), "--out", str(folder / "prepared")]
        subprocess.run(
            [program, "prepare", *arguments, "--image-size", str(MODEL_SIZE)], check=True, capture_output=True
        )

    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, way in (("torchvision", torchvision_pool), ("pack", ours), ("command", command)):
            started = time.perf_counter()
            way()
            found.setdefault(name, []).append(len(paths) / (time.perf_counter() - started))
    medians = {name: round(statistics.median(values)) for name, values in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["pack"], found["torchvision"], strict=True))
    return {"measure": "preparation", "source_px": size, "images": len(paths), **medians, "ratio": round(ratio, 2)}


def memory(folder: Path, count: int) -> dict[str, Any]:
    """Peak resident memory of `prepare` and of its largest worker, for so many generated files."""
    source = folder / f"many-{count}"
    if not source.exists():
        write_photographs(folder / "few", 100, 64)
        few = [path.read_bytes() for path in sorted((folder / "few").iterdir())]
        for number in range(count):
            path = source / f"{number // 1000:04}" / f"{number:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(few[number % 100])
    program = str(Path(sys.executable).with_name("maskdm-server"))
    started = time.perf_counter()
    process = subprocess.Popen(
        [program, "prepare", "--data", str(source), "--out", str(folder / f"out-{count}")], stderr=subprocess.DEVNULL
    )
    largest = {"main": 0, "worker": 0}
    while process.poll() is None:
        for pid in [process.pid, *children(process.pid)]:
            name = "main" if pid == process.pid else "worker"
            largest[name] = max(largest[name], peak_memory(pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    assert process.returncode == 0
    corpus = Corpus.open(folder / f"out-{count}")
    assert len(corpus) == count
    return {
        "measure": "memory",
        "images": count,
        "main_mib": round(largest["main"] / 1024),
        "largest_worker_mib": round(largest["worker"] / 1024),
        "images_per_s": round(count / seconds),
    }


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def peak_memory(pid: int) -> int:
    """Largest resident memory of a process until now, KiB; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def main() -> None:
    """Measure everything, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="folder for generated images (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for size, count in COUNTS.items():
            folder = work / str(size)
            write_photographs(folder / "images", count, size)
            with zipfile.ZipFile(folder / "images.zip", "w") as archive:
                for path in sorted((folder / "images").iterdir()):
                    archive.write(path, path.name)
            lines.append(reading(folder, size, options.repeats))
            print(json.dumps(lines[-1]), flush=True)
            lines.append(preparation(folder, size, options.repeats, cores))
            print(json.dumps(lines[-1]), flush=True)
        for count in (10_000, 100_000):
            lines.append(memory(work, count))
            print(json.dumps(lines[-1]), flush=True)
    machine = {"cpu": cpu(), "cores": cores}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    if options.json:
        write_json(options.json, [{**line, "machine": machine, "versions": versions} for line in lines])


def cpu() -> str:
    """The processor as Linux names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
