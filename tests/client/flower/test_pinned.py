"""What a coordinator sends as code is known by its hash alone."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskdm.federated.bundle import PROJECT, bundle, bundle_sha256
from maskdm_client.flower.pinned import UNANSWERED, problem_of_bundle

OURS = frozenset({bundle_sha256()})


def zipped(files: dict[str, bytes]) -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def project(component: str) -> bytes:
    return f'[tool.flwr.app.components]\nclientapp = "{component}"\n'.encode()


def allowed(content: bytes) -> frozenset[str]:
    return frozenset({hashlib.sha256(content).hexdigest()})


def test_the_bundle_of_this_version_may_run() -> None:
    assert problem_of_bundle(bundle(), OURS) is None


@given(st.binary(max_size=200))
def test_nothing_else_may_run(content: bytes) -> None:
    assert "neither kit nor policy allows" in str(problem_of_bundle(content, OURS))


@given(st.integers(min_value=0, max_value=len(bundle()) - 1), st.integers(min_value=1, max_value=255))
def test_no_byte_of_it_may_be_another(place: int, change: int) -> None:
    changed = bytearray(bundle())
    changed[place] ^= change
    assert problem_of_bundle(bytes(changed), OURS) is not None


@pytest.mark.slow
def test_a_clientapp_that_fails_before_it_can_answer_says_so_to_the_site(tmp_path: Path) -> None:
    (tmp_path / UNANSWERED).parent.mkdir()
    refused = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # answers each POST with 501
    threading.Thread(target=refused.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{refused.server_port}"
    command = [sys.executable, "-m", "maskdm_client.flower.pinned", "clientapp", str(tmp_path), "--insecure"]
    ended = subprocess.run([*command, "--runtime-api-address", address, "--token", "t"], timeout=300, check=False)
    refused.shutdown()
    refused.server_close()
    assert ended.returncode == 1
    assert (tmp_path / UNANSWERED).read_text() == address


BEGINNINGS = [
    "subprocess.Popen(['/bin/true'])",
    "subprocess.Popen(['flwr-other'])",
    "subprocess.Popen([sys.executable, '-c', ''])",
    "subprocess.Popen('flwr-clientapp', shell=True)",
    "subprocess.Popen(['flwr-clientapp'], executable='/bin/true')",
    "os.system('true')",
    "os.execv('/bin/true', ['flwr-clientapp'])",
    "os.fork()",
    "os.posix_spawn('/bin/true', ['flwr-clientapp'], {})",
    "__import__('multiprocessing').get_context('spawn').Process(target=print).start()",
    "__import__('multiprocessing').get_context('fork').Process(target=print).start()",
]


def test_a_superexec_can_begin_no_program_but_ours_whatever_flower_calls(tmp_path: Path) -> None:
    """A next release may name the ClientApp otherwise, or start it without a look at the PATH."""
    for name in ("flwr-clientapp", "flwr-other"):
        (tmp_path / name).write_text('#!/bin/sh\necho "began $@"\n')
        (tmp_path / name).chmod(0o755)
    lines = [
        "import os, subprocess, sys",
        "from importlib import import_module",
        "from pathlib import Path",
        "from maskdm_client.flower.pinned import run_superexec",
        "def flowers():",
        *(
            f"    try: {code}\n    except PermissionError as error: print(error, flush=True)\n    else: print('began')"
            for code in BEGINNINGS
        ),
        "    subprocess.Popen(['flwr-clientapp', '--token', 't']).wait()",
        "import_module('flwr.supercore.cli.flower_superexec').flower_superexec = flowers",
        f"run_superexec(Path({str(tmp_path)!r}))",
    ]
    (tmp_path / "run.py").write_text("\n".join(lines))
    command = [sys.executable, "-W", "ignore", str(tmp_path / "run.py")]
    around = {**os.environ, "PATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    *refused, ours = ended.stdout.splitlines()
    assert len(refused) == len(BEGINNINGS), ended.stderr
    assert all(line.startswith("Flower's superexec may start nothing but flwr-clientapp: ") for line in refused)
    assert ours == "began --token t"


def test_what_is_not_allowed_is_not_even_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: object) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    assert problem_of_bundle(b"PK", OURS) is not None


@pytest.mark.parametrize(
    "content",
    [
        zipped({PROJECT: project("evil:app"), "evil.py": b""}),
        zipped({PROJECT: project("maskdm_client.flower.simulated_app:app")}),
        zipped({PROJECT: b"[project]\n"}),
        zipped({PROJECT: b"not toml ="}),
        zipped({PROJECT: b"\xff\xfe"}),
        zipped({PROJECT: b"tool = 1"}),
        zipped({PROJECT: bytes(2_000_000)}),
        zipped({"other": b""}),
        b"no zip",
        b"",
    ],
)
def test_also_a_bundle_that_is_allowed_may_only_name_the_installed_client(content: bytes) -> None:
    assert problem_of_bundle(content, allowed(content)) is not None
