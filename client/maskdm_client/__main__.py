"""Entry point of `maskdm-client`; also `python -m maskdm_client`."""

import sys

from maskdm import cli
from maskdm_client.cli import app


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(cli.run(app, "maskdm-client"))


if __name__ == "__main__":
    main()
