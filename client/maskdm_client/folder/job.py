"""One piece of a site's work: what is asked for, where it is done, who is told, and whence its randomness comes."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskdm.federated.plan import RoundPlan
from maskdm.run.events import Event
from maskdm.run.runfolder import atomic_write
from maskdm.seeding import Key, derive_seed

from .settings import SiteSettings

SECRET = ".secret"
SECRET_BYTES = 32


@dataclass(frozen=True)
class Job:
    """A plan at a site."""

    plan: RoundPlan
    key: str  # of plan and weights: the same work asked for again has the same
    settings: SiteSettings
    folder: Path  # of the site
    say: Callable[[Event], None]
    superseded: Callable[[], bool]

    def seed(self, purpose: str, *keys: Key) -> int:
        """A seed that nobody outside can know.

        With the work's key, the default, the same question gets the same answer, and any other one other draws: neither
        repeating a question nor changing a little of it shows what the draws hide.
        """
        simulated = self.settings.secret_seed
        secret = site_secret(self.folder) if simulated is None else str(simulated)
        return derive_seed(secret, purpose, *(keys or (self.key,)))


def site_secret(folder: Path) -> bytes:
    """256 bits that never leave the site, made when they are first needed, readable by this user alone."""
    path = folder / SECRET
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        found = secrets.token_bytes(SECRET_BYTES)
        atomic_write(path, found, private=True)
    if len(found) != SECRET_BYTES:
        raise OSError(f"{path} is damaged: delete it to have a new one made")
    return found
