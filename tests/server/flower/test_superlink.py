"""Flower's processes of a coordinator, played by small scripts; the real ones are in tests/e2e."""

import sys
from pathlib import Path

import pytest

from maskdm.errors import FederationError, UsageError
from maskdm.federated.flower_names import UNFIT
from maskdm.run.processes import free_port
from maskdm_server.flower.superlink import SuperLink


class Played(SuperLink):
    """A SuperLink that says one thing and ends."""

    ends_with = 1

    def _commands_for(self, host: str, port: int, largest_update: int) -> dict[str, list[str]]:
        code = f"import sys; print('Starting'); print('Flower 9 lacks it: pip'); sys.exit({self.ends_with})"
        return {"superlink": [sys.executable, "-c", code]}


class Unfit(Played):
    ends_with = UNFIT


@pytest.mark.parametrize(
    ("superlink", "error", "said"),
    [
        (Unfit, UsageError, "^Flower 9 lacks it: pip$"),
        (Played, FederationError, "^the SuperLink did not start:\nStarting\nFlower 9 lacks it: pip$"),
    ],
)
def test_a_superlink_that_does_not_start_says_why(
    tmp_path: Path, superlink: type[Played], error: type[Exception], said: str
) -> None:
    with superlink(tmp_path, "127.0.0.1", free_port(), None, 1000, print) as link, pytest.raises(error, match=said):
        link.submit(lambda: None)
