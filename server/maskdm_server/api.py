"""What researchers do with a coordinator's half of MaskDM: whole federations on one machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskdm.evaluation.extractors.features import RANDOM

from .commands.federation_options import chosen_federation
from .lab.simulate import Engine, Split, suited
from .lab.simulate import simulate as run

__all__ = ["simulate"]


def simulate(
    prior: Path | str,
    data: Path | str | Sequence[Path | str],
    out: Path | str,
    *,
    clients: int = 3,
    rounds: int = 5,
    engine: Engine = "inline",
    split: Split = "iid",
    alpha: float = 0.5,
    fraction: float = 0.1,
    upscale: bool = False,
    **federation: Any,
) -> Path:
    """Run a whole federation on this machine, or go on with it, and return the path of its final model.

    Args:
        data: images to share out among the clients, or one source for each of them.
        out: the federation's folder: `model.safetensors`, `rounds.jsonl`, sample grids; each client's lies in it.
        engine: inline has the clients work in this process, one after another; processes starts a real server and real
            clients on loopback; ray takes Flower's simulation.
        split: iid for equal shares, label for a Dirichlet skew of labels with concentration `alpha`, > 0.
        fraction: share of its images that each client uses, in (0, 1].
        federation: whatever else `maskdm-server simulate` takes, by its name with underscores, e.g. local_images=512,
            lr=1e-4, aggregation="median", server_optimizer="fedadam".

    Raises:
        UsageError: an unknown or impossible option, or `out` holds another federation.
        FederationError: too few usable updates.
        Interrupted: stopped by Ctrl-C; the same call goes on.
    """
    chosen = suited({"rounds": rounds, **federation}, clients, engine)
    return run(
        Path(prior),
        [Path(data)] if isinstance(data, Path | str) else [Path(path) for path in data],
        Path(out),
        chosen_federation(Path(prior), chosen),
        clients=clients,
        engine=engine,
        split=split,
        alpha=alpha,
        fraction=fraction,
        upscale=upscale,
        features=str(chosen.get("evaluate_features") or RANDOM),
    )
