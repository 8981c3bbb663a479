"""A node that speaks Flower's protocol and means harm; for benchmarks/faults.py and the end-to-end tests.

    python benchmarks/hostile.py HOST:PORT ATTACK

Attacks: nan, shapes, key, norm, weight, version, parts (10 GB in many parts), body (10 GB in one part), bomb (one part
named so often that it makes 10 GB).
"""

import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response

from maskdm.federated.encoding import layout
from maskdm.federated.flower_records import asked_in, reply_to
from maskdm.federated.parcel import Outcome, Parcel
from maskdm.federated.plan import RoundPlan

TEN_GIGABYTES = 10 * 2**30
CHUNK = 5 * 2**20


def harmful(plan: RoundPlan, attack: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Arrays and numbers of a reply with one thing wrong; a plan without training is refused, so that all go on."""
    kinds = layout(plan.shapes(), plan.encoding, plan.topk_share)
    rng = np.random.default_rng(plan.round)
    # Bits of bfloat16 around 1e-4: as long as an honest update.
    arrays: dict[str, Any] = {
        name: (0x38D1 | (rng.integers(0, 2, shape) << 15)).astype(np.uint16) for name, (_, shape) in kinds.items()
    }
    numbers: dict[str, float] = {
        "outcome": 0,
        "round": plan.round,
        "exchange": plan.exchange,
        "examples": 100,
        "images_seen": plan.local_images,
        "loss_before": 0.1,
        "loss_after": 0.1,
        "seconds": 1.0,
        "skipped_steps": 0,
    }
    first = next(iter(arrays), "")
    if attack == "version" or not arrays:
        arrays, numbers = {}, {"outcome": int(Outcome.PLAN_REFUSED), "round": plan.round}
    elif attack == "nan":
        arrays[first] = np.full_like(arrays[first], 0x7FC0)
    elif attack == "shapes":
        arrays[first] = arrays[first][..., :1]
    elif attack == "key":
        arrays["another.weight"] = np.zeros(3, np.uint16)
    elif attack == "norm":
        arrays = {name: array + np.uint16(0x0D00) for name, array in arrays.items()}  # 26 powers of two
    elif attack == "weight":
        numbers["images_seen"] = 10**12
    return arrays, numbers


def serve_harm(address: str, attack: str) -> None:
    """Join, and answer everything that is asked with the same attack."""
    with http_request_response(address, insecure=True) as (node, receive, send, _, _, pull, push, confirm):
        TaskIdentity.node_id, TaskIdentity.task_id = node, 1
        print(f"node {node} does {attack}", flush=True)
        while True:
            found = receive()
            if found is None:
                time.sleep(1)
                continue
            head, tree = found
            run = head.metadata.run_id
            TaskIdentity.run_id = run
            contents = pull_objects([n.object_id for n in iterate_object_tree(tree)], lambda name, r=run: pull(r, name))
            confirm(run, head.metadata.message_id)
            asked = inflate_object_from_contents(head.metadata.message_id, contents)
            assert isinstance(asked, Message)
            asked.metadata.__dict__["_message_id"] = head.metadata.message_id
            question = asked_in(asked.content)
            assert question
            if not question.document:
                continue
            try:
                answer(asked, RoundPlan.model_validate_json(question.document), attack, address, send, push, run)
            except Exception as error:
                print(f"round {asked.metadata.group_id}: {type(error).__name__}: {error}"[:300], flush=True)


def answer(asked: Message, plan: RoundPlan, attack: str, address: str, send: Any, push: Any, run: int) -> None:
    """Send one harmful reply, whatever it takes."""
    if attack == "body":

        def body() -> Iterator[bytes]:
            for _ in range(TEN_GIGABYTES // CHUNK):
                yield bytes(CHUNK)

        answered = httpx.post(f"http://{address}/v1/fleet/push-object", content=body(), timeout=60)
        print(f"round {plan.round}: 10 GB in one body: {answered.status_code}", flush=True)
        return
    arrays, numbers = harmful(plan, attack)
    message = reply_to(asked, Parcel(arrays, numbers))
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {name: found.deflate() for name, found in get_all_nested_objects(message).items()}
    tree = get_object_tree(message)
    if attack == "parts":
        names = (
            hashlib.sha256(f"{plan.exchange}-{part}".encode()).hexdigest() for part in range(TEN_GIGABYTES // CHUNK)
        )
        tree.children.append(ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id=name) for name in names]))
    if attack == "bomb" and plan.action == "train":
        objects, tree, message = bomb(message, objects, tree)
    wanted, session = send(message, tree, 1.0)
    for name in [node.object_id for node in iterate_object_tree(tree)]:
        if name in wanted:
            push(run, session, name, objects[name])
    print(f"round {plan.round}: sent", flush=True)


def bomb(message: Message, objects: dict[str, bytes], tree: Any) -> tuple[dict[str, bytes], Any, Message]:
    """The same message with an array whose one part is to be read 2,048 times."""
    record = message.content["update"]
    assert isinstance(record, ArrayRecord)
    array = record["packed"]
    array.data = bytes(CHUNK)
    chunks = array.slice_array()
    array.__dict__["_chunks"] = chunks * (TEN_GIGABYTES // CHUNK)
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {name: found.deflate() for name, found in get_all_nested_objects(message).items()}
    return objects, get_object_tree(message), message


if __name__ == "__main__":
    serve_harm(sys.argv[1], sys.argv[2])
