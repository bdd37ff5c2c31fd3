"""What happens to files and messages on their way: bytes lost, changed or repeated, values of another type or size."""

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

DEEP = 3000
RAW = (
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    "9" * 5000,
    "9" * 400,
    "1e400",
    "-1e-400",
    "NaN",
    "-Infinity",
    '"\\ud800"',
    '"\\u0000"',
    "tru",
    "'x'",
)
"""What JSON's text can hold beside the values below, or nearly."""
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, -(10**18), 0.5, 1e308, "", "x", "-1", "../../x", "é\u2028\x85",
    "<|endoftext|>", "x" * 100_000, [], {}, [[]], [None], [1, "x"], {"": None}, [0] * 10_000,
)  # fmt: skip
TOML = (
    *(
        '"x"',
        '""',
        "-1",
        "0",
        "1e999",
        "nan",
        "-inf",
        "9" * 5000,
        "9223372036854775808",
        "true",
        "[]",
        "{}",
        "[[]]",
    ),
    *(
        "[" * DEEP + "]" * DEEP,
        "{a=" * DEEP + "1" + "}" * DEEP,
        "1979-05-27",
        '"\\ud800"',
        '"',
        "'''",
        "0x",
        "x y",
    ),
)
MARK = "\x1araw\x1a"
Spoilt = tuple[str, bytes]


def spoil(dice: random.Random, name: str, data: bytes) -> Spoilt:
    """Some kind of damage and what it makes of a file; half of the time one that its name's suffix allows."""
    suffix = name.rpartition(".")[2]
    if suffix in INSIDE and dice.random() < 0.5:
        return INSIDE[suffix](dice, data)
    kind = dice.choice(list(BYTES))
    return kind, BYTES[kind](dice, data)


def _flipped(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 3, 20))):
        if changed:
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _random(dice: random.Random, data: bytes) -> bytes:
    return dice.randbytes(dice.choice((1, 8, 100, len(data) or 1)))


def _without(dice: random.Random, data: bytes) -> bytes:
    start, end = sorted(dice.randrange(len(data) + 1) for _ in range(2))
    return data[:start] + data[end:]


def _with(*what: bytes) -> Callable[[random.Random, bytes], bytes]:
    def spoilt(dice: random.Random, data: bytes) -> bytes:
        place = dice.choice((0, len(data), dice.randrange(len(data) + 1)))
        return data[:place] + dice.choice(what) + data[place:]

    return spoilt


BYTES: Mapping[str, Callable[[random.Random, bytes], bytes]] = {
    "flipped": _flipped,
    "truncated": lambda dice, data: data[: dice.randrange(len(data) or 1)],
    "emptied": lambda dice, data: b"",
    "doubled": lambda dice, data: data + data,
    "random": _random,
    "a piece lost": _without,
    "zeros": lambda dice, data: bytes(len(data)),
    "invalid UTF-8": _with(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"caf\xe9"),
    "a mark": _with(b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\n\n"),
    "another encoding": lambda dice, data: data.decode("utf-8", "replace").encode(
        dice.choice(("utf-16", "utf-32"))
    ),
}


def spoil_json(dice: random.Random, data: bytes) -> Spoilt:
    """A JSON text with a value that is another, or gone, or twice."""
    kind, tree = spoil_tree(dice, json.loads(data))
    return kind, as_json(dice, tree)


def as_json(dice: random.Random, tree: Any) -> bytes:
    """The text of a spoilt value."""
    return json.dumps(tree).replace(json.dumps(MARK), dice.choice(RAW)).encode()


def spoil_tree(dice: random.Random, tree: Any) -> tuple[str, Any]:
    """A value of JSON with some inner value replaced, left out, renamed or added; `MARK` stands for text of `RAW`."""
    tree = json.loads(json.dumps(tree))
    holder, key = _place(dice, tree)
    if holder is None:
        return "another type", dice.choice(VALUES)
    act = dice.choice(
        ("another value", "another value", "another value", "raw text", "left out", "renamed", "added")
    )
    if act == "another value":
        holder[key] = dice.choice(VALUES)
    elif act == "raw text":
        holder[key] = MARK
    elif act == "left out":
        del holder[key]
    elif isinstance(holder, dict):
        value = holder.pop(key) if act == "renamed" else dice.choice(VALUES)
        holder[dice.choice((f"{key}x", key.upper(), "", "zz", key[:-1]))] = value
    else:
        holder.insert(key, dice.choice(VALUES))
    return act, tree


def _place(dice: random.Random, tree: Any) -> tuple[Any, Any]:
    """(the table or list, the key) of some inner value, near the root rather than deep inside; (None, None): none."""
    holder, key = None, None
    while isinstance(tree, dict | list) and tree and (holder is None or dice.random() < 0.7):
        holder, key = tree, dice.choice(list(tree)) if isinstance(tree, dict) else dice.randrange(len(tree))
        tree = holder[key]
    return holder, key


def spoil_toml(dice: random.Random, data: bytes) -> Spoilt:
    """A line of TOML with another value or name, gone, or twice."""
    lines = data.decode().splitlines()
    number = dice.choice([number for number, line in enumerate(lines) if line.strip()])
    key, equals, _ = lines[number].partition("=")
    kind = dice.choice(
        ("another value", "another value", "left out", "renamed", "twice")
        if equals
        else ("left out", "twice")
    )
    if kind == "another value":
        lines[number] = f"{key}= {dice.choice(TOML)}"
    elif kind == "renamed":
        lines[number] = lines[number].replace(key, f"{key.strip()}{dice.choice(('x', '.x', ''))} ", 1)
    else:
        lines[number : number + 1] = [lines[number]] * 2 * (kind == "twice")
    return kind, "\n".join(lines).encode()


def spoil_lines(dice: random.Random, data: bytes) -> Spoilt:
    """One line of JSON lines spoilt."""
    lines = data.splitlines()
    number = dice.randrange(len(lines))
    kind, lines[number] = spoil_json(dice, lines[number])
    return kind, b"\n".join(lines)


def spoil_words(dice: random.Random, data: bytes) -> Spoilt:
    """A number or word of a schedule's or table's text replaced."""
    found = list(re.finditer(rb"[0-9]+|[A-Za-z]+|[^\sA-Za-z0-9]", data))
    one = dice.choice(found)
    new = dice.choice(
        (b"0", b"7", b"-1", b"999999", b"9" * 5000, b"", b"F0", b"'", b"&", b":", "²".encode(), b"(" * DEEP)
    )
    return "another word", data[: one.start()] + new + data[one.end() :]


def spoil_header(dice: random.Random, data: bytes) -> Spoilt:
    """Names, shapes and places in a safetensors header, its length made right again or not."""
    size = int.from_bytes(data[:8], "little")
    kind, header = spoil_json(dice, data[8 : 8 + size])
    length = dice.choice((len(header), len(header), size, 0, 2**63))
    return f"header: {kind}", length.to_bytes(8, "little") + header + data[8 + size :]


INSIDE: Mapping[str, Callable[[random.Random, bytes], Spoilt]] = {
    "json": spoil_json,
    "jsonl": spoil_lines,
    "toml": spoil_toml,
    "csv": spoil_words,
    "txt": spoil_words,
    "safetensors": spoil_header,
}
