"""The containers: locked down, apart from each other, with options that the commands have.

`deploy/smoke.sh` runs them.
"""

import re
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import click
import pytest
import yaml

from maskdm.commands import command_line as cli
from maskdm.federated.policy import TEMPLATE
from maskdm_client.commands.app import app as client_app
from maskdm_client.flower.supernode import pinned
from maskdm_server.commands.app import app as server_app
from maskdm_server.kits.provision import provision

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SIMULATION = "docker-compose.yml"
ALONE = ["deploy/compose.server.yml", "deploy/compose.client.yml"]
OVERLAYS = ["deploy/compose.more.yml", "deploy/compose.gpu.yml", "deploy/compose.client.gpu.yml"]
HOSPITALS = ["hospital-a", "hospital-b", "hospital-c"]
ONCE = ["images", "prior", "provision"]
PAGE = (ROOT / "docs" / "containers.md").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
# Of the Compose files, and no option of a command.
OUR_OWN = {"MASKDM_UID", "MASKDM_GID", "MASKDM_FEDERATION", "MASKDM_SITE", "MASKDM_PUBLIC", "MASKDM_DRAWN"}

Service = dict[str, Any]


class Loader(yaml.SafeLoader):
    """With Compose's own tag for a list that replaces the one before."""


def _list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


Loader.add_constructor("!override", _list)


def read(name: str) -> dict[str, Any]:
    """A Compose file, with the defaults of its variables; a variable that must be given becomes /NAME."""
    text = (ROOT / name).read_text().replace("${COMPOSE_PROJECT_NAME}", "maskdm")
    text = re.sub(r"\$\{([A-Z_]+):\?[^}]*\}", r"/\1", text)
    found: dict[str, Any] = yaml.load(re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", text), Loader)
    return found


def services(name: str = SIMULATION) -> dict[str, Service]:
    found: dict[str, Service] = read(name)["services"]
    return found


def mounts(service: Service) -> dict[str, tuple[str, bool]]:
    """What is mounted where, and whether it can be written."""
    found = {}
    for mount in service["volumes"]:
        if isinstance(mount, dict):
            found[mount["target"]] = mount["source"], not mount.get("read_only", False)
        else:
            source, target, *mode = mount.split(":")
            found[target] = source, mode != ["ro"]
    return found


def who_mounts(volume: str) -> set[str]:
    return {
        name for name, service in services().items() if volume in {source for source, _ in mounts(service).values()}
    }


@cache
def options(program: str, *subcommands: str) -> dict[str, click.Option]:
    """The options of a real command by their environment variables."""
    command = cli.prepared({"maskdm-server": server_app, "maskdm-client": client_app}[program], program)
    for name in subcommands:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return {str(option.envvar): option for option in command.params if isinstance(option, click.Option)}


def restricted() -> list[tuple[str, str]]:
    return [(SIMULATION, name) for name in (*ONCE, "server", *HOSPITALS)] + [
        (file, name) for file in ALONE for name in services(file)
    ]


@pytest.mark.parametrize(("file", "name"), restricted())
def test_a_service_runs_as_a_user_without_rights_on_a_read_only_root(file: str, name: str) -> None:
    service = services(file)[name]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["pids_limit"] > 0
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"}
    assert not any("docker.sock" in source for source, _ in mounts(service).values())
    assert service.get("network_mode", "none") == "none"


def test_every_service_is_looked_at() -> None:
    assert set(services()) == {"folders", *ONCE, "server", *HOSPITALS}


def test_the_one_that_runs_as_root_may_change_owners_and_nothing_else() -> None:
    service = services()["folders"]
    assert service["user"] == "0:0"
    assert (service["cap_drop"], service["cap_add"]) == (["ALL"], ["CHOWN"])
    assert service["network_mode"] == "none"
    assert service["read_only"] is True
    assert service["security_opt"] == ["no-new-privileges:true"]
    # It owns what others write: each volume, and the one folder of the host.
    assert {source for source, _ in mounts(service).values()} == {*read(SIMULATION)["volumes"], "./federation"}


def test_hospitals_reach_the_server_and_neither_each_other_nor_the_outside() -> None:
    networks, all_of_them = read(SIMULATION)["networks"], services()
    for name in HOSPITALS:
        assert all_of_them[name]["networks"] == [name]
        assert networks[name] == {"internal": True}
        assert {other for other, service in all_of_them.items() if name in service.get("networks", ())} == {
            name,
            "server",
        }
    for name in ("folders", *ONCE):
        assert all_of_them[name]["network_mode"] == "none"
    assert set(all_of_them["server"]["networks"]) == set(networks)
    assert not any("ports" in service for service in all_of_them.values())


def test_each_sees_its_own_secrets_only() -> None:
    assert who_mounts("authority") == {"folders", "provision"}
    assert who_mounts("kits") == {"folders", "provision"}
    assert who_mounts("server-kit") == {"folders", "provision", "server"}
    for name in HOSPITALS:
        assert who_mounts(f"{name}-kit") == {"folders", "provision", name}
        assert who_mounts(f"{name}-images") == {"folders", "images", name}
        assert who_mounts(name) == {"folders", name}


def test_only_state_can_be_written() -> None:
    for name in ("server", *HOSPITALS):
        assert [target for target, (_, writable) in mounts(services()[name]).items() if writable] == ["/data"]
    for file in ALONE:
        for service in services(file).values():
            assert [target for target, (_, writable) in mounts(service).items() if writable] == ["/data"]


@pytest.mark.parametrize(
    ("file", "name", "command"),
    [
        (SIMULATION, "prior", ("maskdm-server", "pretrain")),
        (SIMULATION, "provision", ("maskdm-server", "provision")),
        (SIMULATION, "server", ("maskdm-server", "serve")),
        *((SIMULATION, name, ("maskdm-client",)) for name in HOSPITALS),
        ("deploy/compose.server.yml", "server", ("maskdm-server", "serve")),
        ("deploy/compose.client.yml", "client", ("maskdm-client",)),
    ],
)
def test_every_variable_is_an_option_of_the_command_and_its_value_fits(
    file: str, name: str, command: tuple[str, ...]
) -> None:
    service, known = services(file)[name], options(*command)
    given = {key: value for key, value in service["environment"].items() if key.startswith("MASKDM_")}
    assert given
    for key, value in given.items():
        assert key in known, f"{key} is no option of {' '.join(command)}"
        assert isinstance(value, str)
        known[key].type.convert(value, known[key], None)
    assert {key for key, option in known.items() if option.required} <= given.keys()
    if command[1:] in (("pretrain",), ("serve",)):
        assert service["command"] == list(command[1:])


def test_the_kits_are_for_the_name_and_the_port_at_which_the_server_is() -> None:
    made = services()["provision"]["environment"]
    assert made["MASKDM_SERVER"] == "server:8000"
    assert made["SITES"].split() == HOSPITALS
    assert "EXPOSE 8000" in DOCKERFILE


def test_the_server_waits_for_all_hospitals_by_default() -> None:
    assert services()["server"]["environment"]["MASKDM_MIN_CLIENTS"] == str(len(HOSPITALS))


@pytest.mark.parametrize("file", [SIMULATION, *ALONE, *OVERLAYS])
def test_the_page_explains_every_variable_that_a_user_may_set(file: str) -> None:
    text = re.sub(r"^#.*", "", (ROOT / file).read_text(), flags=re.MULTILINE)
    wanted = set(re.findall(r"\$\{([A-Z_]+):", text)) - {"HOSPITAL_D_IMAGES"}
    assert {name for name in wanted if f"{name}`" not in PAGE and f"{name}=" not in PAGE} == set()


def test_the_page_names_no_variable_that_is_not_there() -> None:
    known = OUR_OWN | set(options("maskdm-server", "serve")) | set(options("maskdm-client"))
    known |= set(options("maskdm-server", "pretrain"))
    assert set(re.findall(r"MASKDM_[A-Z_]+", PAGE)) - {"MASKDM_"} <= known
    files = "".join((ROOT / file).read_text() for file in (SIMULATION, *ALONE, *OVERLAYS))
    assert set(re.findall(r"\$\{(MASKDM_[A-Z_]+)", files)) <= known


def test_a_fourth_hospital_is_made_like_the_others() -> None:
    more, one = read("deploy/compose.more.yml"), services()
    new = more["services"]["hospital-d"]
    assert new["extends"] == {"file": SIMULATION, "service": "hospital-b"}
    assert new["networks"] == ["hospital-d"]
    assert more["networks"] == {"hospital-d": {"internal": True}}
    theirs = {
        target: (source.replace("-b", "-d"), mode) for target, (source, mode) in mounts(one["hospital-b"]).items()
    }
    assert mounts(new) == theirs
    assert more["services"]["server"]["networks"] == ["hospital-d"]
    for name, key in (("images", "WHAT"), ("provision", "SITES")):
        assert more["services"][name]["environment"][key].startswith(one[name]["environment"][key])
    assert set(mounts(more["services"]["folders"]).values()) == {(volume, True) for volume in more["volumes"]}


@pytest.mark.parametrize(
    ("overlay", "base"), [("deploy/compose.gpu.yml", SIMULATION), ("deploy/compose.client.gpu.yml", ALONE[1])]
)
def test_an_overlay_gives_gpus_to_all_that_compute_and_builds_for_them(overlay: str, base: str) -> None:
    changed, before = services(overlay), services(base)
    assert set(changed) == {name for name in before if name not in ("folders", "images", "provision")}
    for name, service in changed.items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert ("build" in service) == ("build" in before[name])
        assert service.get("build", {"args": {"ACCELERATOR": "cuda"}}) == {"args": {"ACCELERATOR": "cuda"}}


def test_each_image_is_built_by_one_service_and_never_pulled() -> None:
    for file in (SIMULATION, *ALONE):
        built = [service["image"] for service in services(file).values() if "build" in service]
        assert sorted(built) == sorted({service["image"] for service in services(file).values()})
        assert all("build" in service or service["pull_policy"] == "never" for service in services(file).values())


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of the Dockerfile by stage."""
    found = dict[str, list[tuple[str, str]]]()
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines():
        if line and not line.startswith("#"):
            word, _, rest = line.partition(" ")
            if word == "FROM":
                base, _, name = rest.partition(" AS ")
                found[name] = [("FROM", base)]
            elif found:
                found[list(found)[-1]].append((word, rest))
    return found


def test_server_and_client_are_one_image_but_for_their_last_layer() -> None:
    for name in ("server", "client"):
        instructions = stages()[name]
        words = [word for word, _ in instructions]
        assert instructions[0] == ("FROM", "runtime")
        assert words.count("COPY") + words.count("RUN") == 1
        assert ("ENTRYPOINT", f'["maskdm-{name}"]') in instructions
        assert "HEALTHCHECK" in words


def test_the_images_run_as_a_user_and_are_made_from_python_and_nothing_else() -> None:
    users = [rest for word, rest in stages()["runtime"] if word == "USER"]
    assert users == ["10001:10001"]
    bases = {instructions[0][1] for instructions in stages().values()}
    assert bases == {"${WHEELS}", "${PYTHON_IMAGE}", "base", "runtime"}
    assert "ARG PYTHON_IMAGE=python:3.11-slim" in DOCKERFILE
    assert "ARG WHEELS=scratch" in DOCKERFILE
    assert not DOCKERFILE.startswith("# syntax")  # which would be fetched


@pytest.mark.parametrize("file", [SIMULATION, *ALONE])
def test_the_base_image_can_be_given_by_its_digest(file: str) -> None:
    """Arguments that FROM uses stand before the first one; the page says how a digest is found, and names none."""
    before = DOCKERFILE.partition("\nFROM ")[0]
    assert re.findall(r"^ARG (\w+)", before, re.MULTILINE) == ["WHEELS", "PYTHON_IMAGE"]
    (given,) = {service["build"]["args"]["PYTHON_IMAGE"] for service in services(file).values() if "build" in service}
    assert given == "python:3.11-slim"
    assert "docker buildx imagetools inspect python:3.11-slim" in PAGE
    assert "--build-arg PYTHON_IMAGE=python:3.11-slim@sha256:…" in PAGE
    assert not re.search("sha256:[0-9a-f]", PAGE + DOCKERFILE), "it ages"


def test_no_file_names_a_registry_or_an_address() -> None:
    # Python that answers itself, and the reserved names of examples.
    allowed = r"127\.0\.0\.1|192\.0\.2\.1|server:8000|\{|maskdm\.example\.org"
    for path in (ROOT / SIMULATION, *(path for path in DEPLOY.iterdir() if path.is_file())):
        text = path.read_text()
        addresses = re.findall(r"https?://(\S+)", text) + re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text)
        assert [found for found in addresses if not re.match(allowed, found)] == [], path
        assert "index-url http" not in text
        assert "extra-index" not in text


def test_all_that_the_wheel_is_made_of_is_copied_and_not_ignored() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    wanted = {Path(name) for name in (*build["packages"], *build["force-include"])}
    copied = {Path(source) for word, rest in stages()["package"] if word == "COPY" for source in rest.split()[:-1]}
    for path in wanted:
        assert (ROOT / path).exists()
        assert any(source == path or source in path.parents for source in copied), path
    first, *others = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    let_in = {line[1:] for line in others if line.startswith("!")}
    sources = [
        source
        for instructions in stages().values()
        for word, rest in instructions
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    ]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in let_in


@pytest.mark.parametrize("name", ["install.sh", "smoke.sh"])
def test_the_scripts_are_whole(name: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True)


def test_the_smoke_test_touches_nothing_of_its_user() -> None:
    script = (DEPLOY / "smoke.sh").read_text()
    assert "set -euo pipefail" in script
    assert "trap finish EXIT" in script
    assert "docker compose --env-file /dev/null" in script
    assert "prune" not in script


class Answer(BaseHTTPRequestHandler):
    """Answers as a SuperLink does, or as one that is not well."""

    status = 200

    def do_GET(self) -> None:
        """Only /health is known."""
        self.send_response(self.status if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def answering(status: int, tls: Path | None = None) -> Iterator[int]:
    """A server on loopback; gives its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (Answer,), {"status": status})) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "server.crt", tls / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def server_check(**environment: str) -> int:
    command = [sys.executable, str(DEPLOY / "healthy_server.py")]
    return subprocess.run(command, env=environment, capture_output=True).returncode


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_server_is_healthy_where_health_answers(status: int, healthy: bool) -> None:
    with answering(status) as port:
        assert (server_check(MASKDM_PORT=str(port)) == 0) is healthy
    assert server_check(MASKDM_PORT=str(port)) != 0  # gone


def test_with_tls_the_server_must_be_the_one_of_the_kits(tmp_path: Path) -> None:
    for name in ("ours", "other"):
        provision(tmp_path / name, "maskdm.example.org:8000", [], policy=TEMPLATE.encode())
    ours, other = (str(tmp_path / name / "server") for name in ("ours", "other"))
    with answering(200, Path(ours)) as port:
        assert server_check(MASKDM_TLS=ours, MASKDM_PORT=str(port)) == 0
        assert server_check(MASKDM_TLS=other, MASKDM_PORT=str(port)) != 0


def test_with_tls_the_port_is_that_of_the_kits(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    provision(tmp_path, "maskdm.example.org:8000", [], policy=TEMPLATE.encode())
    with answering(200, folder) as port:
        path = folder / "server.json"
        path.write_text(path.read_text().replace(":8000", f":{port}"))
        assert server_check(MASKDM_TLS=str(folder)) == 0


def client_check(folder: Path, *commands: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    for number, command in enumerate(commands, start=10):
        (folder / str(number)).mkdir()
        (folder / str(number) / "cmdline").write_text("\0".join(command) + "\0")
    (folder / "99").mkdir()  # one that has just ended
    check = [sys.executable, str(DEPLOY / "healthy_client.py"), str(folder)]
    return subprocess.run(check, capture_output=True, text=True)


WORKER = ("python", "-m", "maskdm_client.agent.worker", "/data")
NODE = ("python", "-m", "maskdm_client.flower.pinned", "supernode", "/data")
APP = ("python", "-m", "maskdm_client.flower.pinned", "clientapp", "/data")


def test_a_client_is_healthy_where_its_worker_and_its_connection_live(tmp_path: Path) -> None:
    assert client_check(tmp_path, WORKER, NODE).returncode == 0


@pytest.mark.parametrize(
    ("living", "missing"),
    [([NODE], "maskdm_client.agent.worker"), ([WORKER, APP], "maskdm_client.flower.pinned supernode")],
)
def test_a_client_that_lacks_one_is_not(tmp_path: Path, living: list[tuple[str, ...]], missing: str) -> None:
    result = client_check(tmp_path, *living)
    assert result.returncode == 1
    assert f"not running: {missing}" in result.stderr


def test_the_check_looks_for_what_the_client_starts() -> None:
    assert pinned("supernode", Path("/data"))[1:] == list(NODE[1:])
    assert (
        '"-m", "maskdm_client.agent.worker"'
        in (ROOT / "client" / "maskdm_client" / "agent" / "caretaker.py").read_text()
    )
