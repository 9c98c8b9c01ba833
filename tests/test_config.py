"""The sweep file: documented defaults, exact round trip, and every mistake named before any
work.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from kdexp.config import (
    LATER,
    Augment,
    ConfigError,
    Data,
    Distillation,
    Recipe,
    Sweep,
    Teacher,
    Training,
    differences,
    flatten,
    identity,
    load,
    recorded,
    select_rule,
    upgrade,
)
from kdexp.search.space import learns_alike

SWEEPS = sorted((Path(__file__).parents[1] / "sweeps").glob("*.yaml"))
DIGITS = Path(__file__).parents[1] / "sweeps" / "digits.yaml"


def test_the_defaults_are_the_documented_recipe() -> None:
    recipe = Recipe()
    assert (recipe.distillation.alpha, recipe.distillation.temperature) == (0.3, 5.0)
    assert recipe.distillation.times_t_squared
    training = recipe.training
    assert (training.learning_rate, training.batch_size, training.epochs, training.seed) == (
        3e-4,
        128,
        500,
        8787,
    )
    assert (training.optimizer, training.weight_decay, training.schedule) == (
        "adam",
        1e-6,
        "cosine",
    )
    assert training.final_learning_rate == 1e-6
    assert (recipe.student.channels, recipe.student.hidden, recipe.student.dropout) == (
        (16, 32, 64),
        128,
        0.2,
    )
    assert (recipe.data.dataset, recipe.data.channels, recipe.data.mean, recipe.data.std) == (
        "fashion_mnist",
        3,
        0.5,
        0.5,
    )
    assert (recipe.data.augment.flip, recipe.data.augment.shift) == (True, 0)
    assert recipe.teacher.architecture == "resnet50"


def test_the_documented_sweep_holds_the_documented_values() -> None:
    sweep = load(DIGITS.with_name("fashion-mnist.yaml"))
    assert sweep.recipe == Recipe()
    assert (sweep.selection.accuracy_bar, sweep.selection.limit) == (0.924, 100_000)


def test_the_quick_sweep_keeps_alpha_temperature_and_learning_rate() -> None:
    quick = load(DIGITS.with_name("fashion-mnist-quick.yaml"))
    assert quick.distillation == Distillation()
    assert quick.training.learning_rate == Training().learning_rate
    assert quick.study.trials >= 8
    assert len(quick.search["student.channels"].choices) >= 3


def test_every_shipped_sweep_is_valid_and_round_trips_exactly() -> None:
    assert len(SWEEPS) == 5
    for path in SWEEPS:
        sweep = load(path)
        assert Sweep.model_validate_json(sweep.model_dump_json()) == sweep
        assert sweep.name == path.stem
        assert path.read_text().startswith("#"), "a sweep file says what it is for"


@given(
    st.floats(0, 1),
    st.floats(1e-6, 1e6),
    st.floats(1e-12, 10),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(1, 4096), min_size=1, max_size=6),
)
def test_any_recipe_round_trips_exactly(alpha, temperature, rate, seed, channels) -> None:
    recipe = Recipe().replace({
        "distillation.alpha": alpha, "distillation.temperature": temperature, "training.learning_rate": rate,
        "training.seed": seed, "student.channels": channels,
    })  # fmt: skip
    again = Recipe.model_validate_json(recipe.model_dump_json(indent=2))
    assert again == recipe
    assert (again.distillation.alpha, again.training.learning_rate) == (alpha, rate)


# --- the T² factor, and what earlier versions recorded ---


def of_an_earlier_version(sweep: Sweep) -> str:
    """The record of the same sweep when the factor was true by default and the deviation was over
    classes.
    """
    tree = json.loads(sweep.model_dump_json())
    tree["distillation"]["scale_by_t_squared"] = True
    del tree["distillation"]["standard_deviation"]
    return json.dumps(tree)


def test_the_factor_follows_the_loss_until_it_is_set() -> None:
    assert Distillation().times_t_squared
    recipe = Recipe().replace({"training.epochs": 3}).replace({"distillation.loss": "correlation"})
    assert not recipe.distillation.times_t_squared, "resolved too early, it would have stayed on"
    assert recipe.replace({"distillation.scale_by_t_squared": True}).distillation.times_t_squared
    assert not recipe.replace(
        {"distillation.loss": "kl", "distillation.scale_by_t_squared": False}
    ).distillation.times_t_squared


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, []),
        ({"distillation": {"loss": "decoupled"}}, []),
        ({"search": {"distillation.loss": {"choices": ["kl", "decoupled"]}}}, []),
        (
            {"distillation": {"loss": "correlation"}},
            ["distillation.scale_by_t_squared true → false"],
        ),
        (
            {"search": {"distillation.loss": {"choices": ["kl", "correlation"]}}},
            ["distillation.scale_by_t_squared true → null"],
        ),
        (
            {"distillation": {"loss": "standardized"}},
            ['distillation.standard_deviation "population" → "sample"'],
        ),
        (
            {"search": {"distillation.loss": {"choices": ["kl", "standardized"]}}},
            ["distillation.standard_deviation"],
        ),
    ],
)
def test_a_study_of_an_earlier_version_goes_on_where_its_trials_train_the_same(
    tiny, changes, differs
) -> None:
    sweep = Sweep.model_validate_json(json.dumps(json.loads(tiny.model_dump_json()) | changes))
    begun = recorded(of_an_earlier_version(sweep), "study")
    found = differences(begun, sweep)
    assert [one.startswith(other) for one, other in zip(found, differs, strict=True)] == [
        True
    ] * len(differs)
    told = {"scale_by_t_squared": True, "standard_deviation": begun.distillation.standard_deviation}
    set_back = json.loads(sweep.model_dump_json())
    set_back["distillation"] |= told
    assert differences(begun, Sweep.model_validate_json(json.dumps(set_back))) == [], (
        "and it says what to set"
    )


@pytest.mark.parametrize(("loss", "factor"), [("kl", True), ("correlation", False)])
def test_a_search_over_the_factor_begins_as_it_would_come_out(loss, factor) -> None:
    changes = [
        f"distillation.loss={loss}",
        "search.distillation.scale_by_t_squared={choices: [true, false]}",
    ]
    assert load(DIGITS, changes).distillation.scale_by_t_squared is factor
    unset = [
        "distillation.scale_by_t_squared=null",
        "search.distillation.scale_by_t_squared={choices: [true, null]}",
    ]
    assert load(DIGITS, unset).distillation.scale_by_t_squared is None


def test_recipes_that_differ_in_how_the_factor_is_written_learn_alike() -> None:
    on = Recipe().replace({"distillation.scale_by_t_squared": True})
    assert learns_alike(Recipe(), on)
    assert not learns_alike(Recipe(), on.replace({"distillation.scale_by_t_squared": False}))
    assert not learns_alike(
        *(recipe.replace({"distillation.loss": "correlation"}) for recipe in (Recipe(), on))
    )


@pytest.mark.parametrize("loss", ["kl", "standardized", "correlation"])
def test_a_record_of_an_earlier_version_is_read_as_it_was_meant(tiny, loss) -> None:
    recipe = tiny.recipe.replace({"distillation.loss": loss})
    then = Recipe.model_validate_json(
        json.dumps(upgrade(json.loads(of_an_earlier_version(recipe))))
    )
    assert then.distillation.times_t_squared
    assert (then.distillation.standard_deviation == "population") == (loss == "standardized")
    now = Recipe.model_validate_json(json.dumps(upgrade(json.loads(recipe.model_dump_json()))))
    assert now == recipe


MISTAKES = {  # override → what the message must hold
    "distillation.alpa=0.3": ["distillation.alpa", "unknown key", "did you mean alpha?"],
    "trainig={}": ["trainig", "did you mean training?"],
    "foo=1": ["foo", "valid: data, teacher, student"],
    "distillation.alpha=1.5": ["distillation.alpha", "1.5", "at least 0, at most 1"],
    "distillation.alpha=-0.1": ["-0.1", "at least 0"],
    "distillation.temperature=0": ["distillation.temperature", "got 0", "above 0"],
    "training.epochs=five": ["training.epochs", '"five"', "a whole number, at least 1"],
    "training.epochs=2.5": ["training.epochs", "2.5", "whole number"],
    "training.epochs=true": ["training.epochs", "true"],
    "training.learning_rate=.nan": ["training.learning_rate", "not a number", "above 0"],
    "training.learning_rate=.inf": ["training.learning_rate"],
    "training.optimizer=adm": ["'adam', 'adamw' or 'sgd'", "did you mean adam?"],
    "data.dataset=fasion_mnist": ["did you mean fashion_mnist?"],
    "data.channels=2": ["data.channels", "1 or 3"],
    "data.validation_fraction=1": ["below 1"],
    "data.path=x": ["image_folder"],
    "data=5": ["a section of keys"],
    "student.channels=[]": ["at least one stage"],
    "student.channels=[1, x]": ["student.channels.1", "integer"],
    "student.channels=[0]": ["student.channels.0", "0"],
    "student.architecture=resnet18": [],
    "teacher.architecture=resnet18": ["belong to architecture cnn"],
    "teacher.epoch=1000": ["epoch must be one of the", "got 1000"],
    "teacher.members=17": ["teacher.members", "17", "at most 16"],
    "student.stem=small": ["stem small belongs to torchvision's networks, not to cnn"],
    "student.blocks=0": ["student.blocks", "0"],
    "student.stride=3": ["student.stride", "3", "1 or 2"],
    "student={architecture: residul}": [],
    "training.ema=1": ["training.ema", "at least 0, below 1"],
    "training.label_smoothing=1": ["training.label_smoothing", "below 1"],
    "distillation.loss=dkd": ["'kl', 'standardized', 'decoupled' or 'correlation'"],
    "search.training.random_erasing={low: 0.0, high: 0.5}": ["neither it nor training.seed"],
    "study.sampler=grid": ["a grid has choices only; search.distillation.alpha is a range"],
    "student.stem=smal": ["did you mean small?"],
    "name=a/b": ["name", "a/b"],
    "study.sampler=tpee": ["did you mean tpe?"],
    "study.trials=0": ["study.trials", "at least 1"],
    "selection.size=params": ["'parameters', 'multiply_adds', 'bytes' or 'activation_bytes'"],
    "selection.accuracy_bar=92.4": ["92.4", "at most 1"],
    "search.distillation.alpha={low: 1, high: 0}": ["low must be below high"],
    "search.distillation.alpha={low: 0.5, high: 0.5}": ["low must be below high"],
    "search.distillation.alpha={low: 0, high: 1, log: true}": ["log range must start above 0"],
    "search.distillation.alpha={low: 0}": ["search.distillation.alpha.high: missing"],
    "search.distillation.alpha={low: 0, hgh: 1}": ["did you mean high?"],
    "search.distillation.alpha={low: 0, high: 1.5}": [
        "search.distillation.alpha",
        "1.5",
        "at most 1",
    ],
    "search.distillation.alfa={low: 0, high: 1}": ["did you mean distillation.alpha?"],
    "search.student={choices: [1]}": ["section"],
    "search.student.channels={choices: []}": ["search.student.channels"],
    "search.student.channels={choices: [[16, 32, 64], [4, 8], [4, 8]]}": [
        "search.student.channels",
        "[4, 8] stands twice",
    ],
    "search.student.blocks={choices: [0, 1]}": [
        "search.student.blocks: goes beyond what student.blocks may be"
    ],
    "search={student.dropout: {low: 0.0, high: 0.5}}": [
        "smallest needs a student whose size is searched over"
    ],
    "search.student.channels={choices: [[1, 2]]}": ["own value", "[16, 32, 64]", "trial 0"],
    "search.training.learning_rate={low: 0.1, high: 0.2}": ["own value 0.005"],
    "search.data.mean={low: 0, high: 1}": ["not searchable"],
    "search.student.hidden=5": ["search.student.hidden"],
    "training={epochs: 1, epochs: 2}": ["stands twice"],
    "training={epochs: [}": ["not valid YAML"],
    "training={a: &x 1, b: *x}": ["aliases"],
    "search.student.hidden={low: 16, high: 128, step: 0.5}": ["whole step"],
    "search.student.hidden={low: 16, high: 128, step: 5}": ["own value 128"],
    "novalue": ["KEY=VALUE"],
    "training.epochs.deep=3": ["training.epochs"],
    "name=2026-01-01": ["neither text"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_its_key_its_value_and_what_is_allowed(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(DIGITS, [override])
    message = str(error.value)
    assert "Traceback" not in message
    assert "pydantic" not in message
    for part in MISTAKES[override]:
        assert part in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a sweep file is a mapping"),
        (b"- 1\n- 2\n", "a sweep file is a mapping"),
        (b"name: [", "not valid YAML"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"a: &a [x]\nb: *a\n", "aliases"),
        (b"1: 2\n", "is not text"),
        (b"#" * 1_000_001, "is no sweep file"),
        (b"[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_sweep_file_is_said(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load(path)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean digits\.yaml\?"):
        load(DIGITS.with_name("digit.yaml"))
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)


def test_numbers_may_be_written_as_in_python() -> None:
    assert load(DIGITS, ["training.learning_rate=3e-3"]).training.learning_rate == 3e-3


def test_overrides_reach_any_depth_and_the_search_space() -> None:
    sweep = load(
        DIGITS,
        [
            "data.augment.shift=2",
            "search.distillation.alpha={low: 0.1, high: 0.9}",
            "study.trials=3",
        ],
    )
    assert sweep.data.augment.shift == 2
    assert sweep.search["distillation.alpha"].low == 0.1
    assert sweep.study.trials == 3


def test_flat_names_every_leaf_once() -> None:
    flat = flatten(Recipe())
    assert flat["distillation.alpha"] == 0.3
    assert flat["data.augment.flip"] is True
    assert json.loads(json.dumps(flat)) == flat


def test_differences_name_path_and_both_values() -> None:
    assert differences(Recipe(), Recipe().replace({"training.epochs": 6})) == [
        "training.epochs 500 → 6"
    ]


def test_a_rule_is_validated_when_changed() -> None:
    rule = load(DIGITS).selection
    assert select_rule(rule, {"accuracy_bar": 0.5}).accuracy_bar == 0.5
    with pytest.raises(ConfigError, match="did you mean bytes"):
        select_rule(rule, {"size": "byte"})


def test_the_fold_that_is_held_out_changes_no_digest_where_it_is_that_of_earlier_versions() -> None:
    assert "fold" not in identity(Data())
    assert "fold" not in identity(Recipe())
    assert '"fold":3' in identity(Data(fold=3))
    held = Data(fold=3, train_on_validation=True)
    assert Teacher(per_fold=False).data(held) == Data()
    assert Teacher().data(held) == Data(fold=3)
    before = json.loads(Recipe().model_dump_json())
    del before["data"]["fold"]
    assert Recipe.model_validate_json(json.dumps(upgrade(before))) == Recipe()
    with pytest.raises(ConfigError, match=r"data.fold"):
        Recipe().replace({"data.fold": -1})


def test_a_dial_that_is_added_later_and_left_alone_changes_no_digest() -> None:
    class Wider(Teacher):
        groups: int = Field(1, json_schema_extra=LATER)

    class Later(Augment):
        rotate: float = Field(0.0, json_schema_extra=LATER)

    class Rotated(Data):
        augment: Later = Later()

    assert identity(Wider()) == identity(Teacher())
    assert identity(Teacher()) == Teacher().model_dump_json(exclude={"per_fold", "start"})
    assert identity(Wider(groups=2)) != identity(Teacher())
    assert identity(Rotated()) == identity(Data())
    assert identity(Rotated(augment=Later(rotate=1.0))) != identity(Data())
