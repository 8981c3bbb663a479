"""The transfer experiment on real images: prepares them, and runs `maskdm-server experiment`.

    python benchmarks/transfer.py fashion --data DIR --out WORK [--json FILE] [-- OPTIONS OF EXPERIMENT…]
    python benchmarks/transfer.py xray    --data DIR --out WORK [--json FILE] [-- …]

`fashion`: tops (classes 0, 2, 3, 4, 6) as the public corpus, footwear (5, 7, 9) at the sites, 32x32 grey. Distances in
the features of a network that was trained to name all ten classes on the test part, of which no arm sees an image.
`xray`: blood cells, portraits and fashion as the public corpus, chest X-rays at the sites, 64x64 grey; distances in the
features of MobileNetV2.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdm.run.runfolder import write_json

Array = NDArray[np.uint8]
OPTIONS: dict[str, list[str]] = {
    "fashion": ["--image-size", "32"],
    "xray": ["--image-size", "64", "--patch-size", "8", "--references", "600"],
}


def fashion(data: Path, out: Path) -> Path:
    """Write public.npz and local.npz, padded from 28 to 32 pixels; returns the feature network."""
    with np.load(data / "fashion_mnist_25k.npz", allow_pickle=False) as packed:
        arrays = {name: packed[name] for name in packed.files}
    pad = ((0, 0), (2, 2), (2, 2))
    pixels = {part: np.pad(arrays[f"x_{part}"], pad) for part in ("train", "test")}
    labels = {part: arrays[f"y_{part}"].astype(np.int64) for part in ("train", "test")}
    for name, classes in (("public", (0, 2, 3, 4, 6)), ("local", (5, 7, 9))):
        rows = np.isin(labels["train"], classes)
        _save(out / f"{name}.npz", pixels["train"][rows], labels["train"][rows])
    network = out / "FashionNet.safetensors"
    if not network.exists():
        _save(out / "test.npz", pixels["test"], labels["test"])
        _run("features", "--data", str(out / "test.npz"), "--out", str(network), "--image-size", "32")
    return network


def xray(data: Path, out: Path) -> Path:
    """Write public.npz and local.npz in grey; returns the feature network."""
    public = [*_zipped(data / "bloodcells64.zip")[0], *_zipped(data / "portraits64.zip")[0]]
    with np.load(data / "fashion_mnist_25k.npz", allow_pickle=False) as packed:
        clothes = packed["x_train"][::4]
    public += [np.asarray(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in clothes]
    _save(out / "public.npz", np.stack(public), np.zeros(len(public), np.int64))
    chests, names = _zipped(data / "chestxray64.zip")
    _save(out / "local.npz", np.stack(chests), np.array([Path(name).parent.name for name in names]))
    return data / "mobilenetv2_imagenet_int8.npz"


def _run(*arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("maskdm-server")), *arguments], check=True)


def _zipped(path: Path) -> tuple[list[Array], list[str]]:
    with zipfile.ZipFile(path) as packed:
        names = sorted(name for name in packed.namelist() if name.lower().endswith((".jpg", ".jpeg")))
        return [np.asarray(Image.open(packed.open(name)).convert("L")) for name in names], names


def _save(path: Path, images: Array, labels: NDArray[Any]) -> None:
    if not path.exists():
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, images=images, labels=labels)
        temporary.replace(path)


def main() -> None:
    """Prepare, run, and copy the results."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    own, rest = given[:cut], given[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(OPTIONS))
    parser.add_argument("--data", type=Path, required=True, help="folder with the packs")
    parser.add_argument("--out", type=Path, required=True, help="working folder; the same command again continues")
    parser.add_argument("--json", type=Path, help="write the results there, and the table beside it")
    arguments = parser.parse_args(own)
    arguments.out.mkdir(parents=True, exist_ok=True)
    network = {"fashion": fashion, "xray": xray}[arguments.task](arguments.data, arguments.out)
    command = [
        *("experiment", "--public", str(arguments.out / "public.npz"), "--local", str(arguments.out / "local.npz")),
        *("--features", str(network), "--out", str(arguments.out / "experiment")),
        *(*OPTIONS[arguments.task], *rest),
    ]
    _run(*command)
    if arguments.json:
        results = json.loads((arguments.out / "experiment" / "results.json").read_text())
        about = {
            "task": arguments.task,
            "command": f"python benchmarks/transfer.py {arguments.task} --data DIR --out WORK -- {' '.join(rest)}",
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
        }
        write_json(arguments.json, [{**about, **results}])
        (arguments.json.with_suffix(".md")).write_text((arguments.out / "experiment" / "results.md").read_text())


if __name__ == "__main__":
    main()
