"""The command `prepare`, the same for coordinator and site: pack any collection of images, and look it over."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm import cli
from maskdm.checkpoint import load_checkpoint
from maskdm.data.groups import with_groups
from maskdm.data.layouts import LAYOUTS, with_layout
from maskdm.data.packing import check_apart, guess_channels, pack
from maskdm.data.pixels import Filter, Fit, PixelPolicy
from maskdm.data.preflight import CONTACT_SHEET, REPORT, inspect, lines, write_report
from maskdm.errors import UsageError
from maskdm.reporting import say
from maskdm.runfolder import owned


def prepare(
    data: Annotated[Path, typer.Option(help="Images: a folder of any depth, a zip, tar, .npz, .npy or packed corpus.")],
    out: Annotated[Path, typer.Option(help="Folder of the packed corpus; the same command again continues it.")],
    image_size: Annotated[int, typer.Option(help="Pixels along a side.")] = 64,
    channels: Annotated[str, typer.Option(help="1, 3, or auto: grey where all images are grey.")] = "auto",
    layout: Annotated[str, typer.Option(help=f"How the corpus is laid out: {', '.join(LAYOUTS)}.")] = "auto",
    boxes: Annotated[Path | None, typer.Option(help="VGGFace2's loose_bb_….csv: crop to the faces.")] = None,
    group_regex: Annotated[
        str | None, typer.Option(help="Part of an image's path that names its patient, identity or slide.")
    ] = None,
    group_csv: Annotated[
        str | None, typer.Option(help="The same from a table, FILE.csv:COLUMN; its first column names the images.")
    ] = None,
    fit: Annotated[Fit, typer.Option(help="crop: short side, centre; pad: long side, on black.")] = "crop",
    filter: Annotated[Filter, typer.Option(help="How images are made smaller.")] = "lanczos",
    window: Annotated[
        str | None, typer.Option(help="Values that are black and white in images of more than 8 bits, e.g. 0,4095.")
    ] = None,
    upscale: Annotated[
        bool, typer.Option(help="Enlarge images smaller than --image-size instead of skipping them.")
    ] = False,
    prior: Annotated[Path | None, typer.Option(help="Checkpoint to compare the images with.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one for each core.")] = 0,
) -> None:
    """Pack images once, so that training reads them without decoding; leaves a report and a contact sheet."""
    if channels not in ("auto", "1", "3"):
        raise UsageError(f"--channels {channels}: give 1, 3 or auto")
    metadata = load_checkpoint(prior, "--prior")[1] if prior else None
    source = with_groups(with_layout(data, layout, boxes), group_regex, group_csv)
    values = {
        "image_size": image_size,
        "channels": guess_channels(source) if channels == "auto" else int(channels),
        "fit": fit,
        "filter": filter,
        "window": cli.pair("--window", window) if window else None,
        "upscale": upscale,
    }
    policy = cli.configure(PixelPolicy, values)
    check_apart(data, out)
    with owned(out):
        corpus = pack(source, out, policy, workers=workers)
        report = inspect(corpus, metadata)
        write_report(corpus, out, report)
    for line in lines(report, policy):
        say(line)
    say(f"corpus: {out}, {corpus.manifest.sha256[:12]}; {REPORT} and {CONTACT_SHEET} stay on this machine")
