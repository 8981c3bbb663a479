"""The house: which rooms there are, and which of them may know which. A new arrow is a decision; it is made here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSES = {"maskdm": "common", "maskdm_server": "server", "maskdm_client": "client"}
MOST_ENTRIES = 14  # of a folder

# They know no room, and every room of their house may know them. Of `maskdm`: config, errors, metadata and the like.
GROUND = {"maskdm", "maskdm_client.refusals"}
# Room → rooms of the same house that it may import from. Those of `maskdm` may be known by both sides.
ARROWS = {
    "maskdm": "",
    "maskdm.run": "",
    "maskdm.networks": "",
    "maskdm.diffusion": "networks",
    "maskdm.data": "run",
    "maskdm.data.sources": "data run",
    "maskdm.data.preparation": "data data.sources run",
    "maskdm.training": "data diffusion networks run",
    "maskdm.evaluation.extractors": "data run",
    "maskdm.evaluation": "data data.sources data.preparation diffusion evaluation.extractors networks run",
    "maskdm.federated": "networks run",
    "maskdm.commands": "data data.sources data.preparation federated run training",
    "maskdm_server": "commands",
    "maskdm_server.tracking": "",
    "maskdm_server.aggregation": "",
    "maskdm_server.federation": "aggregation",
    "maskdm_server.door": "",
    "maskdm_server.kits": "",
    "maskdm_server.flower": "door federation kits",
    "maskdm_server.report.page": "",
    "maskdm_server.report": "aggregation door federation report.page",
    "maskdm_server.lab": "federation flower report report.page",
    "maskdm_server.lab.experiment": "federation lab report.page",
    "maskdm_server.commands": "federation flower kits lab lab.experiment report tracking",
    "maskdm_client": "commands",
    "maskdm_client.folder": "",
    "maskdm_client.gate": "folder",
    "maskdm_client.work": "folder gate",
    "maskdm_client.flower": "folder gate work",
    "maskdm_client.agent": "flower folder gate work",
    "maskdm_client.doctor": "flower",
    "maskdm_client.commands": "agent doctor flower folder gate work",
}
# What researchers import: each may know every room of its house, and only the package that shows it may know it.
FACES = {"maskdm.api": "maskdm", "maskdm_server.api": "maskdm_server"}


def room_of(module: str) -> str:
    """The innermost room that a module, or a room itself, is in; a face is one of its own."""
    return module if module in {*ARROWS, *GROUND, *FACES} else module.rpartition(".")[0]


def folder_of(room: str) -> Path:
    return ROOT / HOUSES[room.split(".")[0]] / room.replace(".", "/")


def files() -> list[Path]:
    return [path for house, top in HOUSES.items() for path in sorted((ROOT / top / house).rglob("*.py"))]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in files()}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of all that a file imports of the houses, also within functions, and by name."""
    here = name_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in MODULES else base
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in MODULES - set(HOUSES):
            yield node.lineno, node.value  # for import_module, or `python -m`


def is_allowed(room: str, other: str) -> bool:
    house, target = room.split(".")[0], other.split(".")[0]
    if room == other:
        return True
    if room in FACES:
        return target in (house, "maskdm") and other not in FACES
    if house == target:
        return other in GROUND or other.removeprefix(f"{house}.") in ARROWS.get(room, "").split()
    return target == "maskdm"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_a_module_knows_only_the_rooms_below_its_own(path: Path) -> None:
    name, room = name_of(path), room_of(name_of(path))
    wrong = [
        f"line {line}: {room} → {room_of(module)} ({module})"
        for line, module in imported(path)
        if module.split(".")[0] in HOUSES and not is_allowed(room, room_of(module)) and FACES.get(module) != name
    ]
    assert not wrong


def test_the_arrows_have_no_circle() -> None:
    known: set[str] = set()
    left = dict(ARROWS)
    while left:
        done = [
            room for room, below in left.items() if {f"{room.split('.')[0]}.{name}" for name in below.split()} <= known
        ]
        assert done, f"a circle among {sorted(left)}"
        known |= set(done)
        left = {room: below for room, below in left.items() if room not in known}


def test_every_arrow_is_used() -> None:
    used = {(room_of(name_of(path)), room_of(module)) for path in files() for _, module in imported(path)}
    allowed = {(room, f"{room.split('.')[0]}.{name}") for room, below in ARROWS.items() for name in below.split()}
    assert not allowed - used


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_is_small_and_says_what_it_is(room: str) -> None:
    folder = folder_of(room)
    entries = [entry.name for entry in folder.iterdir() if not entry.name.startswith("_") and entry.name != "py.typed"]
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_one_module_of_the_library_knows_flower_and_the_rest_of_it_does_not_know_that_one() -> None:
    records = "maskdm.federated.flower_records"
    library = [path for path in files() if name_of(path).split(".")[0] == "maskdm"]
    knows_flower = [name_of(path) for path in library if "flwr" in top_names(path)]
    assert knows_flower == [records]
    assert not [name_of(path) for path in library if records in {module for _, module in imported(path)}]


def top_names(path: Path) -> set[str]:
    """Of all packages that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in found}


def test_tests_mirror_the_rooms() -> None:
    rooms = {f"{HOUSES[room.split('.')[0]]}/{'/'.join(room.split('.')[1:])}".rstrip("/") for room in ARROWS}
    folders = {
        str(path.parent.relative_to(ROOT / "tests"))
        for top in HOUSES.values()
        for path in (ROOT / "tests" / top).rglob("test_*.py")
    }
    assert folders <= rooms


def test_contributing_shows_each_room_in_a_line() -> None:
    listed: list[tuple[str, str | None]] = []
    house = ""
    for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines():
        if match := re.match(r"(?:common|server|client)/(\w+)/ +\w", line):
            house = match[1]
            listed.append((house, None))
        elif house and (match := re.match(r"  ([\w/]+)/ +(.+)", line)):
            listed.append((f"{house}.{match[1].replace('/', '.')}", match[2]))
    said = {
        room: (ast.get_docstring(ast.parse((folder_of(room) / "__init__.py").read_text())) or "").splitlines()[0]
        for room in ARROWS
    }
    assert listed == [(room, said[room] if "." in room else None) for room in ARROWS]
    assert "(CONTRIBUTING.md)" in (ROOT / "README.md").read_text()
