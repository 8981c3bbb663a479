"""A federation on one machine: real clients on loopback, or all in this process, each with its share of the images."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from maskdm.commands.image_options import pixel_policy
from maskdm.data.corpus import Corpus
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import check_apart
from maskdm.data.sources.source import open_source
from maskdm.diffusion.sampling import check_steps
from maskdm.errors import UsageError
from maskdm.evaluation.extractors.features import RANDOM
from maskdm.federated.kit import POLICY
from maskdm.federated.parcel import NUMBER_NAMES
from maskdm.federated.policy import SIMULATED, as_toml
from maskdm.run.processes import Child, free_port, script
from maskdm.run.reporting import say
from maskdm.run.runfolder import atomic_write, owned
from maskdm.seeding import derive_seed
from maskdm.training.checkpoint import describe_checkpoint

from ..federation.settings import FederationConfig, FederationOptions
from ..flower.serve import serve
from .in_process import prepare_folders, simulate_inline

Rows = NDArray[np.int64]
Engine = Literal["processes", "inline", "ray"]
Split = Literal["iid", "label"]


def suited(chosen: Mapping[str, Any], clients: int, engine: Engine) -> dict[str, Any]:
    """Options of a federation; those that nobody chose suit clients that all take part and are never lost."""
    wanted: dict[str, Any] = {"min_clients": clients}
    wanted["min_replies"] = min(clients, chosen.get("clients_per_round") or clients)
    if engine != "processes":  # clients wait for their turn
        usual = FederationOptions.model_fields["round_limit"].default
        wanted["round_deadline"] = chosen.get("round_limit", usual)
    return {**wanted, **chosen}


def simulate(
    prior: Path,
    data: Sequence[Path],
    out: Path,
    config: FederationConfig,
    *,
    clients: int,
    engine: Engine,
    split: Split,
    alpha: float,
    fraction: float,
    upscale: bool,
    features: str = RANDOM,
    following: AbstractContextManager[Any] | None = None,
) -> Path:
    """Run the federation, or what is left of it, and return the path of its final model.

    Args:
        data: images to share out, or one source for each client.
        features: file of the feature network that clients evaluate with, where `config` asks for that.
        following: what passes on the federation's lines and samples.

    Raises:
        UsageError: sources that do not fit the clients, or cannot be shared out so.
        FederationError: no quorum.
    """
    metadata = describe_checkpoint(prior, "--prior")
    check_steps(config.evaluate_steps, metadata.diffusion, "--evaluate-steps")
    if len(data) not in (1, clients):
        raise UsageError(f"--data is given {len(data)} times for --clients {clients}: give it once, or once a client")
    for path in data:
        check_apart(path, out)
    simulation = {
        **{"clients": clients, "split": split, "alpha": alpha, "fraction": fraction, "upscale": upscale},
        "data": [str(path.absolute()) for path in data],
    }
    network = features if features == RANDOM else str(Path(features).absolute())
    shared = {"share_labels": metadata.class_names, **({"metrics": NUMBER_NAMES} if config.evaluate else {})}
    terms = SIMULATED.model_copy(update=shared)
    with owned(out), following or nullcontext():
        shares = None
        if len(data) == 1:
            shape = metadata.model
            policy = pixel_policy(shape.image_size, shape.channels, upscale)
            corpus = load_corpus(open_source(data[0]), policy)
            say(f"data: {corpus.summary()}")
            shares = _shares(corpus, clients, split, alpha, config.seed)

        def paths() -> Sequence[Path]:
            return data if shares is None else write_shares(corpus, shares, out / "sites")

        if engine == "processes":
            server = f"127.0.0.1:{(port := free_port())}"
            options = ["--fraction", str(fraction), "--seed", str(config.seed), *(["--upscale"] if upscale else [])]
            written = out / "sites" / POLICY
            options += ["--policy", str(written), *(["--features", network] if config.evaluate else [])]

            def start_sites() -> list[Child]:
                atomic_write(written, as_toml(terms))
                return start_clients(paths(), out / "sites", server, options)

            return serve(
                prior,
                out,
                config,
                host="127.0.0.1",
                port=port,
                tls=None,
                start_sites=start_sites,
                simulation=simulation,
            )
        settings: dict[str, Any] = {"fraction": fraction, "seed": config.seed, "upscale": upscale}
        settings |= {"policy": terms.model_dump(mode="json")}
        if config.evaluate:
            settings |= {"features": network}

        def prepare_sites() -> list[Path]:
            return prepare_folders(paths(), out / "sites", settings)

        return simulate_inline(prior, out, config, prepare_sites, simulation, ray=engine == "ray")


def _shares(corpus: Corpus, clients: int, split: Split, alpha: float, seed: int) -> list[Rows]:
    rows = corpus.training_rows
    if split == "iid":
        if len(rows) < 2 * clients:
            raise UsageError(f"--data holds {len(rows)} images, too few for --clients {clients}")
        return split_iid(len(rows), clients, seed)
    labels = [corpus.label(row) for row in rows]
    if len(set(labels)) < 2:
        raise UsageError("--split label needs labels: sub-folders, or an .npz with an array 'labels'")
    return split_by_label(labels, clients, alpha, seed)


def split_iid(count: int, clients: int, seed: int) -> list[Rows]:
    """Equal random shares of `count` images; every image goes to one client."""
    order = np.random.default_rng(derive_seed("iid split", seed)).permutation(count)
    return [np.sort(share) for share in np.array_split(order, clients)]


def split_by_label(labels: Sequence[str], clients: int, alpha: float, seed: int) -> list[Rows]:
    """Dirichlet label skew (Hsu et al. 2019, arXiv 1909.06335): each label is shared out by Dir(alpha).

    A small alpha gives each client few labels, a large one nears IID. Every image goes to one client.

    Raises:
        UsageError: some client would be left with fewer than two images.
    """
    rng = np.random.default_rng(derive_seed("label split", seed))
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        rows = rng.permutation([i for i, found in enumerate(labels) if found == label])
        edges = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)).round().astype(int)
        for share, part in zip(shares, np.split(rows, edges), strict=True):
            share.extend(part.tolist())
    smallest = min(len(share) for share in shares)
    if smallest < 2:
        raise UsageError(f"--alpha {alpha} leaves a client with {smallest} images: raise it, or use fewer --clients")
    return [np.sort(np.array(share, dtype=np.int64)) for share in shares]


def write_shares(corpus: Corpus, shares: Sequence[Rows], folder: Path) -> list[Path]:
    """One `.npz` of images and labels for each client; existing ones of an earlier start are kept.

    Args:
        shares: places in `corpus.training_rows`.
    """
    paths = []
    for number, share in enumerate(shares, start=1):
        path = folder / f"site-{number}" / "images.npz"
        if not path.exists():
            rows = corpus.training_rows[share]
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name("images.tmp.npz")
            pixels = np.moveaxis(corpus.pixels[rows], 1, 3)  # (n, H, W, C)
            np.savez(temporary, images=pixels, labels=np.array([corpus.label(row) for row in rows]))
            temporary.replace(path)
        paths.append(path)
    return paths


def start_clients(data: Sequence[Path], folder: Path, server: str, options: Sequence[str]) -> list[Child]:
    """Start a real `maskdm-client` for each path, sharing out the machine's cores."""
    threads = max(1, (os.cpu_count() or 1) // len(data))
    return [
        Child(
            [
                *(script("maskdm-client"), "--data", str(path), "--server", server),
                *("--out", str(folder / f"site-{number}" / "client"), "--threads", str(threads), *options),
            ],
            log=folder / f"site-{number}" / "client.log",
        )
        for number, path in enumerate(data, start=1)
    ]
