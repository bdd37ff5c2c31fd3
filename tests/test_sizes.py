"""How large a file and a function may be, and a few habits that reviews would otherwise have to watch for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "counterflow"
FILE_LINES = 400
FUNCTION_LINES = 40
EXCUSED: dict[str, str] = {}
"""FILE or FILE:FUNCTION to the reason it is larger. May only shrink."""
NOT_NAMES = ("utils", "util", "helpers", "helper", "manager", "misc", "common")

pytestmark = pytest.mark.pure

FILES = {path.relative_to(PACKAGE.parent).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


def nodes(*kinds: type) -> Iterator[tuple[str, ast.AST]]:
    """(file, node) of every node of these kinds."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield name, node


def test_files_are_short() -> None:
    long = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    long = {name: lines for name, lines in long.items() if lines > FILE_LINES and name not in EXCUSED}
    assert not long, f"over {FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    long = {}
    for name, node in nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        lines = node.end_lineno - node.lineno + 1
        if lines > FUNCTION_LINES and f"{name}:{node.name}" not in EXCUSED:
            long[f"{name}:{node.lineno} {node.name}"] = lines
    assert not long, f"over {FUNCTION_LINES} lines: {long}"


def test_excuses_are_needed() -> None:
    gone = [excuse for excuse in EXCUSED if excuse.split(":")[0] not in FILES]
    assert not gone, f"excused but not there: {gone}"


def test_files_are_named_after_what_they_hold() -> None:
    vague = [name for name in FILES if set(Path(name).with_suffix("").parts) & set(NOT_NAMES)]
    assert not vague, f"names that say nothing: {vague}"


def test_asserts_have_a_message() -> None:
    bare = [f"{name}:{node.lineno}" for name, node in nodes(ast.Assert) if node.msg is None]
    assert not bare, f"asserts without a message: {bare}"


def test_no_bare_except() -> None:
    bare = [f"{name}:{node.lineno}" for name, node in nodes(ast.ExceptHandler) if node.type is None]
    assert not bare, f"name what is caught: {bare}"


def test_no_star_imports() -> None:
    stars = [f"{name}:{node.lineno}" for name, node in nodes(ast.ImportFrom) if node.names[0].name == "*"]
    assert not stars, f"star imports: {stars}"


def test_public_definitions_have_a_docstring() -> None:
    silent = []
    for name, path in FILES.items():
        for owner, inner in _owned(ast.parse(path.read_text())):
            if not ast.get_docstring(inner) and not owner.startswith("_"):
                silent.append(f"{name}:{inner.lineno} {owner}{inner.name}")
    assert not silent, f"without a docstring: {silent}"


def _owned(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and not inner.name.startswith("_"):
            yield owner, inner
        if isinstance(inner, ast.ClassDef):
            yield from _owned(inner, f"{inner.name}.")
