"""What looking at the halves of a batch costs a site: its step beside the plain one, interleaved in one process.

    python benchmarks/site_step.py [--threads 1] [--repeats 7] [--device cpu] [--json FILE]

Ratios are medians of the site's seconds over the plain step's, of the same round.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from maskdm.config import DiffusionConfig, MaskConfig, ModelConfig, Size, TrainingConfig
from maskdm.diffusion.forward_process import forward_process
from maskdm.networks.model import build_model
from maskdm.networks.precision import pick_device
from maskdm.run.runfolder import write_json
from maskdm.training.loop import TrainingState, training_step
from maskdm_client.work.concentration import HALVES, Concentration

DIFFUSION, NONE = DiffusionConfig(), MaskConfig(kind="none", ratio=0)
CASES: tuple[tuple[Size, int, int], ...] = (("tiny", 32, 32), ("S", 32, 16))  # size, pixels, batch


class Side:
    """One of the two, with a network of its own."""

    def __init__(self, model: ModelConfig, batch: int, device: torch.device, looks: bool) -> None:
        network = build_model(model, seed=0, device=device)
        self._config = TrainingConfig(batch_size=batch, accumulate=HALVES if looks else 1, precision="fp32")
        self._state = TrainingState.fresh(network, self._config)
        self._look = Concentration(network.named_parameters()).look if looks else lambda done: None
        self._process = forward_process(DIFFUSION, device)

    def seconds(self, images: torch.Tensor) -> float:
        """Of a step on uint8 images (B, C, S, S)."""
        started = time.perf_counter()
        loss = training_step(
            self._state,
            self._state.model,
            images,
            None,
            self._config,
            DIFFUSION,
            self._process,
            NONE,
            1e-4,
            "fp32",
            self._look,
        )
        loss.item()  # waits for an accelerator
        return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, rows = pick_device(options.device), []
    for size, pixels, batch in CASES:
        model = ModelConfig.preset(size, image_size=pixels, channels=3)
        images = torch.randint(0, 256, (batch, 3, pixels, pixels), dtype=torch.uint8)
        plain, site = (Side(model, batch, device, looks) for looks in (False, True))
        pairs = [(plain.seconds(images), site.seconds(images)) for _ in range(options.repeats + 1)][1:]
        row = {
            "name": f"{size}, {pixels} px, batch {batch}",
            "plain_s": statistics.median(one for one, _ in pairs),
            "site_s": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(other / one for one, other in pairs),
            "machine": platform.machine(),
            "threads": options.threads,
            "device": str(device),
        }
        rows.append(row)
        print(f"{row['name']:<24} {row['plain_s']:.3f} s, at a site {row['site_s']:.3f} s, {row['ratio']:.2f} times")
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
