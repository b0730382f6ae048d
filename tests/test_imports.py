"""Imports point down only: each room imports rooms of lower floors, and no files import in a circle."""

import ast
from graphlib import TopologicalSorter

from detransformer.files import PACKAGE

# Rooms from the ground up; rooms of one floor may import each other only where BESIDE says so.
FLOORS = (
    {"__init__", "files", "folders", "settings", "machine", "presets", "typed_json", "record", "profiles"},
    {"models"},
    {"parallel"},
    {"opening"},
    {"checkpoints"},
    {"planning", "answers"},
    {"cluster"},
    {"training", "coformer", "service"},
    {"tables", "kernels"},
    {"notebooks", "doctor"},
    {"reproduce"},
    {"commands"},
    {"cli"},
)
BESIDE = {("coformer", "training"), ("settings", "files"), ("record", "files"), ("record", "settings")}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path) -> set[str]:
    """Modules of this package that a file imports when it runs; imports for type hints alone do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hints = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and getattr(guard.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if node in hints:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "detransformer":
            found |= {name if is_module(name := f"{node.module}.{a.name}") else node.module for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "detransformer"}
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def room(module: str) -> str:
    return (module.split(".") + ["__init__"])[1]


FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
GRAPH = {module: imports_of(path) for module, path in FILES.items()}


def test_every_room_has_a_floor():
    assert {room(module) for module in FILES} == set(FLOOR)


def test_imports_point_down():
    up = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) != room(other)
        and (room(module), room(other)) not in BESIDE
        and FLOOR[room(other)] >= FLOOR[room(module)]
        and room(other) != "__init__"
    ]
    assert not up, up


def test_no_circle_of_files():
    TopologicalSorter({module: others - {module} for module, others in GRAPH.items()}).prepare()  # CycleError names it


def test_no_file_is_too_long():
    long = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert not {module: lines for module, lines in long.items() if lines > 400}
