"""What answers where a registered model is served: pixels in, a label and its probability out.

A copy of this file lies beside each model (MLflow's `loader_module`), so that `mlflow models serve`
and `mlflow.pyfunc.load_model` work where kdexp is not installed. It imports nothing of kdexp's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["ANSWERS", "Answering"]

ANSWERS = "answers.json"
"""Beside the model: its file, the channels it takes, its classes."""


class Answering:
    """A model as MLflow serves it."""

    def __init__(self, folder: Path) -> None:
        told = json.loads((folder / ANSWERS).read_text("utf-8"))
        self._classes, self._channels = np.array(told["classes"], object), int(told["channels"])
        file = folder / told["file"]
        self._logits = _onnx(file) if file.suffix == ".onnx" else _exported(file)

    def predict(self, images: Any, params: Any = None) -> pd.DataFrame:
        """The likeliest class of each image, and how probable it is, 0 to 1: a row for each of
        `images`, uint8 of shape (images, channels, height, width), 0 to 255.
        """
        pixels = np.asarray(images["pixels"] if isinstance(images, dict) else images, np.uint8)
        logits = self._logits(np.repeat(pixels, self._channels // pixels.shape[1], axis=1)).astype(
            np.float64
        )
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return pd.DataFrame(
            {"label": self._classes[shares.argmax(1)], "probability": shares.max(1)}
        )


def _load_pyfunc(path: str) -> Answering:
    """What MLflow asks a loader module for."""
    return Answering(Path(path))


def _exported(file: Path) -> Any:
    import torch

    module = torch.export.load(file).module()

    def logits(pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = module(torch.from_numpy(pixels).float()).numpy()
        return found

    return logits


def _onnx(file: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def logits(pixels: np.ndarray) -> np.ndarray:
        (found,) = session.run(None, {"pixels": pixels})
        return np.asarray(found)

    return logits
