"""The Flower ClientApp: carries parcels between Flower and the site, which does its work in `maskdm_client.work`.

It lives for one message: it leaves a plan in the mailbox of the site's worker and comes back with the reply or a sign
of life.
"""

from contextlib import suppress
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from maskdm.errors import GateRefused, plain
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.flower_records import Asked, asked_in, reply_to, size_in
from maskdm.federated.parcel import Outcome, Parcel

from ..folder.events import WorkFailed, note
from ..folder.failures import unexpected
from ..folder.mailbox import Mailbox
from ..folder.settings import load_settings
from ..gate.gate import release, release_outcome, release_progress
from ..gate.record_incoming import record_foreign, record_plan, record_progress_question

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
@app.evaluate()  # type: ignore[untyped-decorator]
@app.query()  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """Answer one message of the coordinator, which sends them all as of training: others are none of its."""
    folder = Path(str(context.node_config["site"]))
    try:
        asked = asked_in(message.content) if message.metadata.message_type == MessageType.TRAIN else None
        if asked is None:
            record_foreign(folder / AUDIT, size_in(message.content))
        parcel = carry(asked, folder)
    except OSError:  # what cannot be written down does not leave, nor does the path that could not be written
        raise RuntimeError("the audit log of this site cannot be written") from None
    return reply_to(message, parcel)


def carry(asked: Asked | None, folder: Path) -> Parcel:
    """Hand a plan to the worker, or ask how far it is; an exception must not escape: Flower would send its text.

    Raises:
        OSError: the audit log cannot be written.
    """
    audit = folder / AUDIT
    if asked is None:
        return release_outcome(Outcome.PLAN_REFUSED, 1, 0, audit)
    exchange, seconds, document, weights = asked
    round_number = 1
    if document:
        round_number = record_plan(audit, exchange, document, weights)
    else:
        with suppress(OSError, TypeError):
            round_number = Mailbox(folder).progress(exchange)[0]
        record_progress_question(audit, round_number, exchange)
    try:
        box = Mailbox(folder)
        if document:
            box.ask(exchange, document, weights)
        elif box.asked() != exchange:
            return release_outcome(Outcome.UNKNOWN, round_number, exchange, audit)
        parcel = box.wait(exchange, seconds)
        policy = load_settings(folder).policy
        if parcel is None:
            return release_progress(*box.progress(exchange), exchange, policy, audit)
        found = parcel.scalars.get("round")
        return release(parcel, found if type(found) is int else round_number, policy, audit)
    except GateRefused as error:
        outcome, reason = Outcome.GATE_REFUSED, plain(str(error))
    except Exception as error:
        outcome, reason = Outcome.FAILED, unexpected(folder, error)
    note(folder, WorkFailed(round=round_number, outcome=outcome.name, reason=reason))
    return release_outcome(outcome, round_number, exchange, audit)
