"""A registered model where it is served: pixels in, a label and its probability out, by MLflow alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pytest
from conftest import CPU, drain, stores_in, tiny_sweep, until
from faults.servers import free_port

from kdexp.config import Selection
from kdexp.distill.datasets import load_test
from kdexp.distill.inputs import Input
from kdexp.runs import describe
from kdexp.runs.tracking import Tracking
from kdexp.search.sweep import run_sweep
from kdexp.select.promote import promote

BYTES = Selection(accuracy_bar=0.2, size="bytes")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, empty_store):
    """A study of grey digits on three channels, with its model selected as trained, then as int8."""
    settings = stores_in(tmp_path_factory.mktemp("served"), empty_store)
    tracking, sweep = Tracking(settings), tiny_sweep()
    sweep = sweep.model_copy(update={"data": sweep.data.model_copy(update={"channels": 3})})
    drain(run_sweep(sweep, settings, tracking, CPU))
    study = tracking.study("tiny")
    first = promote(study, Selection(accuracy_bar=0.2), settings, tracking, CPU)
    return first, promote(study, BYTES, settings, tracking, CPU), tracking, load_test(sweep.data)


def source(number: int, tracking: Tracking) -> str:
    return tracking.client.get_model_version("tiny", str(number)).source


@pytest.mark.parametrize("which", [0, 1], ids=["as trained", "int8"])
def test_pixels_give_labels_by_name_as_often_right_as_recorded(finished, which: int) -> None:
    done, tracking, test = finished[which], finished[2], finished[3]
    model = mlflow.pyfunc.load_model(source(which + 1, tracking))
    answers = model.predict(test.images.numpy())
    assert list(answers.columns) == ["label", "probability"]
    right = answers.label == [test.classes[label] for label in test.labels]
    assert right.mean() == pytest.approx(done.test_accuracy)
    assert answers.probability.between(0.1, 1).all()
    assert model.metadata.get_input_schema().inputs[0].shape == (-1, 1, 8, 8)
    example = model.input_example
    assert example.dtype == np.uint8
    assert len(model.predict(example)) == 1
    with pytest.raises(mlflow.exceptions.MlflowException, match="schema"):
        model.predict(test.images.numpy() / 255.0)


def test_the_registry_says_what_it_is_how_good_and_how_to_use_it(finished) -> None:
    first, last, tracking, test = finished
    card = tracking.client.get_registered_model("tiny").description
    for said in (
        f"{last.candidate.parameters:,} parameters",
        f"{last.test_accuracy:.2%}",
        ", ".join(test.classes),
        "(any number, 1, 8, 8)",
        "models:/tiny@smallest",
        "mlflow models serve",
        f"kdexp reproduce {last.run_id}",
    ):
        assert said in card
    tags = [tracking.client.get_model_version("tiny", number).tags for number in ("1", "2")]
    assert [each["variant"] for each in tags] == ["as trained", "int8"]
    for done, each in zip((first, last), tags, strict=True):
        assert float(each["test_accuracy"]) == pytest.approx(done.test_accuracy, rel=1e-5)
        assert int(each["trial"]) == done.candidate.trial


def test_of_many_classes_a_card_names_the_first() -> None:
    text = describe._takes(Input(3, 32, 32, tuple(f"c{n}" for n in range(200))))
    assert "200 classes: c0, c1" in text
    assert text.endswith("c29, and 170 more.")


@pytest.mark.slow
def test_mlflow_serves_it_over_http(finished, tmp_path: Path) -> None:
    done, tracking, test = finished[1], finished[2], finished[3]
    port = free_port()
    binaries = str(Path(sys.executable).parent)
    log = (tmp_path / "log").open("w")
    serve = f"models serve --env-manager local --port {port} --model-uri {source(2, tracking)}"
    server = subprocess.Popen(
        [f"{binaries}/mlflow", *serve.split()],
        env=os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            return direct.open(f"http://127.0.0.1:{port}/ping", timeout=5).status == 200
        except OSError:
            return False

    try:
        until(answers, "the server", 120)
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"inputs": test.images.tolist()}).encode(),
            {"Content-Type": "application/json"},
        )
        found = json.load(direct.open(asked, timeout=60))["predictions"]
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
        log.close()
    assert len(found) == len(test) > 100
    right = [
        row["label"] == test.classes[label] for row, label in zip(found, test.labels, strict=True)
    ]
    assert np.mean(right) == pytest.approx(done.test_accuracy)
