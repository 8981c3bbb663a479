"""Requests of a SuperNode, each signed with its method, path and body: Flower's own signature covers the time alone."""

from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from maskdm.federated.signing import DIGEST, SIGNATURE, digest_of, signed_text


class SignedRequests(NodeAuthHttpInterceptor):  # type: ignore[misc]
    """Signs what Flower signs, and then the whole request with the same key."""

    def __init__(
        self,
        private_key: ec.EllipticCurvePrivateKey,
        public_key: ec.EllipticCurvePublicKey,
        admitted: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            admitted: called once the server has answered a request for work, which it does to a node that it let in;
                again with the next one where that raises OSError.
        """
        super().__init__(private_key, public_key)
        self._key, self._admitted = private_key, admitted

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Add the headers and send it."""

        def sign(context: Any) -> Any:
            request = context.request
            digest, path = digest_of(request.content), request.url.raw_path.decode("ascii")
            text = signed_text(request.method, path, request.headers[TIMESTAMP_HEADER], digest)
            signature = self._key.sign(text, ec.ECDSA(hashes.SHA256()))
            request.headers[DIGEST], request.headers[SIGNATURE] = digest, b64encode(signature).decode("ascii")
            return call_next(context)

        response = super().intercept(context, sign)
        if self._admitted and isinstance(context.message, PullMessagesRequest) and response.is_success:
            with suppress(OSError):
                self._admitted()
                self._admitted = None
        return response
