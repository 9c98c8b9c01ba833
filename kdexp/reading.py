"""Text to a validated model, or one clear line per mistake: the key, the value, what is allowed, the nearest name."""

from __future__ import annotations

import difflib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from kdexp import KdexpError

__all__ = ["ConfigError", "assign", "explain", "nearest", "parse", "show", "spellings", "study_name", "validate"]

M = TypeVar("M", bound=BaseModel)


class ConfigError(KdexpError):
    """A sweep file or a --set that cannot be run."""


def study_name(text: str) -> str:
    """A study's name as it is kept: one code point for é (as typed, not as a Mac's file names have it), no blanks around."""
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(". ")


def spellings(name: str) -> list[str]:
    """How a name may stand in a store: as it is kept now, and as earlier versions took it from a Mac's file name."""
    return list(dict.fromkeys([study_name(name), unicodedata.normalize("NFD", study_name(name)), name]))


class _Loader(yaml.SafeLoader):
    """Safe YAML, with 3e-4 read as a number (YAML 1.2), duplicate keys refused, aliases refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in sweep files")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(map(str, keys))) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.MarkedYAMLError(problem=f"key {twice!r} stands twice", problem_mark=node.start_mark)
        for key in keys:
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is not text", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse(text: str, source: str) -> Any:
    """YAML as plain values. Raises ConfigError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{source}: not valid YAML: {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def assign(tree: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Set the value at a dotted path, making sections on the way. Raises ConfigError."""
    *parents, last = path.split(".")
    if parents and parents[0] == "search":  # search space keys hold dots themselves
        parents, last = ["search"], path.removeprefix("search.")
    for step in parents:
        child = tree.setdefault(step, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{source}: {step} in {path} is a value, not a section")
        tree = child
    tree[last] = value


def validate(model: type[M], tree: Any, source: str) -> M:
    """Plain values as a model. Raises ConfigError, a line per mistake."""
    try:
        # Through JSON: strict types, yet lists may become tuples.
        return model.model_validate_json(json.dumps(tree))
    except TypeError as error:
        raise ConfigError(f"{source}: holds a value that is neither text, number, list nor section: {error}") from None
    except ValidationError as error:
        problems = [explain(model, problem) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in dict.fromkeys(problems))) from None


def explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One of a ValidationError's `errors()` as 'key: got value; allowed: …'."""
    path = [str(step) for step in problem["loc"]]
    if path[:1] == ["search"]:
        del path[2:3]  # the tag that tells a range from choices
    key, kind, value = ".".join(path), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key{nearest(path[-1], _keys(model, path[:-1]))}"
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if key and not message.startswith(key) else message
    allowed = "" if kind.startswith("string_pattern") else _bounds(model, path)
    allowed = allowed or problem["msg"].removeprefix("Input should be ").replace("an object", "a section of keys")
    choices = get_args(_annotation(model, path)) if kind == "literal_error" else ()
    return f"{key}: got {show(value)}; allowed: {allowed}{nearest(value, choices) if choices else ''}"


def _field(model: type[BaseModel], path: list[str]) -> Any:
    field = None
    for step in path:
        if not (isinstance(model, type) and issubclass(model, BaseModel)) or step not in model.model_fields:
            return field if field is not None and step.isdigit() else None
        field = model.model_fields[step]
        model = field.annotation  # type: ignore[assignment]
    return field


def _annotation(model: type[BaseModel], path: list[str]) -> Any:
    field = _field(model, path)
    return field.annotation if field else None


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    if len(path) == 2 and path[0] == "search":
        return ["low", "high", "log", "step", "choices"]
    node = _annotation(model, path) if path else model
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _bounds(model: type[BaseModel], path: list[str]) -> str:
    """A field's type and range in words: 'a number, at least 0, at most 1'."""
    field = _field(model, path)
    if field is None or get_args(field.annotation):
        return ""
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [f"{word} {getattr(rule, sign)}" for rule in field.metadata for sign, word in signs.items() if hasattr(rule, sign)]
    return ", ".join([names.get(field.annotation, ""), *limits]) if field.annotation in names else ""


def nearest(name: Any, names: Iterable[Any]) -> str:
    """'; did you mean X?', or the whole list where it is short, or nothing."""
    options = [str(option) for option in names]
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid: {', '.join(options)}" if 0 < len(options) <= 12 else ""


def show(value: Any) -> str:
    """A value as a person would write it, cut at 60 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
