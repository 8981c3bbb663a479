"""What a site agrees to once and a coordinator cannot change later: which model, how it is trained, what comes back."""

import hashlib
from collections.abc import Iterator

from ..config import DiffusionConfig, Encoding, Frozen, ModelConfig, Trainable
from ..errors import plain
from ..run.runfolder import flatten
from .kit import Digest
from .plan import RoundPlan

LONGEST_LINE = 2000  # characters
AT_LEAST = ("local_images", "batch_size")  # more of them tell less of each image


class Terms(Frozen):
    """Of a federation. They say nothing of the weights, which change from round to round."""

    federation: str
    prior_sha256: Digest | None  # as the coordinator says: a site that joins late never sees the prior itself
    model: ModelConfig
    diffusion: DiffusionConfig
    class_names: tuple[str, ...]
    train: Trainable
    adapter_rank: int
    encoding: Encoding
    local_images: int
    local_minutes: float | None
    batch_size: int

    def fingerprint(self) -> str:
        """For two people to compare: 128 bits of a sha256, as eight groups of hexadecimal digits."""
        digits = hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]
        return "-".join(digits[place : place + 4] for place in range(0, 32, 4))

    def changes(self, now: "Terms") -> Iterator[str]:
        """What of these terms other ones do not keep, in words."""
        agreed, found = flatten(self.model_dump()), flatten(now.model_dump())
        for name, value in agreed.items():
            if found[name] < value if name in AT_LEAST else found[name] != value:
                yield plain(f"{name} was {value}, is {found[name]}", LONGEST_LINE)

    def described(self) -> list[str]:
        """For a person who decides."""
        model, diffusion = self.model, self.diffusion
        minutes = f", or for {self.local_minutes:g} minutes" if self.local_minutes else ""
        weight = {"min-snr": f" (γ {diffusion.min_snr_gamma:g})", "p2": f" (γ {diffusion.p2_gamma:g})"}
        return [
            f"federation  {self.federation}, fingerprint of these terms {self.fingerprint()}",
            f"prior       sha256 {self.prior_sha256 or 'not named'}, as the coordinator says",
            f"model       {model.network}, {model.image_size}x{model.image_size} pixels, {model.channels} channels, "
            f"patches of {model.patch_size}, dim {model.dim}, depth {model.depth}",
            f"process     {diffusion.process}, {diffusion.timesteps} steps, predicts {diffusion.prediction}, loss "
            f"weight {diffusion.loss_weight}{weight.get(diffusion.loss_weight, '')}",
            plain(f"classes     {', '.join(self.class_names) or 'none'}", LONGEST_LINE),
            f"trains      {self.train} weights on at least {self.local_images:,} images a round{minutes}, at least "
            f"{self.batch_size:,} in a step; updates go up as {self.encoding}",
        ]


def terms_of(plan: RoundPlan) -> Terms:
    """The terms that a plan is under: every plan of a federation is under the same ones."""
    return Terms(
        federation=plan.federation,
        prior_sha256=plan.model.prior_sha256,
        model=plan.model.model,
        diffusion=plan.model.diffusion,
        class_names=plan.model.class_names,
        train=plan.train,
        adapter_rank=plan.adapter_rank,
        encoding=plan.encoding,
        local_images=plan.local_images,
        local_minutes=plan.local_minutes,
        batch_size=plan.batch_size,
    )
