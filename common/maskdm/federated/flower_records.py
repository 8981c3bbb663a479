"""What crosses the wire as records of Flower's, in both directions. But for `flower_names`, which looks names of it up,
nothing else of `maskdm` imports Flower.

Down goes `plan` (exchange, seconds to wait, document, nonce) with `weights`, up come `report` (numbers, nonce) and
`update`. Arrays travel as one safetensors document, bit for bit. Who reads trusts nothing: what is not as written here
is None, whatever it holds.
"""

import secrets
from pathlib import Path
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from ..run.tensorfile import Hashed, pack, unpack
from .parcel import Parcel

PACKED = "maskdm.packed"  # how arrays are serialised
LONGEST_WAIT = 600.0  # seconds
LONGEST_PLAN = 1_000_000  # characters
NONCE = "nonce"  # of a question and its reply: two random numbers of 63 bits


class Asked(NamedTuple):
    """What a coordinator asks of a site: a plan with its weights or, with neither, how far the work on it is."""

    exchange: int  # from 0 to below 2**63
    wait: float  # seconds, up to LONGEST_WAIT, after which a site that is still at work says so
    document: str
    weights: bytes


def packed_record(document: bytes | bytearray | memoryview) -> ArrayRecord:
    """One safetensors document, which may lie in a file and is not copied."""
    array = Array("uint8", (len(document),), PACKED, b"")
    array.data = document
    record = ArrayRecord()
    record["packed"] = array  # the constructor would copy it
    return record


def question_records(exchange: int, wait: float, document: str, weights: ArrayRecord | None = None) -> RecordDict:
    """What one site is asked; the nonce is for this site and this time, so that nobody else can tell any id of it."""
    nonce = [secrets.randbits(63), secrets.randbits(63)]
    plan = ConfigRecord({"exchange": exchange, "wait": wait, "document": document, NONCE: nonce})
    return RecordDict({"plan": plan} | ({} if weights is None else {"weights": weights}))


def asked_in(content: RecordDict) -> Asked | None:
    """What is asked; None where it is not what a coordinator sends. The document itself is not looked at."""
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
    return Asked(exchange, seconds, document, packed.data if packed is not None else b"")


def reply_to(question: Message, parcel: Parcel) -> Message:
    """A reply that carries a parcel and the nonce of its question, so that nobody can tell its id."""
    content = RecordDict({"report": MetricRecord({**parcel.scalars, **nonce_in(question.content)})})
    if parcel.arrays:
        content["update"] = packed_record(pack(parcel.arrays))
    return Message(content, reply_to=question)


def nonce_in(content: RecordDict) -> dict[str, list[int]]:
    """The random number of a question, in two parts of 63 bits; nothing where it has none."""
    plan = content.get("plan")
    nonce = plan.get(NONCE) if isinstance(plan, ConfigRecord) else None
    if isinstance(nonce, list) and len(nonce) == 2 and all(type(part) is int and 0 <= part < 2**63 for part in nonce):
        return {NONCE: [int(part) for part in nonce]}
    return {}


def parcel_in(content: RecordDict, arrived: Path | None = None) -> Parcel | None:
    """A reply as a parcel; None where its records are not the two that a site may send.

    Args:
        arrived: where the bytes of its update lie, if not in its record.

    Raises:
        OSError: that file cannot be read.
    """
    report, update = content.get("report"), content.get("update")
    if set(content) - {"report", "update"} or not isinstance(report, MetricRecord):
        return None
    said = {name: value for name, value in report.items() if name != NONCE}
    numbers = {name: value for name, value in said.items() if isinstance(value, int | float)}
    if len(numbers) != len(said):
        return None
    if update is None:
        return Parcel({}, numbers)
    if not isinstance(update, ArrayRecord) or set(update) != {"packed"} or update["packed"].stype != PACKED:
        return None
    try:
        return Parcel(Hashed(arrived) if arrived else unpack(update["packed"].data), numbers)
    except ValueError:
        return None


def size_in(content: RecordDict) -> int:
    """About how many bytes a message holds that may hold anything."""
    values = [value for record in content.values() for value in record.values()]
    texts = [
        value.data if isinstance(value, Array) else value for value in values if isinstance(value, Array | str | bytes)
    ]
    return sum(len(text) for text in texts) + 8 * (len(values) - len(texts))
