"""`maskdm-server report`: a folder that a run or a federation left → report.html in it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from maskdm.errors import UsageError
from maskdm.run.runfolder import atomic_write

from ..report.federation_page import federation_page
from ..report.files import read_row
from ..report.gather import FederationFolder, RunKind, look_at_run
from ..report.run_page import run_page

PAGE = "report.html"


def report(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_FED", help="The folder that pretrain, serve or simulate left, or fills now."),
    ],
) -> None:
    """Write report.html into the folder of a run or a federation: one page with everything in it."""
    page = page_of(folder)
    try:
        atomic_write(folder / PAGE, page)
    except OSError as error:
        raise UsageError(
            f"RUN_OR_FED {folder}: {PAGE} cannot be written there ({error.strerror}): give a copy of the folder"
        ) from error
    print(folder / PAGE)


def page_of(folder: Path) -> str:
    """The page of a run or a federation.

    Raises:
        UsageError: the folder holds neither.
    """
    about = read_row(folder / "config.json", RunKind)
    now = time.time()
    if about and about.kind == "federation" and (federation := FederationFolder(folder).look()):
        return federation_page(federation, written=now)
    if about and about.kind == "pretrain" and (run := look_at_run(folder)):
        return run_page(run, written=now)
    raise UsageError(
        f"RUN_OR_FED {folder} is no folder of a run or a federation: give one that pretrain, serve or simulate left"
    )
