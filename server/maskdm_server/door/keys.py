"""Whether a request at the door is signed by a site that may come in, found out from its headers alone.

Flower looks at its own signature, which covers the time, once a request is read and parsed. This one covers method,
path and the digest of the body too (`maskdm.federated.signing`), and is looked at first.
"""

import binascii
import json
import time
from base64 import b64decode
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from maskdm.federated.signing import DIGEST, SIGNATURE, signed_text

KEYS = "keys.json"  # beside the names of nodes: each key (PEM) and its node
LOOK_SECONDS = 1.0
KEY, TIMESTAMP = b"flwr-public-key", b"flwr-timestamp"
# As Flower has it: how old a signature may be, and how far clocks may differ.
OLDEST_SECONDS, SKEW_SECONDS = 300.0, 5.0


# As Flower says that a node is unknown, and that a version does not fit: its SuperNode repeats the latter and ends.
UNKNOWN = {"code": 2004, "detail": "this server does not let this key in"}
OLD_CLIENT = {"code": 1001, "detail": "this server wants signed requests: install its version of maskdm-client"}


class RequestRefused(Exception):
    """A request that is not passed on, the HTTP status that says why, and what else is said."""

    def __init__(self, status: int, said: Mapping[str, Any] | None = None) -> None:
        super().__init__(status)
        self.status, self.said = status, said


class Signed(NamedTuple):
    """Who sends a request, and the digest that its body must have."""

    node: int
    digest: str


class Keys:
    """The keys that the roster lets in, read anew when they change."""

    def __init__(self, path: Path) -> None:
        self._path, self._nodes = path, dict[bytes, int]()
        self._read: tuple[int, int] | None = None  # inode and time of the file that was read
        self._looked = float("-inf")

    def signer(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Signed:
        """Who signed a request; takes about a millisecond where the key is known, else some microseconds.

        Raises:
            RequestRefused: 401 nobody who may come in, or too long ago; 426 one who may, by an old client; 503 there
                are no keys yet.
        """
        self._look()
        if self._read is None:
            raise RequestRefused(503)
        try:
            key = b64decode(headers[KEY], validate=True)
            timestamp = headers[TIMESTAMP].decode("ascii")
            age = (datetime.now(UTC) - datetime.fromisoformat(timestamp)).total_seconds()
        except (KeyError, ValueError, TypeError, binascii.Error):  # a time without a zone among them
            raise RequestRefused(401) from None
        if not -SKEW_SECONDS < age < OLDEST_SECONDS + SKEW_SECONDS:
            raise RequestRefused(401)
        node = self._nodes.get(key)
        if node is None:
            raise RequestRefused(401, UNKNOWN)
        if SIGNATURE.encode() not in headers:
            raise RequestRefused(426, OLD_CLIENT)
        try:
            digest = headers[DIGEST.encode()].decode("ascii")
            signature = b64decode(headers[SIGNATURE.encode()], validate=True)
            public = load_pem_public_key(key)
            assert isinstance(public, ec.EllipticCurvePublicKey), "provision makes no others"
            public.verify(signature, signed_text(method, path, timestamp, digest), ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, binascii.Error, InvalidSignature):
            raise RequestRefused(401) from None
        return Signed(node, digest)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        with suppress(OSError, ValueError):  # it is not there yet, or being replaced
            about = self._path.stat()
            if self._read != (about.st_ino, about.st_mtime_ns):
                found = json.loads(self._path.read_text())
                self._nodes = {key.encode(): int(node) for key, node in found.items()}
                self._read = about.st_ino, about.st_mtime_ns
