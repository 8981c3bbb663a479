"""The process that does a site's work: it outlives every connection, and takes up after a crash what it had begun."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from maskdm.errors import GateRefused
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.parcel import Outcome
from maskdm.run.runfolder import write_json

from ..folder.events import DiskRefused, WorkFailed, note
from ..folder.mailbox import POLL_SECONDS, Mailbox
from ..folder.settings import load_settings
from ..folder.unfinished import STARTS, saved_at
from ..gate.gate import check_again, code
from ..refusals import NotApproved, PolicyRefused, Superseded
from ..work.answer import answer, check_policy
from ..work.weights import PlanWithWeights

RETRY_SECONDS = 5.0
# Work that ended this process so often, and never came further, is not tried again: memory may not suffice for it.
MOST_STARTS = 2


def work(folder: Path) -> None:
    """Answer the requests in the mailbox of a site's folder, for ever; the newest counts, older work is dropped."""
    box = Mailbox(folder)
    begun, waiting = None, False
    while True:
        try:
            asked, replied = box.asked(), box.replied()
            if asked is None or (replied and replied[0] == asked):
                time.sleep(POLL_SECONDS)
                continue
            again, begun = begun == asked, asked
            if not again and _starts(folder / "work", asked) > MOST_STARTS:
                _give_up(box, asked, folder)
            else:
                _answer(box, replied[1] if replied else "", folder)
            waiting = False
        except Superseded:
            continue
        except OSError as error:  # a full disk, or an audit log that cannot be written: that may pass
            if not waiting:
                note(folder, DiskRefused(reason=f"{error.strerror or error}: {error.filename or folder}"))
            waiting = True
            time.sleep(RETRY_SECONDS)


def _answer(box: Mailbox, done: str, folder: Path) -> None:
    """Answer the request that lies there; `done` is the key of the work whose reply lies there."""
    request = box.request()
    assert request is not None
    came = PlanWithWeights(request.document, request.weights)
    if came.key and came.key == done:  # the same work under another number: the reply was lost on its way
        # What may not leave any more is asked of the work itself, which says why.
        with suppress(GateRefused, PolicyRefused, NotApproved):
            settings, parcel = load_settings(folder), box.take_reply()[1]
            check_policy(settings, came.plan, folder)
            box.reply(
                request.exchange, came.key, check_again(parcel, request.exchange, settings.policy, folder / AUDIT)
            )
            return
    answer(came, folder, box, request.exchange)


def _give_up(box: Mailbox, exchange: int, folder: Path) -> None:
    box.reply(exchange, "", code(Outcome.FAILED, 1, exchange))
    reason = f"the process that trains ended {MOST_STARTS} times over this work, perhaps for want of memory"
    note(folder, WorkFailed(round=1, outcome=Outcome.FAILED.name, reason=reason))


def _starts(folder: Path, exchange: int) -> int:
    """How many processes have begun the work on an exchange, this one among them, since it was last saved."""
    path, now = folder / STARTS, {"exchange": exchange, "saved": saved_at(folder)}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = {}
    starts = found["starts"] + 1 if found.items() >= now.items() else 1
    with suppress(OSError):
        write_json(path, {**now, "starts": starts})
    return starts


if __name__ == "__main__":
    work(Path(sys.argv[1]))
