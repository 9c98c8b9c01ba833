"""Text to a validated model, or one clear line per mistake: the key, the value, what is allowed,
the nearest name.
"""

from __future__ import annotations

import codecs
import difflib
import itertools
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from kdexp import KdexpError

__all__ = [
    "ConfigError",
    "Source",
    "assign",
    "decoded",
    "explain",
    "lines_of",
    "nearest",
    "parse",
    "show",
    "spellings",
    "study_name",
    "validate",
]

M = TypeVar("M", bound=BaseModel)

SEARCH_KEYS = ("low", "high", "log", "step", "choices")
LONGEST_NUMBER = 100


class ConfigError(KdexpError):
    """A sweep file or a --set that cannot be run."""


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that people do not mean as YAML reads it, and how to write what they mean."""


def study_name(text: str) -> str:
    """A study's name as it is kept: one code point for é (as typed, not as a Mac's file names have
    it), no blanks around.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).rstrip(". ")


def spellings(name: str) -> list[str]:
    """How a name may stand in a store: as it is kept now, and as earlier versions took it from a
    Mac's file name.
    """
    return list(
        dict.fromkeys([study_name(name), unicodedata.normalize("NFD", study_name(name)), name])
    )


class _Loader(yaml.SafeLoader):
    """Safe YAML, with 3e-4 read as a number (YAML 1.2); what YAML 1.1 reads in ways of its own is
    refused.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported in sweep files")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if isinstance(key, dict):
                raise _Refused(
                    problem="{{ … }} is a template's placeholder; put the value in its place",
                    problem_mark=mark,
                )
            if not isinstance(key, str):
                read = (
                    f" (YAML reads {key_node.value} so)"
                    if key_node.value.lower() not in (str(key).lower(), "null")
                    else ""
                )
                raise _Refused(
                    problem=f'key {show(key)}{read} is not text; write "{key_node.value}"',
                    problem_mark=mark,
                )
            if unseen := [c for c in key if _is_unseen(c)]:
                name = (
                    f"{unicodedata.name(unseen[0], 'a control character').lower()}"
                    f" (U+{ord(unseen[0]):04X})"
                )
                plain = "".join(c for c in key if not _is_unseen(c))
                raise _Refused(
                    problem=f"key {show(key)} holds a {name}; write {plain}", problem_mark=mark
                )
            if key in seen:
                raise _Refused(problem=f"key {show(key)} stands twice", problem_mark=mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> int:
        """A whole number, as people write them."""
        text = node.value.replace("_", "")
        if len(text) > LONGEST_NUMBER:
            raise _Refused(
                problem=f"a number of {len(text):,} digits", problem_mark=node.start_mark
            )
        number = self._decimal_only(node, self.construct_yaml_int(node))
        if re.fullmatch(r"[-+]?0[0-7]+", text) and number:
            raise _Refused(
                problem=(
                    f"{node.value}: YAML reads a number with a leading 0 as octal, {number}; write "
                    f"{int(text)} or {number}, or quote it where text is meant"
                ),
                problem_mark=node.start_mark,
            )
        return int(number)

    def construct_number(self, node: Any) -> float:
        """A number with a fraction or an exponent."""
        return float(self._decimal_only(node, self.construct_yaml_float(node)))

    def _decimal_only(self, node: Any, number: float) -> float:
        if ":" in node.value:
            raise _Refused(
                problem=(
                    f"{node.value}: YAML reads it to the base of 60, {number}; write {number}, or"
                    " quote it for text"
                ),
                problem_mark=node.start_mark,
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def decoded(content: bytes, source: str) -> str:
    """The text of a file, UTF-8 or as its byte order mark says. Raises ConfigError with the
    line.
    """
    encoding = (
        "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{source}: cannot be read as text: line {line} is not"
            f" {encoding.removesuffix('-sig').upper()}; save it as UTF-8"
        ) from None


def parse(text: str, source: str) -> Any:
    """YAML as plain values. Raises ConfigError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        if isinstance(error, _Refused):
            raise ConfigError(f"{source}: {error.problem}{where}") from None
        problem = str(error.problem)
        problem = f"{error.context} {problem}" if problem.startswith("but ") else problem
        hint = "; indent by spaces, not by tabs" if "'\\t'" in problem else ""
        raise ConfigError(f"{source}: not valid YAML: {problem}{where}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}: not valid YAML: a character U+{error.character:04X} in line {line}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Source:
    """Where values come from: a file's text, and what was set over it, by its dotted path."""

    name: str
    text: str
    overrides: Mapping[str, str]
    """KEY=VALUE as given, by KEY."""

    def __str__(self) -> str:
        return self.name

    def of(self, *keys: str) -> str:
        """The file with the line of the first of these keys that it holds, or the --set that gave
        it; else of the nearest section around the last one.
        """
        *_, last = keys
        sections = itertools.accumulate(last.split("."), lambda one, other: f"{one}.{other}")
        for key in [*keys, *reversed(list(sections))]:
            if given := self._set(key):
                return f"--set {given}"
            if line := self._lines.get(key):
                return f"{self.name}, line {line}"
        return self.name

    def _set(self, key: str) -> str | None:
        """The last --set of a key, or of a section that it is in."""
        found = [path for path in self.overrides if f"{key}.".startswith(f"{path}.")]
        return self.overrides[found[-1]] if found else None

    @cached_property
    def _lines(self) -> dict[str, int]:
        return lines_of(self.text)


def lines_of(text: str) -> dict[str, int]:
    """The line, from 1, of every key and list item of valid YAML, by its dotted path."""
    root = yaml.compose(text, Loader=_Loader)
    return dict(_marks(root, "")) if root else {}


def _marks(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        inside = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inside = [(str(number), item, item) for number, item in enumerate(node.value)]
    else:
        return
    for name, at, value in inside:
        yield f"{prefix}{name}", at.start_mark.line + 1
        yield from _marks(value, f"{prefix}{name}.")


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


def validate(model: type[M], tree: Any, source: str | Source) -> M:
    """Plain values as a model. Raises ConfigError, a line per mistake, each with its place in the
    source.
    """
    try:
        # Through JSON: strict types, yet lists may become tuples.
        return model.model_validate_json(json.dumps(_meant(model, tree)))
    except TypeError as error:
        raise ConfigError(
            f"{source}: holds a value that is neither text, number, list nor section: {error}"
        ) from None
    except ValidationError as error:
        problems = _one_for_each_mistake(error.errors(), tree)
        # the first place of each line
        said = {explain(model, problem): problem["loc"] for problem in reversed(problems)}
        lines = [f"{_place(source, said[line], line)}: {line}" for line in reversed(said)]
        raise ConfigError("\n".join(lines)) from None


def _place(source: str | Source, loc: Sequence[Any], line: str) -> str:
    """Where a mistake is. What is said of a section may begin with the key that it is about."""
    if isinstance(source, str):
        return source
    key = ".".join(map(str, loc))
    about = re.match(r"[\w.]*\w", line.removeprefix(f"{key}: "))
    word = about[0] if about else ""
    near = [f"{key}.{word}", word] if key else [word]
    return source.of(*(near if len(loc) < 2 else []), key)


def _meant(model: type[BaseModel], tree: Any) -> Any:
    """What people mean by a number: 1e5 as a whole number where one is wanted, 2026 as text where
    text is.
    """
    if not isinstance(tree, Mapping):
        return tree
    meant: dict[Any, Any] = {}
    for key, value in tree.items():
        field = model.model_fields.get(key)
        kind = _kinds(field.annotation) if field else ()
        if kind and isinstance(kind[0], type) and issubclass(kind[0], BaseModel):
            meant[key] = _meant(kind[0], value)
        elif key == "search" and isinstance(value, Mapping):
            meant[key] = {
                path: _meant_in_search(model, path, found) for path, found in value.items()
            }
        else:
            meant[key] = _one_meant(kind, value)
    return meant


def _meant_in_search(model: type[BaseModel], path: Any, dimension: Any) -> Any:
    kind = _kinds(_annotation(model, str(path).split(".")))
    if not isinstance(dimension, Mapping) or kind != (int,):
        return dimension
    whole = {key: _one_meant(kind, value) for key, value in dimension.items()}
    if isinstance(listed := whole.get("choices"), list):
        whole["choices"] = [_one_meant(kind, value) for value in listed]
    return whole


def _one_meant(kind: tuple[Any, ...], value: Any) -> Any:
    if kind == (int,) and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return str(value) if kind == (str,) and type(value) is int else value


def _one_for_each_mistake(errors: Iterable[Any], tree: Any) -> list[dict[str, Any]]:
    """A value that may be of several kinds fails once for each, under names that are not in the
    file: one of these errors, at the value. What follows from another mistake is left out.
    """
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for error in errors:
        place = _in_file(error["loc"], tree, error["type"] == "missing")
        kind = error["type"] if place == _without_tag(error["loc"]) else "union"
        found.setdefault(
            place, {**error, "loc": place, "type": kind, "input": _at(tree, place, error["input"])}
        )
    follow = {place for place, error in found.items() if error["type"] == "too_short"}
    return [
        error
        for place, error in found.items()
        if not (
            place in follow
            and any(other != place and other[: len(place)] == place for other in found)
        )
    ]


def _without_tag(loc: Sequence[Any]) -> tuple[Any, ...]:
    """A place without the word that tells a range from choices."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("search",) else tuple(loc)


def _in_file(loc: Sequence[Any], tree: Any, missing: bool) -> tuple[Any, ...]:
    """The part of a place that is in the file: what follows are names of kinds."""
    place: list[Any] = []
    steps = _without_tag(loc)
    for number, step in enumerate(steps):
        inside = _has(tree, step)
        if not inside and not (missing and number == len(steps) - 1):
            break
        place.append(step)
        tree = tree[step] if inside else None
    return tuple(place)


def _at(tree: Any, place: Sequence[Any], otherwise: Any) -> Any:
    for step in place:
        if not _has(tree, step):
            return otherwise
        tree = tree[step]
    return tree


def _has(tree: Any, step: Any) -> bool:
    if isinstance(tree, Mapping):
        return step in tree
    return isinstance(tree, list) and isinstance(step, int) and step < len(tree)


def explain(model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    """One mistake as 'key: got value; allowed: …'."""
    path = [str(step) for step in problem["loc"]]
    key, kind, value = ".".join(path), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        if path[0] == "search" and len(path) > 2 and path[-1] in SEARCH_KEYS:
            return (
                f"{'.'.join(path[:-1])}: holds choices and {path[-1]}; give either choices alone,"
                " or low and high"
            )
        return f"{key}: unknown key{nearest(path[-1], _keys(model, path[:-1]))}"
    if kind == "missing":
        return f"{key}: missing; add it"
    if kind == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if key and not message.startswith(key) else message
    choices = get_args(_annotation(model, path)) if kind == "literal_error" else ()
    return (
        f"{key}: got {show(value)}{_how_read(value)}; allowed: {_allowed(model, path, problem)}"
        + (nearest(value, choices) if choices else "")
    )


def _allowed(model: type[BaseModel], path: list[str], problem: Mapping[str, Any]) -> str:
    field = _field(model, path)
    if problem["type"].startswith("string_pattern"):
        return str(field.description if field and field.description else problem["msg"])
    if problem["type"] == "union":
        return _words(model, path)
    allowed = _bounds(model, path) if problem["type"] != "string_too_long" else ""
    return allowed or problem["msg"].removeprefix("Input should be ").replace(
        "an object", "a section of keys"
    )


def _words(model: type[BaseModel], path: list[str]) -> str:
    """The kinds of value that may stand where several may."""
    if path[0] == "search":
        return (
            "text, a number, true or false, null, or a list of whole numbers"
            if "choices" in path
            else "a number"
        )
    return "text, a number, or true or false"


def _how_read(value: Any) -> str:
    """What is surprising in how a value was read."""
    if isinstance(value, bool):
        return (
            f" (YAML reads {'yes and on' if value else 'no and off'} so; quote it where text is"
            " meant)"
        )
    if isinstance(value, str) and re.search("[“”„‘’]", value):
        return " (“ and ’ are no quotes in YAML, \" and ' are)"
    return ""


def _field(model: type[BaseModel], path: list[str]) -> Any:
    field = None
    for step in path:
        if (
            not (isinstance(model, type) and issubclass(model, BaseModel))
            or step not in model.model_fields
        ):
            return field if field is not None and step.isdigit() else None
        field = model.model_fields[step]
        model = field.annotation  # type: ignore[assignment]
    return field


def _annotation(model: type[BaseModel], path: list[str]) -> Any:
    field = _field(model, path)
    return field.annotation if field else None


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What a field may be besides null."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(
            kind for part in get_args(annotation) if part is not type(None) for kind in _kinds(part)
        )
    return (annotation,)


def _keys(model: type[BaseModel], path: list[str]) -> list[str]:
    if len(path) == 2 and path[0] == "search":
        return list(SEARCH_KEYS)
    node = _annotation(model, path) if path else model
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _bounds(model: type[BaseModel], path: list[str]) -> str:
    """A field's type and range in words: 'a number, at least 0, at most 1'."""
    field = _field(model, path)
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    kinds = _kinds(field.annotation) if field is not None else ()
    if len(kinds) != 1 or kinds[0] not in names:
        return ""
    signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    limits = [
        f"{word} {getattr(rule, sign)}"
        for rule in field.metadata
        for sign, word in signs.items()
        if hasattr(rule, sign)
    ]
    null = (
        []
        if kinds == (field.annotation,) or get_origin(field.annotation) is Annotated
        else ["or null"]
    )
    return ", ".join([names[kinds[0]], *limits, *null])


def nearest(name: Any, names: Iterable[Any]) -> str:
    """'; did you mean X?', or the whole list where it is short, or nothing."""
    options = [str(option) for option in names]
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; valid: {', '.join(options)}" if 0 < len(options) <= 12 else ""


def show(value: Any) -> str:
    """A value as a person would write it, cut at 60 characters; what cannot be seen by its
    number.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "not a number"
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = "".join(f"\\u{ord(c):04x}" if _is_unseen(c) else c for c in text)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_unseen(character: str) -> bool:
    return character != " " and (not character.isprintable() or character.isspace())
