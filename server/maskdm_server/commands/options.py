"""Options that several commands share, each written once."""

from pathlib import Path
from typing import Annotated

import typer

from maskdm.config import Precision

from ..tracking.follow import Log, check_installed

Out = Annotated[Path, typer.Option(help="Folder of this run; the same command again continues it.")]
Prior = Annotated[Path, typer.Option(help="Checkpoint to start from.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
PrecisionOption = Annotated[Precision, typer.Option(help="Arithmetic of matrix products.")]
Seed = Annotated[int, typer.Option(help="All randomness follows from it.")]
LogOption = Annotated[
    Log, typer.Option(callback=check_installed, help="Also log the run to OUT/tensorboard, or to MLflow.")
]
