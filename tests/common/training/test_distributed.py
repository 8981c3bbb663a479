"""Two real processes under torchrun train one model (gloo, CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from maskdm.config import DiffusionConfig, MaskConfig, TrainingConfig
from maskdm.data.batches import batches
from maskdm.diffusion.forward_process import forward_process
from maskdm.diffusion.targets import masked_loss, to_model_range
from maskdm.errors import UsageError
from maskdm.networks.layers import patchify
from maskdm.networks.masking import draw_visible
from maskdm.networks.model import build_model
from maskdm.run.processes import is_first
from maskdm.run.runfolder import read_lines
from maskdm.seeding import generator
from maskdm.training import distributed
from maskdm.training.checkpoint import load_checkpoint

from .distributed_worker import TINY

WORKER = Path(__file__).with_name("distributed_worker.py")


def own_gradients(number: int, processes: int) -> dict[str, Tensor]:
    """Gradients of one process's share of the first batch, computed without any of the distributed code."""
    pixels = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images, _ = next(batches(pixels, 8, 0, 0, share=(number, processes)))
    config = TrainingConfig()
    randomness = generator("step", config.seed, 0, number)
    model, diffusion = build_model(TINY, seed=1), DiffusionConfig(timesteps=20)
    visible = draw_visible(MaskConfig(kind="patch", ratio=0.5), TINY.grid, len(images), randomness)
    assert visible is not None
    patches = patchify(images, 2)
    shown = patches.gather(1, visible[:, :, None].expand(-1, -1, patches.shape[2]))
    process = forward_process(diffusion)
    times = process.times(torch.rand(len(images), generator=randomness))
    noise = torch.randn(shown.shape, generator=randomness)
    masked_loss(model, diffusion, process, to_model_range(shown), visible, times, noise).mean().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_two_processes(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "how"), [(1, "copies"), (2, "copies"), (1, "sharded")])
def test_two_processes_keep_equal_weights_and_average_their_gradients(
    tmp_path: Path, accumulate: int, how: str
) -> None:
    in_two_processes(str(WORKER), str(tmp_path), str(accumulate), how)
    first, second = (load_file(tmp_path / f"{number}.safetensors") for number in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    parts = [own_gradients(number, 2) for number in (0, 1)]
    for name in parts[0]:
        found, mean = first[f"first_gradient.{name}"], (parts[0][name] + parts[1][name]) / 2
        assert torch.allclose(found, mean, rtol=1e-4, atol=1e-7), name
        assert not torch.allclose(parts[0][name], parts[1][name]) or not parts[0][name].any()


@pytest.mark.slow
def test_the_command_trains_saves_and_continues_a_sharded_network_in_two_processes(tmp_path: Path) -> None:
    np.save(tmp_path / "corpus.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    command = [
        "-m",
        "maskdm_server",
        "pretrain",
        "--data",
        str(tmp_path / "corpus.npy"),
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--size", "tiny", "--image-size", "8", "--patch-size", "2", "--mask", "patch", "--mask-ratio", "0.5"]
    command += ["--batch-size", "4", "--precision", "fp32", "--shard"]
    in_two_processes(*command, "--images", "80")
    once, _ = load_checkpoint(tmp_path / "run" / "prior.safetensors")
    in_two_processes(*command, "--images", "160")
    twice, metadata = load_checkpoint(tmp_path / "run" / "prior.safetensors")
    assert metadata.images_seen == 160
    assert not torch.equal(once["head.weight"], twice["head.weight"])
    images = [line["images"] for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert images == sorted(set(images)), "written by more than one process"


def test_a_single_process_needs_no_group() -> None:
    with distributed.process_group(torch.device("cpu")):
        assert (distributed.rank(), distributed.world_size(), is_first()) == (0, 1, True)
        model = torch.nn.Linear(1, 1)
        assert distributed.together(model) is model
        assert distributed.agreed(lambda: True, torch.device("cpu"))()
        assert not distributed.agreed(lambda: False, torch.device("cpu"))()


def test_a_batch_that_cannot_be_shared_equally_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    distributed.check_batch(9)
    with pytest.raises(UsageError, match="--batch-size 8 cannot be shared equally by 3 processes"):
        distributed.check_batch(8)
