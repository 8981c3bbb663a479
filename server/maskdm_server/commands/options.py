"""Options that several commands share, each written once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from maskdm import quantities
from maskdm.commands import command_line as cli
from maskdm.config import Encoding, Precision, Sampler, Trainable
from maskdm.data.pixels import PixelPolicy
from maskdm.evaluation.extractors.features import RANDOM, open_extractor

from ..aggregation.optimizers import ServerOptimizer
from ..aggregation.robust import Rule
from ..tracking.follow import Log, check_installed

Out = Annotated[Path, typer.Option(help="Folder of this run; the same command again continues it.")]
Prior = Annotated[Path, typer.Option(help="Checkpoint to start from.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
PrecisionOption = Annotated[Precision, typer.Option(help="Arithmetic of matrix products.")]
Seed = Annotated[int, typer.Option(help="All randomness follows from it.")]
LogOption = Annotated[
    Log, typer.Option(callback=check_installed, help="Also log the run to OUT/tensorboard, or to MLflow.")
]


def federation_options(
    rounds: Annotated[int, typer.Option(help="Rounds of the federation.")] = 10,
    min_clients: Annotated[int, typer.Option(help="Clients needed to begin.")] = 2,
    min_replies: Annotated[int, typer.Option(help="Usable updates that close a round.")] = 1,
    clients_per_round: Annotated[
        int | None, typer.Option(help="At most so many clients a round; default: all.")
    ] = None,
    join_deadline: Annotated[
        float, typer.Option(help="Seconds to wait for clients, since the last one joined.")
    ] = 3600,
    round_deadline: Annotated[
        float, typer.Option(help="Seconds without progress after which a client is left out.")
    ] = 3600,
    round_limit: Annotated[float, typer.Option(help="Seconds that a round may take in all.")] = 86_400,
    patience: Annotated[
        int, typer.Option(help="Stop after so many rounds without a better held-out loss; 0: never.")
    ] = 0,
    keep_every: Annotated[int, typer.Option(help="Keep the model of every n-th round; 0: the last two.")] = 10,
    sample_every: Annotated[
        int | None, typer.Option(help="Draw samples every n-th round; 0: never; default: about eight times in all.")
    ] = None,
    local_images: Annotated[
        str | None,
        typer.Option(help="Images a client sees in a round, counting repetitions, e.g. 2K; default: 2048."),
    ] = None,
    local_minutes: Annotated[
        float | None, typer.Option(help="Minutes a client trains in a round; then --local-images has no default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Batch size at the clients.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate at the clients.")] = 5e-5,
    proximal: Annotated[float, typer.Option(help="FedProx: pull of the clients towards the round's model.")] = 0.0,
    keep_moments: Annotated[
        bool, typer.Option(help="Clients keep their optimiser's moments from round to round.")
    ] = False,
    train: Annotated[Trainable, typer.Option(help="What clients train and send.")] = "all",
    adapter_rank: Annotated[int, typer.Option(help="Rank of --train adapters.")] = 8,
    encoding: Annotated[Encoding, typer.Option(help="Of updates on their way up.")] = "bf16",
    topk_share: Annotated[float, typer.Option(help="Share of the values that --encoding topk keeps.")] = 0.01,
    max_upload: Annotated[
        str | None, typer.Option(help="Largest update that may be asked for, e.g. 50MB; default: any.")
    ] = None,
    aggregation: Annotated[Rule, typer.Option(help="How updates become one.")] = "mean",
    byzantine: Annotated[
        int, typer.Option(help="Hostile updates a round that the other rules than mean withstand.")
    ] = 1,
    max_norm_ratio: Annotated[float, typer.Option(help="An update so many times longer than usual is rejected.")] = 3.0,
    server_optimizer: Annotated[
        ServerOptimizer, typer.Option(help="What the coordinator does with the result.")
    ] = "fedavg",
    server_lr: Annotated[float, typer.Option(help="Its learning rate.")] = 1.0,
    server_betas: Annotated[str, typer.Option(help="Its decay rates.")] = "0.9,0.99",
    server_epsilon: Annotated[float, typer.Option(help="τ of fedadam and fedyogi.")] = 1e-3,
    server_ema: Annotated[
        float, typer.Option(help="Longest decay of the average of the rounds' models; 0: none.")
    ] = 0.0,
    evaluate: Annotated[
        int,
        typer.Option(help="Images that sites draw from prior and final model, to compare with held-out ones; 0: none."),
    ] = 0,
    evaluate_features: Annotated[
        str | None, typer.Option(help="File of the feature network that sites have, too; default: random.")
    ] = None,
    evaluate_sampler: Annotated[Sampler, typer.Option(help="Sampler of --evaluate.")] = "dpmpp",
    evaluate_steps: Annotated[int | None, typer.Option(help="Its steps; default: as usual for it.")] = None,
    seed: Seed = 0,
) -> dict[str, Any]:
    """Everything that FederationConfig takes, as `serve` and `simulate` offer it."""
    values = dict(locals())
    usual = "100M" if local_minutes is not None else "2048"
    values["local_images"] = quantities.count("--local-images", usual if local_images is None else local_images)
    values["max_upload"] = max_upload and quantities.size("--max-upload", max_upload)
    values["server_betas"] = quantities.pair("--server-betas", server_betas)
    values["evaluate_features"] = _digest_of(evaluate_features or RANDOM) if evaluate else None
    return values


def _digest_of(features: str) -> str:
    """What sites know a feature network by: the sha256 of its file."""
    return open_extractor(features, "--evaluate-features").sha256


def with_options(shared: Callable[..., dict[str, Any]], **defaults: Any) -> Callable[[Callable[..., Any]], Any]:
    """Give a command the options of `shared` beside its own; it gets what `shared` makes of them as its last argument.

    Args:
        defaults: that are others for this command.
    """

    def decorate(command: Callable[..., Any]) -> Any:
        own, more = inspect.signature(command).parameters, inspect.signature(shared).parameters
        *names, last = own

        def run(**values: Any) -> Any:
            return command(**{n: values[n] for n in names}, **{last: shared(**{n: values[n] for n in more})})

        added = [p.replace(default=defaults.get(p.name, p.default)) for p in more.values()]
        kept = [own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in names]
        together = [*kept, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in added)]
        run.__signature__ = inspect.Signature(together)  # type: ignore[attr-defined]
        hints = get_type_hints(command, include_extras=True) | get_type_hints(shared, include_extras=True)
        run.__annotations__ = {p.name: hints[p.name] for p in together}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def pixel_policy(image_size: int, channels: int, upscale: bool) -> PixelPolicy:
    """How images become pixels, from options."""
    return cli.configure(PixelPolicy, {"image_size": image_size, "channels": channels, "upscale": upscale})
