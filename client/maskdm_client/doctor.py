"""`maskdm-client doctor`: what can be checked before joining. Nothing leaves the site."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from maskdm import cli
from maskdm.checkpoint import load_checkpoint
from maskdm.data.corpus import SKIPPED
from maskdm.data.options import Upscale, Window, window_of
from maskdm.data.packing import check_apart, guess_channels, pack
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preflight import CONTACT_SHEET, inspect, lines, write_report
from maskdm.data.sources import open_source
from maskdm.reporting import say
from maskdm.runfolder import atomic_write, owned


def doctor(
    data: Annotated[Path, typer.Option(help="Local images: a folder, zip, tar, .npz, .npy or packed corpus.")],
    prior: Annotated[Path | None, typer.Option(help="The coordinator's prior, to compare the images with.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels along a side, where there is no --prior.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report and the contact sheet.")] = Path("maskdm-doctor"),
    upscale: Upscale = False,
    window: Window = None,
) -> int:
    """Look the local images over as training would see them; exit code 1 where something looks wrong."""
    metadata = load_checkpoint(prior, "--prior")[1] if prior else None
    source = open_source(data)
    size, channels = (metadata.model.image_size, metadata.model.channels) if metadata else (image_size, 0)
    values = {
        "image_size": size,
        "channels": channels or guess_channels(source),
        "upscale": upscale,
        "window": window_of(window),
    }
    policy = cli.configure(PixelPolicy, values)
    check_apart(data, out)
    with owned(out), tempfile.TemporaryDirectory(dir=out) as folder:
        corpus = pack(source, Path(folder) / "corpus", policy)
        report = inspect(corpus, metadata)
        write_report(corpus, out, report)
        atomic_write(out / SKIPPED, (Path(folder) / "corpus" / SKIPPED).read_bytes())
    for line in lines(report, policy):
        say(line)
    say(f"look at {out / CONTACT_SHEET}; it stays on this machine")
    return 1 if report.warnings else 0
