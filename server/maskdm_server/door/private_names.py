"""Names of Flower beside its public interface (`flwr.app`, `flwr.serverapp`) that a coordinator uses or replaces.

Where one is missing no SuperLink begins: unreplaced, nothing would stand before it.
"""

from maskdm.federated.flower_names import Replaced, Used

USED: Used = {
    "flwr.app.message": "remove_content_from_message",
    "flwr.common.serde": "fab_to_proto message_to_proto user_config_to_proto",
    "flwr.proto.control_pb2": "ListNodesRequest RegisterNodeRequest StartRunRequest UnregisterNodeRequest",
    "flwr.proto.federation_config_pb2": "SimulationConfig",
    "flwr.proto.message_pb2": "ConfirmMessageReceivedRequest",
    "flwr.proto.node_pb2": "Node",
    "flwr.proto.runtime_pb2": "PullAppMessagesRequest PushAppMessagesRequest",
    "flwr.supercore.constant": "HEAD_BODY_DIVIDER",
    "flwr.supercore.control": (
        "ControlHttpClient.from_server_address ControlHttpClient.StartRun ControlHttpClient.ListNodes "
        "ControlHttpClient.RegisterNode ControlHttpClient.UnregisterNode ControlHttpClient.close"
    ),
    "flwr.supercore.fab": "Fab",
    "flwr.supercore.inflatable.inflatable_object": (
        "get_all_nested_objects get_object_body get_object_children_ids_from_object_content get_object_tree "
        "get_object_type_from_object_content no_object_id_recompute"
    ),
    "flwr.supercore.inflatable.inflatable_protobuf_utils": "make_pull_object_fn_protobuf make_push_object_fn_protobuf",
    "flwr.supercore.inflatable.inflatable_utils": (
        "ObjectPullError ObjectPushError ObjectUnavailableError inflatable_class_registry push_objects"
    ),
    "flwr.superlink.cli.flower_superlink": "flower_superlink",
    "flwr.superlink.grid.http_grid": "HttpGrid._runtime_client HttpGrid.run",
}
REPLACED = (
    Replaced("flwr.supercore.sql_mixin", "SQLITE_PRAGMAS"),
    Replaced("flwr.superlink.main", "create_app", by_import_in="flwr.superlink.cli.flower_superlink"),
    Replaced("flwr.superlink.cli.flower_superlink", "uvicorn"),
)
GRID = ("_runtime_client", "node", "run")  # of the Grid that a ServerApp is handed
