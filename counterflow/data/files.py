"""Which files a source names: the same by folder and by glob, each once, whatever links lead there.

A folder is the glob `FOLDER/**/*`. Links are followed, but not where they were followed before, so that one which leads
back into its own folder ends there. Hidden names and caches are for nobody; whatever else is left out is counted. Not
taken: Python's own glob, which reads a file again for each turn of such a loop, and whose `rglob` follows no link.
"""

import re
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from glob import has_magic
from os.path import expanduser, lexists
from pathlib import Path, PurePath
from sysconfig import get_path
from typing import NamedTuple

from counterflow.config.run import Source
from counterflow.data.lines import PACKED
from counterflow.errors import DataError, nearest

STDLIB = "python-stdlib"
STDLIB_LEFT_OUT = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "ensurepip",
        "__pycache__",
    )
)
STDLIB_TABLES = frozenset(
    (
        "encodings",
        "pydoc_data",
        "html/entities.py",
        "re/_casefix.py",
        "stringprep.py",
        "locale.py",
        "_compat_pickle.py",
        "curses/has_key.py",
    )
)
"""Folders and files that are mostly literals: a sixth of the library's bytes, and next to no code."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TEXT, LINES, PARQUET = (".txt", ".md", ".py"), ".jsonl", ".parquet"
KNOWN = (*TEXT, LINES, PARQUET)
NAMED = 5
"""Reasons that are named, the commonest first."""


class Found(NamedTuple):
    """The files of a source, (name relative to it, path) sorted by name, and why how many others are not read."""

    files: list[tuple[str, Path]]
    skipped: Counter[str]


def files(source: Source) -> list[tuple[str, Path]]:
    """(name relative to the source, file), sorted by name."""
    return found(source).files


def skipped(source: Source) -> str:
    """What of a source is not read, in one line; empty where all is."""
    counted = found(source).skipped
    named = [f"{reason} ({number})" for reason, number in counted.most_common(NAMED)]
    if rest := counted.total() - sum(dict(counted.most_common(NAMED)).values()):
        named.append(f"others ({rest})")
    return f"source '{source.path}': not read are {', '.join(named)}." if named else ""


def form(path: PurePath) -> str:
    """How text lies in a file, by its ending, in small letters and without that of what packed it; empty if unknown."""
    plain = PurePath(path.name.lower())
    packed = plain.suffix in PACKED
    ending = PurePath(plain.stem).suffix if packed else plain.suffix
    return ending if ending in KNOWN and not (packed and ending == PARQUET) else ""


def found(source: Source) -> Found:
    """What a source's path names.   Fails: DataError where nothing is there to be read."""
    if source.path == STDLIB:
        return Found(_stdlib(), Counter())
    path = Path(expanduser(source.path))
    if path.is_file():
        if not form(path):
            raise DataError(
                f"{path} is not text that is known here; files must end in {_endings()}: rename it."
            )
        return Found([(path.name, path)], Counter())
    if path.is_dir():
        matched = _Matched(path, ("**", "*"))
    elif has_magic(source.path):
        fixed = next(place for place, part in enumerate(path.parts) if has_magic(part))
        matched = _Matched(Path(*path.parts[:fixed]), path.parts[fixed:])
    else:
        raise DataError(
            f"source '{source.path}' is not there; data.sources must name files, folders or globs, or "
            f"'{STDLIB}': {_near(path)}"
        )
    below = path if path.is_dir() else None
    named = sorted(((one.relative_to(below) if below else one).as_posix(), one) for one in matched.files())
    if not named:
        raise DataError(
            f"source '{source.path}' has no file that ends in {_endings()}; at least one is needed. Point "
            "it at the folder or files that hold the text."
        )
    return Found(named, matched.skipped)


class _Matched:
    """What matches the parts of a pattern below a folder."""

    def __init__(self, base: Path, parts: tuple[str, ...]) -> None:
        self.base, self.parts, self.skipped = base, parts, Counter[str]()
        self._seen: set[tuple[Path, tuple[str, ...]]] = set()

    def files(self) -> list[Path]:
        """Those that hold text, each once: by the way without links, if there is one."""
        direct, linked = dict[Path, None](), list[Path]()
        for path, through_link in self._walk(self.base, self.base.resolve(), self.parts, False):
            if path.is_dir():
                continue
            if not path.exists():
                self.skipped["broken links"] += 1
            elif not form(path):
                self.skipped[path.suffix or "no ending"] += 1
            elif through_link:
                linked.append(path)
            else:
                direct[path] = None
        there = {path.resolve() for path in direct} if linked else set[Path]()
        for path in sorted(linked):
            real = path.resolve()
            if real in there:
                self.skipped["links to what is read"] += 1
            else:
                there.add(real)
                direct[path] = None
        return list(direct)

    def _walk(
        self, folder: Path, real: Path, parts: tuple[str, ...], linked: bool
    ) -> Iterator[tuple[Path, bool]]:
        """(path, whether a link leads there); `**` is any number of folders."""
        if (real, parts) in self._seen:
            return
        self._seen.add((real, parts))
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self._walk(folder, real, rest or ("*",), linked)
        for name in self._names(folder, part):
            path = folder / name
            link = path.is_symlink()
            if part != "**" and not rest:
                yield path, linked or link
            elif path.is_dir():
                inner = path.resolve() if link else real / name
                yield from self._walk(path, inner, parts if part == "**" else rest, linked or link)

    def _names(self, folder: Path, part: str) -> list[str]:
        """Names in a folder that match one part; hidden ones and caches only if it says so."""
        if not has_magic(part):
            return [part] if lexists(folder / part) else []
        try:
            names = sorted(path.name for path in folder.iterdir())
        except OSError:
            self.skipped["folders that cannot be read"] += 1
            return []
        wanted = "*" if part == "**" else part
        return [
            name
            for name in names
            if fnmatchcase(name, wanted)
            and name != "__pycache__"
            and (wanted.startswith(".") or not name.startswith("."))
        ]


def _stdlib() -> list[tuple[str, Path]]:
    root = Path(get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        built_here = name.parts[0].startswith(("config-", "_sysconfigdata", "_sysconfig_vars"))
        table = STDLIB_TABLES.intersection((name.parts[0], name.as_posix()))
        if not built_here and not table and not STDLIB_LEFT_OUT.intersection(name.parts):
            found.append((name.as_posix(), path))
    if not found:
        raise DataError(
            f"this Python keeps no .py files in {root}; '{STDLIB}' needs an unzipped standard library. Give "
            "your own text with data.sources."
        )
    return sorted(found)


def _endings() -> str:
    return f"{', '.join(KNOWN)}, all but the last also packed ({' or '.join(PACKED)})"


def _near(path: Path) -> str:
    if HUB_NAME.fullmatch(str(path)) and not form(path) and not path.parent.is_dir():
        return "data sets of the Hugging Face hub are not read by name: save its files in a folder first."
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either."
    beside = [other.name for other in path.parent.iterdir() if not other.name.startswith(".")]
    return nearest(path.name, beside) if beside else f"the folder {path.parent.resolve()} is empty."
