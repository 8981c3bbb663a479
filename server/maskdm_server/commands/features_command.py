"""`maskdm-server features`: a feature network of one's own domain, for distances that mean something there."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from maskdm.commands import command_line as cli
from maskdm.commands.image_options import Channels, Upscale, channels_of, pixel_policy
from maskdm.data.preparation.cache import load_corpus
from maskdm.data.preparation.pack import guess_channels
from maskdm.data.sources.source import open_source
from maskdm.errors import UsageError
from maskdm.evaluation.extractors.feature_net import FeatureNetConfig, accuracy, save_feature_net, train_feature_net
from maskdm.run.reporting import WorkBar, say

from .options import Seed

HELD_OUT = 10  # every so-manieth image tells how often the network is right


def features(
    data: Annotated[Path, typer.Option(help="Labelled images (sub-folders, or an .npz) that no compared model sees.")],
    out: Annotated[Path, typer.Option(help="File to write; its name without suffix is the network's.")],
    image_size: Annotated[int, typer.Option(help="Pixels along a side.")] = 64,
    channels: Channels = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Times that each image is seen.")] = 12,
    seed: Seed = 0,
    upscale: Upscale = False,
) -> None:
    """Train a small network to name the labels; `evaluate` and `experiment` measure distances in its features."""
    source = open_source(data)
    corpus = load_corpus(source, pixel_policy(image_size, channels_of(channels) or guess_channels(source), upscale))
    names = [name for name in corpus.labels if name]
    values = {"name": out.stem, "image_size": image_size, "channels": corpus.manifest.policy.channels}
    if len(names) < 2:
        raise UsageError("--data has no two labels: give sub-folders, or an .npz with an array 'labels'")
    config = cli.configure(FeatureNetConfig, values | {"classes": len(names)}, {"name": "--out"})
    rows = corpus.training_rows
    rows = rows[[corpus.label(row) in names for row in rows]]
    rows = np.random.default_rng(seed).permutation(rows)
    labels = torch.tensor([names.index(corpus.label(row)) for row in rows])
    images = torch.from_numpy(np.ascontiguousarray(corpus.pixels[rows]))
    held = torch.arange(len(rows)) % HELD_OUT == 0
    if len(rows) < 2 * HELD_OUT:
        raise UsageError(f"--data holds {len(rows)} labelled images: at least {2 * HELD_OUT} are needed")
    with WorkBar("feature network", epochs * int((~held).sum())) as bar:
        net = train_feature_net(images[~held], labels[~held], config, epochs=epochs, seed=seed, progress=bar.update)
    right = round(accuracy(net, images[held], labels[held]), 4)
    about = f"{len(rows) - int(held.sum()):,} images of {len(names)} classes, corpus {corpus.manifest.sha256[:16]}"
    save_feature_net(out, net, config.model_copy(update={"trained_on": about, "accuracy": right}))
    say(f"features: {out}; names {right:.1%} of held-out images correctly")
