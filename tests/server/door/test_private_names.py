"""A Flower without a name that a coordinator uses or replaces: no SuperLink begins, since nothing would guard it."""

from importlib import import_module
from pathlib import Path

import pytest

from maskdm.errors import UsageError
from maskdm.federated.flower_names import lacking
from maskdm_server.door import door
from maskdm_server.door.private_names import REPLACED, USED

from ...flower_names import names_in_use, without

SIDE = Path(__file__).parents[3] / "server"
EACH_USED = [(module, name) for module, names in USED.items() for name in names.split()]


def test_the_installed_flower_has_all_of_them() -> None:
    assert lacking(USED, REPLACED) == []


def test_every_name_that_a_coordinator_uses_is_listed() -> None:
    listed = {(module, name.split(".")[0]) for module, name in EACH_USED}
    listed |= {(each.module, each.name) for each in REPLACED}
    handed_out = {("flwr.superlink.grid.http_grid", "HttpGrid")}  # to the ServerApp, which imports it from nowhere
    assert names_in_use(SIDE) == listed - handed_out


@pytest.mark.parametrize(("module", "name"), [*EACH_USED, *((each.module, each.name) for each in REPLACED)])
def test_without_a_name_no_superlink_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, name: str
) -> None:
    begun = list[str]()
    command = import_module("flwr.superlink.cli.flower_superlink")
    monkeypatch.setattr(command, "flower_superlink", lambda: begun.append("it"))
    without(monkeypatch, module, name)
    with pytest.raises(UsageError, match=r"^Flower \d+\.\d+\.\d+ lacks .*, which MaskDM needs: pip install 'flwr"):
        door.main([str(tmp_path), "1000", "40000"])
    assert begun == []
