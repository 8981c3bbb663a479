"""`maskdm-server serve` and `simulate`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from maskdm.commands import command_line as cli
from maskdm.commands.image_options import Upscale
from maskdm.diffusion.sampling import check_steps
from maskdm.evaluation.extractors.features import RANDOM
from maskdm.run.reporting import say
from maskdm.run.runfolder import owned
from maskdm.training.checkpoint import load_checkpoint

from ..federation.folder import federation_config
from ..federation.settings import FederationConfig
from ..flower.serve import address_of, serve
from ..lab.simulate import Engine, Split, suited
from ..lab.simulate import simulate as run
from ..report.dashboard import Dashboard
from ..tracking.follow import FEDERATION, follow
from .options import LogOption, Out, Prior, federation_options, with_options


@with_options(federation_options)
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
    federation: dict[str, Any] = {},  # noqa: B006  what with_options gives
) -> None:
    """Hand a prior to institutions, gather their updates round by round, and keep the federated model."""
    _, metadata = load_checkpoint(prior, "--prior")
    config = cli.configure(FederationConfig, federation_config(prior, federation))
    check_steps(config.evaluate_steps, metadata.diffusion, "--evaluate-steps")
    address, at = address_of(tls, insecure, host, port)
    with owned(out), Dashboard(out, dashboard) if dashboard else nullcontext(), follow(out, FEDERATION, log):
        model = serve(prior, out, config, host=address, port=at, tls=tls)
    say(f"model: {model}; samples before and after: {out / 'samples'}")


@with_options(federation_options, rounds=5)
def simulate(
    context: typer.Context,
    prior: Prior,
    data: Annotated[list[Path], typer.Option(help="Images to share out, or one --data for each client.")],
    out: Out,
    clients: Annotated[int, typer.Option(min=1, help="Institutions.")] = 3,
    engine: Annotated[
        Engine,
        typer.Option(help="Real server and clients; all in this process, one after another; or Flower's simulation."),
    ] = "processes",
    split: Annotated[Split, typer.Option(help="Equal shares, or Dirichlet label skew.")] = "iid",
    alpha: Annotated[float, typer.Option(min=1e-3, help="Dirichlet concentration of --split label.")] = 0.5,
    fraction: Annotated[float, typer.Option(help="Share of its images that each client uses.")] = 0.1,
    upscale: Upscale = False,
    log: LogOption = "off",
    federation: dict[str, Any] = {},  # noqa: B006  what with_options gives
) -> None:
    """Run a whole federation on this machine: a real Flower server and real clients on loopback."""
    chosen = {name: federation[name] for name in cli.given(context) & federation.keys()}
    values = federation | suited(chosen, clients, engine)
    config = cli.configure(FederationConfig, federation_config(prior, values))
    model = run(
        prior,
        data,
        out,
        config,
        clients=clients,
        engine=engine,
        split=split,
        alpha=alpha,
        fraction=fraction,
        upscale=upscale,
        features=context.params["evaluate_features"] or RANDOM,
        following=follow(out, FEDERATION, log),
    )
    say(f"model: {model}; samples before and after: {out / 'samples'}")
