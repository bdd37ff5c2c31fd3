"""Where each item of the DeepSeek-V3 report lives in the code: "eq 16" to a file and a line.

The first docstring line of the one definition that is an item ends in its tag, such as [Eq. 16]; whoever
merely uses it carries none. The source is read with `ast`, not imported, so that a look-up needs no torch and
sees every file. A table kept by hand was the other way; it goes stale at the first renamed function.
`docs/PAPER.md` is printed from the tags (`make paper`) without line numbers, which would change it with every
edit.

A tag lists items: an equation, figure or table or a range of them (Eq. 13-16), a section (§4.2), or one named
thing of a section (§4.1 packing). Named things have one home; a bare section says only where numbers come
from.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[1]
KINDS = {"Eq": "eq|eqs|equation|equations", "Fig": "fig|figure", "Tab": "tab|table", "§": "§|sec|section"}

_TAGS = re.compile(r"\s*\[((?:Eq\.|Fig\.|Tab\.|§)[^\[\]]*)\]$")
_NUMBERED = re.compile(r"(Eq|Fig|Tab)\. (\d+)(?:[-–](\d+))?")
_SECTION = re.compile(r"§(\d+(?:\.\d+)*)(?: (\w[\w -]*))?")
_TEST_NUMBERED = re.compile(r"(?:^|_)(eq|fig|tab)(\d+)(?:_to_(\d+))?(?=_|$)")
_TEST_SECTION = re.compile(r"(?:^|_)sec(?:tion)?_?(\d+(?:_\d+)*)(?=_|$)")


class Home(NamedTuple):
    """An item and the definition that is it."""

    item: str
    """Such as "Eq. 16" or "§4.1 packing"."""
    name: str
    """Dotted, from the package down: counterflow.model.route.choose."""
    file: str
    """Relative to the folder that holds the package."""
    line: int
    sentence: str
    """The first docstring line without its tag."""


class Found(NamedTuple):
    """An answer to a question: the home and the tests that are named after the item."""

    home: Home
    tests: tuple[str, ...]
    """FILE:LINE NAME of each; empty where the tests are not at hand."""


@cache
def items() -> list[Home]:
    """All items of the package, in the paper's order."""
    homes = [home for path in sorted(PACKAGE.rglob("*.py")) for home in _homes(path)]
    return sorted(homes, key=lambda home: (_order(home.item), home.name))


def index() -> str:
    """docs/PAPER.md: a table of items and their definitions."""
    lines = [
        "# The report's items in the code",
        "",
        "Generated from the docstrings by `make paper`; do not edit. Items of arXiv:2412.19437; what is",
        "left out on purpose, or not yet built, stands with its reason in `tests/test_paper.py`.",
        '`counterflow where "eq 16"` also gives the line and the tests.',
        "",
        "| item | definition | what it is |",
        "|---|---|---|",
    ]
    for home in items():
        module = home.file.removeprefix("counterflow/").removesuffix(".py").replace("/", ".")
        short = home.name.removeprefix(f"counterflow.{module}.")
        sentence = home.sentence.replace("|", "\\|")
        lines.append(f"| {home.item} | [`{module}`](../{home.file}) `{short}` | {sentence} |")
    return "\n".join(lines) + "\n"


def find(query: str) -> list[Found]:
    """What `query` means: "eq 16", "Figure 2", "eq 13-16", "§4.2", "4.2 AdamW", or words of a sentence."""
    wanted = _parse(query)
    if wanted:
        homes = [home for home in items() if any(_covers(item, home.item) for item in wanted)]
    else:
        words = query.lower().split()
        homes = [
            home
            for home in items()
            if words and all(word in " ".join(map(str, home)).lower() for word in words)
        ]
    return [Found(home, _tests_of(home.item)) for home in homes]


def expand(tags: str) -> list[str]:
    """Single items of a tag's inside: "Eq. 1-2, §4.1 packing" gives Eq. 1, Eq. 2 and §4.1 packing."""
    out: list[str] = []
    for tag in tags.split(", "):
        if numbered := _NUMBERED.fullmatch(tag):
            kind, first, last = numbered.groups()
            out += [f"{kind}. {number}" for number in range(int(first), int(last or first) + 1)]
        else:
            assert _SECTION.fullmatch(tag), (
                f"[{tag}] is no item; write Eq. 1, Eq. 1-2, Fig. 2, Tab. 2 or §4.1 packing"
            )
            out.append(tag)
    return out


def _homes(path: Path) -> Iterator[Home]:
    """The tagged definitions of one file."""
    file = path.relative_to(PACKAGE.parent)
    parts = [part for part in file.with_suffix("").parts if part != "__init__"]
    for name, line, doc in _documented(ast.parse(path.read_text()), ".".join(parts)):
        first = doc.strip().split("\n", 1)[0]
        if tags := _TAGS.search(first):
            for item in expand(tags[1]):
                yield Home(item, name, file.as_posix(), line, first[: tags.start()])


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str
) -> Iterator[tuple[str, int, str]]:
    """(dotted name, line, docstring) of a definition and those inside; text under an assignment counts."""
    doc = ast.get_docstring(node, clean=False)
    if doc:
        yield name, getattr(node, "lineno", 1), doc
    before = None
    for inner in node.body:
        if isinstance(inner, ast.ClassDef | ast.FunctionDef):
            yield from _documented(inner, f"{name}.{inner.name}")
        elif isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and before is not None:
            yield f"{name}.{before.id}", before.lineno, str(inner.value.value)
        target = inner.target if isinstance(inner, ast.AnnAssign) else None
        if isinstance(inner, ast.Assign):
            target = inner.targets[0]
        before = target if isinstance(target, ast.Name) else None


def _order(item: str) -> tuple[int, list[int], str]:
    """Equations, figures, tables, sections; each by number."""
    kind = next(place for place, sign in enumerate(KINDS) if item.startswith(sign))
    numbers, _, label = item.lstrip("EqFigTab.§ ").partition(" ")
    return kind, [int(number) for number in numbers.split(".")], label


def _parse(query: str) -> list[str]:
    """Items as `expand` gives them; empty if the query is no item."""
    text = " ".join(query.strip().strip("[]").split())
    for kind, names in KINDS.items():
        match = re.fullmatch(rf"(?:{names})\.?\s*(\d.*)", text, re.IGNORECASE)
        if match or (kind == "§" and re.match(r"\d+(\.\d+)*( |$)", text)):
            rest = match[1] if match else text
            item = f"§{rest}" if kind == "§" else f"{kind}. {re.sub(r' ?(-|–|to) ?', '-', rest)}"
            return expand(item) if _NUMBERED.fullmatch(item) or _SECTION.fullmatch(item) else []
    return []


def _covers(wanted: str, item: str) -> bool:
    """Whether an item is the wanted one, or a part of the wanted section."""
    wanted, item = wanted.lower(), item.lower()
    return item == wanted or (wanted.startswith("§") and item.startswith((f"{wanted} ", f"{wanted}.")))


@cache
def _tests() -> list[tuple[str, str]]:
    """(name, FILE:LINE NAME) of every test function beside a checked-out package."""
    root = PACKAGE.parent
    if not (root / "pyproject.toml").exists():
        return []
    out: list[tuple[str, str]] = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                out.append((node.name, f"{path.relative_to(root).as_posix()}:{node.lineno} {node.name}"))
    return out


def _tests_of(item: str) -> tuple[str, ...]:
    return tuple(place for name, place in _tests() if _names(name, item))


def _names(test: str, item: str) -> bool:
    """Whether a test is named after an item: test_eq17_to_20_…, test_sec4_1_fim_…"""
    if section := _SECTION.fullmatch(item):
        numbers = [match.replace("_", ".") for match in _TEST_SECTION.findall(test)]
        label = (section[2] or "").lower().split()
        return section[1] in numbers and (not label or any(word in test.lower() for word in label))
    for kind, first, last in _TEST_NUMBERED.findall(test):
        if item in expand(f"{kind.capitalize()}. {first}-{last or first}"):
            return True
    return False


if __name__ == "__main__":
    print(index(), end="")
