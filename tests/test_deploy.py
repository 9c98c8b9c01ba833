"""The ONNX files: run by ONNX Runtime they are as good as the student in them, and really
smaller.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from kdexp.config import Augment, Data, Distillation, Student, Training
from kdexp.distill.compact import as_stored
from kdexp.distill.datasets import Splits, load_splits
from kdexp.distill.deploy import Deployed, DeployError, convert, least_bytes, stored_bytes
from kdexp.distill.evaluate import evaluate, logits_of
from kdexp.distill.models import build
from kdexp.distill.packs import Lane
from kdexp.distill.train import train

STUDENTS = {
    "cnn": Student(channels=(8, 16), hidden=32),
    "residual": Student(architecture="residual", channels=(8, 16), blocks=1),
    "separable": Student(architecture="separable", channels=(24, 32), blocks=1),
}


@pytest.fixture(scope="module")
def splits() -> Splits:
    """Digits, grey images on three channels."""
    return load_splits(Data(dataset="digits", validation_fraction=0.2, augment=Augment(flip=False)))


@pytest.fixture(scope="module", params=sorted(STUDENTS))
def student(request, splits) -> nn.Module:
    """A trained one of each family."""
    network = STUDENTS[request.param]
    lane = Lane(
        network,
        Training(epochs=8, batch_size=64, learning_rate=0.01, precision="fp32"),
        Distillation(alpha=0.0),
    )
    weights = None
    for (report,) in train([lane], splits, Data(dataset="digits", augment=Augment(flip=False))):
        weights = report.weights or weights
    module = build(network, splits.train)
    module.load_state_dict(weights)
    return module.eval()


@pytest.fixture(scope="module")
def untrained(splits) -> nn.Module:
    """One for what does not depend on weights."""
    torch.manual_seed(0)
    return build(STUDENTS["cnn"], splits.train).eval()


@pytest.fixture(scope="module")
def models(student, splits) -> dict[str, onnx.ModelProto]:
    return {
        precision: convert(student, splits.train, precision)
        for precision in ("float32", "float16", "int8")
    }


def run(model: onnx.ModelProto, split) -> torch.Tensor:
    """By ONNX Runtime alone, as somebody who was given the file would."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"pixels": split.images.numpy()})[0])


def test_the_file_takes_pixels_as_stored_and_agrees_with_the_student(
    student, models, splits
) -> None:
    expected = logits_of(student, splits.validation)
    for precision, tolerance in (("float32", 1e-4), ("float16", 0.02)):
        assert torch.allclose(
            run(models[precision], splits.validation), expected, rtol=tolerance, atol=tolerance
        )
    (pixels,) = models["int8"].graph.input
    assert [d.dim_value for d in pixels.type.tensor_type.shape.dim][1:] == [1, 8, 8]
    assert pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_evaluation_of_a_file_is_what_the_runtime_gives(models, splits) -> None:
    for model in models.values():
        result = evaluate(Deployed(model.SerializeToString(), splits.validation), splits.validation)
        assert result.correct == int(
            (run(model, splits.validation).argmax(1) == splits.validation.labels).sum()
        )


def test_rounding_costs_at_most_a_few_images(student, models, splits) -> None:
    trained = evaluate(student, splits.validation)
    assert trained.accuracy > 0.8
    for precision, images in (("float32", 0), ("float16", 1), ("int8", 4)):
        found = evaluate(
            Deployed(models[precision].SerializeToString(), splits.validation), splits.validation
        )
        assert abs(found.correct - trained.correct) <= images, precision


def test_the_files_are_smaller_and_no_smaller_than_their_parameters_need(
    student, models, splits
) -> None:
    stored = {precision: stored_bytes(model) for precision, model in models.items()}
    assert stored["float16"] < 0.51 * stored["float32"] + 100
    assert stored["int8"] < stored["float16"]
    files = {precision: model.ByteSize() for precision, model in models.items()}
    assert files["int8"] < files["float16"] < files["float32"]
    for precision, found in stored.items():
        assert least_bytes(student, splits.train, precision) <= found < files[precision]
    assert stored["float32"] - least_bytes(student, splits.train, "float32") <= 64, (
        "a few constants"
    )


def test_convolutions_run_on_integers(student, models, splits, tmp_path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        models["int8"].SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    convolutions = sum(isinstance(layer, nn.Conv2d) for layer in student.modules())
    assert (kinds["QLinearConv"], kinds["Conv"]) == (convolutions, 0)


def test_a_file_is_valid_and_tells_nothing_of_where_it_was_made(models) -> None:
    for model in models.values():
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
        assert b".py" not in content
        assert str(Path(torch.__file__).parents[1]).encode() not in content


def test_a_file_comes_out_the_same_again_and_only_int8_looks_at_the_images(
    untrained, splits
) -> None:
    white = dataclasses.replace(splits.train, images=torch.full_like(splits.train.images, 255))
    assert convert(untrained, splits.train, "int8") == convert(untrained, splits.train, "int8")
    assert convert(untrained, splits.train, "int8") != convert(untrained, white, "int8")
    assert convert(untrained, splits.train, "float16") == convert(untrained, white, "float16")


def test_a_coloured_dataset_keeps_its_channels(splits) -> None:
    images = splits.train.images[:20].expand(-1, 3, -1, -1).contiguous()
    coloured = dataclasses.replace(splits.train.take(torch.arange(20)), images=images)
    module = build(STUDENTS["cnn"], coloured)
    assert as_stored(coloured).channels == 3
    assert torch.allclose(
        run(convert(module, coloured, "float32"), coloured), logits_of(module, coloured), atol=1e-4
    )


def test_a_network_that_cannot_be_exported_is_said_in_one_line(splits) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(192, 10)

        def forward(self, x):
            return self.layer(x.flatten(1)) if x.sum() > 0 else self.layer(-x.flatten(1))

    with pytest.raises(DeployError, match="cannot be exported to ONNX: ") as error:
        convert(Moody(), splits.train, "float32")
    assert "\n" not in str(error.value)


def test_without_the_libraries_what_to_install_is_said(untrained, splits, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeployError, match=r"pip install 'kdexp\[export\]'"):
        convert(untrained, splits.train, "float32")
