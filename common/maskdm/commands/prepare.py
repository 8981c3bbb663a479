"""The command `prepare`, the same for coordinator and site: pack any collection of images, and look it over."""

from pathlib import Path
from typing import Annotated

import typer

from ..data.pixels import Filter, Fit, PixelPolicy
from ..data.preparation.pack import check_apart, guess_channels, pack
from ..data.preparation.preflight import CONTACT_SHEET, REPORT, inspect, lines, write_report
from ..data.sources.groups import with_groups
from ..data.sources.layouts import LAYOUTS, with_layout
from ..run.reporting import say
from ..run.runfolder import owned
from ..training.checkpoint import describe_checkpoint
from . import command_line as cli
from .image_options import Channels, GroupCsv, GroupRegex, Upscale, Window, channels_of, window_of


def prepare(
    data: Annotated[Path, typer.Option(help="Images: a folder of any depth, a zip, tar, .npz, .npy or packed corpus.")],
    out: Annotated[Path, typer.Option(help="Folder of the packed corpus; the same command again continues it.")],
    image_size: Annotated[int, typer.Option(help="Pixels along a side.")] = 64,
    channels: Channels = "auto",
    layout: Annotated[str, typer.Option(help=f"How the corpus is laid out: {', '.join(LAYOUTS)}.")] = "auto",
    boxes: Annotated[Path | None, typer.Option(help="VGGFace2's loose_bb_….csv: crop to the faces.")] = None,
    group_regex: GroupRegex = None,
    group_csv: GroupCsv = None,
    fit: Annotated[Fit, typer.Option(help="crop: short side, centre; pad: long side, on black.")] = "crop",
    filter: Annotated[Filter, typer.Option(help="How images are made smaller.")] = "lanczos",
    window: Window = None,
    upscale: Upscale = False,
    prior: Annotated[Path | None, typer.Option(help="Checkpoint to compare the images with.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes one for each core.")] = 0,
) -> None:
    """Pack images once, so that training reads them without decoding; leaves a report and a contact sheet."""
    wanted_channels = channels_of(channels)
    metadata = describe_checkpoint(prior, "--prior") if prior else None
    source = with_groups(with_layout(data, layout, boxes), group_regex, group_csv)
    values = {
        "image_size": image_size,
        "channels": wanted_channels or guess_channels(source),
        "fit": fit,
        "filter": filter,
        "window": window_of(window),
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
