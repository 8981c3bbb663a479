"""Entry point of `maskdm-server`; also `python -m maskdm_server`."""

import sys

from maskdm import cli
from maskdm_server.cli import app


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(cli.run(app, "maskdm-server"))


if __name__ == "__main__":
    main()
