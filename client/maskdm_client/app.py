"""The Flower ClientApp: turns Flower messages into parcels and back. Everything else is in `maskdm_client.site`."""

from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from maskdm.protocol import Parcel
from maskdm_client.site import answer

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Answer one plan of the coordinator."""
    config, weights = message.content["plan"], message.content["weights"]
    assert isinstance(config, ConfigRecord)
    assert isinstance(weights, ArrayRecord)
    parcel = Parcel({name: array.numpy() for name, array in weights.items()}, {}, str(config["document"]))
    released = answer(parcel, Path(str(context.node_config["site"])))
    content = RecordDict({"report": MetricRecord(dict(released.scalars))})
    if released.arrays:
        content["update"] = ArrayRecord({name: Array(array) for name, array in released.arrays.items()})
    return Message(content, reply_to=message)
