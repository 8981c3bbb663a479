"""Flower's control interface: who submits runs and registers nodes. Only `serve` reaches it, with a secret."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskdm.errors import FederationError
from maskdm.federated.bundle import bundle, bundle_sha256
from maskdm.run.processes import NO_CALLS_HOME, no_proxy_for_loopback


class Control:
    """Calls to one SuperLink."""

    def __init__(self, address: str, secret: str, certificate: Path | None) -> None:
        """Connect at the first call.

        Args:
            address: HOST:PORT of the private side.
            certificate: of the authority; None for a connection in the clear.
        """
        os.environ.update(NO_CALLS_HOME | no_proxy_for_loopback())
        from flwr.supercore.control import ControlHttpClient

        root = str(certificate) if certificate else None
        self._client: Any = ControlHttpClient.from_server_address(
            address, certificate is None, root, interceptors=[_Secret(secret)]
        )

    def start_run(self, name: str, federation: Path, simulation: Mapping[str, float] | None = None) -> int:
        """Submit a bundle of ours; returns the run's number.

        Args:
            simulation: resources of Flower's simulation, where it is one.

        Raises:
            FederationError: it was not accepted.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.federation_config_pb2 import SimulationConfig
        from flwr.supercore.fab import Fab

        content, resources = bundle(name), dict[str, Any](simulation or {})
        request = StartRunRequest(
            fab=fab_to_proto(Fab(bundle_sha256(name), content, {})),
            override_config=user_config_to_proto({"federation": str(federation.resolve())}),
            override_federation_config=SimulationConfig(**resources) if simulation else None,
        )
        answer = self._call("the run was not accepted", self._client.StartRun, request)
        if not answer.HasField("run_id"):
            raise FederationError("the run was not accepted: see logs/superlink.log")
        return int(answer.run_id)

    def nodes(self) -> dict[bytes, int]:
        """Who is let in: nodes by their public keys (PEM)."""
        from flwr.proto.control_pb2 import ListNodesRequest

        found = self._call("the nodes could not be listed", self._client.ListNodes, ListNodesRequest()).nodes_info
        return {bytes(node.public_key): int(node.node_id) for node in found if node.status != "unregistered"}

    def register(self, name: str, public_key: bytes) -> int:
        """Let a node in; returns its number."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        request = RegisterNodeRequest(public_key=public_key, name=name)
        return int(self._call(f"{name} could not be registered", self._client.RegisterNode, request).node_id)

    def unregister(self, node: int) -> None:
        """Let a node in no more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        self._call(
            f"node {node} could not be removed", self._client.UnregisterNode, UnregisterNodeRequest(node_id=node)
        )

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _call(self, what: str, call: Any, request: Any) -> Any:
        import httpx

        try:
            return call(request)
        except (httpx.HTTPError, RuntimeError) as error:
            raise FederationError(f"{what}: {error}") from error


class _Secret:
    """Shows the door who asks."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def intercept(self, context: Any, call_next: Any) -> Any:
        context.request.headers["authorization"] = f"Bearer {self._secret}"
        return call_next(context)
