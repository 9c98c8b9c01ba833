"""Students and teachers by name; their parameters, multiply-adds, bytes and summary.

`cnn` is the documented student, generalised: blocks of (Conv 3x3 -> BatchNorm -> ReLU -> AvgPool
2), then Dropout -> Linear -> ReLU -> Dropout -> Linear. With channels 16/32/64, hidden 128 and
3x28x28 input it has 98,954 parameters, 74.6 % of them in the hidden layer: `hidden: 0` pools
globally in its place. `residual` is CIFAR's ResNet (arXiv:1512.03385, section 4.2, projections
where a stage begins), `separable` the same of depthwise-separable convolutions (arXiv:1704.04861).
Any torchvision classifier goes by its name, your own as `package.module:callable`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import torchinfo
from jaxtyping import Float, Real
from torch import Tensor, nn

from kdexp import KdexpError
from kdexp.config import FAMILIES, Network, Teacher
from kdexp.distill.datasets import Split
from kdexp.distill.footprint import activation_bytes
from kdexp.distill.randomness import drawing
from kdexp.own import load_own, own_line

__all__ = [
    "FromPixels",
    "ModelError",
    "Residual",
    "Size",
    "build",
    "layout_of",
    "measure",
    "outline",
    "summary",
    "weights_hash",
    "what_and_where",
]

State = Mapping[str, Tensor]
Shape = tuple[int, int, int]

AUXILIARY = ("googlenet", "inception_v3")  # torchvision's that give further logits in training
PROBE_IMAGES = 4


class ModelError(KdexpError):
    """A network that cannot be built or does not fit the data."""


@dataclass(frozen=True)
class Size:
    """What a network costs: trainable numbers, multiply-adds for one image (torchinfo's count),
    bytes stored, bytes that its activations take at once (footprint.py).
    """

    parameters: int
    multiply_adds: int
    bytes: int
    activation_bytes: int | None = None
    """None where a former version recorded it, or where a network's steps cannot be looked at."""

    @classmethod
    def recorded(cls, metrics: Mapping[str, float]) -> Size:
        """As a run's metrics hold it. Raises KeyError."""
        live = metrics.get("activation_bytes")
        return cls(
            int(metrics["parameters"]),
            int(metrics["multiply_adds"]),
            int(metrics["model_bytes"]),
            None if live is None else int(live),
        )

    @property
    def metrics(self) -> dict[str, int]:
        """As a run's metrics hold it."""
        found = {
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "model_bytes": self.bytes,
        }
        if self.activation_bytes is not None:
            found["activation_bytes"] = self.activation_bytes
        return found


def build(network: Network, like: Split) -> nn.Module:
    """A fresh network for images and classes like those of a split; weights from torch's global
    generator.

    Raises ModelError where there is no such architecture or it does not fit the data.
    """
    shape, classes = (like.channels, *like.image_size), len(like.classes)
    try:
        module = _made(network, shape, classes)
        _check_fit(module, shape, classes, network.architecture)
    except ModelError:
        raise
    except Exception as error:  # a network of one's own may raise anything
        raise ModelError(
            f"{network.architecture}: cannot be built for {shape} images: {what_and_where(error)}"
        ) from error
    if ":" in network.architecture and _wants_contiguous(
        network.model_dump_json(include={"architecture", "options"}), shape, classes
    ):
        module.register_forward_pre_hook(_Contiguous())
    return module


def _made(network: Network, shape: Shape, classes: int) -> Any:
    """What an architecture makes: a module, unless a callable of one's own makes something else."""
    if network.architecture in FAMILIES:
        return _family(network, shape, classes)
    if ":" in network.architecture:
        made: nn.Module = _own(network.architecture)(
            channels=shape[0], image_size=shape[1:], classes=classes, **network.options
        )
        return made
    # whose file may hold the auxiliary parts too
    given = isinstance(network, Teacher) and network.weights is not None
    return _torchvision(network.architecture, network.stem, shape[0], classes, keep_auxiliary=given)


def _trained_once(module: nn.Module, shape: Shape, classes: int) -> Any:
    """What it gives in training, after one pass forward and backward."""
    images = torch.randn(PROBE_IMAGES, *shape).to(memory_format=torch.channels_last)
    logits = module.train()(images)
    if isinstance(logits, Tensor) and logits.shape == (PROBE_IMAGES, classes):
        F.cross_entropy(logits.float(), torch.arange(PROBE_IMAGES) % classes).backward()
    return logits


class _Contiguous:
    """Images in the plain layout, for a network that works in no other."""

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # A copy: an image of one channel counts as laid out in both ways, and convolutions go by
        # its strides.
        return tuple(
            x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x
            for x in inputs
        )


def layout_of(module: nn.Module) -> torch.memory_format:
    """How a network that `build` made keeps its weights: channels last, where it can: a quarter
    less time on a CPU.
    """
    plain = any(isinstance(hook, _Contiguous) for hook in module._forward_pre_hooks.values())
    return torch.contiguous_format if plain else torch.channels_last


@lru_cache(256)
def _wants_contiguous(network: str, shape: Shape, classes: int) -> bool:
    """Whether a network of one's own trains in the plain layout and not in channels last, as where
    it calls x.view(…).
    """
    for layout in (torch.channels_last, torch.contiguous_format):
        with drawing(), torch.enable_grad():
            try:
                module = _made(Network.model_validate_json(network), shape, classes)
                module.eval()(torch.zeros(2, *shape))  # lazy layers find their sizes
                if layout == torch.contiguous_format:
                    module.register_forward_pre_hook(_Contiguous())
                _trained_once(module.to(memory_format=layout), shape, classes)
            except Exception:  # noqa: S112 - whatever it is, the other layout may do without
                continue
            return layout == torch.contiguous_format
    return False


def outline(network: Network, like: Split) -> nn.Module:
    """A network to look at, not to train: torch's generator stays as it was. Raises ModelError."""
    with drawing():
        return build(network, like)


class Residual(nn.Module):
    """body(x) + shortcut(x)."""

    def __init__(self, body: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out out_height out_width"]:
        """The sum."""
        return self.body(x) + self.shortcut(x)


def _family(network: Network, shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """A network of a family for images of `shape` (channels, height, width)."""
    features = nn.Sequential(
        *(_plain if network.architecture == "cnn" else _residual)(network, shape[0])
    )
    try:
        left = _features_of(features, shape)
    except RuntimeError:
        stages = len(network.channels or ())
        raise ValueError(
            f"{stages} halvings leave nothing of {shape[1]}x{shape[2]} pixels; use fewer channels"
        ) from None
    return nn.Sequential(*features, *_head(network, left, classes))


@torch.no_grad()
def _features_of(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """How many numbers it makes of an image."""
    count = module.eval()(torch.zeros(1, *shape))[0].numel()
    module.train()
    return count


def _plain(network: Network, depth: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    stride = network.stride or 1
    for out in network.channels or ():
        for _ in range(network.blocks or 1):
            layers += [nn.Conv2d(depth, out, 3, stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            depth, stride = out, 1
        layers.append(nn.AvgPool2d(2))
    return layers


def _residual(network: Network, depth: int) -> list[nn.Module]:
    channels = network.channels or ()
    layers = [*_convolution(depth, channels[0], stride=network.stride or 1), nn.ReLU()]
    depth, body = channels[0], _separable_body if network.architecture == "separable" else _body
    for stage, out in enumerate(channels):
        for block in range(network.blocks or 1):
            stride = 2 if stage and not block else 1
            same = stride == 1 and depth == out
            shortcut = (
                nn.Identity() if same else nn.Sequential(*_convolution(depth, out, 1, stride))
            )
            layers += [Residual(nn.Sequential(*body(depth, out, stride)), shortcut), nn.ReLU()]
            depth = out
    return layers


def _body(depth: int, out: int, stride: int) -> list[nn.Module]:
    return [*_convolution(depth, out, 3, stride), nn.ReLU(), *_convolution(out, out)]


def _separable_body(depth: int, out: int, stride: int) -> list[nn.Module]:
    return [*_convolution(depth, depth, 3, stride, depth), nn.ReLU(), *_convolution(depth, out, 1)]


def _convolution(
    depth: int, out: int, size: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [
        nn.Conv2d(depth, out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]


def _head(network: Network, features: int, classes: int) -> list[nn.Module]:
    dropout = network.dropout or 0.0
    hidden = network.hidden or 0
    depth = (network.channels or ())[-1]
    if not hidden:
        return [
            nn.AdaptiveAvgPool2d(1),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(depth, classes),
        ]
    first = [nn.Dropout(dropout), nn.Flatten(), nn.Linear(features, hidden), nn.ReLU()]
    return [*first, nn.Dropout(dropout), nn.Linear(hidden, classes)]


def measure(module: nn.Module, like: Split) -> Size:
    """Parameters, multiply-adds, bytes and activations of a network on one image like those of a
    split.
    """
    stored = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    parameters = sum(p.numel() for p in module.parameters())
    return Size(parameters, _multiply_adds(_torchinfo(module, like)), stored, _live(module, like))


def _live(module: nn.Module, like: Split) -> int | None:
    with suppress(Exception):  # a network of one's own may do what no step by step look allows
        return activation_bytes(module, like)
    return None


def _multiply_adds(info: torchinfo.ModelStatistics) -> int:
    """torchinfo's count. Of a layer that computes its weight from others it would count none, or
    too many: that is counted here as the plain layer that it is in use.
    """
    computed = [layer for layer in info.summary_list if _computes_its_weight(layer.module)]
    counted = sum(layer.macs for layer in computed if layer.is_leaf_layer)
    return int(info.total_mult_adds) - counted + sum(_plainly(layer) for layer in computed)


def _computes_its_weight(module: nn.Module) -> bool:
    """Whether by a parametrization, or by the hook of a former torch (weight_norm, spectral_norm,
    pruning).
    """
    plain = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    return plain and "weight" not in module._parameters


def _plainly(layer: torchinfo.layer_info.LayerInfo) -> int:
    """As torchinfo counts a plain layer: each weight once for each place of the output."""
    module, shape = layer.module, layer.output_size
    weights = module.weight.numel() + (0 if module.bias is None else module.bias.numel())  # type: ignore[operator]
    places = shape[0] if isinstance(module, nn.Linear) else math.prod([shape[0], *shape[2:]])
    return int(weights * places)


def summary(module: nn.Module, like: Split) -> str:
    """torchinfo's table, layer by layer, for one image.

    torchinfo counts 2.24 M multiply-adds for the documented student; the older torch-summary
    printed 2.32 M because it counts each Sequential's weights once more.
    """
    return str(_torchinfo(module, like))


def weights_hash(state: State) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FromPixels(nn.Module):
    """A network that takes pixels 0 to 255 as they are: normalises them, then runs the student."""

    def __init__(self, student: nn.Module, like: Split) -> None:
        super().__init__()
        self.student, self.mean, self.std = student, like.mean, like.std

    def forward(
        self, images: Real[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a batch."""
        return self.student((images / 255 - self.mean) / self.std)


def _torchinfo(module: nn.Module, like: Split) -> torchinfo.ModelStatistics:
    return torchinfo.summary(
        module,
        input_size=(1, like.channels, *like.image_size),
        col_names=("input_size", "output_size", "kernel_size", "num_params", "mult_adds"),
        depth=4,
        verbose=0,
        device=next((parameter.device for parameter in module.parameters()), torch.device("cpu")),
    )


def _torchvision(
    name: str, stem: str, channels: int, classes: int, keep_auxiliary: bool
) -> nn.Module:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name, [*FAMILIES, *names], n=1)
        raise ModelError(
            "architecture: no network named"
            f" '{name}'{f'; did you mean {close[0]}?' if close else ''} Allowed:"
            f" {', '.join(FAMILIES)}, a torchvision classifier (resnet18, …), or"
            " package.module:callable"
        )
    if stem == "imagenet" and channels != 3:
        raise ModelError(
            f"{name}: torchvision's networks take 3 channels, data.channels is {channels}; set it"
            " to 3, or for a ResNet stem to small"
        )
    extra = {"aux_logits": keep_auxiliary, "init_weights": True} if name in AUXILIARY else {}
    module = torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)
    return module if stem == "imagenet" else _with_small_stem(module, name, channels)


def _with_small_stem(module: nn.Module, name: str, channels: int) -> nn.Module:
    """A ResNet that begins with 3x3 at full resolution, as for CIFAR-10: arXiv:1512.03385 section
    4.2.

    ImageNet's stem leaves 7x7 positions of 28x28 pixels before its first block.
    """
    first = getattr(module, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not isinstance(
        getattr(module, "maxpool", None), nn.MaxPool2d
    ):
        raise ModelError(
            f"{name}: has no stem that could be small (conv1 and maxpool, as in a ResNet); set stem"
            " to imagenet"
        )
    module.conv1 = nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
    # like torchvision's own
    nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
    module.maxpool = nn.Identity()
    return module


def _own(name: str) -> Any:
    try:
        return load_own(name)
    except ModelError:
        raise
    except Exception as error:  # the user's module is run, and may raise anything
        raise ModelError(
            f"architecture: cannot import '{name}': {what_and_where(error)}; write it as"
            " package.module:callable or path/to/file.py:callable, looked for in the working"
            " folder and the sweep file's"
        ) from None


def _check_fit(module: object, shape: tuple[int, int, int], classes: int, name: str) -> None:
    """Two black images through it, as evaluation would."""
    if not isinstance(module, nn.Module):
        raise ModelError(f"{name}: made a {type(module).__name__}, expected a torch.nn.Module")
    with torch.no_grad():
        out = module.eval()(torch.zeros(2, *shape))
    module.train()
    if not isinstance(out, Tensor) or out.shape != (2, classes):
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(
            f"{name}: gives {got} for 2 images, expected logits of shape {(2, classes)}"
        )


def what_and_where(error: Exception) -> str:
    """An error's first line, and the user's own line that it came from."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    where = own_line(error)
    return f"{line} ({where})" if where else line
