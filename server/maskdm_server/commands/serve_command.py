"""`maskdm-server serve`: a federation."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from maskdm.diffusion.sampling import check_steps
from maskdm.run.reporting import say
from maskdm.run.runfolder import owned
from maskdm.training.checkpoint import describe_checkpoint

from ..flower.serve import address_of, serve
from ..report.dashboard import Dashboard
from ..tracking.follow import FEDERATION, follow
from .federation_options import chosen_federation, with_federation_options
from .options import LogOption, Out, Prior


@with_federation_options()
def serve_command(
    prior: Prior,
    out: Out,
    tls: Annotated[
        Path | None, typer.Option(help="The server's folder that provision made: TLS and node keys.")
    ] = None,
    insecure: Annotated[bool, typer.Option(help="Neither encrypt nor authenticate: for one machine.")] = False,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; default: any with --tls, else 127.0.0.1.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port; default: that of the kits with --tls, else 8000.")
    ] = None,
    dashboard: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port on loopback where a browser sees the report, live.")
    ] = None,
    log: LogOption = "off",
    *,
    federation: dict[str, Any],
) -> None:
    """Hand a prior to institutions, gather their updates round by round, and keep the federated model."""
    metadata = describe_checkpoint(prior, "--prior")
    config = chosen_federation(prior, federation)
    check_steps(config.evaluate_steps, metadata.diffusion, "--evaluate-steps")
    address, at = address_of(tls, insecure, host, port)
    with owned(out), Dashboard(out, dashboard) if dashboard else nullcontext(), follow(out, FEDERATION, log):
        model = serve(prior, out, config, host=address, port=at, tls=tls)
    say(f"model: {model}; samples before and after: {out / 'samples'}")
