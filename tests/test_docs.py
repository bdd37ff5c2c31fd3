"""What the pages say exists: commands, options, settings, files, links and records."""

import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from counterflow.cli import VERBS, main
from counterflow.config.load import all_keys

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "records" / "README.md",
    *(ROOT / "docs").glob("*.md"),
]
NESTED = ("evaluate", "bench")
"""Verbs with verbs of their own."""
SETTINGS = {*all_keys(), "from", "base"}


def commands(page: Path) -> list[list[str]]:
    """The words after `counterflow` of every command in the page's code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`(counterflow [^`]+)`", text)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    found = (
        re.match(r"(?:.* )?counterflow ([a-z].*)", line)
        for line in lines
        if not line.startswith("counterflow:")
    )
    return [shlex.split(match[1], comments=True) for match in found if match and "VERB" not in match[0]]


@cache
def help_of(verb: str) -> str:
    """What `counterflow VERB --help` prints, options with underscores."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*verb.split(), "--help"])
    return out.getvalue().replace("-", "_")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_with_its_options_and_settings(page):
    for words in commands(page):
        verb = words[0]
        assert verb in VERBS or verb.startswith("-"), words
        if verb in NESTED and len(words) > 1:
            verb = f"{verb} {words[1]}"
        for word in words[1:]:
            option = re.match(r"--?[a-z][\w-]*", word)
            if option:
                assert re.search(rf"{option[0].replace('-', '_')}\b", help_of(verb)), f"{word} in {words}"
            key = re.match(r"([a-z_]+(?:\.[a-z_0-9]+)+)=", word)
            if key and verb in ("train", "plan"):
                assert re.sub(r"sources\..*", "sources", key[1]) in SETTINGS, f"{word} in {words}"


@pytest.mark.pure
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_within_the_project_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = page.parent / path if path else page
        assert aim.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf-8"), re.M)
            assert anchor in {
                re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in headings
            }, target


@pytest.mark.pure
def test_the_tour_names_files_that_exist():
    tour = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"`([a-z]+/[a-z0-9_/]+(?:\.py|/))`", tour)):
        assert (ROOT / path).exists() or (ROOT / "counterflow" / path).exists(), path


@pytest.mark.pure
def test_every_record_stands_in_the_index():
    index = (ROOT / "records" / "README.md").read_text(encoding="utf-8")
    missing = [
        folder.name
        for folder in (ROOT / "records").iterdir()
        if folder.is_dir() and f"({folder.name}/" not in index
    ]
    assert not missing, f"records/README.md has no row for {missing}"
