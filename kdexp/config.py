"""What to run: a sweep file is a recipe, a search space over it, study settings and a selection
rule.

A *recipe* is the complete description of one training. The defaults are the documented recipe:
alpha 0.3, T 5, learning rate 3e-4, batch 128, 500 epochs, seed 8787, channels 16/32/64.
Everything here is frozen; unknown keys, wrong types and values out of range fail before any work.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from kdexp.reading import (
    ConfigError,
    Source,
    assign,
    decoded,
    nearest,
    parse,
    show,
    study_name,
    validate,
)

__all__ = [
    "CONTROLS",
    "LATER",
    "Augment",
    "Choices",
    "ConfigError",
    "Data",
    "Distillation",
    "Network",
    "Objective",
    "Precision",
    "Range",
    "Recipe",
    "Selection",
    "Size",
    "Student",
    "Study",
    "Sweep",
    "Teacher",
    "Training",
    "Variant",
    "as_meant",
    "differences",
    "flatten",
    "identity",
    "load",
    "name_for",
    "recorded",
    "select_rule",
    "upgrade",
]

CONTROLS = 2  # trials 0 and 1: the file's own values, and the same with labels only
MAX_FILE_BYTES = 1_000_000  # a sweep file is a page; anything near this is the wrong file
NAME_LENGTH = 100
# what MLflow's names of models, its addresses and its searches cannot hold; “ is never meant
NOT_IN_NAMES = "/\\:?'\"`“”"
SCALE = "distillation.scale_by_t_squared"
SEARCHABLE = ("student", "distillation", "training")

DATA_SETS = (
    "fashion_mnist",
    "mnist",
    "kmnist",
    "cifar10",
    "cifar100",
    "svhn",
    "stl10",
    "emnist",
    "usps",
    "digits",
    "image_folder",
    "arrays",
)


def _known(name: str) -> str:
    if name in DATA_SETS or re.fullmatch(OWN, name):
        return name
    raise ValueError(
        f"got {show(name)}; allowed: {', '.join(DATA_SETS)}, or"
        f" module:callable{nearest(name, DATA_SETS)}"
    )


OWN = r".+:[A-Za-z_]\w*"
"""What a function of one's own returns: module:callable."""
Images = Annotated[
    str,
    AfterValidator(_known),
    WithJsonSchema({"anyOf": [{"enum": list(DATA_SETS)}, {"type": "string", "pattern": OWN}]}),
]
Size = Literal["parameters", "multiply_adds", "bytes", "activation_bytes"]
Precision = Literal["float32", "float16", "int8"]
Variant = Literal["as trained", "float32", "float16", "int8"]
Objective = Literal["smallest", "accuracy", "pareto"]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Scalar = bool | int | float | str
R = TypeVar("R", bound="Recipe")


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


LATER: JsonDict = {"later": True}
"""A field's `json_schema_extra`, where it is added after teachers have been trained and kept by a
digest without it.
"""


def identity(model: BaseModel) -> str:
    """A config as the text that digests are made of: a field of LATER stands in it only where it is
    not at its default.
    """
    return model.model_dump_json(exclude=_later(model))


def _later(model: BaseModel) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            found |= {name: inside} if (inside := _later(value)) else {}
        elif field.json_schema_extra == LATER and value == field.get_default(
            call_default_factory=True
        ):
            found[name] = True
    return found


# --- the recipe --------------------------------------------------------------------------------


class Augment(Frozen):
    """The finite set of views: (flip or not) x every shift of up to `shift` pixels each way."""

    flip: bool = Field(True, description="also mirrored, left to right")
    shift: int = Field(0, ge=0, le=8, description="also moved by up to so many pixels each way")


class Data(Frozen):
    """Which images, and how they are split, normalised and augmented."""

    dataset: Images = Field(
        "fashion_mnist", description="which images; or module:callable, which returns arrays"
    )
    path: str | None = Field(
        None,
        description="image_folder: the folder; arrays: the .npz file; relative to the data folder",
    )
    image_size: int | None = Field(
        None, ge=1, le=1024, description="image_folder only: resize to this square"
    )
    channels: Literal[1, 3] = Field(3, description="1: grey, 3: colour; grey images are repeated")
    mean: float = Field(0.5, description="taken off every pixel, which is 0 to 1 then")
    std: float = Field(0.5, gt=0, description="by which it is divided after that")
    validation_fraction: Fraction = Field(
        0.1, description="share of the training images that is held out to judge by"
    )
    fold: int = Field(
        0,
        ge=0,
        json_schema_extra=LATER,
        description="which fold of training and validation is held out; 0: the validation split",
    )
    train_on_validation: bool = Field(
        False, description="held out from the teacher only: see `kdexp confirm`"
    )
    test_fraction: Fraction = Field(
        0.2, description="for datasets without a test split of their own"
    )
    split_seed: int = Field(8787, ge=0, description="which images are held out")
    augment: Augment = Field(Augment(), description="views of an image that are trained on")

    @property
    def own(self) -> bool:
        """Whether a function of the user's own returns the images."""
        return ":" in self.dataset

    @model_validator(mode="after")
    def _path_and_size_belong_to_files(self) -> Self:
        if self.dataset == "image_folder":
            if self.path is None or self.image_size is None:
                raise ValueError("dataset image_folder needs both path and image_size")
        elif self.dataset == "arrays":
            if self.path is None or self.image_size is not None:
                raise ValueError("dataset arrays needs path, and takes its images as they are")
        elif self.path is not None or self.image_size is not None:
            raise ValueError(
                f"path and image_size belong to dataset image_folder, not to {self.dataset}"
            )
        return self


FAMILIES: dict[str, dict[str, Any]] = {
    "cnn": {"channels": [16, 32, 64], "blocks": 1, "stride": 1, "hidden": 128, "dropout": 0.2},
    "residual": {"channels": [16, 32, 64], "blocks": 1, "stride": 1, "hidden": 0, "dropout": 0.0},
    "separable": {"channels": [16, 32, 64], "blocks": 1, "stride": 1, "hidden": 0, "dropout": 0.0},
}
"""The networks that are made here, and what their dials are set to where nothing is said."""


class Network(Frozen):
    """A network by name: one of the families `cnn` (the documented student, generalised),
    `residual` and `separable`, all with the same dials; a torchvision name; or
    `package.module:callable`, called as callable(channels=, image_size=, classes=, **options).
    """

    architecture: str = Field(
        "cnn",
        description="cnn, residual, separable, a torchvision name, or"
        " package.module:callable of your own",
    )
    channels: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = Field(
        None, strict=False, description="families: one per stage, each of half the height and width"
    )
    blocks: int | None = Field(None, ge=1, le=64, description="families: in each stage")
    stride: Literal[1, 2] | None = Field(
        None, description="families: of the first convolution; 2: a quarter of the pixels"
    )
    hidden: int | None = Field(
        None,
        ge=0,
        le=65536,
        description="families: width of the hidden layer; 0: none, pooled globally",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="families: share left out before each layer of the head"
    )
    stem: Literal["imagenet", "small"] = Field(
        "imagenet", description="torchvision: small for images under 64 pixels"
    )
    options: dict[str, Scalar] = Field(
        {}, description="arguments of your own package.module:callable"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_family(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        family = FAMILIES.get(
            values.get("architecture", cls.model_fields["architecture"].default), {}
        )
        return {
            **family,
            **{
                key: value
                for key, value in values.items()
                if value is not None or key not in family
            },
        }

    @model_validator(mode="after")
    def _keys_belong_to_the_architecture(self) -> Self:
        if self.architecture in FAMILIES:
            if not self.channels:
                raise ValueError("channels needs at least one stage, as in [16, 32, 64]")
        elif any(getattr(self, dial) is not None for dial in FAMILIES["cnn"]):
            raise ValueError(
                f"{', '.join(FAMILIES['cnn'])} belong to architecture {', '.join(FAMILIES)}, not to"
                f" {self.architecture}"
            )
        if self.options and ":" not in self.architecture:
            raise ValueError(
                "options belong to an architecture of your own, package.module:callable"
            )
        if self.stem == "small" and (self.architecture in FAMILIES or ":" in self.architecture):
            raise ValueError(
                f"stem small belongs to torchvision's networks, not to {self.architecture}"
            )
        return self


class Training(Frozen):
    """How a network is trained. `epochs` is the recipe's "max iteration"."""

    batch_size: int = Field(128, ge=2, description="images of a step")
    learning_rate: float = Field(3e-4, gt=0, description="the schedule's highest")
    epochs: int = Field(500, ge=1, description="passes over the training images")
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimiser steps")
    seed: int = Field(8787, ge=0, lt=2**63, description="of weights, order of images, dropout")
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adam", description="adamw: decay apart from the gradient; sgd: Nesterov momentum 0.9"
    )
    weight_decay: float = Field(1e-6, ge=0, description="as the optimizer understands it")
    schedule: Literal["cosine", "one_cycle", "constant"] = Field(
        "cosine", description="of the learning rate over all steps"
    )
    final_learning_rate: float = Field(1e-6, ge=0, description="where the cosine ends")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a label spread over all classes"
    )
    random_erasing: float = Field(
        0.0, ge=0, le=1, description="share of the images in which a rectangle is greyed out"
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the weights' moving average, which is then what is kept; 0: none",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="which epoch's weights, by validation accuracy"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of activations and products in training"
    )


class Student(Network):
    """The network whose size the study shrinks."""


class Teacher(Network, Training):
    """The network whose soft labels the student learns from: trained once, or read from `weights`.

    A teacher stopped early can teach a small student better: Cho & Hariharan 2019,
    arXiv:1910.01348.
    """

    architecture: str = Field("resnet50", description="as the student's")
    weights: str | None = Field(None, description="a checkpoint: .safetensors, .pt or .pth")
    start: str | None = Field(
        None,
        json_schema_extra=LATER,
        description="a checkpoint that its training begins from; a head for other classes is drawn"
        " anew",
    )
    members: int = Field(
        1,
        ge=1,
        le=16,
        description="an ensemble: trained with seed, seed + 1, …, their logits averaged",
    )
    epochs: int = Field(20, ge=1, description="passes over the training images")
    epoch: int | None = Field(
        None, ge=1, description="the weights after this one of `epochs`, whatever `keep` says"
    )
    per_fold: bool = Field(
        True,
        json_schema_extra=LATER,
        description="trained anew for each fold that students hold out; false: one for all, which"
        " has seen the labels of the others",
    )
    learning_rate: float = Field(1e-3, gt=0, description="the schedule's highest")

    @property
    def shared(self) -> bool:
        """Whether one teacher serves every fold."""
        return self.weights is not None or not self.per_fold

    def data(self, data: Data) -> Data:
        """What it is trained on, as the teacher of students on `data`: it holds out what they do,
        or where it is shared, fold 0.
        """
        fold = 0 if self.shared else data.fold
        return data.model_copy(update={"fold": fold, "train_on_validation": False})

    @model_validator(mode="after")
    def _weights_are_used_or_trained_on(self) -> Self:
        if self.weights is not None and self.start is not None:
            raise ValueError("weights are used as they are, start is trained further: give one")
        return self

    @model_validator(mode="after")
    def _epoch_is_one_of_the_epochs(self) -> Self:
        if self.epoch is not None and self.epoch > self.epochs:
            raise ValueError(f"epoch must be one of the {self.epochs} epochs, got {self.epoch}")
        return self


class Distillation(Frozen):
    """L = alpha * T^2 * KL(teacher || student at T) + (1 - alpha) * cross-entropy. alpha weighs the
    teacher.

    `loss` puts another divergence in the place of KL (see distill/losses.py).
    """

    alpha: float = Field(
        0.3, ge=0, le=1, description="weight of the teacher; 1 - alpha is that of the labels"
    )
    temperature: float = Field(
        5.0, gt=0, description="by which logits are divided: the higher, the softer"
    )
    scale_by_t_squared: bool | None = Field(
        None, description="null: where the loss's gradient falls with T²; not correlation's"
    )
    loss: Literal["kl", "standardized", "decoupled", "correlation"] = Field(
        "kl", description="how student and teacher are held against each other"
    )
    beta: float = Field(
        2.0, ge=0, description="decoupled: weight of the wrong classes among each other"
    )
    standard_deviation: Literal["sample", "population"] = Field(
        "sample",
        description=(
            "standardized: over classes - 1, as its authors; population, over classes, as kdexp did"
            " at first"
        ),
    )

    @property
    def times_t_squared(self) -> bool:
        """Whether the distillation term is multiplied by T²."""
        return (
            self.loss != "correlation"
            if self.scale_by_t_squared is None
            else self.scale_by_t_squared
        )


class Recipe(Frozen):
    """The complete description of one training."""

    data: Data = Field(Data(), description="which images, and how they are cut and shown")
    teacher: Teacher = Field(Teacher(), description="the network that teaches")
    student: Student = Field(Student(), description="the network whose size the study shrinks")
    distillation: Distillation = Field(Distillation(), description="what is learned of the teacher")
    training: Training = Field(Training(), description="how the student is trained")

    @model_validator(mode="after")
    def _epochs_are_chosen_on_images_held_out(self) -> Self:
        if self.data.train_on_validation and self.training.keep != "last":
            raise ValueError(
                "data.train_on_validation leaves no images to choose an epoch by: it needs"
                " training.keep: last"
            )
        return self

    @property
    def losses(self) -> list[str]:
        """Every distillation loss that is trained with."""
        return [self.distillation.loss]

    def value(self, path: str) -> Any:
        """The value at a dotted path, as plain JSON. Raises ValueError where there is none."""
        node: Any = self.model_dump(mode="json")
        for step in path.split("."):
            if not isinstance(node, Mapping) or step not in node:
                raise ValueError(f"search.{path}: no such key{nearest(path, flatten(self))}")
            node = node[step]
        if isinstance(node, Mapping):
            raise ValueError(
                f"search.{path}: is a section; search over one of its keys ({', '.join(node)})"
            )
        return node

    def replace(self, values: Mapping[str, Any]) -> Self:
        """The same with `values` at their dotted paths, validated again. Raises ConfigError."""
        tree = self.model_dump(mode="json")
        for path, value in values.items():
            assign(tree, path, value, source="recipe")
        return validate(type(self), tree, source="recipe")


# --- search, study, selection ------------------------------------------------------------------


class Range(Frozen):
    """Numbers from low to high, both included."""

    low: int | float = Field(description="the least value")
    high: int | float = Field(description="the greatest value")
    log: bool = Field(False, description="searched on a logarithmic scale")
    step: int | float | None = Field(None, description="only every so many from low on")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a log range must start above 0, got low {self.low}")
        if self.step is not None and (self.log or self.step <= 0):
            raise ValueError("step must be positive and cannot be combined with log")
        if (
            isinstance(self.low, int)
            and isinstance(self.high, int)
            and isinstance(self.step, float)
        ):
            raise ValueError(f"a range of whole numbers needs a whole step, got {self.step}")
        return self

    def __contains__(self, value: Any) -> bool:
        inside = isinstance(value, int | float) and self.low <= value <= self.high
        return inside and (
            self.step is None
            or math.isclose(((value - self.low) / self.step + 0.5) % 1, 0.5, abs_tol=1e-9)
        )

    @property
    def last(self) -> int | float:
        """The greatest value that is searched: `high`, or where the steps from `low` end before
        it.
        """
        if self.step is None:
            return self.high
        # 0.3 is three steps of 0.1
        low, high, step = (Decimal(str(value)) for value in (self.low, self.high, self.step))
        if (high - low) % step == 0:
            return self.high
        last = low + (high - low) // step * step
        return (
            int(last) if isinstance(self.low, int) and isinstance(self.high, int) else float(last)
        )

    def apart(self, one: float, other: float) -> float:
        """How far two values lie apart: a share of the range, on the log scale where that is
        searched.
        """
        if one == other:
            return 0.0
        # a control's alpha may lie outside
        if not (self.low <= min(one, other) and max(one, other) <= self.high):
            return math.inf
        if self.log:
            return abs(math.log(one) - math.log(other)) / (math.log(self.high) - math.log(self.low))
        return abs(one - other) / (self.high - self.low)

    def ends(self) -> tuple[int | float, ...]:
        """The values that must be valid for all in between to be."""
        return (self.low, self.high)


class Choices(Frozen):
    """A finite list of values."""

    choices: tuple[Scalar | tuple[int, ...] | None, ...] = Field(
        min_length=1, description="one of these"
    )

    @model_validator(mode="after")
    def _each_is_another(self) -> Self:
        seen = set[Hashable]()
        for choice in self.choices:
            if choice in seen:
                raise ValueError(f"choices: {show(choice)} stands twice; every choice once")
            seen.add(choice)
        return self

    def __contains__(self, value: Any) -> bool:
        return (tuple(value) if isinstance(value, list) else value) in self.choices

    def ends(self) -> tuple[Any, ...]:
        """Every value."""
        return self.choices


def _kind(value: Any) -> str:
    return (
        "choices"
        if isinstance(value, Choices) or (isinstance(value, Mapping) and "choices" in value)
        else "range"
    )


Dimension = Annotated[
    Annotated[Choices, Tag("choices")] | Annotated[Range, Tag("range")],
    Discriminator(_kind),
]


def name_for(text: str, otherwise: str) -> str:
    """The study's name that comes nearest to a text, such as a folder's name; `otherwise` where
    nothing of it can be kept.
    """
    kept = re.sub(r"[^\w.+]+", "-", study_name(text)).lstrip("-.")[:NAME_LENGTH].strip("-.")
    return kept if re.search(r"\w", kept) else otherwise


class Study(Frozen):
    """How the search space is searched."""

    objective: Objective = Field(
        "smallest", description="what the search aims at: see kdexp/search/objective.py"
    )
    trials: int = Field(
        50, ge=1, description="trained ones; a proposal that is not trained is none"
    )
    sampler: Literal["tpe", "random", "gp", "grid"] = Field(
        "gp", description="grid: every combination of choices once"
    )
    pruner: Literal["none", "median", "hyperband", "successive_halving"] = Field(
        "none", description="Optuna's, by which a trial that lags behind is ended"
    )
    early_stop: bool = Field(
        False,
        description="end a trial that can no longer be selected: see kdexp/search/stopping.py",
    )
    repeats: int = Field(
        10,
        ge=1,
        description="smallest: the most trainings of a recipe that meets the bar, each with another"
        " seed on another fold, until it is sure; 1: one decides",
    )
    retries: int = Field(
        3, ge=0, description="how often a trial that broke off without getting on is tried again"
    )
    seed: int = Field(8787, ge=0, lt=2**32, description="of the sampler, and of what is repeated")

    @model_validator(mode="after")
    def _a_frontier_is_trained_to_its_end(self) -> Self:
        if self.objective == "pareto":
            if self.pruner != "none":
                raise ValueError(
                    f"pruner {self.pruner} ranks by one objective and pareto has two; set"
                    " study.pruner to none"
                )
            if self.early_stop:
                raise ValueError(
                    "early_stop ends what is below the bar and pareto wants it; set"
                    " study.early_stop to false"
                )
        return self


class Selection(Frozen):
    """Which trial wins: the smallest whose validation accuracy meets the bar, or the most accurate
    within the size limit (and over the bar)."""

    accuracy_bar: float = Field(
        0.924, ge=0, le=1, description="validation accuracy that the selected model must reach"
    )
    size: Size = Field("parameters", description="in which smaller is better")
    limit: int | None = Field(
        None, ge=1, description="no selected model is larger, in units of `size`"
    )
    goal: Literal["smallest", "most_accurate"] = Field(
        "smallest", description="the smallest over the bar, or the most accurate within the limit"
    )
    confidence: float | None = Field(
        None,
        gt=0.5,
        lt=1,
        description="at which the bar must be cleared; null: 0.95 where a study repeats, else as"
        " estimated",
    )


class Sweep(Recipe):
    """A whole sweep file."""

    name: str = Field(description="of the study; what is begun again under it goes on")
    search: dict[str, Dimension] = Field(
        {}, description="ranges and choices by dotted path, such as training.learning_rate"
    )
    study: Study = Field(Study(), description="how the search space is searched")
    selection: Selection = Field(Selection(), description="which trial wins")

    @field_validator("name")
    @classmethod
    def _kept_as(cls, name: str) -> str:
        kept = study_name(name)
        bad = "".join(dict.fromkeys(c for c in kept if c in NOT_IN_NAMES or not c.isprintable()))
        if (
            bad
            or not re.match(r"[^.\-]", kept)
            or not re.search(r"\w", kept)
            or len(kept) > NAME_LENGTH
        ):
            instead = name_for(kept, "study")
            why = f", and {show(name)} holds {show(bad)}" if bad else f", got {show(name)}"
            raise ValueError(
                f"a name is of 1 to {NAME_LENGTH} letters, digits and signs, begins with neither ."
                f" nor -, and holds none of {' '.join(NOT_IN_NAMES)}{why}; give it another (name: …"
                f" in the file, or --set name={instead})"
            )
        return kept

    @property
    def recipe(self) -> Recipe:
        """The file's own values: what trial 0 trains."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.model_fields})

    @property
    def repeats(self) -> bool:
        """Whether a trial that meets the bar is trained again, until it is sure."""
        return self.study.objective == "smallest" and self.study.repeats > 1

    @property
    def shared_training(self) -> Training | None:
        """The training whose seed and epochs all trials share; None where they are searched
        over.
        """
        deciding = {f"training.{key}" for key in ("seed", "epochs", "max_steps", "batch_size")}
        return None if deciding & self.search.keys() else self.training

    @property
    def student_choices(self) -> list[dict[str, Any]]:
        """Every choice of a part of the student by itself, and both ends of a range of an option of
        one's own, by path.
        """
        dimensions = {
            path: dimension
            for path, dimension in self.search.items()
            if path.startswith("student.")
        }
        return [
            {path: value}
            for path, found in dimensions.items()
            if isinstance(found, Choices) or path.startswith("student.options.")
            for value in found.ends()
        ]

    @property
    def losses(self) -> list[str]:
        """Every distillation loss that is trained with."""
        dimension = self.search.get("distillation.loss")
        return (
            [str(choice) for choice in dimension.choices]
            if isinstance(dimension, Choices)
            else super().losses
        )

    @property
    def beyond_controls(self) -> list[dict[str, Any]]:
        """A grid's points, by path: every combination of choices once, the last path's changing
        fastest. Without those that trials 0 and 1 train, and of those with labels only, which learn
        alike however they would distil, one each.
        """
        axes = [
            dimension.choices
            for dimension in self.search.values()
            if isinstance(dimension, Choices)
        ]
        recipe, learned = self.recipe, dict[Hashable, str]()

        def learns(point: Mapping[str, Any]) -> tuple[str, ...]:
            """The same for points that learn alike. Each section's part is made once: 10,000
            recipes would take seconds.
            """
            found = []
            for section in SEARCHABLE:
                part = {
                    path: value for path, value in point.items() if path.startswith(f"{section}.")
                }
                key = section, *part.items()
                if key not in learned:
                    learned[key] = _learns(getattr(recipe.replace(part), section))
                found.append(learned[key])
            return tuple(found)

        seen = {learns({}), learns({"distillation.alpha": 0.0})}
        points = []
        for point in (dict(zip(self.search, values, strict=True)) for values in product(*axes)):
            if (here := learns(point)) not in seen:
                seen.add(here)
                points.append(point)
        return points

    @model_validator(mode="after")
    def _search_fits_the_recipe(self) -> Self:
        leaves = flatten(self.recipe)
        for path, dimension in self.search.items():
            if path.split(".")[0] not in SEARCHABLE:
                searchable = [leaf for leaf in leaves if leaf.split(".")[0] in SEARCHABLE]
                raise ValueError(
                    f"search.{path}: not searchable{nearest(path, searchable)}; a search ranges"
                    f" over {', '.join(SEARCHABLE)} (data and teacher are fixed, so trials compare)"
                )
            current = self.recipe.value(path)
            for value in dimension.ends():
                try:
                    self.recipe.replace({path: value})
                except ConfigError as error:
                    raise ValueError(
                        f"search.{path}: goes beyond what {path} may be: {error}"
                    ) from None
            if current not in dimension:
                raise ValueError(
                    f"search.{path}: the recipe's own value {current} is not in the search space; "
                    f"trial 0 always trains it, so widen the search or change {path}"
                )
        return self

    @model_validator(mode="after")
    def _a_grid_is_of_choices(self) -> Self:
        if self.study.sampler != "grid":
            return self
        ranges = [path for path, dimension in self.search.items() if isinstance(dimension, Range)]
        if ranges:
            raise ValueError(
                f"study.sampler: a grid has choices only; search.{ranges[0]} is a range, list its"
                " values as choices"
            )
        if self.study.objective == "smallest":
            raise ValueError(
                "study.sampler: a grid is trained whole, it aims at nothing; set study.objective to"
                " accuracy"
            )
        if self.study.trials > (most := CONTROLS + len(self.beyond_controls)):
            raise ValueError(
                f"study.trials: got {self.study.trials}, but the grid has {most} trials, controls"
                " included; set it to that"
            )
        return self

    @model_validator(mode="after")
    def _what_is_erased_is_the_same_for_all(self) -> Self:
        if "training.random_erasing" in self.search or (
            self.training.random_erasing and self.shared_training is None
        ):
            raise ValueError(
                "training.random_erasing is drawn anew in every epoch, and the teacher's logits are"
                " cached for these draws: neither it nor training.seed, epochs, max_steps or"
                " batch_size may then stand in search"
            )
        return self

    @model_validator(mode="after")
    def _trials_are_judged_on_images_held_out(self) -> Self:
        if self.data.train_on_validation:
            raise ValueError(
                "data.train_on_validation: trials are judged on validation images, so a sweep file"
                " holds them out; kdexp confirm --train-and-validation trains the confirmed model"
                " on them"
            )
        return self

    @model_validator(mode="after")
    def _smallest_can_be_aimed_at(self) -> Self:
        if self.study.objective == "smallest":
            if self.selection.goal != "smallest":
                raise ValueError(
                    f"selection.goal: {self.selection.goal} is not what study.objective smallest"
                    " searches for; set study.objective to accuracy, or selection.goal to smallest"
                )
            if self.search and not any(
                path.startswith("student.") and path != "student.dropout" for path in self.search
            ):
                raise ValueError(
                    "study.objective: smallest needs a student whose size is searched over; "
                    "add student.channels or the like to search, or set study.objective to accuracy"
                )
        return self


def as_meant(recipe: R) -> R:
    """With the T² factor as it comes out, where it was left to the loss and every loss in question
    has the same.
    """
    how = recipe.distillation
    found = {how.model_copy(update={"loss": loss}).times_t_squared for loss in recipe.losses}
    if len(found) > 1:
        return recipe
    return recipe.model_copy(
        update={"distillation": how.model_copy(update={"scale_by_t_squared": found.pop()})}
    )


def _learns(section: BaseModel) -> str:
    """What a recipe's section says of how it trains: with labels only, the distillation says
    nothing more.
    """
    if isinstance(section, Distillation):
        if section.alpha == 0:
            return "labels only"
        section = section.model_copy(update={"scale_by_t_squared": section.times_t_squared})
    return section.model_dump_json()


def load(path: Path, overrides: list[str] | None = None) -> Sweep:
    """The sweep file at `path` with `KEY=VALUE` overrides applied, whole and validated.

    Raises ConfigError naming the file, the key, the value and what is allowed.
    """
    try:
        with path.open("rb") as file:  # which may be a pipe
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such sweep file{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{path}: is a folder; name a sweep file, such as sweeps/digits.yaml"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: over {MAX_FILE_BYTES:,} bytes is no sweep file")
    text = decoded(content, str(path))
    tree = parse(text, str(path))
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a sweep file is a mapping of keys (name, data, teacher, …), got {show(tree)}"
        )
    tree.setdefault("name", path.stem)
    given: dict[str, str] = {}
    for override in overrides or []:
        key, separator, value = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(
                f"--set {override}: write it as KEY=VALUE, for example --set training.epochs=10"
            )
        assign(tree, key.strip(), parse(value, f"--set {override}"), source=f"--set {override}")
        given.pop(key.strip(), None)  # the last one counts
        given[key.strip()] = override
    source = Source(str(path), text, given)
    return validate(Sweep, _with_a_factor_to_begin_with(tree), source)


def _with_a_factor_to_begin_with(tree: dict[str, Any]) -> dict[str, Any]:
    """Where the T² factor is searched over and not set, trial 0 has it as it would come out."""
    search, how = tree.get("search"), tree.get("distillation") or {}
    if (
        not (isinstance(search, dict) and SCALE in search and isinstance(how, dict))
        or "scale_by_t_squared" in how
    ):
        return tree
    return {**tree, "distillation": {**how, "scale_by_t_squared": how.get("loss") != "correlation"}}


def upgrade(stored: dict[str, Any]) -> dict[str, Any]:
    """A recipe or sweep as some version stored it, in today's words: the one place that knows how
    they were called before, and what was done in the place of keys that there were not.
    """
    how, search, study = (stored.get(section) for section in ("distillation", "search", "study"))
    if isinstance(study, dict):
        # before there was a choice of objectives a study aimed at accuracy; nothing was repeated
        stored = {**stored, "study": {"objective": "accuracy", "repeats": 1, **study}}
    if not isinstance(how, dict):  # damaged: validation says so
        return stored
    searched = search.get("distillation.loss") if isinstance(search, dict) else None
    losses = [
        how.get("loss"),
        *(searched.get("choices") or () if isinstance(searched, dict) else ()),
    ]
    then = {
        "scale_by_t_squared": True,
        **({"standard_deviation": "population"} if "standardized" in losses else {}),
    }
    return {**stored, "distillation": {**then, **how}}


def recorded(text: str, source: str) -> Sweep:
    """A sweep as a study recorded it."""
    return validate(Sweep, upgrade(json.loads(text)), source)


def select_rule(rule: Selection, changes: Mapping[str, Any]) -> Selection:
    """A selection rule with changes, validated again. Raises ConfigError."""
    return validate(Selection, rule.model_dump(mode="json") | dict(changes), source="selection")


def flatten(model: BaseModel) -> dict[str, Any]:
    """Every leaf of a config by its dotted path: {"distillation.alpha": 0.3, …}."""
    return dict(_leaves(model.model_dump(mode="json"), ""))


def differences(one: BaseModel, other: BaseModel) -> list[str]:
    """What differs between two configs, as 'training.epochs 5 → 6'."""
    left, right = (
        flatten(as_meant(model) if isinstance(model, Recipe) else model) for model in (one, other)
    )
    return [
        f"{path} {show(left.get(path))} → {show(right.get(path))}"
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    ]


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("sweeps")
    return nearest(path.name, [file.name for file in sorted(folder.glob("*.y*ml"))])
