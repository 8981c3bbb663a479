"""A ServerApp with Flower's FedAvg, and clients that send back what came; see benchmarks/federation.py."""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()  # two statements: Flower looks for the names without running this
client = ClientApp()


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    parameters, parts = int(os.environ["PEER_PARAMETERS"]), 100
    arrays = {f"w{n}": Array(np.zeros(parameters // parts, np.float32) + np.float32(n)) for n in range(parts)}
    while len(list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    times = list[float]()  # before the first round, and after each
    FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2).start(
        grid, ArrayRecord(arrays), num_rounds=2, evaluate_fn=lambda *_: times.append(time.monotonic())
    )
    Path(os.environ["PEER_RESULT"]).write_text(json.dumps(times))


@client.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    moved = {name: Array(array.numpy() + np.float32(1e-4)) for name, array in arrays.items()}
    metrics = MetricRecord({"num-examples": 64, "train_loss": 0.1})
    return Message(RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)
