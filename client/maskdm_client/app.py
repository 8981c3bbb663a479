"""The Flower ClientApp: turns Flower messages into parcels and back. Everything else is in `maskdm_client.site`."""

from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from maskdm.protocol import Parcel, pack, unpack
from maskdm_client.site import answer

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Answer one plan of the coordinator."""
    released = answer(_parcel(message.content), Path(str(context.node_config["site"])))
    content = RecordDict({"report": MetricRecord(dict(released.scalars))})
    if released.arrays:
        content["update"] = ArrayRecord({"packed": Array(pack(released.arrays))})
    return Message(content, reply_to=message)


def _parcel(content: RecordDict) -> Parcel:
    """What came, as a parcel; an empty one, whose plan is refused, where it is not what a coordinator sends.

    An exception must not escape from here: Flower would send its text to the server.
    """
    plan, weights = content.get("plan"), content.get("weights")
    if not isinstance(plan, ConfigRecord) or not isinstance(weights, ArrayRecord):
        return Parcel({}, {})
    try:
        return Parcel(unpack(weights["packed"].numpy()), {}, str(plan["document"]))
    except (KeyError, TypeError, ValueError):
        return Parcel({}, {})
