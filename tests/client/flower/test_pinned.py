"""What a coordinator sends as code is known by its hash alone."""

import hashlib
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
