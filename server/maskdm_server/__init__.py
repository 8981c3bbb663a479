"""The coordinator: pre-trains the prior, serves the federation, samples."""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["simulate"]

if TYPE_CHECKING:
    from .api import simulate
else:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(".api", __name__), name)


def __dir__() -> list[str]:
    return __all__
