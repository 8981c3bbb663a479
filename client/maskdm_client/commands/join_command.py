"""`maskdm-client` without a subcommand: takes part in a federation, to its end."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.commands.image_options import GroupCsv, GroupRegex, Upscale, Window, window_of
from maskdm.config import Precision
from maskdm.data.preparation.pack import check_apart
from maskdm.data.preparation.slices import Found, Slice
from maskdm.data.sources.source import open_source
from maskdm.errors import UsageError
from maskdm.federated.bundle import bundle_sha256
from maskdm.federated.kit import POLICY, OpenedKit, valid_kit
from maskdm.federated.policy import POLICY_KEYS, SitePolicy, load_policy
from maskdm.networks.precision import pick_device
from maskdm.run.interruption import Interruption
from maskdm.run.reporting import say
from maskdm.run.runfolder import claim, owned

from ..agent.connection import work
from ..flower.address import BANNER, address_of
from ..folder.mailbox import Mailbox
from ..folder.settings import SiteSettings
from ..gate.changed_policy import warn_of_change
from ..work.local_data import choose_slice, forget_pixels
from ..work.quality import features_of

MAY_CHANGE = tuple(f"site.{name}" for name in ("device", "precision", "threads", "features", "bundle", "approve"))


def join(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Local images: a folder of any depth, a zip, .npz or .npy.")] = None,
    kit: Annotated[
        Path | None,
        typer.Option(help="Startup kit from the coordinator, zip or folder: address, TLS, this site's key."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Coordinator, HOST:PORT; default: the kit's, else 127.0.0.1:8000.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Connect to another machine without a kit, in the clear.")] = False,
    policy: Annotated[Path | None, typer.Option(help="What may leave (TOML); default: the kit's policy.toml.")] = None,
    approve: Annotated[
        str | None, typer.Option(help="Fingerprint of the terms that this site agrees to, as the coordinator says it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="This site's own folder: log, audit, slice, final model.")] = Path(
        "maskdm-site"
    ),
    fraction: Annotated[float, typer.Option(help="Share of the local images to use, always the same ones.")] = 0.1,
    held_out: Annotated[float, typer.Option(help="Share of those kept to measure, never trained on.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Key of the choice of images.")] = 0,
    max_images: Annotated[int | None, typer.Option(help="Use at most so many, of the fraction.")] = None,
    stratify: Annotated[bool, typer.Option(help="Take the fraction of each label.")] = False,
    group_regex: GroupRegex = None,
    group_csv: GroupCsv = None,
    upscale: Upscale = False,
    window: Window = None,
    max_upload: Annotated[
        str | None, typer.Option(help="Largest update that may leave in a round, e.g. 50MB; default: any.")
    ] = None,
    wait: Annotated[float, typer.Option(help="Seconds to keep trying while the coordinator is away.")] = 600,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Arithmetic of matrix products.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all.")] = 0,
    features: Annotated[
        str | None, typer.Option(help="File of a feature network, or random: for evaluations that the policy lists.")
    ] = None,
) -> None:
    """Join a federation, fine-tune on a slice of the local images in each round, send back only the update."""
    if context.invoked_subcommand:
        return
    if data is None:
        raise UsageError("--data is missing: give the folder, zip, .npz or .npy with your images")
    if kit and insecure:
        raise UsageError("--kit and --insecure exclude each other: choose one")
    values = {
        "data": data.absolute(),
        "fraction": fraction,
        "held_out": held_out,
        "seed": seed,
        "max_images": max_images,
        "stratify": stratify,
        "group_regex": group_regex,
        "group_csv": group_csv and str(Path(group_csv).absolute()),
        "upscale": upscale,
        "window": window_of(window),
        "device": device,
        "precision": precision,
        "threads": threads,
        "features": features and features_of(features),
    }
    source = open_source(data)
    check_apart(data, out)
    pick_device(device)
    with owned(out), Interruption() as interruption:
        opened = valid_kit(kit, out / ".kit") if kit else None
        host, port = address_of(server, opened, insecure)
        terms = _terms(policy, opened, max_upload, approve)
        values |= {"policy": terms, "approve": approve, "bundle": opened.kit.bundle if opened else bundle_sha256()}
        settings = cli.configure(SiteSettings, values)
        for left in (*out.glob(".*.tmp"), *out.glob("work/.*.tmp")):  # by processes that were killed as they wrote
            left.unlink(missing_ok=True)
        # Another authority is another federation, or somebody who pretends to be this one.
        identity = {"site": settings.model_dump(mode="json"), "authority": opened.fingerprint() if opened else None}
        claim(out, "client", identity, may_change=(*MAY_CHANGE, *POLICY_KEYS))
        # Of a federation that is over nothing is trained on any more.
        model = opened.kit.model if opened and not Mailbox(out).is_over() else None
        chosen, found = choose_slice(source, settings, out, model, interruption.check)
        say(_described(chosen, found))
        if opened is None:
            say(BANNER)
        work(out, host, port, opened, wait, interruption.check)
        forget_pixels(out)
        say(f"done; the final model is {out / 'model.safetensors'}, what left is listed in {out / 'audit.jsonl'}")


def _terms(policy: Path | None, kit: OpenedKit | None, max_upload: str | None, approve: str | None) -> SitePolicy:
    """What may leave: the policy, and what options add to it."""
    terms = load_policy(policy or (kit.folder / POLICY if kit else None))
    if kit and not policy:
        warn_of_change(kit, terms)
    if max_upload:
        largest = quantities.size("--max-upload", max_upload)
        if largest < 1:
            raise UsageError(f"--max-upload {max_upload}: give at least one byte")
        terms = terms.model_copy(update={"max_bytes_per_round": min(largest, terms.max_bytes_per_round or largest)})
    if approve:  # and to no others, without a person
        terms = terms.model_copy(update={"approve_first_round": True})
    return terms


def _described(chosen: Slice, found: Found) -> str:
    """The slice, for a person."""
    return (
        f"{found.total:,} local images; {len(chosen.train):,} to train on, {len(chosen.held_out):,} held out"
        + (f"; {len(found.unreadable):,} could not be read" if found.unreadable else "")
        + (f"; {len(chosen.left_out):,} left out, alike to both" if chosen.left_out else "")
        + (f"; {found.other_splits:,} left out: in folders named test or validation" if found.other_splits else "")
    )
