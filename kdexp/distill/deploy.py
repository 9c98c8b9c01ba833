"""A student as one ONNX file that takes pixels 0 to 255 as they are stored and gives logits:
float32, float16 or int8.

Each is folded (compact.py). float16 keeps the weights by half and computes in float32. int8 is ONNX
Runtime's static quantization: weights in 8 bits with a scale for each output channel, activations
in 8 bits over the range that they have on training images, so that convolutions run on integers;
biases and logits are float32.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html

The only file that knows onnx and onnxruntime, which are an extra.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from kdexp import KdexpError
from kdexp.config import Precision
from kdexp.distill.compact import as_stored, compact
from kdexp.distill.datasets import Split
from kdexp.distill.models import FromPixels

__all__ = ["DeployError", "Deployed", "available", "convert", "least_bytes", "stored_bytes"]

CALIBRATION, BATCH = 1000, 100  # training images for the ranges of activations
FLOAT_ENDS = ["Gemm", "MatMul"]  # logits in 8 bits would tie


class DeployError(KdexpError):
    """A network that cannot be exported, or no libraries for it."""


class Deployed(nn.Module):
    """An ONNX file's content, run as it will be, by as many threads as torch has now, behind the
    interface of the student in it: normalised images to logits.
    """

    def __init__(self, content: bytes, like: Split) -> None:
        super().__init__()
        _need_libraries()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        self.channels, self.mean, self.std = as_stored(like).channels, like.mean, like.std

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch, by way of its pixels."""
        pixels = (
            ((images[:, : self.channels] * self.std + self.mean) * 255)
            .round()
            .to("cpu", torch.uint8)
        )
        return self.from_pixels(pixels).to(images.device)

    def from_pixels(
        self, pixels: UInt8[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch of pixels as they are stored, on the CPU: what the file itself does."""
        (logits,) = self.session.run(None, {"pixels": pixels.contiguous().numpy()})
        return torch.from_numpy(logits)


def available() -> bool:
    """Whether the libraries of the extra `export` are installed."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def convert(student: nn.Module, train: Split, precision: Precision) -> Any:
    """A student as an ONNX model, for images like those that it was trained on, whose class names
    it keeps as JSON.

    Raises DeployError.
    """
    _need_libraries()
    model = _exported(student, train)
    if precision == "float16":
        _halve(model)
    elif precision == "int8":
        model = _quantized(model, train)
    _strip(model)
    _shorten(model.graph)
    model.metadata_props.add(key="classes", value=json.dumps(train.classes, ensure_ascii=False))
    return model


def least_bytes(student: nn.Module, like: Split, precision: Precision) -> int:
    """What `stored_bytes` will not fall short of: the folded parameters, each in that precision."""
    parameters = sum(parameter.numel() for parameter in compact(student, like).parameters())
    return parameters * {"float32": 4, "float16": 2, "int8": 1}[precision]


def stored_bytes(model: Any) -> int:
    """Bytes of all numbers in an ONNX model, or in a file's content: weights, biases, scales,
    constants.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_from_string(model) if isinstance(model, bytes) else model
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


def _need_libraries() -> None:
    if not available():
        raise DeployError(
            "ONNX files need onnx, onnxscript and onnxruntime: pip install 'kdexp[export]'"
        )


def _exported(student: nn.Module, like: Split) -> Any:
    """The folded student from pixels to logits, for any number of images."""
    module = FromPixels(compact(student, like).cpu(), like).eval()
    try:
        with warnings.catch_warnings():
            # about the user's network, in words for torch's own developers
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                (like.images[:2].cpu(),),
                input_names=["pixels"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch.export refuses some networks, each in its own way
        raise DeployError(
            f"This network cannot be exported to ONNX: {str(error).strip().partition(chr(10))[0]}"
        ) from error
    assert program is not None
    return program.model_proto


def _halve(model: Any) -> None:
    """Keep each weight in half precision; the graph begins by making it float32 again."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.dims:
            name = tensor.name
            tensor.CopyFrom(
                numpy_helper.from_array(
                    numpy_helper.to_array(tensor).astype("float16"), f"{name}.half"
                )
            )
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _quantized(model: Any, train: Split) -> Any:
    """The same in 8 bits, as far as ONNX Runtime has 8-bit kernels."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = _calibration(train)

        def get_next(self) -> dict[str, Any] | None:
            return next(({"pixels": batch.numpy()} for batch in self.batches), None)

    # folded, and shapes are known
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as temporary:
        quantize_static(
            model,
            Path(temporary) / "int8.onnx",
            Images(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": FLOAT_ENDS, "QuantizeBias": False},
        )
        return onnx.load(Path(temporary) / "int8.onnx")


def _calibration(train: Split) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
    """Batches of images from all over a training set, which may be in order of class."""
    chosen = torch.linspace(0, len(train) - 1, min(CALIBRATION, len(train))).long()
    return iter(train.images[chosen.to(train.images.device)].cpu().split(BATCH))


def _strip(message: Any) -> None:
    """Take out what no runtime reads: an exporter's notes hold its source's lines and paths, and
    outweigh a small network.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string", "value_info"):
            message.ClearField(field.name)
        elif field.message_type:
            for part in [value] if hasattr(value, "ListFields") else value:
                _strip(part)


def _shorten(graph: Any) -> None:
    """Number what lies between input and output: names took up a third of a file of 17 KB of
    weights.
    """
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return  # graphs within refer to names out here
    short = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    for node in graph.node:
        node.name = ""
        node.input[:] = [short.setdefault(name, f"{len(short):x}") for name in node.input]
        node.output[:] = [short.setdefault(name, f"{len(short):x}") for name in node.output]
    for tensor in graph.initializer:
        tensor.name = short.setdefault(tensor.name, f"{len(short):x}")
