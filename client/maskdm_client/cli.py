"""`maskdm-client`: the institution's command line."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm import cli
from maskdm.config import Precision
from maskdm.data.options import GroupCsv, GroupRegex, Upscale, Window, window_of
from maskdm.data.packing import check_apart
from maskdm.data.prepare import prepare
from maskdm.data.sources import open_source
from maskdm.errors import UsageError
from maskdm.interruption import Interruption
from maskdm.precision import pick_device
from maskdm.reporting import say
from maskdm.runfolder import claim, owned
from maskdm_client.doctor import doctor
from maskdm_client.local_data import choose_slice
from maskdm_client.settings import SiteSettings
from maskdm_client.supervision import work

app = typer.Typer(add_completion=False, no_args_is_help=False)


@app.callback(invoke_without_command=True)
def join(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Local images: a folder of any depth, a zip, .npz or .npy.")] = None,
    server: Annotated[str, typer.Option(help="Coordinator, HOST:PORT.")] = "127.0.0.1:8000",
    kit: Annotated[Path | None, typer.Option(help="Folder with ca.crt of the coordinator: connects by TLS.")] = None,
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
) -> None:
    """Join a federation, fine-tune on a slice of the local images in each round, send back only the update."""
    if context.invoked_subcommand:
        return
    if data is None:
        raise UsageError("--data is missing: give the folder, zip, .npz or .npy with your images")
    host, port = _address(server)
    certificate = kit / "ca.crt" if kit else None
    if certificate and not certificate.is_file():
        raise UsageError(f"--kit {kit} holds no ca.crt: give the folder that the coordinator made for you")
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
        "policy": {"max_upload": max_upload and cli.size("--max-upload", max_upload)},
    }
    settings = cli.configure(SiteSettings, values)
    open_source(data)
    check_apart(data, out)
    pick_device(device)
    with owned(out), Interruption() as interruption:
        for left in (*out.glob(".*.tmp"), *out.glob("work/.*.tmp")):  # by processes that were killed as they wrote
            left.unlink(missing_ok=True)
        may_change = ("site.device", "site.precision", "site.threads", "site.policy.max_upload")
        claim(out, "client", {"site": settings.model_dump(mode="json")}, may_change=may_change)
        chosen, found = choose_slice(settings, out, interruption.check)
        say(
            f"{found.total:,} local images; {len(chosen.train):,} to train on, {len(chosen.held_out):,} held out"
            + (f"; {len(found.unreadable):,} could not be read" if found.unreadable else "")
            + (f"; {len(chosen.left_out):,} left out, alike to both" if chosen.left_out else "")
            + (f"; {found.other_splits:,} left out: in folders named test or validation" if found.other_splits else "")
        )
        if certificate is None:
            say("WARNING: no --kit, so the connection is not encrypted: use it on one machine or a closed network only")
        work(out, host, port, certificate, wait, interruption.check)
        say(f"done; the final model is {out / 'model.safetensors'}, what left is listed in {out / 'audit.jsonl'}")


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--server {server}: give HOST:PORT, e.g. maskdm.example.org:8000")
    return host.strip("[]"), int(port)


app.command("prepare")(prepare)
app.command("doctor")(doctor)
