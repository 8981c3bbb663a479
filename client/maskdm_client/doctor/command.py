"""`maskdm-client doctor`: all that can be checked before joining. Joins nothing, sends nothing of the images."""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from torch import Tensor

from maskdm.commands.image_options import Upscale, Window, pixel_policy, window_of
from maskdm.config import DiffusionConfig, ModelConfig
from maskdm.data.corpus import SKIPPED
from maskdm.data.pixels import PixelPolicy
from maskdm.data.preparation.pack import check_apart, guess_channels, pack
from maskdm.data.preparation.preflight import CONTACT_SHEET, inspect, lines, write_report
from maskdm.data.sources.source import Source, open_source
from maskdm.errors import DataError, UsageError
from maskdm.federated.kit import OpenedKit
from maskdm.federated.policy import SitePolicy
from maskdm.metadata import CheckpointMetadata
from maskdm.run.processes import no_proxy_for_loopback
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write, owned, write_json
from maskdm.training.checkpoint import load_checkpoint

from ..flower.address import address_of
from . import checks
from .checks import Check, mistake, show, skipped
from .checks_connection import clock, connection, name_resolution
from .checks_machine import (
    accelerator,
    available_memory,
    disk,
    installed,
    memory,
    needed_memory,
    training_step,
    versions,
)
from .node_key import node_key

# What is asked of the coordinator, one after another.
WAY = ("name resolution", "connection", "clock", "node key")


def doctor(
    data: Annotated[Path, typer.Option(help="Local images: a folder, zip, tar, .npz, .npy or packed corpus.")],
    kit: Annotated[Path | None, typer.Option(help="Startup kit from the coordinator, zip or folder.")] = None,
    server: Annotated[str | None, typer.Option(help="Coordinator, HOST:PORT; default: the kit's.")] = None,
    insecure: Annotated[bool, typer.Option(help="Ask another machine without a kit, in the clear.")] = False,
    policy: Annotated[Path | None, typer.Option(help="What may leave (TOML); default: the kit's policy.toml.")] = None,
    prior: Annotated[Path | None, typer.Option(help="The coordinator's prior, to compare the images with.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels along a side, where neither prior nor kit says it.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for the report and the contact sheet.")] = Path("maskdm-doctor"),
    upscale: Upscale = False,
    window: Window = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    json: Annotated[
        str | None, typer.Option(help="Write the results as JSON into a file; - is standard output.")
    ] = None,
) -> int:
    """Check images, machine, kit and connection before joining; exit code 1 where something is red."""
    if kit and insecure:
        raise UsageError("--kit and --insecure exclude each other: choose one")
    if kit and not kit.exists():
        raise UsageError(f"--kit {kit} does not exist: give the zip that the coordinator made for you")
    if server and not kit:
        address_of(server, None, insecure)
    weights, metadata = load_checkpoint(prior, "--prior") if prior else (None, None)
    source = open_source(data)
    check_apart(data, out)
    os.environ.update(no_proxy_for_loopback())
    with owned(out), tempfile.TemporaryDirectory(dir=out, prefix=".kit-") as private:  # a key has no place in a report
        opened, of_kit = _kit(kit, Path(private))
        terms, of_policy = checks.policy(policy, opened)
        shape = _shape(metadata.model if metadata else opened.kit.model if opened else None, image_size, source)
        pixels = pixel_policy(shape.image_size, shape.channels, upscale, window_of(window))
        address = address_of(server, opened, insecure) if opened or (server and not kit) else None
        why_not = "the kit cannot be used" if kit else "neither --kit nor --server was given"
        found = []
        for check in chain(
            [versions(installed()), of_kit, of_policy, _bundle(opened, terms)],
            _way(*address, opened) if address else (skipped(name, why_not) for name in WAY),
            _machine(out, source.count() or 0, shape, device, weights, metadata.diffusion if metadata else None),
            _images(source, out, pixels, metadata, terms),
        ):
            show(check)
            found.append(check)
    _write(json, found)
    red = sum(check.ok is False for check in found)
    say(f"{red} of {len(found)} checks are red" if red else "nothing is red")
    return 1 if red else 0


def _kit(path: Path | None, folder: Path) -> tuple[OpenedKit | None, Check]:
    return checks.kit(path, folder, datetime.now(UTC)) if path else (None, skipped("kit", "no --kit was given"))


def _bundle(opened: OpenedKit | None, terms: SitePolicy | None) -> Check:
    if opened is None:
        return skipped("bundle", "no kit says which code may run")
    return checks.bundle(opened.kit, terms or SitePolicy())


def _shape(known: ModelConfig | None, image_size: int, source: Source) -> ModelConfig:
    """The model that will be trained, or the usual one."""
    if known:
        return known
    try:
        return ModelConfig.preset("S", image_size=image_size, channels=guess_channels(source))
    except ValidationError as error:
        raise UsageError(f"--image-size {image_size}: give a multiple of 4 from 4 to 2048") from error


def _way(host: str, port: int, opened: OpenedKit | None) -> Iterator[Check]:
    """From here to the coordinator."""
    resolved = name_resolution(host)
    yield resolved
    if not resolved.ok:
        yield from (skipped(name, "the server has no address") for name in WAY[1:])
        return
    connected, answer = connection(host, port, opened.authority if opened else None)
    yield connected
    if answer is None:
        yield from (skipped(name, "there is no connection") for name in WAY[2:])
    elif opened is None:
        yield from (skipped(name, "without a kit nothing is signed") for name in WAY[2:])
    else:
        yield clock(answer)
        yield node_key(host, port, opened)


def _machine(
    out: Path,
    images: int,
    shape: ModelConfig,
    name: str,
    weights: dict[str, Tensor] | None,
    diffusion: DiffusionConfig | None,
) -> Iterator[Check]:
    yield disk(out, images, shape)
    device, picked = accelerator(name)
    yield picked
    if device is None:
        yield from (skipped(name, "there is no such device") for name in ("memory", "training step"))
        return
    fits = memory(needed_memory(shape), available_memory(device), device)
    yield fits
    if not fits.ok:  # the system might end this process for it
        yield skipped("training step", "there is not enough memory to try it")
        return
    yield training_step(shape, device, weights, diffusion)


def _images(
    source: Source, out: Path, pixels: PixelPolicy, metadata: CheckpointMetadata | None, terms: SitePolicy | None
) -> Iterator[Check]:
    """The images as training would see them, with a report for people."""
    try:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            corpus = pack(source, Path(folder) / "corpus", pixels)
            report = inspect(corpus, metadata)
            write_report(corpus, out, report)
            atomic_write(out / SKIPPED, (Path(folder) / "corpus" / SKIPPED).read_bytes())
    except DataError as error:
        yield mistake("data", error)
        return
    for line in lines(report, pixels):
        say(line)
    problems = [*report.warnings]
    if terms and (few := terms.problem_of_slice(report.images)):
        problems.append(few)
    found = f"{report.images:,} images can be used"
    if problems:
        yield Check("data", False, "; ".join([found, *problems]), f"look at {out / CONTACT_SHEET}")
        return
    yield Check("data", True, f"{found}; {out / CONTACT_SHEET} stays on this machine")


def _write(where: str | None, found: list[Check]) -> None:
    document = [asdict(check) for check in found]
    if where == "-":
        print(dumps(document, indent=2, ensure_ascii=False), file=sys.stdout, flush=True)
    elif where:
        try:
            write_json(Path(where), document)
        except OSError as error:
            raise UsageError(f"--json {where} cannot be written ({error.strerror}): choose another file") from error
