"""What the signature of a site's request covers, beside the time that Flower's own covers: method, path and body."""

import hashlib

# Headers, as ASGI and HTTP/2 spell them. The digest is sent too, so that who signed is known before the body is read.
DIGEST, SIGNATURE = "maskdm-digest", "maskdm-signature"


def digest_of(body: bytes) -> str:
    """SHA-256 of a body, in hexadecimal digits."""
    return hashlib.sha256(body).hexdigest()


def signed_text(method: str, path: str, timestamp: str, digest: str) -> bytes:
    """What is signed, with ECDSA and SHA-256.

    Args:
        path: as it stands in the request's first line.
        timestamp: as in Flower's header of that name.
        digest: of the body, see `digest_of`.
    """
    return "\n".join(("maskdm request 1", method, path, timestamp, digest)).encode()
