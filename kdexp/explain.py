"""A config's validation errors in one line each: the key, the value, what is allowed, the nearest valid name."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

__all__ = ["explain", "nearest", "show"]


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
