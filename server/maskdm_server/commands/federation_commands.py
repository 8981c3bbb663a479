"""`maskdm-server serve` and `simulate`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from maskdm.commands import command_line as cli
from maskdm.commands.image_options import Upscale
from maskdm.config import DiffusionConfig
from maskdm.data.corpus import Corpus
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import check_apart
from maskdm.data.sources.source import open_source
from maskdm.errors import UsageError
from maskdm.evaluation.extractors.features import RANDOM
from maskdm.federated.kit import POLICY
from maskdm.federated.parcel import NUMBER_NAMES
from maskdm.federated.policy import SIMULATED, as_toml
from maskdm.run.processes import Child, free_port
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write, owned
from maskdm.training.checkpoint import describe_checkpoint

from ..federation.folder import federation_config
from ..federation.settings import FederationConfig
from ..flower.serve import address_of, serve
from ..lab.in_process import prepare_folders, simulate_inline
from ..lab.simulate import Rows, split_by_label, split_iid, start_clients, write_shares
from ..report.dashboard import Dashboard
from ..tracking.follow import FEDERATION, follow
from .options import LogOption, Out, Prior, federation_options, pixel_policy, with_options


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
    metadata = describe_checkpoint(prior, "--prior")
    config = cli.configure(FederationConfig, federation_config(prior, federation))
    _check_steps(config.evaluate_steps, metadata.diffusion)
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
        Literal["processes", "inline", "ray"],
        typer.Option(help="Real server and clients; all in this process, one after another; or Flower's simulation."),
    ] = "processes",
    split: Annotated[Literal["iid", "label"], typer.Option(help="Equal shares, or Dirichlet label skew.")] = "iid",
    alpha: Annotated[float, typer.Option(min=1e-3, help="Dirichlet concentration of --split label.")] = 0.5,
    fraction: Annotated[float, typer.Option(help="Share of its images that each client uses.")] = 0.1,
    upscale: Upscale = False,
    log: LogOption = "off",
    federation: dict[str, Any] = {},  # noqa: B006  what with_options gives
) -> None:
    """Run a whole federation on this machine: a real Flower server and real clients on loopback."""
    metadata = describe_checkpoint(prior, "--prior")
    if len(data) not in (1, clients):
        raise UsageError(f"--data is given {len(data)} times for --clients {clients}: give it once, or once a client")
    everyone = min(clients, federation["clients_per_round"] or clients)
    wanted: dict[str, float] = {"min_clients": clients, "min_replies": everyone}
    if engine != "processes":  # clients wait for their turn, and nobody is lost
        wanted["round_deadline"] = federation["round_limit"]
    given = cli.given(context)
    values = federation | {name: value for name, value in wanted.items() if name not in given}
    config = cli.configure(FederationConfig, federation_config(prior, values))
    _check_steps(config.evaluate_steps, metadata.diffusion)
    for path in data:
        check_apart(path, out)
    network = context.params["evaluate_features"] or RANDOM
    features = network if network == RANDOM else str(Path(network).absolute())
    simulation = {
        **{"clients": clients, "split": split, "alpha": alpha, "fraction": fraction, "upscale": upscale},
        "data": [str(path.absolute()) for path in data],
    }
    shared = {"share_labels": metadata.class_names, **({"metrics": NUMBER_NAMES} if config.evaluate else {})}
    terms = SIMULATED.model_copy(update=shared)
    with owned(out), follow(out, FEDERATION, log):
        shares = None
        if len(data) == 1:
            shape = metadata.model
            corpus = load_corpus(open_source(data[0]), pixel_policy(shape.image_size, shape.channels, upscale))
            say(f"data: {corpus.summary()}")
            shares = _shares(corpus, clients, split, alpha, config.seed)

        def paths() -> list[Path]:
            return data if shares is None else write_shares(corpus, shares, out / "sites")

        if engine == "processes":
            server = f"127.0.0.1:{(port := free_port())}"
            options = ["--fraction", str(fraction), "--seed", str(config.seed), *(["--upscale"] if upscale else [])]
            policy = out / "sites" / POLICY
            options += ["--policy", str(policy), *(["--features", features] if config.evaluate else [])]

            def start_sites() -> list[Child]:
                atomic_write(policy, as_toml(terms))
                return start_clients(paths(), out / "sites", server, options)

            model = serve(
                prior,
                out,
                config,
                host="127.0.0.1",
                port=port,
                tls=None,
                start_sites=start_sites,
                simulation=simulation,
            )
        else:
            settings: dict[str, Any] = {"fraction": fraction, "seed": config.seed, "upscale": upscale}
            settings |= {"policy": terms.model_dump(mode="json")}
            if config.evaluate:
                settings |= {"features": features}

            def prepare_sites() -> list[Path]:
                return prepare_folders(paths(), out / "sites", settings)

            model = simulate_inline(prior, out, config, prepare_sites, simulation, ray=engine == "ray")
    say(f"model: {model}; samples before and after: {out / 'samples'}")


def _check_steps(steps: int | None, diffusion: DiffusionConfig) -> None:
    if steps is not None and diffusion.process == "ddpm" and steps > diffusion.timesteps:
        raise UsageError(f"--evaluate-steps {steps} is more than the prior's {diffusion.timesteps} timesteps")


def _shares(corpus: Corpus, clients: int, split: str, alpha: float, seed: int) -> list[Rows]:
    rows = corpus.training_rows
    if split == "iid":
        if len(rows) < 2 * clients:
            raise UsageError(f"--data holds {len(rows)} images, too few for --clients {clients}")
        return split_iid(len(rows), clients, seed)
    labels = [corpus.label(row) for row in rows]
    if len(set(labels)) < 2:
        raise UsageError("--split label needs labels: sub-folders, or an .npz with an array 'labels'")
    return split_by_label(labels, clients, alpha, seed)
