"""Entry point of `maskdm-server`; also `python -m maskdm_server`."""

import os
import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Before torch loads OpenMP: waiting threads that spin make training a hundred times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from maskdm import cli
    from maskdm_server.cli import app

    sys.exit(cli.run(app, "maskdm-server"))


if __name__ == "__main__":
    main()
