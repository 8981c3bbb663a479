"""A Flower without a name that a site uses or replaces: nothing of it begins, and no code of a coordinator's runs."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.federated.flower_names import UNFIT, Replaced, lacking
from maskdm_client.flower import pinned
from maskdm_client.flower.pinned import PROCESSES, run_clientapp, run_supernode
from maskdm_client.flower.private_names import CLIENTAPP, REPLACED, USED

from ...flower_names import names_in_use, without

SIDE = Path(__file__).parents[3] / "client"
EACH_USED = [(module, name) for module, names in USED.items() for name in names.split()]


@pytest.fixture(autouse=True)
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of Flower began."""
    found = list[str]()
    for path in ("supernode.cli.flower_supernode", "supercore.cli.flower_superexec", "supernode.cli.flwr_clientapp"):
        module, name = import_module(f"flwr.{path}"), path.rpartition(".")[2]
        monkeypatch.setattr(module, name, lambda name=name: found.append(name))
    return found


def test_the_installed_flower_has_all_of_them() -> None:
    assert lacking(USED, REPLACED) == []


def test_every_name_that_a_site_uses_is_listed() -> None:
    listed = {(module, name.split(".")[0]) for module, name in EACH_USED}
    listed |= {(each.module, each.name) for each in REPLACED}
    assert names_in_use(SIDE) == listed


@pytest.mark.parametrize(("module", "name"), [*EACH_USED, *((each.module, each.name) for each in REPLACED)])
def test_without_a_name_no_supernode_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: list[str], module: str, name: str
) -> None:
    without(monkeypatch, module, name)
    with pytest.raises(UsageError, match=r"^Flower \d+\.\d+\.\d+ lacks .*, which MaskDM needs: pip install 'flwr"):
        run_supernode(tmp_path)
    assert begun == []


@pytest.mark.parametrize("name", [each.name for each in CLIENTAPP])
@pytest.mark.parametrize("run", PROCESSES.values(), ids=PROCESSES)
def test_without_what_keeps_code_of_a_coordinator_away_no_clientapp_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: list[str], name: str, run: Callable[[Path], None]
) -> None:
    without(monkeypatch, "flwr.supernode.runtime.run_clientapp", name)
    with pytest.raises(UsageError, match=rf"lacks flwr.supernode.runtime.run_clientapp.{name}, "):
        run(tmp_path)
    assert begun == []


def test_a_name_that_is_there_and_not_looked_up_any_more_is_as_bad(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: list[str]
) -> None:
    """As if the next release unpacked a bundle by another function, and kept the old one."""
    runtime = import_module("flwr.supernode.runtime.run_clientapp")
    text = Path(str(runtime.__file__)).read_text().replace("    install_from_fab(fab", "    unpack(fab")
    (tmp_path / "run_clientapp.py").write_text(text)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "run_clientapp.py"))
    with pytest.raises(UsageError, match=r"lacks a use of flwr\.supernode\.runtime\.run_clientapp\.install_from_fab, "):
        run_clientapp(tmp_path)
    assert begun == []


def test_a_name_that_is_only_read_as_the_module_is_loaded_is_not_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "release_early.py").write_text("def install(): ...\nstep = install\n")
    (tmp_path / "release_late.py").write_text("def install(): ...\ndef run(): install()\n")
    (tmp_path / "release_copies.py").write_text("from release_late import install\ndef run(): install()\n")
    (tmp_path / "release_imports.py").write_text("def run():\n    from release_late import install\n    install()\n")
    assert lacking({}, [Replaced("release_early", "install")]) == ["a use of release_early.install"]
    assert lacking({}, [Replaced("release_late", "install")]) == []
    assert lacking({}, [Replaced("release_late", "install", "release_copies")]) == ["a use of release_late.install"]
    assert lacking({}, [Replaced("release_late", "install", "release_imports")]) == []
    assert lacking({}, [Replaced("release_none", "install")]) == ["release_none.install"]


def test_a_process_that_may_not_begin_says_why_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(
        "import runpy, sys\n"
        "import flwr.supernode.runtime.run_clientapp as runtime\n"
        "del runtime.install_from_fab\n"
        f"sys.argv = ['pinned', 'supernode', {str(tmp_path)!r}, '--insecure']\n"
        f"runpy.run_module({pinned.__name__!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-W", "ignore", str(tmp_path / "run.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (UNFIT, "")
    assert ended.stderr.startswith("Flower ")
    assert ended.stderr.count("\n") == 1
