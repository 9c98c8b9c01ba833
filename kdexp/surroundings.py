"""What a process finds and cannot choose: a locale of few characters, streams that are closed, ~,
no home at all, a working folder that is gone, no memory left. Standard library only.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import sys
import warnings
from pathlib import Path

from kdexp import KdexpError

__all__ = [
    "expanded",
    "expanded_url",
    "homeless",
    "open_streams",
    "out_of_memory",
    "speak_utf8",
    "working_folder",
]

PLAIN = {
    "α": "alpha",
    "·": "-",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "±": "+/-",
    "×": "x",
    "²": "^2",
    "“": '"',
    "”": '"',
}
"""What kdexp prints beyond ASCII, in ASCII."""
NO_HOME = "/nonexistent"  # as Debian names it


def speak_utf8() -> None:
    """Begin this process anew in UTF-8 mode where the locale has another encoding: names of files,
    texts that libraries write and what this command's workers read are then the same everywhere.
    What is printed keeps the locale's encoding.
    """
    spoken = codecs.lookup(sys.getfilesystemencoding()).name
    if spoken == "utf-8" or sys.flags.utf8_mode or os.name != "posix" or not sys.executable:
        return
    if sys.stdout is not None:
        os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    # ourselves
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


def open_streams() -> None:
    """Let no output raise: a closed stream leads nowhere, a character that an encoding lacks is
    written in ASCII, a warning of a library is one also where PYTHONWARNINGS makes errors of them.

    A number that a closed stream left free would go to the next file that is opened, and prints
    would end up in it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None and not _is_open(number):
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(nowhere, True)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            # for the process's life
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    # of a shell that is set up for tests
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")
        sys.warnoptions[:] = [
            option for option in sys.warnoptions if not option.startswith("error")
        ]
        # for the processes that this one starts
        os.environ["PYTHONWARNINGS"] = ",".join(sys.warnoptions)
    codecs.register_error("kdexp", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="kdexp")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return (
        "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking),
        error.end,
    )


def working_folder() -> Path:
    """Where this process stands. Raises KdexpError where that folder has been deleted."""
    try:
        return Path.cwd()
    except OSError:
        raise KdexpError(
            "The folder that you are in has been deleted or replaced: go to one that is there (cd"
            " ..) and give the command again"
        ) from None


def homeless() -> None:
    """Give a user without a home the name of one that is not there: libraries ask for one as they
    are imported.
    """
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path's own raises
        os.environ["HOME"] = NO_HOME


def expanded(path: str | Path) -> Path:
    """A path with ~ as the home folder, as a shell would have it. Raises KdexpError where there is
    no such home.

    Files, flags written --flag=~/… and variables reach us as they were written.
    """
    written = str(path)
    # Path's own raises where the home is unknown
    whole = os.path.expanduser(written)  # noqa: PTH111
    nobodys = whole == written or whole.startswith(NO_HOME)
    if written.startswith("~") and nobodys and not Path(path).exists():
        who = Path(written).parts[0]
        raise KdexpError(
            f"{written}: {who} stands for a home folder, and there is none"
            f" here{' (HOME is not set)' if who == '~' else ''}; write the whole path, or ./{who}"
            " for a folder of that name"
        )
    return Path(whole)


def expanded_url(url: str) -> str:
    """An SQLite URL or a plain path with ~ as the home folder; any other URL as it is."""
    scheme, separator, rest = url.partition(":///")
    if separator and rest.startswith("~") and re.fullmatch(r"sqlite(\+\w+)?|file", scheme):
        path, question, query = rest.partition("?")
        return f"{scheme}:///{expanded(path)}{question}{query}"
    return str(expanded(url)) if url.startswith("~") else url


def out_of_memory(error: BaseException) -> bool:
    """Whether a failure means that there is no memory left, whatever it calls it."""
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return True
    words = (
        "bad_alloc|can't allocate memory|cannot allocate memory|out of memory|failed to map"
        " segment|can't start new thread"
    )
    return (
        isinstance(error, RuntimeError | ImportError | OSError)
        and re.search(words, str(error), re.IGNORECASE) is not None
    )
