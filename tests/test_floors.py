"""The floors: a folder imports from lower floors only, never sideways. Imports inside functions count.

The table is the one of docs/DESIGN.md, as data. The source is read, not imported; one subprocess then asks
what the torch-free floors really pull in.
"""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "counterflow"
FLOORS = {
    "errors": -2,
    "units": -2,
    "machine": -2,
    "notation": -2,
    "progress": -1,
    "interrupt": -1,
    "config": 0,
    "schedule": 0,
    "kernels": 1,
    "plan": 1,
    "comm": 2,
    "data": 2,
    "model": 3,
    "pipeline": 4,
    "convert": 4,
    "train": 5,
    "infer": 5,
    "evaluate": 6,
    "benchmark": 6,
    "serve": 6,
    "cli": 7,
    "__main__": 8,
}
ALONE = {
    "tyro": "cli",
    "jinja2": "infer",
    "fastapi": "serve",
    "starlette": "serve",
    "pydantic": "serve",
    "uvicorn": "serve",
}
"""Libraries that one room alone imports."""
STANDARD_ONLY = ("errors", "units", "notation", "machine", "interrupt", "config", "schedule")
TORCH_FREE = (*STANDARD_ONLY, "plan")

pytestmark = pytest.mark.pure


def files() -> Iterator[tuple[str, Path]]:
    """(room, file) of the whole package; the package's own __init__ belongs to no room."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a file imports, lazily or not; names as the statement gives them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import; name the module in full"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def violations(room: str, path: Path) -> Iterator[str]:
    """One line for each import that the table forbids."""
    for name, line in imports(path):
        where, top = f"{path.relative_to(PACKAGE.parent)}:{line}", name.split(".")[0]
        if top == "counterflow":
            other = name.split(".")[1]
            assert other in FLOORS, f"{where}: {other} has no floor; give it one in tests/test_floors.py"
            if other != room and FLOORS[other] >= FLOORS[room]:
                yield f"{where}: {room} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})"
        elif ALONE.get(top, room) != room:
            yield f"{where}: {room} imports {name}; only {ALONE[top]} may"
        elif room in STANDARD_ONLY and top not in sys.stdlib_module_names:
            yield f"{where}: {room} imports {name}; it may use the standard library only"
        elif room in TORCH_FREE and top == "torch":
            yield f"{where}: {room} imports {name}; it starts without torch"


def test_rooms_import_from_lower_floors_only() -> None:
    for room, path in files():
        assert room in FLOORS, f"{path}: {room} has no floor; give it one in tests/test_floors.py"
    found = [violation for room, path in files() for violation in violations(room, path)]
    assert not found, "\n".join(found)


def test_a_sideways_a_lazy_and_a_foreign_import_are_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "counterflow")
    path = tmp_path / "counterflow" / "data" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from counterflow.comm import local\n    import tyro\n    import counterflow.config\n"
    )
    assert [line.split(": ")[0].rpartition(":")[2] for line in violations("data", path)] == ["2", "3"]


def test_shapes_are_enforced_wherever_a_signature_has_them() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    enforced = settings["addopts"].split("--jaxtyping-packages=")[1].split(",")[:-1]
    shaped = {
        room for room, path in files() if any(name.startswith("jaxtyping.") for name, _ in imports(path))
    }
    assert set(enforced) == {f"counterflow.{room}" for room in shaped}


def test_torch_free_floors_start_without_torch() -> None:
    names = []
    for room, path in files():
        if room in TORCH_FREE:
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(part for part in parts if part != "__init__"))
    code = f"import sys\nfor name in {names}: __import__(name)\n"
    code += "print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert out.stdout.split() == ["False", "False"], f"one of {names} imports torch or numpy"
