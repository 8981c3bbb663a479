"""One of several processes of `test_distributed.py`: trains a few steps and writes what it ended with."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, TrainingConfig
from maskdm.data.batches import batches
from maskdm.networks.model import build_model
from maskdm.training.distributed import process_group, rank, shard, together, whole, world_size
from maskdm.training.loop import TrainingState, train

torch.set_num_threads(1)
TINY = ModelConfig(image_size=8, channels=1, patch_size=2, dim=16, depth=2, heads=2)


def main(out: Path, accumulate: int, sharded: bool) -> None:
    pixels = torch.randint(0, 256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with process_group(torch.device("cpu")):
        config = TrainingConfig(images=32, batch_size=8, accumulate=accumulate, precision="fp32", clip_norm=1e6)
        model = build_model(TINY, seed=1)
        if sharded:
            shard(model)
        state = TrainingState.fresh(model, config)
        state.optimizer.param_groups[0]["eps"] = 1.0
        gradients: list[dict[str, torch.Tensor]] = []

        def keep(*_: object) -> None:
            named = model.named_parameters()
            gradients.append({name: whole(p.grad).clone() for name, p in named if p.grad is not None})

        state.optimizer.register_step_pre_hook(keep)
        order = batches(pixels, config.batch_size, 0, 0, share=(rank(), world_size()))
        train(
            state,
            order,
            config,
            DiffusionConfig(timesteps=20),
            MaskConfig(kind="patch", ratio=0.5),
            denoiser=together(model),
        )
        tensors = {f"weight.{name}": whole(p.detach()) for name, p in model.named_parameters()}
        tensors |= {f"average.{name}": whole(tensor) for name, tensor in state.average.items()}
        tensors |= {f"first_gradient.{name}": tensor for name, tensor in gradients[0].items()}
        save_file(tensors, out / f"{rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "sharded")
