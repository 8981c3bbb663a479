"""The Flower ServerApp of `serve`: runs the rounds of `maskdm_server.federation` over a SuperLink."""

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from maskdm.errors import MaskDMError
from maskdm.run.events import append_event
from maskdm.training.checkpoint import describe_checkpoint

from ..federation.events import RoundsCrashed, RoundsFailed
from ..federation.rounds import run_federation
from ..federation.settings import FederationConfig, largest_update
from ..federation.transport import Link
from .liveness import alive
from .streaming import StreamingLink

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the federation whose folder the run configuration names."""
    run_rounds(context, lambda folder, largest: StreamingLink(grid, folder, largest))


def run_rounds(context: Context, connect: Callable[[Path, int], Link]) -> None:
    """Run the federation whose folder the run configuration names.

    Args:
        connect: makes the link of a federation's folder, given the bytes of its largest update.
    """
    folder = Path(str(context.run_config["federation"]))
    config = FederationConfig.model_validate(json.loads((folder / "config.json").read_text())["federation"])
    largest = largest_update(config, describe_checkpoint(folder / "prior.safetensors").model)
    try:
        link = connect(folder, largest)
        with alive(folder):
            run_federation(link, folder, config)
    except MaskDMError as error:
        _tell(folder, RoundsFailed(reason=str(error)))
        raise
    except Exception as error:  # whoever watches starts it again
        _tell(folder, RoundsCrashed(reason=f"unexpected {type(error).__name__}: {error}"))
        with suppress(OSError), (folder / "logs" / "rounds.log").open("a") as log:
            traceback.print_exc(file=log)
        raise


def _tell(folder: Path, event: RoundsFailed | RoundsCrashed) -> None:
    """Say why the rounds end; where the disk is so full that this cannot be written, on standard error."""
    try:
        append_event(folder, event)
    except OSError:
        print(f"{event.event}: {event.reason}", file=sys.stderr)
