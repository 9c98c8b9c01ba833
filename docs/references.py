"""Writes the two references out of the program itself: every command, every key of a sweep file.

    python docs/references.py

A test holds them to what the program says now.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdexp.config import Sweep

DOCS = Path(__file__).parent
WRITTEN = "<!-- written by docs/references.py -->"
SCHEMA: Mapping[str, Any] = Sweep.model_json_schema()
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
}


def commands() -> str:
    """Every command with its options, as its help says it."""
    written = subprocess.run(
        [sys.executable, "-m", "typer", "kdexp.cli", "utils", "docs", "--name", "kdexp"],
        capture_output=True,
        check=True,
    )
    text = written.stdout.decode("utf-8")
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # cut off in the middle
    head = f"{WRITTEN}\n\n# Commands\n\nWhat they are for: [the guide](guide.md#commands).\n"
    return head + text.partition("\n")[2].rstrip() + "\n"


def keys() -> str:
    """Every key of a sweep file: its default, what it may be, what it is."""
    lines = [
        WRITTEN,
        "",
        "# Keys of a sweep file",
        "",
        "With an example and what it means: [the guide](guide.md#the-sweep-file). `search` takes",
        "any key of `student`, `distillation` and `training`, by its path, to a range or choices.",
    ]
    for name, found in SCHEMA["properties"].items():
        lines += ["", f"## {name}", "", _sentence(found.get("description", ""))]
        rows = list(_rows(name, found))
        if rows:
            lines += ["", "| key | default | may be | what it is |", "|---|---|---|---|", *rows]
    for name in ("Range", "Choices"):
        lines += ["", f"## A {name.lower()} of `search`", ""]
        lines += ["| key | default | may be | what it is |", "|---|---|---|---|"]
        lines += _rows("", {"$ref": f"#/$defs/{name}"})
    return "\n".join(lines) + "\n"


def _rows(path: str, found: Mapping[str, Any]) -> Iterator[str]:
    """A row for each key below a section."""
    if "$ref" not in found:
        return
    section = SCHEMA["$defs"][found["$ref"].rpartition("/")[2]]
    for name, field in section["properties"].items():
        whole = f"{path}.{name}" if path else name
        if "$ref" in field:
            yield from _rows(whole, field)
            continue
        default = found.get("default", {}).get(name, field.get("default"))
        needed = name in section.get("required", ())
        shown = "" if needed else f"`{_yaml(default)}`"
        yield f"| `{whole}` | {shown} | {_allowed(field)} | {field.get('description', '')} |"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _allowed(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_allowed(each) for each in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{_yaml(each)}`" for each in field["enum"])
    if "const" in field:
        return f"`{_yaml(field['const'])}`"
    if "pattern" in field:
        return "`module:callable`" if ":" in field["pattern"] else "text"
    kind = {"string": "text", "boolean": "`true`, `false`", "null": "`null`", "object": "keys"}
    plain = kind.get(field.get("type", ""), field.get("type", ""))
    bounds = [text.format(field[bound]) for bound, text in BOUNDS.items() if bound in field]
    if field.get("type") == "array":
        return f"a list of {_allowed(field['items'])}" if field.get("items") else "a list"
    return " ".join([plain, ", ".join(bounds)]).strip()


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(commands(), "utf-8")
    (DOCS / "keys.md").write_text(keys(), "utf-8")
