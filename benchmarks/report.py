"""How every benchmark reports: the machine, one table, and last one line of JSON with the same
figures. What takes hours keeps each result as it comes, and goes on from there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdexp.environment import cpu_name

__all__ = ["Kept", "Row", "machine", "print_report"]

Row = dict[str, Any]


class Kept:
    """Results in a file of JSON lines, each written as it comes; without a file, in none."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file and file.exists() else []
        self._rows = [json.loads(line) for line in lines]

    def row(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row that has these values; measured now where there is none."""
        for row in self._rows:
            if key.items() <= row.items():
                return row
        row = {**key, **measure()}
        self._rows.append(row)
        if self.file:
            with self.file.open("a") as file:
                file.write(f"{json.dumps(row)}\n")
        return row


def print_report(title: str, rows: Sequence[Row], figures: Mapping[str, Any]) -> None:
    """The table of these rows, with a column for every key that one of them has; then the figures
    as JSON.
    """
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    first = {name: value for row in reversed(rows) for name, value in row.items()}
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        justify = "left" if isinstance(first[name], str) else "right"
        table.add_column(name.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    console.print(table)
    console.print(f"\n{machine()}")
    print(json.dumps({**figures, "machine": machine()}))


def machine() -> str:
    """Processor, cores, accelerator and torch: what absolute times depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{cpu_name()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}, torch"
        f" {torch.__version__}"
    )


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
