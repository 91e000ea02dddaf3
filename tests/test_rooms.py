"""Imports run down only: what a room of the package may import."""

import ast
import functools
import pathlib

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "neumeta_jax"
ROOMS = (
    *("errors", "files", "elastic", "core", "networks", "data", "evaluation"),
    *("search", "export", "report", "runs", "comparison", "commands"),
)  # a room imports those before it
MAX_FLOORS = 7


def module_name(path):
    parts = ("neumeta_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports():
    """The modules of the package that each of its modules imports, at any place."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [member if member in files else node.module for member in members]
            found[name] |= {n for n in names if n in files} - {name}
    return found


def room(name):
    return name.split(".")[1] if "." in name else None


def test_every_module_lies_in_a_room():
    outside = {room(name) for name in imports()} - {*ROOMS, None, "__main__"}
    assert not outside, f"add {outside} to ROOMS, in the order of imports"


def test_modules_and_functions_are_short():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                args = node.args
                named = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
                assert sum(arg is not None for arg in named) <= 8, f"{path}: {node.name}"
                assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"


def test_imports_run_down_only():
    upwards = [
        f"{name} imports {other}"
        for name, others in imports().items()
        for other in others
        if room(name) in ROOMS and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle():
    edges, done = imports(), set()

    def visit(name, path):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in edges[name]:
                visit(other, [*path, name])
            done.add(name)

    for name in edges:
        visit(name, [])


def test_the_house_has_few_floors():
    below = {one: set() for one in ROOMS}
    for name, others in imports().items():
        if room(name) in ROOMS:
            below[room(name)] |= {room(other) for other in others} & {*ROOMS} - {room(name)}

    @functools.cache
    def floor(one):
        return 0 if one == "errors" else 1 + max(map(floor, below[one]), default=0)

    floors = {one: floor(one) for one in ROOMS}
    assert max(floors.values()) <= MAX_FLOORS, floors
