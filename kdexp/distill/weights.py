"""Weights out of a checkpoint as it lies around: the one dict of tensors in it that fits a network.
No code of it is run.

Training scripts save {"net": …}, {"state_dict": …, "hyper_parameters": …}, with names that wrappers
put a prefix to (module., _orig_mod., model.) and with a loss's or a metric's own tensors beside
them. What fits is found by names and shapes, whatever it is called, and what was taken is said.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from kdexp import KdexpError

__all__ = ["MEMBERS", "Found", "TeacherError", "find_weights", "read_weights"]

State = Mapping[str, Tensor]

MEMBERS = "members"  # how the names in an ensemble's state begin: its attribute
DEEP = 6  # so deep a checkpoint is looked through
USUAL = (
    "teacher",
    "model_state_dict",
    "state_dict",
    "model",
    "weights",
    "net",
    "network",
    "params",
    "state",
    "module",
)
"""Of several that fit and differ, the one under the first of these names is meant."""
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What wrappers put into names, also in their middle."""
BESIDE = re.compile(
    r"criteri|loss|metric|acc|auroc|f1|conf_?mat|precision|recall|^aux|n_averaged", re.IGNORECASE
)
"""What stands beside a network's own parts: a loss, a metric, heads that only training uses."""
# PyTorch before 0.4.1 did not save it, and BatchNorm's momentum does without
COUNTED = "num_batches_tracked"
PLAIN = ("argparse", "collections", "datetime", "decimal", "numpy", "pathlib", "uuid")
"""Modules whose classes are called to be read; they hold data."""


SKIPPED = "kdexp skipped "  # how the modules of stand-ins are called


class TeacherError(KdexpError):
    """A teacher that is missing, does not fit, or disagrees with its cache."""


@dataclass(frozen=True)
class Found:
    """A network's weights, and in words where they were."""

    state: dict[str, Tensor]
    said: str


@dataclass(frozen=True)
class _Candidate:
    """A dict of tensors in a checkpoint, the names as the network has them after `prefix`; `beside`
    belong to others.
    """

    keys: tuple[str, ...]
    prefix: str
    state: dict[str, Tensor]
    beside: tuple[str, ...]

    @property
    def place(self) -> str:
        """In words: key 'net', prefix 'module.'."""
        parts = [f"key '{'.'.join(self.keys)}'"] if self.keys else []
        return ", ".join(parts + ([f"prefix '{self.prefix}'"] if self.prefix else []))

    @property
    def rank(self) -> tuple[int, int]:
        """The lower, the likelier it is meant."""
        words = [*self.keys, *self.prefix.split(".")]
        usual = min((USUAL.index(word) for word in words if word in USUAL), default=len(USUAL))
        return usual, len(self.keys)


def read_weights(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The state in a checkpoint that fits `module`. Raises TeacherError naming what does not."""
    return find_weights(path, module).state


def find_weights(path: Path, module: nn.Module, head: Collection[str] = ()) -> Found:
    """The one dict of tensors in a checkpoint that fits `module`, and where it was. Those named in
    `head` need not fit: then they stay as they are in `module`. Raises TeacherError.
    """
    if not path.is_file():
        key, without = ("start", "from scratch") if head else ("weights", "one")
        raise TeacherError(
            f"{path}: no such checkpoint; correct teacher.{key}, or set it to null to train"
            f" {without}"
        )
    expected, states = module.state_dict(), list(_states(_load(path)))
    if not states:
        raise TeacherError(f"{path}: holds no weights by name; save the network's state_dict()")
    candidates = [
        _less(candidate, head, expected)
        for keys, state in states
        for candidate in _candidates(keys, state, expected)
    ]
    fitting = [c for c in candidates if not _unlike(c.state, _due(c.state, head, expected))]
    if not fitting:
        _check_members(path, states, expected)
        nearest = min(candidates, key=lambda c: (_distance(c.state, expected), c.rank))
        raise TeacherError(
            f"{path}{f' ({nearest.place})' if nearest.place else ''}:"
            f" {_what_differs(nearest.state, _due(nearest.state, head, expected))}"
        )
    taken = min(fitting, key=lambda candidate: candidate.rank)
    if taken.prefix.startswith(f"{MEMBERS}."):
        _check_members(path, states, expected)
    others = [c for c in fitting if c is not taken and not _equal(c.state, taken.state, expected)]
    if any(c.rank[0] == taken.rank[0] for c in others):
        raise TeacherError(
            f"{path}: holds several networks that fit and differ"
            f" ({'; '.join(c.place for c in (taken, *others)[:5])}); save the one that is meant by"
            " itself"
        )
    for name in expected:
        if name in taken.state and not torch.isfinite(taken.state[name].float()).all():
            raise TeacherError(
                f"{path}: {name} holds NaN or infinity; give a checkpoint of a training that did"
                " not diverge"
            )
    said = [str(path), *([taken.place] if taken.place else [])]
    said += (
        [f"left out: {', '.join(taken.beside[:3])}{' …' if len(taken.beside) > 3 else ''}"]
        if taken.beside
        else []
    )
    said += [f"not taken: {other.place}, which fits too and differs" for other in others[:2]]
    drawn = sorted(set(head) - taken.state.keys())
    said += [f"drawn anew: {', '.join(drawn)}"] if drawn else []
    return Found(
        {name: taken.state.get(name, tensor) for name, tensor in expected.items()}, "; ".join(said)
    )


# --- a file's content ---


def _load(path: Path) -> Any:
    """What a file holds, by its content whatever its name."""
    try:
        return load_file(path) if _is_safetensors(path) else _unpickled(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(
            f"{path}: cannot be read: {str(error).splitlines()[0]}; the file is damaged or no"
            " checkpoint"
        ) from None
    except TeacherError as error:
        raise TeacherError(f"{path}: {error}") from None
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise TeacherError(
            f"{path}: not a checkpoint of weights alone ({type(error).__name__}); save its"
            " state_dict() with torch.save or safetensors: kdexp never runs code from a checkpoint"
        ) from None


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(9)
    return (
        len(head) == 9
        and head[8:] == b"{"
        and struct.unpack("<Q", head[:8])[0] <= path.stat().st_size - 8
    )


def _unpickled(path: Path) -> Any:
    """torch's own reading of weights alone, with stand-ins for the objects of other libraries that
    lie beside them.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in names or "archive_format" in names:
            raise TeacherError(
                "a TorchScript or exported program, which is code: save the network's state_dict()"
                " instead"
            )
    stand_ins: dict[str, Any] = {
        "argparse.Namespace": _stand_in("argparse.Namespace"),
        "collections.defaultdict": lambda *_: OrderedDict(),
    }
    while True:
        try:
            known: list[Any] = [(made, name) for name, made in stand_ins.items()]
            with path.open("rb") as file, torch.serialization.safe_globals(known):
                # given a path it would go by the suffix
                return torch.load(file, "cpu", weights_only=True)
        except Exception as error:
            unknown = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
            filled = re.search(
                rf"Can only SETITEMS? for dict.*got <class '{SKIPPED}(\S+)'>", str(error), re.DOTALL
            )
            if unknown and unknown[1] not in stand_ins and len(stand_ins) < 1000:
                name = unknown[1] if "." in unknown[1] else f"builtins.{unknown[1]}"
                if name in stand_ins:
                    raise
                stand_ins[name] = _stand_in(name)
            elif filled and stand_ins.get(filled[1]) is not OrderedDict:
                stand_ins[filled[1]] = OrderedDict  # a dict of a class of its own
            else:
                raise


def _stand_in(name: str) -> type:
    """A class for objects that are not needed: it takes any state. What would have to be called is
    refused.
    """

    def called(_: object, *__: Any, **___: Any) -> None:
        if name.split(".")[0] not in PLAIN:
            raise TeacherError(
                f"calls {name} as it is read, which may do anything; kdexp never runs code from a"
                " checkpoint"
            )

    def ignore(_: object, __: Any) -> None:
        """Its state is not looked at."""

    members = {
        "__init__": called,
        "__setstate__": ignore,
        "__module__": SKIPPED + name.rpartition(".")[0],
    }
    return type(name.rpartition(".")[2], (), members)


def _states(tree: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], State]]:
    """Every dict in a checkpoint that holds tensors by name, and under which keys it lies."""
    if not keys and type(tree).__module__.startswith(SKIPPED):
        raise TeacherError(
            f"a whole pickled {type(tree).__name__}, not its weights: save its state_dict()"
        )
    if isinstance(tree, Mapping) and len(keys) <= DEEP:
        tensors = {str(name): value for name, value in tree.items() if isinstance(value, Tensor)}
        if tensors:
            yield keys, tensors
        inner: Sequence[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list | tuple) and len(keys) <= DEEP:
        inner = list(enumerate(tree))
    else:
        return
    for name, value in inner:
        if isinstance(value, Mapping | list | tuple):
            yield from _states(value, (*keys, str(name)))


# --- what fits ---


def _candidates(keys: tuple[str, ...], state: State, expected: State) -> Iterator[_Candidate]:
    """A dict of tensors in every way to read its names as the network's: each prefix that stands
    before one of them.
    """
    own = {part for name in expected for part in name.split(".")}
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS - own)
        for name in state
    }
    prefixes = {""} | {
        short.removesuffix(name)
        for name in expected
        for short in plain.values()
        if short.endswith(f".{name}")
    }
    for prefix in sorted(prefixes):
        within = {
            name: short.removeprefix(prefix)
            for name, short in plain.items()
            if short.startswith(prefix)
        }
        parts = {name.split(".")[0] for name in expected}
        beside = {
            name
            for name, short in within.items()
            if short.split(".")[0] not in parts and BESIDE.search(short.split(".")[0])
        }
        taken = {short: state[name] for name, short in within.items() if name not in beside}
        written = {
            name.removesuffix(short)
            for name, short in within.items()
            if short in expected and name.endswith(short)
        }
        shown = (
            min(written, default=prefix, key=lambda text: (len(text), text))
            if len(written) > 1
            else "".join(written) or prefix
        )
        yield _Candidate(keys, shown, taken, tuple(sorted(beside | (state.keys() - within.keys()))))


def _less(candidate: _Candidate, head: Collection[str], expected: State) -> _Candidate:
    """A candidate without the tensors of a head for other classes."""
    state = {
        name: tensor
        for name, tensor in candidate.state.items()
        if name not in head or tensor.shape == expected[name].shape
    }
    return replace(candidate, state=state)


def _due(state: State, head: Collection[str], expected: State) -> State:
    """What of a network a state must hold."""
    return {name: tensor for name, tensor in expected.items() if name in state or name not in head}


def _unlike(state: State, expected: State) -> bool:
    missing = {name for name in expected.keys() - state.keys() if not name.endswith(COUNTED)}
    if missing or state.keys() - expected.keys():
        return True
    return any(
        state[name].shape != tensor.shape
        for name, tensor in expected.items()
        if name in state and not name.endswith(COUNTED)
    )


def _equal(one: State, other: State, expected: State) -> bool:
    return all(
        torch.equal(one[name], other[name]) for name in expected if name in one and name in other
    )


def _distance(state: State, expected: State) -> int:
    names = len(expected.keys() ^ state.keys())
    return 2 * names + sum(
        state[name].shape != tensor.shape for name, tensor in expected.items() if name in state
    )


def _what_differs(state: State, expected: State) -> str:
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        example = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the network has not"
        return (
            f"is of another network than teacher.architecture: it {example} "
            f"({len(missing)} names missing, {len(extra)} too many)"
        )
    wrong = [
        f"{name} is {tuple(state[name].shape)}, the teacher of this sweep needs"
        f" {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if state[name].shape != tensor.shape
    ]
    more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
    return (
        f"wrong shape: {'; '.join(wrong[:3])}{more}; correct the teacher section or give the"
        " matching checkpoint"
    )


def _check_members(
    path: Path, states: Sequence[tuple[tuple[str, ...], State]], expected: State
) -> None:
    """Say where an ensemble is of another number of networks than the teacher."""
    wanted, held = _members(expected), max(_members(state) for _, state in states)
    if held != wanted:
        raise TeacherError(
            f"{path}: holds the weights of {held} network{'s' if held > 1 else ''}, teacher.members"
            f" is {wanted}; give the weights.safetensors of an ensemble of so many (kdexp keeps it"
            f" in the teacher's run), or set members to {held}"
        )


def _members(state: State) -> int:
    """How many networks an ensemble's state holds; 1 for any other."""
    return len({name.split(".")[1] for name in state if name.startswith(f"{MEMBERS}.")}) or 1
