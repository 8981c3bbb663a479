"""The built wheel in an empty environment, away from the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maskdm.federated.bundle import source

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path, public_corpus: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASKDM_", "PYTHONPATH"))}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "fresh")
    binaries = tmp_path / "fresh" / "bin"
    install = ("-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    run(str(binaries / "python"), *install)
    options = ("--size", "tiny", "--image-size", "16", "--block-size", "2", "--mask-ratio", "0.5", "--images", "256")
    server = str(binaries / "maskdm-server")
    run(server, "pretrain", "--data", str(public_corpus), "--out", "run", *options, "--batch-size", "32")
    run(server, "pretrain", "--data", str(public_corpus), "--out", "x", "--recipe", "celeba-64", "--dry-run")
    simulate = ("simulate", "--prior", "run/prior.safetensors", "--data", str(public_corpus), "--out", "fed")
    run(server, *simulate, "--clients", "2", "--rounds", "1", "--local-images", "64")
    assert (tmp_path / "fed" / "model.safetensors").exists()
    where = run(str(binaries / "python"), "-c", "import maskdm, maskdm_client, maskdm_server; print(maskdm.__file__)")
    assert where.startswith(str(tmp_path / "fresh"))


@pytest.mark.parametrize(
    ("name", "server", "client"),
    [
        ("flower-app", "maskdm_server.flower.server_app:app", "maskdm_client.flower.client_app:app"),
        ("flower-simulation", "maskdm_server.flower.simulated_app:app", "maskdm_client.flower.simulated_app:app"),
    ],
)
def test_a_bundle_holds_one_file_that_names_installed_code_and_no_dependency(
    name: str, server: str, client: str
) -> None:
    import tomllib

    assert [path.name for path in source(name).iterdir()] == ["pyproject.toml"]
    document = tomllib.loads((source(name) / "pyproject.toml").read_text())
    assert document["project"]["dependencies"] == []
    components = document["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": server, "clientapp": client}


def test_the_library_imports_neither_flower_nor_the_other_packages() -> None:
    code = (
        "import sys, pkgutil, importlib, maskdm\n"
        "[importlib.import_module('maskdm.' + m.name) for m in pkgutil.iter_modules(maskdm.__path__)]\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('flwr', 'maskdm_server', 'maskdm_client')]\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_server_and_client_never_import_each_other() -> None:
    for side, other in (("server", "maskdm_client"), ("client", "maskdm_server")):
        for path in (ROOT / side).rglob("*.py"):
            imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
            assert not [line for line in imports if other in line], path
