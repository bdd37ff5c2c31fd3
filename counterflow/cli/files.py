"""What a verb writes beside its words: a file that is named, or one line that says why it cannot be."""

import json
from pathlib import Path
from typing import Any

from counterflow.errors import ConfigError


def write(name: str | Path, text: str) -> None:
    """Write a file, as UTF-8; half a character, which has no such form, as its escape, which JSON reads back.

    Fails: ConfigError.
    """
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"'{name}' cannot be written ({error.strerror}); choose another file.") from None


def keep(found: Any, name: str | Path) -> None:
    """Write a report as JSON, if a file is named, and say where."""
    if name:
        write(name, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        print(f"  {name}")
