"""`maskdm-server simulate`: a federation whose sites are all on this machine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from maskdm.commands.image_options import Upscale
from maskdm.evaluation.extractors.features import RANDOM
from maskdm.run.reporting import say

from ..lab.simulate import Engine, Split, suited
from ..lab.simulate import simulate as run
from ..tracking.follow import FEDERATION, follow
from .federation_options import chosen_federation, with_federation_options
from .options import LogOption, Out, Prior


@with_federation_options(rounds=5)
def simulate(
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
    *,
    federation: dict[str, Any],
) -> None:
    """Run a whole federation on this machine: a real Flower server and real clients on loopback."""
    model = run(
        prior,
        data,
        out,
        chosen_federation(prior, suited(federation, clients, engine)),
        clients=clients,
        engine=engine,
        split=split,
        alpha=alpha,
        fraction=fraction,
        upscale=upscale,
        features=federation.get("evaluate_features") or RANDOM,
        following=follow(out, FEDERATION, log),
    )
    say(f"model: {model}; samples before and after: {out / 'samples'}")
