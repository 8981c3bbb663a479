"""Names of Flower beside its public interface (`flwr.app`, `flwr.clientapp`) that a site uses or replaces.

Where one is missing no process of Flower's begins: unreplaced, they would run code that a coordinator sends.
"""

from maskdm.federated.flower_names import Replaced, Used

USED: Used = {
    "flwr.common.constant": "TIMESTAMP_HEADER",
    "flwr.proto.fleet_pb2": "ActivateNodeRequest PullMessagesRequest",
    "flwr.supercore.cli.flower_superexec": "flower_superexec",
    "flwr.supercore.constant": "TaskType.SERVER_APP",
    "flwr.supercore.error": (
        "ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED FlowerError.from_json"
    ),
    "flwr.supercore.exit": "add_exit_handler",
    "flwr.supercore.primitives.asymmetric": "public_key_to_bytes",
    "flwr.supernode.cli.flower_supernode": "flower_supernode",
    "flwr.supernode.cli.flwr_clientapp": "flwr_clientapp",
    "flwr.supernode.fleet_http_client": "FleetHttpClient.ActivateNode",
    "flwr.supernode.node_auth_http_interceptor": "NodeAuthHttpInterceptor.intercept",
}
CLIENTAPP = tuple(
    Replaced("flwr.supernode.runtime.run_clientapp", name)
    for name in ("install_from_fab", "get_load_client_app_fn", "Error", "push_message")
)
REPLACED = (
    *CLIENTAPP,
    Replaced("flwr.supernode.fleet_http_connection", "NodeAuthHttpInterceptor"),
    Replaced("flwr.supernode.start_client_internal", "get_fused_config_from_fab"),
)
