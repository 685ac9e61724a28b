"""The house stands: every import goes down, and the root of the package stays small.

The same table of floors stands in CONTRIBUTING.md.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fed_diffusion"
FLOORS = (
    ("cli",),
    ("deploy", "sweep"),
    ("engines", "apps"),
    ("experiment",),
    ("checks", "finish"),
    ("server", "analysis", "evaluation"),
    ("client", "generate", "export"),
    ("secure",),
    ("aggregation",),
    ("protocol", "build", "report"),
    ("masks", "data", "store", "theory"),
    ("models", "common"),
    ("diffusion", "config"),
)
"""From the top; the rooms of one floor do not import one another. `apps` are server_app and
client_app."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
APPS = ("server_app", "client_app")
MOST_AT_THE_ROOT = 6


def room_of(module: str) -> str | None:
    """The room that a dotted name is in; None for what is not ours, and for the package itself."""
    first, *rest = module.split(".")
    if first in APPS:
        return "apps"
    return rest[0] if first == "fed_diffusion" and rest else None


def modules() -> list[tuple[str, Path]]:
    """Every module of the application with its dotted name, but for the package's own faces."""
    found = []
    for folder in ("fed_diffusion", *APPS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(p for p in parts if p != "__init__"), path))
    faces = ("fed_diffusion", "fed_diffusion.__main__")
    return [(name, path) for name, path in found if name not in faces]


def imports(path: Path) -> set[str]:
    """The dotted names that a module imports, wherever in it; not those for type checkers alone."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def arrows() -> list[tuple[str, str, str]]:
    """(module, its room, a room that it imports from), without those inside one room."""
    found = set()
    for name, path in modules():
        here = room_of(name)
        for target in imports(path):
            there = room_of(target)
            if here and there in FLOOR and there != here:
                found.add((name, here, there))
    return sorted(found)


def test_every_room_has_a_floor():
    rooms = {room_of(name) for name, _ in modules()}
    assert rooms == FLOOR.keys()


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down_only(floor):
    up = [
        f"{name} ({here}) imports {there}"
        for name, here, there in arrows()
        if FLOOR[here] == floor and FLOOR[there] <= floor
    ]
    assert up == []


def test_no_two_modules_import_each_other_when_they_are_loaded():
    """Inside a room too: follow the imports at the top level of modules, and find no way back."""
    named = dict(modules())
    needs = {
        name: {t for t in imports_at_the_top(path) if t in named and t != name}
        for name, path in named.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in needs[name]:
                visit(target, (*way, name))
            done.add(name)

    for name in named:
        visit(name, ())


def imports_at_the_top(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return names


def test_few_modules_stand_at_the_root():
    rooms = [path for path in PACKAGE.glob("*.py") if path.name != "__main__.py"]
    assert len(rooms) <= MOST_AT_THE_ROOT


def test_only_the_flower_apps_import_flower_and_ray():
    guilty = [
        name
        for name, path in modules()
        if room_of(name) != "apps"
        and any(target.split(".")[0] in ("flwr", "ray") for target in imports(path))
    ]
    assert guilty == []


def test_the_table_in_contributing_is_this_one():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert [tuple(line.split("`")[1::2]) for line in rows] == list(FLOORS)


WHOLE = {
    "config.load._absolute",
    "config.load.with_overrides",
    "config.methods.method_name",
    "store.rundir.RunDir.create",
    "store.rundir.RunDir.write_config",
}
"""What may take the whole `Config` below build.py: it makes one of another, or writes it down."""
BELOW_BUILD = {room for room, floor in FLOOR.items() if floor > FLOOR["build"]}
BESIDE_BUILD = set(FLOORS[FLOOR["build"]]) - {"build"}


def takes_the_whole_config(rooms: set[str]) -> set[str]:
    """The functions of these rooms with a parameter annotated as `Config`, by their dotted name."""
    found = set()

    def look(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                look(child, f"{name}.{child.name}")
            else:
                look(child, name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = node.args
            for given in (*told.posonlyargs, *told.args, *told.kwonlyargs):
                words = ast.walk(given.annotation) if given.annotation else ()
                if any(isinstance(w, ast.Name) and w.id in ("Config", "Setup") for w in words):
                    found.add(name.removeprefix("fed_diffusion."))

    for module, path in modules():
        if room_of(module) in rooms:
            look(ast.parse(path.read_text("utf-8")), module)
    return found


def test_below_build_a_function_takes_a_section_of_the_config_and_never_all_of_it():
    assert takes_the_whole_config(BELOW_BUILD) == WHOLE


def test_beside_build_only_trackers_are_told_the_whole_config():
    """`report.trackers.Tracker` says that a tracker is made with it."""
    made = {f"report.trackers.{name}.__init__" for name in ("Csv", "MLflow", "TensorBoard")}
    assert takes_the_whole_config(BESIDE_BUILD) == made | {"report.trackers.Trackers.__init__"}


LONGEST_FILE, LONGEST_CLASS = 400, 199
"""Lines of code and text together."""


def test_no_file_and_no_class_is_too_long_to_be_read():
    files, classes = {}, {}
    for name, path in modules():
        text = path.read_text("utf-8")
        files[name] = len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                classes[f"{name}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert {name: lines for name, lines in files.items() if lines > LONGEST_FILE} == {}
    assert {name: lines for name, lines in classes.items() if lines > LONGEST_CLASS} == {}
