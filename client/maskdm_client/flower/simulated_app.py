"""The ClientApp of Flower's simulation: a virtual site does its work when it is asked, in the process that asks it.

Apart from `maskdm_client.flower.client_app`, because here the folder of a site follows from what the server says.
"""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from maskdm.federated.flower_records import asked_in, reply_to
from maskdm.federated.virtual import SITES, folder_of

from ..work.virtual import answer

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Answer one message of the coordinator."""
    number = int(str(context.node_config["partition-id"])) + 1
    folder = folder_of(Path(str(context.run_config["federation"])) / SITES, number)
    _, _, document, weights = asked_in(message.content) or (0, 0.0, "", b"")
    return reply_to(message, answer(document, weights, folder))
