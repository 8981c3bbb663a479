"""Entry point of `maskdm-client`; also `python -m maskdm_client`."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    # Imported here: processes that decode images import this module too, and need none of it.
    from maskdm.commands import command_line as cli

    from .commands.app import app

    sys.exit(cli.run(app, "maskdm-client"))


if __name__ == "__main__":
    main()
