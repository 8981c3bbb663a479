"""Whether a coordinator would let this site in, asked in Flower's way. It joins nothing and takes nothing away."""

import os
import ssl
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from maskdm.federated.kit import OpenedKit
from maskdm.run.processes import NO_CALLS_HOME

from .checks import Check

NAME = "node key"
SECONDS = 20.0


def node_key(host: str, port: int, kit: OpenedKit) -> Check:
    """Show the site's key to the server."""
    os.environ.update(NO_CALLS_HOME)
    import httpx
    from flwr.supercore.error import ApiErrorCode, FlowerError

    try:
        status, text = _show_key(host, port, kit)
    except (httpx.HTTPError, OSError) as error:
        return Check(NAME, False, f"no answer ({type(error).__name__})", "run this again; see the connection above")
    answered = FlowerError.from_json(text)
    code = answered.code if answered else None
    if code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return Check(NAME, True, f"the server knows it and would let {kit.kit.name} in")
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        found = "the server does not know it: the kit was revoked, has expired, or another server's list is served"
        return Check(NAME, False, found, "ask the coordinator for a new kit")
    if status == httpx.codes.UNAUTHORIZED:
        found = "the server refuses its signature"
        return Check(NAME, False, found, "set this machine's clock; where it is right, ask for a new kit")
    remedy = (
        "see whether coordinator and site have the same version of MaskDM, and whether something in between answers"
    )
    return Check(NAME, False, f"the server answers {status}", remedy)


def _show_key(host: str, port: int, kit: OpenedKit) -> tuple[int, str]:
    """Status and text of the server's answer."""
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient

    from ..flower.signatures import SignedRequests

    key = load_ssh_private_key(kit.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    public = key.public_key()
    # A heartbeat of no seconds, which Flower takes from nobody: it verifies the signature, looks the key up, and then
    # refuses before anything is changed. Other requests need the node's number, which only joining tells
    # (SendNodeHeartbeat, which also marks it online), take messages away (PullMessages), or are answered without a
    # look at the list of sites (RegisterNode).
    request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=0)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    client: Any = FleetHttpClient(
        f"https://{address}",
        interceptors=[SignedRequests(key, public)],
        verify=ssl.create_default_context(cafile=str(kit.authority)),
        timeout=SECONDS,
    )
    with client:
        try:
            client.ActivateNode(request)
        except ValueError:  # something else than Flower says that all is well
            pass
        except httpx.HTTPStatusError as error:
            return error.response.status_code, error.response.text
    return int(httpx.codes.OK), ""
