"""From a name or a TOML file plus dotted overrides to one RunConfig, and back to TOML.

Unknown keys fail and name the nearest: a misspelt setting that is ignored costs a training run. Types are
checked here, once, against the dataclasses' annotations; what is impossible is said by the dataclasses
themselves. The standard library reads TOML but does not write it; the writer below knows just what a
RunConfig holds.
"""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from os.path import expanduser
from pathlib import Path
from typing import Any, cast

from counterflow.config.model import ModelConfig
from counterflow.config.models import MODELS
from counterflow.config.released import read_released
from counterflow.config.run import RunConfig
from counterflow.config.runs import RUNS
from counterflow.config.scalar import scalar
from counterflow.errors import ConfigError, nearest
from counterflow.notation import from_toml

CHANGES = "changes"
"""In a run.toml: what was another setting until some step; a record, and no setting."""
LENGTHS = ("tokens", "steps", "minutes")
"""Of `train`: whoever gives one does not mean the others of the named run."""


def load_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `name` (of RUNS) or a TOML file describes, with overrides such as "train.lr.peak=1e-3".

    In TOML, `base = "tiny"` starts from a named run and `model.base = "small"` from a named model; `model`
    may also be a name or the path of a released config.json or of a run.toml, in TOML as in an override. `from` names
    a run or an exported model to start from.
    """
    tree = _read_toml(Path(name)) if name.endswith(".toml") else {"base": name}
    tree.pop(CHANGES, None)
    given: dict[str, Any] = {}
    for keys, value in sorted(map(_override, overrides), key=lambda override: len(override[0])):
        for key in reversed(keys):
            value = {key: value}
        given = _laid_over(given, value)  # what is whole first, so that model=small leaves model.num_layers=6
    _require_one_model(tree, given, name)
    return run_of(_laid_over(tree, given))


def _laid_over(old: Any, new: Any, key: str = "") -> Any:
    """Two values of one setting, in either order: of tables both; a name or paths stay the base of a table."""
    if _table(old) is None and _table(new) is None:
        return new
    below, above = _based(old), _based(new)
    if below is None or above is None:
        inner = f"{key}.{next(iter(_table(new) or _table(old) or {}), '')}"
        raise ConfigError(f"{key} is a value, not a table; '{inner}' is no setting.")
    merged = dict(below)
    for name, value in above.items():
        whole = f"{key}.{name}".removeprefix(".")
        merged[name] = _laid_over(merged[name], value, whole) if name in merged else value
    return merged


def _based(value: Any) -> Mapping[str, Any] | None:
    """The value if it is a table; a name or paths as the base of one."""
    return {"base": value} if isinstance(value, str | list) else _table(value)


def _require_one_model(tree: Mapping[str, Any], given: Mapping[str, Any], file: str) -> None:
    """Refuse another model on the command line beside a file's settings of its own: which is meant cannot be told."""
    own, asked = [key for key in _table(tree.get("model")) or () if key != "base"], given.get("model")
    table = _table(asked)
    base = asked if table is None else table.get("base")
    if own and base is not None:
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise ConfigError(
            f"model={base} takes another model, and {file} has settings for its own (model.{own[0]}{more}); take those "
            f"out of the file, or leave out model={base}."
        )


def _override(text: str) -> tuple[list[str], Any]:
    """(keys from the outermost on, value) of "train.lr.peak=1e-3"."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"'{text}' is no override; write KEY=VALUE, such as train.lr.peak=1e-3.")
    return key.strip().removeprefix("--").split("."), _value(value.strip())


def _start_from(tree: dict[str, Any], given: str) -> None:
    """`from = PATH`: model, tokenizer and weights of a run's or an exported folder, unless said otherwise."""
    path = Path(expanduser(given))
    folder = path if path.exists() or "/" in given else Path("runs") / given
    described = next(
        (folder / name for name in ("run.toml", "config.json") if (folder / name).is_file()), None
    )
    if described is None:
        raise ConfigError(
            f"from is '{given}', and {folder} has neither run.toml nor config.json; give a run's folder or an "
            "exported one."
        )
    model = tree.get("model", {})
    tree["model"] = {"base": str(described)} | ({"base": model} if isinstance(model, str) else dict(model))
    tree["train"] = {"start_from": given} | dict(tree.get("train", {}))
    tree["data"] = {"tokenizer": str(folder / "tokenizer.json")} | dict(tree.get("data", {}))


def run_of(tree: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from nested settings."""
    tree = dict(tree)
    if "from" in tree:
        _start_from(tree, str(tree.pop("from")))
    base = tree.pop("base", None)
    start = RunConfig(name="run", model=MODELS["tiny"]) if base is None else _named(base, RUNS, "run")
    if "model" in tree:
        model, rest = _model(start.model, tree.pop("model"))
        start = _same_length(start, model)
        tree["model"] = rest
    train = _table(tree.get("train")) or {}
    if any(train.get(name) for name in LENGTHS):
        tree["train"] = dict.fromkeys(LENGTHS, 0) | dict(train)
    return _build(start, tree, "")


def _same_length(run: RunConfig, model: ModelConfig) -> RunConfig:
    """The run with another model; its samples shortened if the model has fewer positions."""
    length = min(run.data.sequence_length, model.max_positions)
    return dataclasses.replace(run, model=model, data=dataclasses.replace(run.data, sequence_length=length))


def _model(model: ModelConfig, given: Any) -> tuple[ModelConfig, dict[str, Any]]:
    """The model to start from, and the settings that change it."""
    if isinstance(given, str):
        given = {"base": given}
    table = _table(given)
    if table is None:
        raise ConfigError(
            f"model is {given!r}; give a model's name, a config.json's path or a table of settings."
        )
    rest = dict(table)
    base = rest.pop("base", None)
    if base is None:
        return model, rest
    if str(base).endswith(".json"):
        return read_released(Path(expanduser(base))), rest
    if str(base).endswith(".toml"):
        return load_run(expanduser(base)).model, rest
    return _named(base, MODELS, "model"), rest


def _named(name: Any, table: Mapping[str, Any], what: str) -> Any:
    if not isinstance(name, str) or name not in table:
        file = "a .toml file" if what == "run" else "the path of a released config.json"
        raise ConfigError(f"'{name}' is no known {what}; {nearest(str(name), table)} Or give {file}.")
    return table[name]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return from_toml(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give a .toml file or a run's name."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}; correct that line.") from None


def _table(value: Any) -> Mapping[str, Any] | None:
    """The value if it is a table; TOML's keys are strings."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else None


def _value(text: str) -> Any:
    """A TOML value, or the text itself: paths and names need no quotes."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        document = from_toml(f"value = {text}")
    except ValueError:
        return text
    return document["value"] if len(document) == 1 else text


def settings(kind: type) -> dict[str, Any]:
    """A dataclass's field names and types."""
    return typing.get_type_hints(kind)


def all_keys(kind: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a run."""
    for name, hint in settings(kind).items():
        yield prefix + name
        inner = _dataclass_of(hint)
        if inner is not None:
            yield from all_keys(inner, f"{prefix}{name}.")


def _dataclass_of(hint: Any) -> type | None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # pyright: ignore[reportReturnType]


def _build(start: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    """`start` with the tree's settings in place of its own."""
    hints = settings(start.__class__)
    changes: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            raise _unknown(prefix + key, value, [prefix + name for name in hints])
        changes[key] = _convert(value, hints[key], getattr(start, key), prefix + key)
    return dataclasses.replace(start, **changes)


def _unknown(name: str, value: Any, beside: Sequence[str]) -> ConfigError:
    """Names the setting meant: one that ends in what was given, or the most alike, or else lists those `beside`."""
    while table := _table(value):
        inner, value = next(iter(table.items()))
        name += f".{inner}"
    keys = [*all_keys(), *beside]
    close = [key for key in keys if f".{key}".endswith(f".{name}")]
    leaf = get_close_matches(
        name.rpartition(".")[2], {key.rpartition(".")[2] for key in keys}, n=1, cutoff=0.65
    )
    if leaf and not close:  # by the last word, since all settings of a table begin alike
        close = get_close_matches(name, [key for key in keys if key.endswith(leaf[0])], n=1, cutoff=0.0)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(beside)}."
    return ConfigError(f"{name} is not a setting; {hint}")


def _convert(value: Any, hint: Any, current: Any, key: str) -> Any:
    inner = _dataclass_of(hint)
    if inner is not None:
        if inner is not hint and str(value).lower() == "none":
            return None
        table = _table(value)
        if table is None:
            raise ConfigError(f"{key} is {value!r}; it is a table of settings: {', '.join(settings(inner))}.")
        return _build(inner() if current is None else current, table, key + ".")
    if typing.get_origin(hint) is tuple:
        return _tables(value, typing.get_args(hint)[0], current, key)
    return scalar(value, hint, key, QUOTE if hint is str else "")


QUOTE = """: put it in quotes, KEY='"VALUE"'"""


def _tables(value: Any, kind: type, current: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    """A list of tables; one path, or several, stand for tables that only name a path.

    Beside them, or to change what is there, settings of all and, by their numbers, of single ones.
    """
    table = dict(_table(value) or {"base": value})
    single = {name: table.pop(name) for name in sorted(table, key=_number) if name.isdigit()}
    items = list(current)
    if "base" in table:
        given = table.pop("base")
        listed = cast("list[Any]", given) if isinstance(given, list) else [given]
        items = [_build(kind(), _named_path(item, f"{key}.{n}"), f"{key}.") for n, item in enumerate(listed)]
    if "path" in table and len(items) > 1:
        raise ConfigError(f"{key}.path is given and there are {len(items)}; say which, such as {key}.0.path.")
    items = [_build(item, table, f"{key}.") for item in items]
    for name, settings_ in single.items():
        number, changes = int(name), _named_path(settings_, f"{key}.{name}")
        if number > len(items) or (number == len(items) and "path" not in changes):
            raise ConfigError(
                f"{key}.{name} is given and there are {len(items)}, numbered from 0; give {key}.{len(items)}.path "
                "first."
            )
        items[number:] = [_build((*items, kind())[number], changes, f"{key}.{name}."), *items[number + 1 :]]
    return tuple(items)


def _number(name: str) -> int:
    return int(name) if name.isdigit() else -1


def _named_path(item: Any, key: str) -> Mapping[str, Any]:
    table = {"path": item} if isinstance(item, str) else _table(item)
    if table is None:
        raise ConfigError(f"{key} is {item!r}; it must be a path or a table with path, weight, field.")
    return table


def to_toml(run: RunConfig) -> str:
    """The whole configuration; `load_run` of it gives an equal RunConfig."""
    return "".join(_lines(run, ""))


def _lines(value: Any, prefix: str) -> Iterator[str]:
    nested: list[tuple[str, Any]] = []
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if dataclasses.is_dataclass(item) or isinstance(item, tuple):
            nested.append((field.name, cast("Any", item)))
        elif item is not None:
            yield f"{field.name} = {literal(item)}\n"
    for name, item in nested:
        several = isinstance(item, tuple)
        for table in cast("tuple[Any, ...]", item if several else (item,)):
            header = f"[[{prefix}{name}]]" if several else f"[{prefix}{name}]"
            yield f"\n{header}\n"
            yield from _lines(table, f"{prefix}{name}.")


def literal(item: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, str):
        escaped = item.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
    return repr(item)
