"""The Kubernetes manifests: valid, locked down, closed to the network, with options that the commands have."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from maskdm.commands import command_line as cli
from maskdm_client.commands.app import app as client_app
from maskdm_server.commands.app import app as server_app

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
BUILT = ["base/server", "base/client", "overlays/gpu", "files"]
JOBS = ["base/server", "base/client", "overlays/gpu"]
PLACES = [*((folder, "initContainers") for folder in JOBS), *((folder, "containers") for folder in BUILT)]
CLIENTS = ["base/client", "overlays/gpu"]
PAGE = (ROOT / "docs" / "kubernetes.md").read_text()

Resource = dict[str, Any]
# As much of kustomize as the manifests use; one test compares it with the real one.
KEYS = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Resource]:
    """The resources of a kustomization, with its namespace, patches and images."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(settings) <= KEYS, f"{folder}: {set(settings) - KEYS} is not built here"
    resources = list[Resource]()
    for name in settings["resources"]:
        path = folder / name
        resources += build(path) if path.is_dir() else read(path)
    for resource in resources:
        if "namespace" in settings and resource["kind"] not in CLUSTER_WIDE:
            resource["metadata"]["namespace"] = settings["namespace"]
    for change in settings.get("patches", ()):
        target = change["target"]
        found = [r for r in resources if (r["kind"], r["metadata"]["name"]) == (target["kind"], target["name"])]
        assert found, f"{folder}: nothing is {target}"
        for resource in found:
            patch(resource, yaml.safe_load(change["patch"]))
    for container in (c for resource in resources for c in containers(resource)):
        for image in settings.get("images", ()):
            name, _, tag = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
    return resources


def read(path: Path) -> list[Resource]:
    """The documents of one file; what an anchor repeats is copied."""
    return [_apart(document) for document in yaml.safe_load_all(path.read_text())]


def patch(resource: Resource, operations: list[dict[str, Any]]) -> None:
    """JSON patch (RFC 6902): add and replace."""
    for operation in operations:
        *way, last = (part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:])
        place: Any = resource
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        assert operation["op"] == "add" or last in place, f"nothing to replace at {operation['path']}"
        place[last] = operation["value"]


def pod_of(resource: Resource) -> dict[str, Any] | None:
    """The pod that a resource is or makes."""
    if resource["kind"] == "Pod":
        found: dict[str, Any] = resource["spec"]
        return found
    template = (resource.get("spec") or {}).get("template")
    return template["spec"] if template else None


def containers(resource: Resource) -> list[dict[str, Any]]:
    """All that run in its pod, first those that run before."""
    pod = pod_of(resource) or {}
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def _apart(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def one(folder: str, kind: str, name: str = "") -> Resource:
    found = [r for r in build(FOLDER / folder) if r["kind"] == kind and name in ("", r["metadata"]["name"])]
    assert len(found) == 1, found
    return found[0]


def pod(folder: str) -> dict[str, Any]:
    found = [spec for resource in build(FOLDER / folder) if (spec := pod_of(resource))]
    assert len(found) == 1
    return found[0]


def variables(folder: str) -> dict[str, Any]:
    """What the main container's environment holds: from the ConfigMap, and from its own entries."""
    container = pod(folder)["containers"][0]
    assert container["envFrom"] == [{"configMapRef": {"name": "maskdm-options"}}]
    entries = {entry["name"]: entry for entry in container["env"]}
    return {**one(folder, "ConfigMap", "maskdm-options")["data"], **entries}


def weaknesses(spec: dict[str, Any]) -> list[str]:
    """What a pod may do that it should not."""
    around = spec.get("securityContext", {})
    found = []
    if spec.get("automountServiceAccountToken") is not False:
        found.append("token")
    if spec.get("enableServiceLinks") is not False:  # MASKDM_PORT=tcp://… would be read as an option
        found.append("service links")
    if around.get("runAsNonRoot") is not True or around.get("runAsUser") == 0 or around.get("runAsGroup") == 0:
        found.append("root")
    if around.get("seccompProfile") != {"type": "RuntimeDefault"}:
        found.append("seccomp")
    if any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        found.append("host")
    if any(set(volume) & {"hostPath"} for volume in spec.get("volumes", ())):
        found.append("host path")
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        own = container.get("securityContext", {})
        if own.get("readOnlyRootFilesystem") is not True:
            found.append("writable root")
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            found.append("privileges")
        if own.get("capabilities") != {"drop": ["ALL"]}:
            found.append("capabilities")
        if set(own) & {"runAsNonRoot", "runAsUser", "runAsGroup", "seccompProfile"}:
            found.append("container differs from pod")
        resources = container.get("resources", {})
        if any({"cpu", "memory"} - set(resources.get(kind, {})) for kind in ("requests", "limits")):
            found.append("no resources")
        if any("hostPort" in port for port in container.get("ports", ())):
            found.append("host port")
    return found


@pytest.mark.parametrize("folder", BUILT)
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_every_resource_follows_the_schema_of_kubernetes(folder: str, version: str) -> None:
    import kubernetes_validate

    for resource in build(FOLDER / folder):
        kubernetes_validate.validate(resource, version, strict=True)
    wrong = copy.deepcopy(resource) | {"specification": {}}
    with pytest.raises(kubernetes_validate.ValidationError, match="specification"):
        kubernetes_validate.validate(wrong, version, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
@pytest.mark.parametrize("folder", BUILT)
def test_what_the_tests_build_is_what_kustomize_builds(folder: str) -> None:
    text = subprocess.run(["kubectl", "kustomize", FOLDER / folder], capture_output=True, check=True).stdout

    def by_name(resources: Any) -> dict[tuple[str, str], Resource]:
        return {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}

    assert by_name(build(FOLDER / folder)) == by_name(yaml.safe_load_all(text))


def test_every_manifest_belongs_to_a_kustomization_and_every_resource_exists() -> None:
    named = set[Path]()
    for path in FOLDER.rglob("kustomization.yaml"):
        resources = [path.parent / name for name in yaml.safe_load(path.read_text())["resources"]]
        assert [resource for resource in resources if not resource.exists()] == []
        named |= {path, *(resource.resolve() for resource in resources if resource.is_file())}
    assert {path for path in FOLDER.rglob("*") if path.is_file()} == named


@pytest.mark.parametrize("folder", BUILT)
def test_no_pod_may_do_more_than_it_needs(folder: str) -> None:
    assert weaknesses(pod(folder)) == []


@pytest.mark.parametrize(("folder", "place"), PLACES)
@pytest.mark.parametrize(
    ("loosen", "weakness"),
    [
        (lambda spec, own: own["securityContext"].pop("readOnlyRootFilesystem"), "writable root"),
        (lambda spec, own: own["securityContext"].pop("allowPrivilegeEscalation"), "privileges"),
        (lambda spec, own: own["securityContext"].update(privileged=True), "privileges"),
        (lambda spec, own: own["securityContext"].pop("capabilities"), "capabilities"),
        (lambda spec, own: own["securityContext"]["capabilities"].update(add=["NET_RAW"]), "capabilities"),
        (lambda spec, own: own["securityContext"].update(runAsUser=0), "container differs from pod"),
        (lambda spec, own: own.pop("resources"), "no resources"),
        (lambda spec, own: spec["securityContext"].pop("runAsNonRoot"), "root"),
        (lambda spec, own: spec["securityContext"].update(runAsUser=0), "root"),
        (lambda spec, own: spec["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda spec, own: spec.pop("automountServiceAccountToken"), "token"),
        (lambda spec, own: spec.pop("enableServiceLinks"), "service links"),
        (lambda spec, own: spec.update(hostNetwork=True), "host"),
        (lambda spec, own: spec["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "host path"),
    ],
)
def test_a_loosened_pod_is_noticed(
    folder: str, place: str, loosen: Callable[[dict[str, Any], dict[str, Any]], Any], weakness: str
) -> None:
    spec = pod(folder)
    loosen(spec, spec[place][0])
    assert weakness in weaknesses(spec)


@pytest.mark.parametrize("folder", JOBS)
def test_the_namespace_admits_restricted_pods_only_and_holds_everything(folder: str) -> None:
    namespace = one(folder, "Namespace")
    for mode in ("enforce", "audit", "warn"):
        assert namespace["metadata"]["labels"][f"pod-security.kubernetes.io/{mode}"] == "restricted"
    inside = {r["metadata"].get("namespace") for r in build(FOLDER / folder) if r["kind"] != "Namespace"}
    assert inside == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("folder", JOBS)
def test_a_finished_federation_is_not_started_again_and_a_mistake_is_not_repeated(folder: str) -> None:
    job = one(folder, "Job")["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["podReplacementPolicy"] == "Failed"
    by_code = {
        code: (rule["action"], rule["onExitCodes"]["containerName"])
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    name = job["template"]["spec"]["containers"][0]["name"]
    assert by_code == {2: ("FailJob", name), cli.INTERRUPTED: ("Ignore", name)}
    assert {"type": "DisruptionTarget", "status": "True"} in job["podFailurePolicy"]["rules"][-1]["onPodConditions"]


def options(app: typer.Typer, command: str) -> dict[str, click.Parameter]:
    """By environment variable, as the real command line names them."""
    found = cli.prepared(app, "maskdm")
    if command:
        assert isinstance(found, click.Group)
        found = found.commands[command]
    return {str(option.envvar): option for option in found.params if isinstance(option, click.Option)}


@pytest.mark.parametrize("folder", JOBS)
def test_every_variable_is_an_option_and_its_value_fits(folder: str) -> None:
    command = pod(folder)["containers"][0]["command"]
    program, *subcommand = command
    known = options({"maskdm-server": server_app, "maskdm-client": client_app}[program], "".join(subcommand))
    given = {name: value for name, value in variables(folder).items() if name.startswith("MASKDM_")}
    assert given
    assert set(one(folder, "ConfigMap")["data"]) <= set(given)
    assert set(given) <= set(known)
    for name, value in given.items():
        if isinstance(value, str):
            known[name].type.convert(value, known[name], None)
        else:
            assert value["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    required = {name for name, option in known.items() if option.required}
    assert required <= set(given)


@pytest.mark.parametrize("folder", JOBS)
def test_every_path_lies_in_a_volume_that_can_be_written_where_it_must_be(folder: str) -> None:
    spec = pod(folder)
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in spec["containers"][0]["volumeMounts"]}
    assert {mount["name"] for mount in spec["containers"][0]["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    paths = {name: value for name, value in variables(folder).items() if isinstance(value, str) and value[0] == "/"}
    assert "MASKDM_OUT" in paths
    for name, path in paths.items():
        around = [mount for mount in mounts if Path(path).is_relative_to(mount)]
        assert len(around) == 1, (name, path)
        if name == "MASKDM_OUT":
            # The root of a new volume may hold a lost+found, which would be taken for foreign files.
            assert path not in mounts
            assert not mounts[around[0]]
    assert mounts["/tmp"] is False
    (scratch,) = (volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "tmp")
    assert scratch["medium"] == "Memory"
    assert "sizeLimit" in scratch


def test_the_clients_images_and_kit_and_the_servers_keys_are_read_only() -> None:
    for folder in CLIENTS:
        mounts = {mount["name"]: mount for mount in pod(folder)["containers"][0]["volumeMounts"]}
        assert (mounts["images"]["readOnly"], mounts["kit"]["readOnly"]) == (True, True)
    server = {mount["name"]: mount for mount in pod("base/server")["containers"][0]["volumeMounts"]}
    assert server["tls"]["readOnly"]
    assert "subPath" not in server["tls"]  # or a revocation would not arrive
    for folder in JOBS:
        for volume in (volume for volume in pod(folder)["volumes"] if "secret" in volume):
            assert volume["secret"]["defaultMode"] == 0o440


@pytest.mark.parametrize("folder", JOBS)
def test_what_waits_for_files_is_a_shell_without_keys_or_network_code(folder: str) -> None:
    spec = pod(folder)
    (waiting,) = spec["initContainers"]
    assert waiting["command"][:2] == ["sh", "-c"]
    assert "maskdm-" not in waiting["command"][2]
    secret = {volume["name"] for volume in spec["volumes"] if "secret" in volume}
    assert secret
    assert not secret & {mount["name"] for mount in waiting["volumeMounts"]}


@pytest.mark.parametrize("folder", JOBS)
def test_nothing_may_be_reached_unless_it_is_named(folder: str) -> None:
    deny = one(folder, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert len([r for r in build(FOLDER / folder) if r["kind"] == "NetworkPolicy"]) == 2


@pytest.mark.parametrize("folder", CLIENTS)
def test_a_client_reaches_the_server_and_the_name_service_and_nobody_reaches_it(folder: str) -> None:
    policy = one(folder, "NetworkPolicy", "maskdm-client")["spec"]
    labels = one(folder, "Job")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"] == []
    server, names = policy["egress"]
    (to,) = server["to"]
    assert to == {"ipBlock": {"cidr": "192.0.2.10/32"}}  # where nobody is, until an overlay says otherwise
    assert server["ports"] == [{"port": 8000, "protocol": "TCP"}]
    (service,) = names["to"]
    assert service["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kube-system"}
    assert service["podSelector"]["matchLabels"] == {"k8s-app": "kube-dns"}
    assert [(port["port"], port["protocol"]) for port in names["ports"]] == [(53, "UDP"), (53, "TCP")]


def test_the_server_is_reached_at_its_port_only_and_reaches_nobody() -> None:
    policy = one("base/server", "NetworkPolicy", "maskdm-server")["spec"]
    job, service = one("base/server", "Job")["spec"]["template"], one("base/server", "Service")["spec"]
    labels = job["metadata"]["labels"].items()
    assert policy["podSelector"]["matchLabels"].items() <= labels
    assert service["selector"].items() <= labels
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    assert policy["ingress"] == [{"ports": [{"port": 8000, "protocol": "TCP"}]}]
    (port,) = job["spec"]["containers"][0]["ports"]
    assert str(port["containerPort"]) == variables("base/server")["MASKDM_PORT"] == "8000"
    assert [(given["port"], given["targetPort"]) for given in service["ports"]] == [(8000, port["name"])]


def test_health_is_asked_for_with_tls_at_the_server_and_as_in_the_image_at_the_client() -> None:
    server = pod("base/server")["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": "federation", "scheme": "HTTPS"}
    stage = (ROOT / "deploy" / "Dockerfile").read_text().partition(" AS client\n")[2]
    check = re.search(r"^HEALTHCHECK .*CMD (\[.*\])$", stage, re.MULTILINE)
    assert check
    for folder in CLIENTS:
        client = pod(folder)["containers"][0]
        assert client["readinessProbe"]["exec"]["command"] == yaml.safe_load(check[1])
        assert "livenessProbe" not in client  # it fails while the server is away, which a client waits for


def test_only_the_gpu_overlay_asks_for_a_gpu() -> None:
    limits = {folder: pod(folder)["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for folder in JOBS}
    assert limits == {"base/server": None, "base/client": None, "overlays/gpu": "1"}
    assert variables("overlays/gpu")["MASKDM_DEVICE"] == "cuda"
    assert pod("overlays/gpu")["containers"][0]["image"] == "maskdm-client:cuda"


def test_manifests_name_no_registry_and_images_are_set_by_kustomize() -> None:
    for path in FOLDER.rglob("*.yaml"):
        if path.name != "kustomization.yaml":
            images = {container["image"] for resource in read(path) for container in containers(resource)}
            assert images <= {"maskdm", "maskdm-server", "maskdm-client"}, path
    for folder in BUILT:
        for container in (c for resource in build(FOLDER / folder) for c in containers(resource)):
            assert re.fullmatch(r"maskdm-(server|client):(cpu|cuda)", container["image"])


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    """The manifests, with the overlays of the page beside them."""
    shutil.copytree(FOLDER, tmp_path / "deploy" / "kubernetes")
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL):
        lines = [line.removeprefix("   ") for line in block.splitlines()]
        path = tmp_path / lines[0].removeprefix("# ")
        path.parent.mkdir()
        path.write_text("\n".join(lines))
    return tmp_path


def test_the_overlays_of_the_page_build_and_change_what_they_say(overlays: Path) -> None:
    server, client = (build(overlays / name) for name in ("my-server", "my-client"))
    (service,) = (resource["spec"] for resource in server if resource["kind"] == "Service")
    assert (service["type"], service["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    policies = {r["metadata"]["name"]: r["spec"] for r in [*server, *client] if r["kind"] == "NetworkPolicy"}
    assert policies["maskdm-server"]["ingress"][0]["from"] == [{"ipBlock": {"cidr": "198.51.100.0/24"}}]
    assert policies["maskdm-client"]["egress"][0]["to"] == [{"ipBlock": {"cidr": "203.0.113.5/32"}}]
    for container in (c for resource in [*server, *client] for c in containers(resource)):
        assert container["image"].startswith("images.example.org/maskdm-")
    known = options(server_app, "serve") | options(client_app, "")
    assert {name for name in re.findall(r"MASKDM_[A-Z_]+", PAGE) if name not in known} == set()


def test_the_doctor_of_the_page_runs_once_and_writes_beside_the_site(overlays: Path) -> None:
    (job,) = (resource["spec"] for resource in build(overlays / "my-doctor") if resource["kind"] == "Job")
    container = job["template"]["spec"]["containers"][0]
    assert (job["backoffLimit"], container["command"]) == (0, ["maskdm-client"])
    assert container["args"][:2] == ["doctor", "--out"]
    assert "MASKDM_OUT" in options(client_app, "doctor")
    (_, out) = container["args"][1:]
    site = variables("base/client")["MASKDM_OUT"]
    assert Path(out).parent == Path(site).parent
    assert out != site  # which would be refused as somebody else's folder
    assert weaknesses(job["template"]["spec"]) == []


def test_the_page_points_at_what_the_manifests_hold() -> None:
    job = one("base/client", "Job")
    assert job["spec"]["template"]["spec"]["volumes"][1]["name"] == "images"
    patch(job, [{"op": "replace", "path": "/spec/template/spec/volumes/1/persistentVolumeClaim", "value": {}}])
    names = {
        volume["secret"]["secretName"] for folder in JOBS for volume in pod(folder)["volumes"] if "secret" in volume
    }
    assert names == set(re.findall(r"create secret generic (\S+)", PAGE))
    for path in re.findall(r"deploy/kubernetes/[\w/.-]+\w", PAGE):
        assert (ROOT / path).exists(), path
