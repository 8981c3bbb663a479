"""Requests of a SuperNode, each signed with its method, path and body: Flower's own signature covers the time alone."""

from base64 import b64encode
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from maskdm.federated.signing import DIGEST, SIGNATURE, digest_of, signed_text


class SignedRequests(NodeAuthHttpInterceptor):  # type: ignore[misc]
    """Signs what Flower signs, and then the whole request with the same key."""

    def __init__(self, private_key: ec.EllipticCurvePrivateKey, public_key: ec.EllipticCurvePublicKey) -> None:
        super().__init__(private_key, public_key)
        self._key = private_key

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Add the headers and send it."""

        def sign(context: Any) -> Any:
            request = context.request
            digest, path = digest_of(request.content), request.url.raw_path.decode("ascii")
            text = signed_text(request.method, path, request.headers[TIMESTAMP_HEADER], digest)
            signature = self._key.sign(text, ec.ECDSA(hashes.SHA256()))
            request.headers[DIGEST], request.headers[SIGNATURE] = digest, b64encode(signature).decode("ascii")
            return call_next(context)

        return super().intercept(context, sign)
