"""Two runs' records side by side: what is equal, what differs, what one of them does not hold.
Pure.

A record says many things, each by a name. The original is what counts: what it lacks was not
recorded by the version that made it, and what this version does not know cannot be compared. Both
are said, and are no differences. But an original that was made by this very code lacks only what
was taken out of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from kdexp.runs.tracking import RunRecord
from kdexp.select.verify import ROUNDING, Difference

__all__ = ["Comparison", "Said", "compare", "covered", "described", "said_by"]

Said = Mapping[str, str | float]
"""All that a record says, by name."""
CLOCK = ("train_seconds", "epoch/seconds")
"""No second training takes as long."""
HASHES = {
    "kdexp.train_sha256": "training data",
    "kdexp.validation_sha256": "validation data",
    "kdexp.teacher_sha256": "teacher weights",
    "kdexp.logits_sha256": "teacher's logits",
    "kdexp.weights_sha256": "student weights",
}
OWN = {
    *(
        "kdexp.kind",
        "kdexp.mark",
        "kdexp.study",
        "kdexp.trial",
        "kdexp.confirms",
        "kdexp.seed",
        "kdexp.trained_on",
    ),
    *(
        "kdexp.reproduces",
        "kdexp.reproduction",
        "kdexp.selected",
        "kdexp.selected_trial",
        "kdexp.confirmed",
        "kdexp.model_version",
        "kdexp.error",
    ),
    *(
        "kdexp.not_registered",
        "kdexp.not_exported",
        "kdexp.test_looked_at",
        "kdexp.resumed_from_epoch",
        "kdexp.artifacts",
    ),
    "kdexp.teacher_run",
}
"""Tags that are a run's own: its place among others, and what became of it. verify.py holds these
against the rest.
"""
FOLLOWS = ("teacher's logits", "student weights", "weights.safetensors", "kept_epoch")
"""What never agrees to the bit on another machine, or hangs on what does not."""


def said_by(
    run: RunRecord,
    history: Mapping[str, Sequence[tuple[int, float]]],
    inputs: Mapping[str, Mapping[str, str]],
) -> dict[str, str | float]:
    """All that a run's record says, its files left out, and another training must come to."""
    said: dict[str, str | float] = {}
    for name, points in history.items():
        for step, value in points if name.startswith("epoch/") else ():
            said[f"{name.removeprefix('epoch/')}, epoch {step}"] = (
                "taken" if name in CLOCK else value
            )
    for name, value in run.metrics.items():
        if not name.startswith("epoch/"):
            said[name] = "taken" if name in CLOCK else value
    said |= {f"param {name}": text for name, text in run.params.items() if name != "trial"}
    tags = {
        tag: text for tag, text in run.tags.items() if tag.startswith("kdexp.") and tag not in OWN
    }
    said |= {HASHES.get(tag, f"tag {tag}"): text for tag, text in tags.items()}
    return said | described(inputs)


def described(inputs: Mapping[str, Mapping[str, str]]) -> dict[str, str | float]:
    """What a record says of its data sets."""
    return {
        f"{role} input, {key}": text for role, own in inputs.items() for key, text in own.items()
    }


@dataclass(frozen=True)
class Comparison:
    """A run beside its reproduction."""

    original: RunRecord
    again: RunRecord
    compared: int
    """How many values of epochs were compared."""
    differences: tuple[Difference, ...]
    environment: tuple[Difference, ...]
    covered: tuple[str, ...] = ()
    """What else is equal, in words."""
    unrecorded: tuple[str, ...] = ()
    """What the original does not hold."""
    unknown: tuple[str, ...] = ()
    """What it holds, and this version does not know."""
    notes: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """All that the original records is so again, to the bit."""
        return not self.differences

    @property
    def weights(self) -> str:
        """SHA-256 of the weights, if it is on record."""
        return self.original.tags.get("kdexp.weights_sha256", "")

    @property
    def largest(self) -> float:
        """By how much two values differ at most."""
        return max((d.by for d in self.differences if d.what not in FOLLOWS), default=0.0)

    def within(self, tolerance: float | None) -> bool:
        """Whether data and teacher are the same, and metrics differ by no more than that."""
        return tolerance is not None and self.largest <= tolerance

    @property
    def failure(self) -> str:
        """That the run is not reproduced, and why that may be, in one line."""
        names = [difference.what for difference in self.differences]
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        changed = ", ".join(difference.what for difference in self.environment)
        why = (
            f"Environment: {changed}"
            if changed
            else (
                "Code, libraries and machine are as recorded: the record was changed after the run;"
                " if not, please report this"
            )
        )
        many = f"{len(names)} values differ" if len(names) > 1 else "1 value differs"
        return f"Run {self.original.run_id} is not reproduced: {many} ({some}). {why}."


def compare(
    original: Said, again: Said, samples: Mapping[str, int], elsewhere: bool, by_this_code: bool
) -> tuple[list[Difference], list[str], list[str], list[str]]:
    """What differs; what the original does not hold; what is not known here; what is worth a note.

    `samples`: how many images an accuracy is of, by the beginning of its name. `elsewhere`: code,
    libraries or machine are not those of the original; of equal weights a measure may then differ
    by what is rounded otherwise.
    """
    differences, notes = [], []
    same_weights = original.get("weights.safetensors") == again.get("weights.safetensors")
    for name, one in original.items():
        other = again.get(name)
        if other is None or repr(one) == repr(other):  # repr: also NaN equals itself
            continue
        rounded = same_weights and _is_rounding(name, one, other, samples)
        if elsewhere and (rounded or name == "model_summary.txt"):
            notes.append(
                f"{name}: {_short(one)} recorded, {_short(other)} here, by other code or on another"
                " machine"
            )
        else:
            differences.append(Difference(name, _short(one), _short(other), _apart(one, other)))
    known, held = set(map(_group, again)), set(map(_group, original))
    for name in original.keys() - again.keys():  # an epoch that there was not again
        if _group(name) in known:
            differences.append(Difference(name, _short(original[name]), "—"))
    for name in again.keys() - original.keys():
        if by_this_code or _group(name) in held:
            differences.append(Difference(name, "—", _short(again[name])))
    missing = () if by_this_code else _groups(name for name in again if _group(name) not in held)
    order = {name: place for place, name in enumerate([*original, *again])}
    differences.sort(key=lambda difference: order.get(difference.what, 0))
    return (
        differences,
        list(missing),
        list(_groups(name for name in original if _group(name) not in known)),
        notes,
    )


def covered(original: Said, again: Said) -> list[str]:
    """What two records both say, in words."""
    both = [name for name in original if name in again]
    kinds = {
        "final metrics": [
            n for n in both if isinstance(original[n], float) and ", epoch " not in n
        ],
        "params": [n for n in both if n.startswith("param ")],
        "data sets": {n.partition(" input, ")[0] for n in both if " input, " in n},
    }
    named = [
        n
        for n in both
        if isinstance(original[n], str) and not n.startswith("param ") and ", " not in n
    ]
    return [
        *(f"{len(names)} {kind}" for kind, names in kinds.items() if names),
        *(n for n in named if original[n] != "taken"),
    ]


def _is_rounding(
    name: str, one: str | float, other: str | float, samples: Mapping[str, int]
) -> bool:
    """Whether two measurements of the same weights are as near as another order of sums may leave
    them.
    """
    if isinstance(one, str) or isinstance(other, str) or ", epoch " in name:
        return False
    if "accuracy" in name:
        kind = "test" if "test_" in name else "val"
        return abs(one - other) * samples.get(kind, 0) <= ROUNDING + 0.5
    return name.endswith("loss") and math.isclose(one, other, rel_tol=1e-3)


def _group(name: str) -> str:
    """A curve's name stands for its epochs."""
    return name.partition(", epoch ")[0]


def _groups(names: Iterable[str]) -> Iterable[str]:
    return dict.fromkeys(map(_group, names))


def _apart(one: str | float, other: str | float) -> float:
    if isinstance(one, str) or isinstance(other, str):
        return math.inf
    apart = abs(one - other)
    return math.inf if math.isnan(apart) else apart


def _short(value: str | float) -> str:
    return value[:16] if isinstance(value, str) else repr(value)
