"""Object trees of a request as its bytes have them, walked before anything of Flower's parses them.

A message of Flower's is a tree of objects, each named by a hash of its content. The fields that are looked at are those
of `flwr/proto/message_pb2` and `fleet_pb2`.
"""

from collections.abc import Iterator

TREES = 3  # of the requests that push messages
NAME, CHILDREN = 1, 2  # of a tree
NAME_LENGTH = 64  # hexadecimal digits of a SHA-256
MOST_FIELDS = 16  # of a request, whose own are five at most

Children = frozenset[bytes]


class Malformed(Exception):
    """Bytes that no client of ours would send."""


class TooMany(Exception):
    """More objects than an update can have."""


def fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each field; of one that has no length, nothing.

    Raises:
        Malformed: it is no protobuf.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind, length = key & 7, 0
        if kind == 0:
            _, place = _varint(data, place)
        elif kind in (1, 5):
            place += 8 if kind == 1 else 4
        elif kind == 2:
            length, place = _varint(data, place)
        else:
            raise Malformed
        if place + length > len(data):
            raise Malformed
        yield key >> 3, data[place : place + length]
        place += length


def objects(request: bytes, most: int) -> dict[bytes, Children]:
    """All objects of a request's trees with the names of their children; takes some microseconds for each.

    Raises:
        Malformed: a tree is none, or names an object twice with other children.
        TooMany: there are more than `most`, each counted as often as it is named.
    """
    found = dict[bytes, Children]()
    # Trees to look at, and those that were: a tree's children are known when they have been looked at.
    waiting, seen = list[tuple[memoryview, list[bytes]]](), list[tuple[bytes, list[bytes]]]()
    for number, value in fields(memoryview(request)):
        if number == TREES:
            waiting.append((value, []))
            if len(waiting) > most:
                raise TooMany
    while waiting:
        tree, siblings = waiting.pop()
        name, children = b"", list[bytes]()
        for number, value in fields(tree):
            if number == CHILDREN:
                waiting.append((value, children))
            elif number == NAME and not name and len(value) == NAME_LENGTH:
                name = bytes(value)
            else:
                raise Malformed
            if len(seen) + 1 + len(waiting) > most:
                raise TooMany
        if not name:
            raise Malformed
        siblings.append(name)
        seen.append((name, children))
    for name, children in seen:
        if found.setdefault(name, frozenset(children)) != frozenset(children):
            raise Malformed
    return found


def parts(request: bytes) -> list[tuple[int, memoryview]]:
    """Number and content of each field of a request.

    Raises:
        Malformed: there are too many, or it is no protobuf.
    """
    found = list[tuple[int, memoryview]]()
    for field in fields(memoryview(request)):
        found.append(field)
        if len(found) > MOST_FIELDS:
            raise Malformed
    return found


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise Malformed
