"""Object trees as bytes: what Flower's own parser finds is found, and nothing else costs anything."""

from itertools import count
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from hypothesis import given
from hypothesis import strategies as st

from maskdm_server.door.trees import MOST_FIELDS, Malformed, TooMany, objects, parts

# The shape of a tree: a list of its children's.
SHAPES: st.SearchStrategy[Any] = st.recursive(
    st.just([]), lambda children: st.lists(children, max_size=4), max_leaves=12
)


def named(shape: list[Any], numbers: Any) -> Any:
    return ObjectTree(object_id=f"{next(numbers):064x}", children=[named(child, numbers) for child in shape])


def all_of(tree: Any) -> dict[bytes, frozenset[bytes]]:
    found = {tree.object_id.encode(): frozenset(child.object_id.encode() for child in tree.children)}
    for child in tree.children:
        found |= all_of(child)
    return found


def request(*trees: Any) -> bytes:
    return bytes(
        PushMessagesRequest(
            node=Node(node_id=2**63 + 5),
            messages_list=[Message()],
            message_object_trees=trees,
            clientapp_runtime_list=[1.5],
        ).SerializeToString()
    )


@given(st.lists(SHAPES, max_size=3))
def test_every_object_is_found_with_its_children(shapes: list[Any]) -> None:
    numbers = count()
    trees = [named(shape, numbers) for shape in shapes]
    expected: dict[bytes, frozenset[bytes]] = {}
    for tree in trees:
        expected |= all_of(tree)
    assert objects(request(*trees), len(expected)) == expected
    if expected:
        with pytest.raises(TooMany):
            objects(request(*trees), len(expected) - 1)


def test_an_object_that_is_named_often_counts_as_often() -> None:
    leaf = ObjectTree(object_id="a" * 64)
    tree = ObjectTree(object_id="b" * 64, children=[leaf] * 9)
    assert objects(request(tree), 10) == {b"a" * 64: frozenset(), b"b" * 64: frozenset({b"a" * 64})}
    with pytest.raises(TooMany):
        objects(request(tree), 9)


def test_an_object_has_the_same_children_everywhere() -> None:
    leaf, other = ObjectTree(object_id="a" * 64), ObjectTree(object_id="c" * 64)
    twice = [ObjectTree(object_id="b" * 64, children=[leaf]), ObjectTree(object_id="b" * 64, children=[other])]
    with pytest.raises(Malformed):
        objects(request(*twice), 10)


@pytest.mark.parametrize("name", ["", "a" * 63, "a" * 65])
def test_an_object_has_a_name_that_is_a_sha256(name: str) -> None:
    with pytest.raises(Malformed):
        objects(request(ObjectTree(object_id=name)), 10)


def test_empty_trees_end_at_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million bytes of them; each would be an object of Python's."""
    with pytest.raises((Malformed, TooMany)):
        objects(b"\x1a\x00" * 5_000_000, 100)
    deep = bytearray()
    for _ in range(100):
        deep[:0] = b"\x12" + bytes([len(deep) & 127 | 128, len(deep) >> 7])
    with pytest.raises((Malformed, TooMany)):
        objects(b"\x1a" + bytes([len(deep) & 127 | 128, len(deep) >> 7]) + deep, 50)


@given(st.binary(max_size=300))
def test_any_bytes_are_trees_or_refused(body: bytes) -> None:
    for look in (lambda: objects(body, 5), lambda: parts(body), lambda: objects(b"\x1a\x7f" + body, 5)):
        try:
            look()
        except (Malformed, TooMany):
            continue


def test_fields_of_a_request_have_their_numbers_and_contents() -> None:
    whole = PushObjectRequest(
        node=Node(node_id=5), run_id=2**64 - 1, object_id="x", object_content=b"c" * 300, session_id="s"
    )
    found = {number: bytes(part) for number, part in parts(bytes(whole.SerializeToString()))}
    assert found == {1: b"\x08\x05", 2: b"", 3: b"x", 4: b"c" * 300, 5: b"s"}


def test_a_request_of_many_fields_is_refused_at_the_first_too_many() -> None:
    assert len(parts(b"\x10\x01" * MOST_FIELDS)) == MOST_FIELDS
    with pytest.raises(Malformed):
        parts(b"\x10\x01" * 10**7)
