"""The Flower ServerApp: carries parcels over Flower's Grid. The rounds themselves are in `maskdm_server.rounds`."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

from maskdm.errors import MaskDMError
from maskdm.protocol import Parcel, pack, unpack
from maskdm.runfolder import append_line
from maskdm_server.rounds import FederationConfig, Reply, run_federation

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run the federation whose folder the run configuration names."""
    folder = Path(str(context.run_config["federation"]))
    config = FederationConfig.model_validate(json.loads((folder / "config.json").read_text())["federation"])
    try:
        run_federation(GridLink(grid), folder, config)
    except Exception as error:
        reason = str(error) if isinstance(error, MaskDMError) else f"unexpected {type(error).__name__}: {error}"
        append_line(folder / "events.jsonl", {"time": time.time(), "event": "failed", "reason": reason})
        raise


class GridLink:
    """Parcels over Flower's Grid; one exchange at a time."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._waiting: set[str] = set()

    def sites(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def send(self, sites: list[int], parcel: Parcel, seconds: float) -> None:
        content = RecordDict(
            {
                "plan": ConfigRecord({"document": parcel.document}),
                "weights": ArrayRecord({"packed": Array(pack(parcel.arrays))}),
            }
        )
        # A plan that outlives its round would be worked on in vain, so it expires with it.
        messages = [Message(content, site, MessageType.TRAIN, ttl=seconds + 5) for site in sites]
        self._waiting = set(self._grid.push_messages(messages))

    def receive(self) -> Iterable[Reply]:
        for message in self._grid.pull_messages(self._waiting) if self._waiting else ():
            self._waiting.discard(message.metadata.reply_to_message_id)
            yield Reply(message.metadata.src_node_id, None if message.has_error() else _parcel(message.content))


def _parcel(content: RecordDict) -> Parcel | None:
    """A reply as a parcel; None where its records are not the two that a site may send."""
    report, update = content.get("report"), content.get("update")
    if set(content) - {"report", "update"} or not isinstance(report, MetricRecord):
        return None
    numbers = {name: value for name, value in report.items() if isinstance(value, int | float)}
    if len(numbers) != len(report):
        return None
    if update is None:
        return Parcel({}, numbers)
    if not isinstance(update, ArrayRecord) or set(update) != {"packed"}:
        return None
    try:
        return Parcel(unpack(update["packed"].numpy()), numbers)
    except (TypeError, ValueError):
        return None
