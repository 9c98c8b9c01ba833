"""What a student says of images from anywhere: just what it says of the same pixels in its data set,
by class name.
"""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, drain, stores_in, tiny_sweep
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_digits

from kdexp import KdexpError
from kdexp.config import Data, Recipe
from kdexp.distill.datasets import _split, load_splits
from kdexp.distill.evaluate import logits_of
from kdexp.distill.images import read
from kdexp.distill.inputs import Input, blank, open_image
from kdexp.files import check_output
from kdexp.runs.bench import Bench
from kdexp.runs.prepare import prepare
from kdexp.runs.recording import Entry, recorded
from kdexp.runs.records import load_student
from kdexp.runs.tracking import Tracking
from kdexp.screen import show_predictions
from kdexp.select.predict import Predictions, predict, write_csv
from kdexp.select.promote import register
from kdexp.select.variants import made
from kdexp.settings import Settings

DIGITS = tiny_sweep().recipe.replace({"data.channels": 3, "training.epochs": 6})
CLASSES = ("Blüte [rot]", "cat, small", "dog")


def trained(recipe: Recipe, settings: Settings) -> str:
    """The run ID of a student of this recipe."""
    tracking = Tracking(settings)
    bench = Bench(settings, tracking, CPU, tracking.experiment("tiny"))
    _, prepared = drain(prepare(recipe, bench))
    with recorded(recipe, prepared, bench, Entry("train", "train tiny")) as recording:
        list(recording.epochs())
    return recording.run_id


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, empty_store) -> tuple[str, Settings, Tracking]:
    """A student of scikit-learn's digits, grey images on three channels."""
    settings = stores_in(tmp_path_factory.mktemp("digits"), empty_store)
    return trained(DIGITS, settings), settings, Tracking(settings)


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    """Three digits as an image folder of other names."""
    root, digits = tmp_path_factory.mktemp("data") / "shots", load_digits()
    for name, label in zip(CLASSES, (0, 1, 7), strict=True):
        (root / name).mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:40]):
            picture = Image.fromarray((image * 255 / 16).round().astype(np.uint8))
            picture.resize((32, 24)).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory, shots, empty_store) -> tuple[str, Settings, Tracking]:
    """A student of that folder, whose images it saw in 8x8."""
    stores = stores_in(tmp_path_factory.mktemp("folder"), empty_store).stores
    settings = Settings(stores=stores, data_dir=shots.parent)
    changes = {
        "data.dataset": "image_folder",
        "data.path": "shots",
        "data.image_size": 8,
        "data.channels": 1,
        "training.epochs": 10,
        "training.batch_size": 16,
        "teacher.batch_size": 16,
    }
    return trained(tiny_sweep().recipe.replace(changes), settings), settings, Tracking(settings)


def answers(run: tuple[str, Settings, Tracking], *paths: Path, name: str = "") -> Predictions:
    run_id, settings, tracking = run
    return drain(predict(name or run_id, paths, settings, tracking, CPU))[1]


def picture(file: Path, values: np.ndarray, mode: str = "L", **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).convert(mode).save(file, **options)
    return file


# --- the same pixels, the same answer ---


def test_images_of_the_data_set_get_the_answers_that_they_get_there(digits_run, tmp_path) -> None:
    run_id, _, tracking = digits_run
    validation = load_splits(DIGITS.data).validation
    files = [
        picture(tmp_path / f"{number:03}.png", pixels[0].numpy())
        for number, pixels in enumerate(validation.images)
    ]
    done = answers(digits_run, *files)
    module = load_student(tracking.read(run_id), DIGITS, validation, tracking)
    expected = logits_of(module, validation).softmax(1)
    top, labels = expected.topk(2)
    assert [row.label for row in done.rows] == [str(int(label)) for label in labels[:, 0]]
    assert [row.second_label for row in done.rows] == [str(int(label)) for label in labels[:, 1]]
    assert torch.allclose(
        torch.tensor([[row.probability, row.second_probability] for row in done.rows]),
        top,
        atol=1e-6,
    )
    right = sum(
        row.label == str(int(label))
        for row, label in zip(done.rows, validation.labels, strict=True)
    )
    recorded = tracking.read(run_id).metrics["val_accuracy"]
    assert right == round(recorded * len(validation)) > 0.5 * len(validation)


def test_a_grey_image_on_colour_channels_a_larger_one_and_a_lossless_copy_are_the_same(
    digits_run, tmp_path
) -> None:
    pixels = load_splits(DIGITS.data).validation.images[3, 0].numpy()
    forms = [
        picture(tmp_path / "grey.png", pixels),
        picture(tmp_path / "colour.png", pixels, "RGB"),
        picture(tmp_path / "lossless.webp", pixels, "RGB", lossless=True),
        picture(tmp_path / "sixteen.png", pixels),
    ]
    Image.fromarray(pixels.astype(np.uint16) * 257).save(forms[-1])
    done = answers(digits_run, *forms)
    assert len({(row.label, row.probability) for row in done.rows}) == 1
    assert done.notes == ("1 of 16 bits: scaled to 8 (value / 257)",)


def test_a_folders_images_are_prepared_as_they_were_for_training(folder_run, shots) -> None:
    run_id, settings, tracking = folder_run
    recipe = Recipe.model_validate_json(tracking.read_text(run_id, "config.json"))
    splits = load_splits(recipe.data, settings.data_dir)
    done = answers(folder_run, shots)
    assert len(done.rows) == 120
    assert done.classes == splits.train.classes == tuple(sorted(CLASSES))
    right = sum(Path(row.path).parent.name == row.label for row in done.rows)
    assert right > 100
    module = load_student(tracking.read(run_id), recipe, splits.train, tracking)
    known = {
        picture.numpy().tobytes(): splits.train.classes[int(answer)]
        for picture, answer in zip(
            splits.train.images, logits_of(module, splits.train).argmax(1), strict=True
        )
    }
    same = [
        known[pixels] == row.label
        for row in done.rows
        if (pixels := read(Path(row.path), 8, 1).pixels.tobytes()) in known
    ]
    assert len(same) >= len(splits.train)
    assert all(same)


@pytest.mark.parametrize("channels", [1, 3])
def test_cifar10s_images_are_made_grey_as_its_data_set_makes_them(tmp_path, channels) -> None:
    data = Data(dataset="cifar10", channels=channels)
    pixels = np.random.default_rng(8787).integers(0, 256, (5, 3, 32, 32)).astype(np.uint8)
    names = tuple("0123456789")
    split = _split((pixels, np.arange(5), names), data)
    like = blank(Input.of(split), data)
    for number, each in enumerate(pixels):
        file = tmp_path / f"{number}.png"
        Image.fromarray(each.transpose(1, 2, 0)).save(file)
        assert np.array_equal(open_image(file, data, like).pixels, split.images[number].numpy())


# --- what people have ---


@pytest.fixture
def mixed(tmp_path, shots) -> Path:
    """Modes, formats and sizes side by side, names with spaces and umlauts, one that is broken."""
    source, root = Image.open(shots / CLASSES[0] / "00.png"), tmp_path / "my pictures"
    (root / "Schöne Ausflüge" / "x").mkdir(parents=True)
    source.resize((31, 17)).save(root / "Schöne Ausflüge" / "grüne Wiese.jpg")
    source.convert("RGB").resize((200, 100)).save(root / "Schöne Ausflüge" / "x" / "big.webp")
    source.convert("P").save(root / "palette.gif")
    source.convert("RGBA").save(root / "a b.png")
    source.convert("1").resize((3, 5)).save(root / "tiny.PNG")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def test_all_images_below_a_folder_are_done_and_what_cannot_be_read_is_named(
    folder_run, mixed
) -> None:
    done = answers(folder_run, mixed)
    names = [str(Path(row.path).relative_to(mixed)) for row in done.rows]
    assert sorted(names) == [
        "Schöne Ausflüge/grüne Wiese.jpg",
        "Schöne Ausflüge/x/big.webp",
        "a b.png",
        "palette.gif",
        "tiny.PNG",
    ]
    assert {row.label for row in done.rows} <= set(CLASSES)
    for row in done.rows:
        assert 1 >= row.probability >= row.second_probability >= 0
        assert row.label != row.second_label
    (broken,) = done.unreadable
    assert broken.startswith(f"{mixed}/broken.png ")
    assert done.left_out == {"hidden": 1, ".txt": 1}
    assert sum(done.counts.values()) == 5


def test_the_csv_has_a_row_for_each_image_and_reads_back(folder_run, mixed, tmp_path) -> None:
    done = answers(folder_run, mixed, mixed / "a b.png")
    write_csv(done, tmp_path / "out" / "p.csv")
    with (tmp_path / "out" / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path",
        "label",
        "probability",
        "second_label",
        "second_probability",
    ]
    assert [row["path"] for row in rows] == [row.path for row in done.rows], "each file once"
    for text, row in zip(rows, done.rows, strict=True):
        assert (text["label"], text["second_label"]) == (row.label, row.second_label)
        assert float(text["probability"]) == pytest.approx(row.probability, abs=1e-6)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["p.csv"]


def test_a_file_that_is_given_is_tried_whatever_it_is_called(folder_run, mixed, tmp_path) -> None:
    odd = shutil.copy(mixed / "a b.png", tmp_path / "photo.download")
    (row,) = answers(folder_run, Path(odd)).rows
    assert row.path == str(odd)


def test_the_screen_shows_few_images_each_and_always_a_summary(folder_run, mixed, shots) -> None:
    def screen(done: Predictions, file: Path | None = None) -> str:
        console = Console(file=StringIO(), width=80, soft_wrap=True)
        show_predictions(console, done, file)
        return console.file.getvalue()

    done = answers(folder_run, mixed)
    text = screen(done, Path("p.csv"))
    for row in done.rows:
        (line,) = [line for line in text.splitlines() if line.startswith(row.path)]
        assert row.label in line, "also a name with brackets"
    assert "not read  " in text
    assert "Images:   5, 1 not read, 2 left out: " in text
    assert "Written:  p.csv, 5 rows" in text
    many = screen(answers(folder_run, shots))
    assert "Images:   120\n" in many
    assert "00.png" not in many
    assert "--out predictions.csv" in many


# --- which student ---


def test_a_registered_model_answers_in_the_form_that_is_registered(digits_run, tmp_path) -> None:
    run_id, settings, tracking = digits_run
    run = made(tracking.read(run_id), DIGITS, "int8", load_splits(DIGITS.data), tracking)
    address = register(run, DIGITS, "tiny", "smallest", "…", settings, tracking, "int8")
    file = picture(tmp_path / "x.png", load_splits(DIGITS.data).validation.images[0, 0].numpy())
    by_alias = answers(digits_run, file, name=address)
    assert (by_alias.run_id, by_alias.variant) == (run_id, "int8")
    by_version = answers(digits_run, file, name="models:/tiny/1")
    assert by_version.rows == by_alias.rows
    as_trained = answers(digits_run, file)
    assert as_trained.variant == "as trained"
    assert as_trained.rows[0].label == by_alias.rows[0].label
    assert as_trained.rows != by_alias.rows


def test_the_data_set_need_not_be_there(folder_run, mixed, tmp_path) -> None:
    run_id, settings, tracking = folder_run
    away = Settings(stores=settings.stores, data_dir=tmp_path / "nowhere")
    done = drain(predict(run_id, [mixed], away, tracking, CPU))[1]
    assert done.rows == answers(folder_run, mixed).rows
    input_file = json.loads(tracking.read_text(run_id, "input.json"))
    assert input_file == {"channels": 1, "height": 8, "width": 8, "classes": sorted(CLASSES)}


def test_a_run_of_an_earlier_version_needs_its_data_set_for_the_names(
    folder_run, mixed, tmp_path
) -> None:
    run_id, settings, tracking = folder_run
    sums = tracking.read(run_id).tags["kdexp.artifacts"]
    without = {name: sha for name, sha in json.loads(sums).items() if name != "input.json"}
    expected = answers(folder_run, mixed).rows
    tracking.tag(run_id, {"kdexp.artifacts": json.dumps(without)})
    try:
        assert answers(folder_run, mixed).rows == expected
        away = Settings(stores=settings.stores, data_dir=tmp_path / "nowhere")
        with pytest.raises(KdexpError, match="former version of kdexp, without its class names"):
            drain(predict(run_id, [mixed], away, tracking, CPU))
    finally:
        tracking.tag(run_id, {"kdexp.artifacts": sums})


def test_a_run_that_an_earlier_version_recorded_answers(tmp_path) -> None:
    """Out of the sample of such runs."""
    store = Path(__file__).parent / "witness" / "c3d1cbb.tar.xz"
    with tarfile.open(store) as archive:
        archive.extractall(tmp_path, filter="data")
    run_id = json.loads((tmp_path / "runs.json").read_text())["cnn"]
    settings = Settings(stores=tmp_path / "mlruns")
    tracking = Tracking(settings, make=False)
    recipe = Recipe.model_validate_json(tracking.read_text(run_id, "config.json"))
    validation = load_splits(recipe.data).validation
    file = picture(tmp_path / "x.png", validation.images[0, 0].numpy())
    (row,) = answers((run_id, settings, tracking), file).rows
    assert row.label in validation.classes


# --- what goes wrong ---


def test_what_cannot_be_done_is_one_clear_line(digits_run, mixed, tmp_path) -> None:
    run_id, _, tracking = digits_run
    teacher = tracking.find("teacher", {})[0].run_id
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    broken, good = mixed / "broken.png", mixed / "a b.png"
    cases = {
        "none.png: No such file or directory; give image files": (run_id, tmp_path / "none.png"),
        "empty: no image there (left out: 1 .txt)": (run_id, tmp_path / "empty"),
        "None of 1 images can be read: ": (run_id, broken),
        "No run 'nope'": ("nope", good),
        "is a teacher; only students go with kdexp predict": (teacher, good),
        "no address of a registered model; write models:/NAME@ALIAS": ("models:/a/b/c", good),
        "models:/none@smallest: not in the embedded store": ("models:/none@smallest", good),
        "models:/none/3: not in the embedded store": ("models:/none/3", good),
    }
    for says, (name, path) in cases.items():
        with pytest.raises(KdexpError) as error:
            answers(digits_run, path, name=name)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(KdexpError, match="is a folder; name a file in it"):
        check_output("--out", tmp_path, "predictions.csv")
    done = answers(digits_run, good)
    with pytest.raises(KdexpError, match="cannot be written: "):
        write_csv(done, broken / "p.csv")
