"""MaskDM: masked diffusion priors. Images in, a trained denoiser out; nothing here knows about federation servers.

What researchers import is listed in `__all__`, described in docs/api.md, and loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "Corpus",
    "DiffusionConfig",
    "MaskConfig",
    "Model",
    "ModelConfig",
    "Run",
    "Stage",
    "TrainingConfig",
    "__version__",
    "evaluate",
    "fine_tune",
    "load",
    "masks",
    "pack",
    "pretrain",
    "processes",
    "sample",
    "samplers",
]

if TYPE_CHECKING:
    from .api import (
        Corpus,
        DiffusionConfig,
        MaskConfig,
        Model,
        ModelConfig,
        Run,
        Stage,
        TrainingConfig,
        evaluate,
        fine_tune,
        load,
        masks,
        pack,
        pretrain,
        processes,
        sample,
        samplers,
    )
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return __all__
