"""Each of the doctor's checks is green where all is well, and red, with a remedy, where something is wrong."""

import errno
import os
import socket
import ssl
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.supercore.error import ApiErrorCode
from torch import Tensor

from maskdm.config import ModelConfig
from maskdm.data.corpus import RECORD
from maskdm.federated.bundle import bundle_sha256
from maskdm.federated.kit import POLICY, OpenedKit, open_kit
from maskdm.federated.policy import TEMPLATE, SitePolicy
from maskdm_client.doctor import checks, checks_connection, checks_machine
from maskdm_client.doctor.checks import Check, mistake, show, skipped
from maskdm_client.doctor.checks_connection import AHEAD, BEHIND, Answer, clock, connection, name_resolution
from maskdm_client.doctor.checks_machine import (
    accelerator,
    available_memory,
    disk,
    installed,
    memory,
    needed_memory,
    training_step,
    versions,
)
from maskdm_client.doctor.node_key import node_key
from maskdm_server.kits.provision import provision

CPU = torch.device("cpu")


def is_red(check: Check, found: str, remedy: str) -> bool:
    """Red for this reason, with this advice."""
    assert (check.ok, found in check.found, remedy in check.remedy) == (False, True, True), check
    return True


@pytest.fixture
def kits(tmp_path: Path) -> Path:
    """Those of a server at 127.0.0.1."""
    provision(tmp_path / "kits", "127.0.0.1:8000", ["hospital-a"], policy=TEMPLATE.encode())
    return tmp_path / "kits"


@pytest.fixture
def opened(kits: Path, tmp_path: Path) -> OpenedKit:
    return open_kit(kits / "hospital-a.zip", tmp_path / "kit")


# The machine


def test_versions_that_were_not_tested_are_red_and_those_here_are_green() -> None:
    here = installed()
    assert versions(here).ok
    for name, wrong in (
        ("flwr", "1.43.0"),
        ("flwr", "1.40.9"),
        ("torch", "2.7.1+cu128"),
        ("torch", "3.0"),
        ("Python", "3.10.4"),
        ("Python", "3.14.0"),
    ):
        assert is_red(versions({**here, name: wrong}), f"{name} {wrong}", f"install {name} >=")
    for name, right in (("flwr", "1.41.0"), ("flwr", "1.42.0"), ("torch", "2.8.0a0+34c6371d24.nv25.08")):
        assert versions({**here, name: right}).ok, "also one that somebody built"


def test_the_versions_of_python_that_are_named_are_those_that_are_allowed() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert project["requires-python"] == f">={named[0]},<3.{int(named[-1].removeprefix('3.')) + 1}"


def test_a_flower_without_a_name_that_a_site_needs_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("flwr.supernode.runtime.run_clientapp.install_from_fab")
    assert is_red(versions(installed()), "lacks flwr.supernode.runtime.run_clientapp.install_from_fab", "pip install")


def test_a_full_disk_and_one_that_cannot_be_written_are_red(tmp_path: Path, tiny: ModelConfig) -> None:
    assert disk(tmp_path, 1, tiny).ok
    assert RECORD.itemsize == checks_machine.RECORD
    assert is_red(disk(tmp_path, 10**15, tiny), "GB needed", "free some space")
    (tmp_path / "file").touch()
    assert is_red(disk(tmp_path / "file", 1, tiny), os.strerror(errno.ENOTDIR), "choose another --out")


def test_a_machine_without_memory_for_a_step_is_red(tiny: ModelConfig) -> None:
    needed = needed_memory(tiny)
    assert memory(needed, needed, CPU).ok
    assert is_red(memory(needed, needed - 1, CPU), "available on this machine", "end other programs")


def test_larger_models_images_and_batches_need_more_memory() -> None:
    small = ModelConfig.preset("S", image_size=32, channels=3)
    assert needed_memory(small) < needed_memory(ModelConfig.preset("B", image_size=32, channels=3))
    assert needed_memory(small) < needed_memory(ModelConfig.preset("S", image_size=64, channels=3))
    assert needed_memory(small, 32) < needed_memory(small, 64)


def test_a_containers_limit_counts_as_the_memory_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(CPU, tmp_path) == 8000 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.stat").write_text("anon 1\ninactive_file 500000\nactive_file 7\n")
    (group / "memory.current").write_text("1500000\n")
    (group / "memory.max").write_text("max\n")
    assert available_memory(CPU, tmp_path) == 8000 * 1024
    (group / "memory.max").write_text("3000000\n")
    assert available_memory(CPU, tmp_path) == 2_000_000
    assert available_memory(CPU) > 0


def test_a_device_that_is_not_there_is_red_and_a_cpu_alone_is_green() -> None:
    device, check = accelerator("cpu")
    assert (device, check.ok) == (CPU, True)
    assert accelerator("auto")[1].ok
    for name in ("cuda:99", "abacus"):
        device, check = accelerator(name)
        assert device is None
        assert is_red(check, f"--device {name} is not available here", "use cpu, or auto")


def test_a_step_of_training_is_really_taken(tiny: ModelConfig, weights: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for classes in (0, 3):
        check = training_step(tiny.model_copy(update={"classes": classes}), CPU)
        assert check.ok, check
        assert "32 images of 8x8" in check.found
    assert training_step(tiny, CPU, weights).ok
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items()), "the prior was changed"


def test_a_step_whose_loss_is_no_number_is_red(tiny: ModelConfig, weights: dict[str, Tensor]) -> None:
    broken = {name: tensor * 1e30 for name, tensor in weights.items()}
    assert is_red(training_step(tiny, CPU, broken), "not finite", "copy the prior again")


def test_a_step_that_does_not_fit_is_red(tiny: ModelConfig) -> None:
    """So many pixels have no room in the addresses of a process, whatever the machine."""
    check = training_step(tiny, CPU, batch=2**44)
    assert is_red(check, "do not fit into the memory of cpu", "ask for a smaller model or --batch-size")


def test_a_step_that_fails_on_the_device_is_red(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image\nmore")

    monkeypatch.setattr(checks_machine, "train", fail)
    assert is_red(training_step(tiny, CPU), "cpu failed (CUDA error: no kernel image)", "look after its driver")


# The kit, the policy, the code


def test_a_kit_is_shown_with_name_server_time_left_and_fingerprint(
    kits: Path, opened: OpenedKit, tmp_path: Path
) -> None:
    now = opened.kit.issued + timedelta(hours=1)
    found, check = checks.kit(kits / "hospital-a.zip", tmp_path / "again", now)
    assert found
    assert check.ok
    for text in (
        "hospital-a at 127.0.0.1:8000",
        opened.fingerprint(),
        "89 days left",
        "as the coordinator proposed it",
    ):
        assert text in check.found
    assert "WARNING" not in check.found
    _, soon = checks.kit(kits / "hospital-a.zip", tmp_path / "again", now + timedelta(days=80))
    assert (soon.ok, "WARNING" in soon.found) == (True, True)


def test_a_kit_that_is_damaged_expired_or_from_the_future_is_red(kits: Path, opened: OpenedKit, tmp_path: Path) -> None:
    path, folder, made = kits / "hospital-a.zip", tmp_path / "kit", opened.kit.issued
    found, check = checks.kit(path, folder, made + timedelta(days=91))
    assert found, "the connection can be looked at all the same"
    assert is_red(check, "it expired on", "provision renew")
    assert is_red(checks.kit(path, folder, made - timedelta(days=1))[1], "later than this machine's clock", "set it")
    (folder / "client.pub").write_text("another key")
    found, check = checks.kit(folder, tmp_path / "again", made)
    assert found is None
    assert is_red(check, "damaged or changed", "ask the coordinator for a new one")


def test_a_policy_that_was_changed_by_the_site_is_said_to_be(opened: OpenedKit, tmp_path: Path) -> None:
    (opened.folder / POLICY).write_text('min-images = 50\nmax-bytes-per-round = "2MB"\napprove-first-round = true\n')
    changed, check = checks.kit(opened.folder, tmp_path / "again", opened.kit.issued)
    assert changed
    assert (check.ok, "policy.toml is changed by this site" in check.found) == (True, True)
    terms, check = checks.policy(None, changed)
    assert terms == SitePolicy(min_images=50, max_bytes_per_round=2_000_000, approve_first_round=True)
    assert check.ok
    for text in ("the kit's", "2,000,000 bytes", "from 50 images on", "approves"):
        assert text in check.found


@pytest.mark.parametrize(
    ("content", "found", "remedy"),
    [
        ("min-imagse = 5", "unknown key 'min-imagse'", "the keys are"),
        ("min-images = [", "is not TOML", ""),
        ("require-dp = true", "differential privacy", "require-dp = false"),
        ('metrics = ["outcome"]', "loss_before, loss_after", "list them under metrics"),
    ],
)
def test_a_policy_that_cannot_be_read_or_lets_nothing_leave_is_red(
    tmp_path: Path, content: str, found: str, remedy: str
) -> None:
    (tmp_path / "mine.toml").write_text(content)
    assert is_red(checks.policy(tmp_path / "mine.toml", None)[1], found, remedy)


def test_code_that_neither_kit_nor_policy_names_is_red(opened: OpenedKit) -> None:
    assert checks.bundle(opened.kit, SitePolicy()).ok
    other = opened.kit.model_copy(update={"bundle": "0" * 64})
    assert is_red(checks.bundle(other, SitePolicy()), "0" * 64, "install the coordinator's version")
    assert checks.bundle(other, SitePolicy(bundles=(bundle_sha256(),))).ok


# The connection


class Server(BaseHTTPRequestHandler):
    """Answers as a coordinator does; `late` seconds behind this machine's clock."""

    late, status, code = 0.0, 200, 0

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = f'{{"code": {self.code}, "detail": "public"}}'.encode()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() - self.late, usegmt=True)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent."""


class Quiet(HTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what some tests are about."""


@contextmanager
def serving(tls: Path | None, host: str = "127.0.0.1", **behaviour: float) -> Iterator[int]:
    """The port of a server with the certificate in a folder, or in the clear."""
    server = Quiet((host, 0), type("Behaving", (Server,), behaviour))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.crt", tls / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Serve = Callable[..., int]


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:
        yield lambda tls, **behaviour: stack.enter_context(serving(tls, **behaviour))


def test_a_name_without_an_address_is_red() -> None:
    assert name_resolution("localhost").ok
    # .invalid is kept free of names for ever (RFC 6761)
    assert is_red(name_resolution("maskdm.invalid"), "maskdm.invalid has no address", "DNS")
    assert is_red(name_resolution("a" * 64 + ".org"), "has no address", "look at the name")


def test_with_a_proxy_in_the_environment_its_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    assert is_red(name_resolution("example.org"), "proxy.invalid (the proxy in the environment) has no address", "DNS")
    assert name_resolution("localhost").ok


def test_the_kits_own_server_is_green_and_its_certificates_time_is_shown(kits: Path, serve: Serve) -> None:
    check, answer = connection("127.0.0.1", serve(kits / "server"), kits / "server" / "ca.crt")
    assert check.ok, check
    assert "89 days left" in check.found
    assert answer
    assert clock(answer).ok


def test_a_server_of_another_authority_is_red(kits: Path, tmp_path: Path, serve: Serve) -> None:
    provision(tmp_path / "others", "127.0.0.1:8000", ["hospital-a"], policy=TEMPLATE.encode())
    check, answer = connection("127.0.0.1", serve(tmp_path / "others" / "server"), kits / "server" / "ca.crt")
    assert answer is None
    assert is_red(check, "not of the kit's authority", "compare the fingerprint")


def test_a_server_whose_certificate_has_another_name_is_red(kits: Path, serve: Serve) -> None:
    port = serve(kits / "server", host="127.0.0.2")
    check, _ = connection("127.0.0.2", port, kits / "server" / "ca.crt")
    assert is_red(check, "not for 127.0.0.2", "provision --san 127.0.0.2")


def test_a_server_whose_certificate_has_expired_is_red(tmp_path: Path, serve: Serve) -> None:
    provision(tmp_path / "old", "127.0.0.1:8000", ["hospital-a"], days=0, policy=TEMPLATE.encode())
    tls = tmp_path / "old" / "server"
    assert is_red(connection("127.0.0.1", serve(tls), tls / "ca.crt")[0], "has expired", "provision renew")


def test_a_server_in_the_clear_is_red_for_who_has_a_kit_and_green_for_who_asked_for_it(
    kits: Path, serve: Serve
) -> None:
    port = serve(None)
    check, _ = connection("127.0.0.1", port, kits / "server" / "ca.crt")
    assert is_red(check, "serves in the clear", "--tls")
    check, answer = connection("127.0.0.1", port, None)
    assert (check.ok, "in the clear" in check.found, answer is not None) == (True, True, True)


def test_a_server_with_tls_is_red_for_who_has_no_kit(kits: Path, serve: Serve) -> None:
    check, _ = connection("127.0.0.1", serve(kits / "server"), None)
    assert is_red(check, "does not answer in the clear", "ask for a --kit")


def test_a_port_where_nobody_listens_or_answers_is_red(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = kits / "server" / "ca.crt"
    monkeypatch.setattr(checks_connection, "SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        for asked in (authority, None):
            assert is_red(connection("127.0.0.1", port, asked)[0], "did not answer within", "firewall")
    for asked in (authority, None):
        assert is_red(connection("127.0.0.1", port, asked)[0], "nobody listens at", "whether the coordinator serves")


def test_another_server_behind_the_address_is_red(kits: Path, serve: Serve) -> None:
    tls = kits / "server"
    check, _ = connection("127.0.0.1", serve(tls, status=502), tls / "ca.crt")
    assert is_red(check, "answers 502 to /health", "something in between")
    assert is_red(connection("127.0.0.1", serve(None, status=502), None)[0], "answers 502", "whether the address")


def test_a_proxy_is_asked_for_the_way_and_its_refusal_is_red(
    kits: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{serve(None)}")  # which knows no CONNECT
    monkeypatch.setenv("no_proxy", "")
    check, _ = connection("maskdm.example.org", 8000, kits / "server" / "ca.crt")
    assert is_red(check, "no connection to maskdm.example.org:8000 (501 ", "HTTPS_PROXY")


@pytest.mark.parametrize(("late", "ok"), [(3600, False), (-3600, False), (20, False), (-200, True), (0, True)])
def test_a_clock_further_off_than_flower_accepts_is_red(kits: Path, serve: Serve, late: float, ok: bool) -> None:
    tls = kits / "server"
    _, answer = connection("127.0.0.1", serve(tls, late=late), tls / "ca.crt")
    assert answer
    check = clock(answer)
    assert check.ok is ok, check
    assert ok or is_red(check, "ahead of" if late > 0 else "behind", "set this machine's clock")


def test_the_clocks_bounds_are_flowers() -> None:
    assert (AHEAD, BEHIND) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)


def test_a_server_that_does_not_say_the_time_is_not_compared() -> None:
    assert clock(Answer(200, None, time.time())).ok is None


@pytest.mark.parametrize(
    ("status", "code", "found"),
    [
        (412, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "the server does not know it"),
        (401, 0, "refuses its signature"),
        (200, 0, "the server answers 200"),
        (404, 0, "the server answers 404"),
    ],
)
def test_a_key_that_is_not_let_in_is_red(
    kits: Path, opened: OpenedKit, serve: Serve, status: int, code: int, found: str
) -> None:
    """What the real server answers is in tests/e2e."""
    port = serve(kits / "server", status=status, code=int(code))
    assert is_red(node_key("127.0.0.1", port, opened), found, "")


def test_a_server_that_went_away_cannot_take_a_key(opened: OpenedKit) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    assert is_red(node_key("127.0.0.1", port, opened), "no answer (ConnectError)", "run this again")


# How it is said


def test_a_line_has_a_mark_what_was_found_and_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    for check in (Check("disk", True, "room"), Check("disk", False, "full", "free some"), skipped("kit", "none")):
        show(check)
    assert capsys.readouterr().err.splitlines() == [
        "✓ disk            room",
        "✗ disk            full: free some",
        "- kit             none",
    ]


def test_the_remedy_of_a_mistake_is_what_follows_its_last_colon() -> None:
    assert mistake("kit", ValueError("--kit x: is none: ask")) == Check("kit", False, "--kit x: is none", "ask")
    assert mistake("kit", ValueError("is none")) == Check("kit", False, "is none")
