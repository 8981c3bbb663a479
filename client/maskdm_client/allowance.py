"""How many updates left a site in the last 24 hours: a file that is written before each one leaves.

Whatever fails after that, it counts as left.
"""

import json
import math
import time
from pathlib import Path

from maskdm.errors import MaskDMError
from maskdm.policy import DAY, SitePolicy
from maskdm.runfolder import write_json

RELEASES = "releases.json"


class PolicyRefused(MaskDMError):
    """The site's policy does not allow it to take part."""


def check_allowance(folder: Path, work: str, policy: SitePolicy) -> None:
    """See that one more update may leave today.

    Args:
        work: key of plan and weights, the same where the same work is asked for again.

    Raises:
        PolicyRefused: it may not.
    """
    allowed = policy.max_rounds_per_day
    if allowed is not None and len(_before(work, _of_today(folder))) >= allowed:
        raise PolicyRefused(
            f"the site's policy allows {allowed} updates in 24 hours, and so many left (max-rounds-per-day)"
        )


def use_allowance(folder: Path, work: str, policy: SitePolicy) -> None:
    """Count the update that is about to leave; one that is made again after a crash counts once.

    Raises:
        PolicyRefused: as `check_allowance`.
        OSError: it cannot be written down, so the update must not leave.
    """
    if policy.max_rounds_per_day is None:
        return
    check_allowance(folder, work, policy)
    write_json(folder / RELEASES, [*_before(work, _of_today(folder)), (time.time(), work)])


def _before(work: str, releases: list[tuple[float, str]]) -> list[tuple[float, str]]:
    """Without the last one where it is of this very work. Its number would not do: the coordinator chooses that."""
    return releases[:-1] if work and releases and releases[-1][1] == work else releases


def _of_today(folder: Path) -> list[tuple[float, str]]:
    """When updates left, and of which work; those of a clock that went ahead count too."""
    try:
        read = json.loads((folder / RELEASES).read_text())
        found = [(float(when), of) for when, of in read]
        if not isinstance(read, list) or not all(math.isfinite(when) and isinstance(of, str) for when, of in found):
            raise ValueError("no list of times")
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, OverflowError) as error:
        raise PolicyRefused(f"{RELEASES} is damaged, so nobody knows how many updates left: delete it") from error
    return [(when, of) for when, of in found if when > time.time() - DAY]
