"""The ServerApp of Flower's simulation, whose virtual nodes take and give everything in one piece.

Apart from `maskdm_server.flower.server_app`, so that a Grid that cannot stream is never taken for one of a simulation.
"""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from .grid import GridLink
from .server_app import run_rounds

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the federation whose folder the run configuration names."""
    run_rounds(context, lambda *_: GridLink(grid))
