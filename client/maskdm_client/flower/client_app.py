"""The Flower ClientApp: carries parcels between Flower and the site, which does its work in `maskdm_client.work`.

It lives for one message: it leaves a plan in the mailbox of the site's worker and comes back with the reply or a sign
of life.
"""

from contextlib import suppress
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from maskdm.errors import GateRefused, plain
from maskdm.federated.auditlog import AUDIT
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.run.tensorfile import pack

from ..folder.mailbox import Mailbox, note
from ..folder.settings import load_settings
from ..gate.gate import release, release_outcome, release_progress
from ..gate.record_incoming import record_foreign, record_plan, record_progress_question

PACKED = "maskdm.packed"  # how our arrays are serialised: one safetensors document
LONGEST_WAIT = 600.0
LONGEST_PLAN = 1_000_000  # characters

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
@app.evaluate()  # type: ignore[untyped-decorator]
@app.query()  # type: ignore[untyped-decorator]
def answer(message: Message, context: Context) -> Message:
    """Answer one message of the coordinator, which sends them all as of training: others are none of its."""
    folder = Path(str(context.node_config["site"]))
    try:
        asked = asked_of(message.content) if message.metadata.message_type == MessageType.TRAIN else None
        if asked is None:
            record_foreign(folder / AUDIT, size_of(message.content))
        parcel = carry(asked, folder)
    except OSError:  # what cannot be written down does not leave, nor does the path that could not be written
        raise RuntimeError("the audit log of this site cannot be written") from None
    return message_with(parcel, message)


def message_with(parcel: Parcel, message: Message) -> Message:
    """A reply that carries a parcel, bit for bit, and the number of its question, so that nobody can tell its id."""
    content = RecordDict({"report": MetricRecord({**parcel.scalars, **nonce_of(message.content)})})
    if parcel.arrays:
        packed = pack(parcel.arrays)
        content["update"] = ArrayRecord({"packed": Array("uint8", (len(packed),), PACKED, packed)})
    return Message(content, reply_to=message)


def nonce_of(content: RecordDict) -> dict[str, list[int]]:
    """The random number of a question, in two parts of 63 bits; nothing where it has none."""
    plan = content.get("plan")
    nonce = plan.get("nonce") if isinstance(plan, ConfigRecord) else None
    if isinstance(nonce, list) and len(nonce) == 2 and all(type(part) is int and 0 <= part < 2**63 for part in nonce):
        return {"nonce": [int(part) for part in nonce]}
    return {}


def carry(asked: tuple[int, float, str, bytes] | None, folder: Path) -> Parcel:
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
        outcome, reason = Outcome.GATE_REFUSED, str(error)
    except Exception as error:
        outcome, reason = Outcome.FAILED, f"unexpected {type(error).__name__}: {error}"
    note(folder, {"event": "failed", "round": round_number, "outcome": outcome.name, "reason": plain(reason)})
    return release_outcome(outcome, round_number, exchange, audit)


def size_of(content: RecordDict) -> int:
    """About how many bytes a message holds that may hold anything."""
    values = [value for record in content.values() for value in record.values()]
    texts = [
        value.data if isinstance(value, Array) else value for value in values if isinstance(value, Array | str | bytes)
    ]
    return sum(len(text) for text in texts) + 8 * (len(values) - len(texts))


def asked_of(content: RecordDict) -> tuple[int, float, str, bytes] | None:
    """Exchange, seconds to wait, plan and weights; None where it is not what a coordinator sends."""
    plan, weights = content.get("plan"), content.get("weights")
    if not isinstance(plan, ConfigRecord) or (weights is not None and not isinstance(weights, ArrayRecord)):
        return None
    exchange, seconds, document = (plan.get(name) for name in ("exchange", "wait", "document"))
    if type(exchange) is not int or not 0 <= exchange < 2**63 or not isinstance(document, str):
        return None
    if len(document) > LONGEST_PLAN:
        return None
    if not isinstance(seconds, float) or not 0 <= seconds <= LONGEST_WAIT or bool(document) != (weights is not None):
        return None
    packed = weights.get("packed") if weights is not None else None
    if packed is not None and packed.stype != PACKED:
        return None
    return exchange, seconds, document, packed.data if packed is not None else b""
