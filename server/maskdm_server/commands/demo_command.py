"""`maskdm-server demo`."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm.run.runfolder import owned

from .options import Seed


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("maskdm-demo"),
    seed: Seed = 0,
) -> None:
    """The whole story in minutes: draw faces, pre-train a prior, federate three institutions, show the result."""
    from ..lab.demo import demo

    with owned(out):
        page = demo(out, seed)
    print(page)
