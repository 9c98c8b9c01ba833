"""A pack: K networks of one fuse key that take their steps together.

`Stacked` trains K `cnn` networks as one: activations are [batch, lanes * channels, height, width], so that ReLU,
pooling and BatchNorm are the ordinary ones, a convolution has one group for each lane, and a linear layer is one
batched matrix product. With one lane it is the plain network. `Separate` steps any modules side by side.

Nothing of a lane reaches another: its result depends on K and on its place, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from kdexp.config import Distillation, Network, Recipe, Training
from kdexp.distill.data import Split, pixels
from kdexp.distill.losses import Loss, distillation_loss, label_loss
from kdexp.distill.models import build
from kdexp.distill.optimizers import Optimizer
from kdexp.distill.randomness import dropout_mask, seed_of

__all__ = ["Batch", "Execution", "Lane", "Pack", "Separate", "Source", "Stacked", "gather", "pack_of"]

BN_MOMENTUM, BN_EPS = 0.1, 1e-5  # nn.BatchNorm2d's

P = ParamSpec("P")
T = TypeVar("T")

Lowering = Literal["grouped", "unfold", "vmap", "separate"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Lane:
    """One network to train and how. Lanes of a pack agree in `fuse_key`; what is not in it may differ."""

    network: Network
    training: Training
    distillation: Distillation

    @classmethod
    def of(cls, recipe: Recipe) -> Lane:
        """The student of a recipe."""
        return cls(recipe.student, recipe.training, recipe.distillation)

    @property
    def fuse_key(self) -> str:
        """What lanes must share to step together: everything but alpha, T, learning rate, weight decay, dropout, seed."""
        return "\n".join(
            [
                self.network.model_dump_json(include=set(Network.model_fields) - {"dropout"}),
                self.training.model_dump_json(include=set(Training.model_fields) - {"learning_rate", "weight_decay", "seed"}),
                self.distillation.model_dump_json(exclude={"alpha", "temperature"}),
            ]
        )


@dataclass(frozen=True)
class Execution:
    """How a training is carried out: not part of a recipe, but its last bits depend on it, so it is recorded."""

    lanes: int = 1
    shared: bool = True
    """All lanes see the same mini-batches: they start together and have one seed."""
    compiled: bool = False
    lowering: Lowering = "grouped"
    precision: Precision = "fp32"
    """Of activations and products in training; parameters, statistics, loss, optimiser and evaluation are in fp32."""

    def record(self, place: int) -> dict[str, str]:
        """As text by name, with the place of one lane."""
        return {
            "lanes": str(self.lanes),
            "lane": str(place),
            "mini-batches": "shared" if self.shared else "own",
            "compiled": "yes" if self.compiled else "no",
            "lowering": self.lowering,
            "precision": self.precision,
        }

    @classmethod
    def recorded(cls, record: Mapping[str, str]) -> tuple[Execution, int]:
        """What `record` wrote: the execution, and the lane's place. A run of a former version was alone and plain."""
        written = {**cls().record(0), **record}
        lowering = next(known for known in get_args(Lowering) if known == written["lowering"])
        precision = next(known for known in get_args(Precision) if known == written["precision"])
        shared, compiled = written["mini-batches"] == "shared", written["compiled"] == "yes"
        return cls(int(written["lanes"]), shared, compiled, lowering, precision), int(written["lane"])


@dataclass(frozen=True)
class Source:
    """What batches are gathered from: the training images, the list of views, the teacher's raw logits in each."""

    split: Split
    views: Int64[Tensor, "views 3"]
    logits: Float[Tensor, "views samples classes"] | None


class Batch(NamedTuple):
    """One mini-batch: with a lanes axis where lanes see different images."""

    images: Float[Tensor, "*lanes batch channels height width"]
    labels: Int64[Tensor, "*lanes batch"]
    soft: Float[Tensor, "*lanes batch classes"] | None
    """The teacher's raw logits for these images as they are seen here."""


def gather(
    source: Source, samples: Int64[Tensor, "*lanes batch"], chosen: Int64[Tensor, "*lanes batch"], dtype: torch.dtype
) -> Batch:
    """These samples, each in its chosen view."""
    views = source.views[chosen.flatten()] if len(source.views) > 1 else None
    images = pixels(source.split, samples.flatten(), views).to(dtype)
    soft = None if source.logits is None else source.logits[chosen, samples].to(dtype)
    return Batch(images.unflatten(0, samples.shape) if samples.ndim > 1 else images, source.split.labels[samples], soft)


class Variables(NamedTuple):
    """What may differ from lane to lane within a step: tensors, so that other values compile nothing anew."""

    alpha: Float[Tensor, " lanes"]
    temperature: Float[Tensor, " lanes"]
    masks: list[Float[Tensor, "lanes batch features"]]
    """Of the two dropouts, each of its own width."""


class Form(NamedTuple):
    """What is the same for all lanes, and compiled in."""

    blocks: int
    scale_by_t_squared: bool
    lowering: Lowering
    dtype: torch.dtype
    narrow: torch.dtype
    """Of activations and products in training."""


class Stacked:
    """K `cnn` networks as one. Parameters are one [lanes, parameters] tensor, of which each layer sees its columns."""

    def __init__(self, lanes: Sequence[Lane], source: Source, how: Execution, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.how, self.dtype = source, how, dtype
        self.device = source.split.labels.device
        blocks = len(lanes[0].network.channels or ())
        self.form = Form(
            blocks,
            lanes[0].distillation.scale_by_t_squared,
            how.lowering,
            dtype,
            torch.bfloat16 if how.precision == "bf16" else dtype,
        )
        self._losses = _compiled(_losses) if how.compiled else _losses
        self._masks = _compiled(_masks) if how.compiled else _masks
        first = _fresh(lanes[0], source.split)
        self.shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
        self.widths = [self.shapes[f"{4 * blocks + layer}.weight"][1] for layer in (2, 5)]
        count = sum(shape.numel() for shape in self.shapes.values())
        self.parameters = torch.zeros(len(lanes), count, dtype=dtype, device=self.device)
        self.leaves = _columns(self.parameters, self.shapes)
        self.running = {
            name: torch.zeros(len(lanes), *buffer.shape, dtype=dtype, device=self.device)
            for name, buffer in first.named_buffers()
            if "running" in name
        }
        self.hyper = torch.zeros(3, len(lanes), dtype=dtype, device=self.device)  # alpha, temperature, dropout
        self.keys = torch.zeros(len(lanes), dtype=torch.int64, device=self.device)
        decay = torch.zeros(len(lanes), dtype=dtype, device=self.device)
        self.optimizer = Optimizer(lanes[0].training.optimizer, self.parameters, decay)
        self.steps = [0] * len(lanes)
        for place, lane in enumerate(lanes):
            self.put(place, lane)

    def put(self, place: int, lane: Lane) -> None:
        """A fresh network in a lane's place."""
        module = _fresh(lane, self.source.split)
        for name, parameter in module.named_parameters():
            self.leaves[name].data[place] = parameter.detach()
        for name in self.running:
            self.running[name][place] = module.get_buffer(name)
        values = [lane.distillation.alpha, lane.distillation.temperature, lane.network.dropout or 0.0]
        self.hyper[:, place] = torch.tensor(values, dtype=self.dtype)
        self.keys[place] = seed_of(lane.training.seed, "dropout") % 2**32
        self.optimizer.reset(place, lane.training.weight_decay)
        self.steps[place] = 0

    def save(self, place: int) -> dict[str, Tensor]:
        """All that a lane's training goes on from, on the CPU."""
        return _copies(self._progress(place) | {"batches": torch.tensor(self.steps[place])})

    def load(self, place: int, progress: Mapping[str, Tensor]) -> None:
        """Go on from what `save` gave; the lane is already in this place."""
        for name, tensor in self._progress(place).items():
            tensor.copy_(progress[name])
        self.steps[place] = int(progress["batches"])

    def _progress(self, place: int) -> dict[str, Tensor]:
        optimizer = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.state(place).items()}
        running = {name: tensor[place] for name, tensor in self.running.items()}
        return {"parameters": self.parameters[place], **running, **optimizer}

    def step(
        self,
        samples: Int64[Tensor, "*lanes batch"],
        chosen: Int64[Tensor, "*lanes batch"],
        rates: Float[Tensor, " places"],
        steps: Int64[Tensor, " places"],
    ) -> Loss:
        """One optimiser step of every lane on these samples, each in its chosen view. Returns each lane's loss.

        `steps` are the lanes' own step numbers; samples have a lanes axis where lanes see different ones.
        """
        alpha, temperature, drop = self.hyper.unbind()
        # Masks are drawn by themselves: within the network, their integers keep its last block from being vectorised.
        masks = self._masks(samples.shape[-1], self.widths, drop, self.keys, steps)
        variables = Variables(alpha, temperature, masks)
        loss, running = self._losses(self.leaves, self.running, variables, self.source, samples, chosen, self.form)
        # The sum's gradient is one for every lane, also where a neighbour's loss is NaN.
        gradients = torch.autograd.grad(loss.total.sum(), list(self.leaves.values()), materialize_grads=True)
        self.running = running
        self.optimizer.step(torch.cat([gradient.flatten(1) for gradient in gradients], 1), rates)
        self.steps = [step + 1 for step in self.steps]
        return Loss(*(part.detach() for part in loss))

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "lanes batch classes"]:
        """Every lane's logits of the same images, as in evaluation."""
        return _logits(self.leaves, self.running, images.to(self.dtype), self.form, None)[0]

    def state(self, place: int) -> dict[str, Tensor]:
        """A lane's state, as its own module would name it, on the CPU."""
        state = {name: leaf[place] for name, leaf in self.leaves.items()}
        for name, running in self.running.items():
            state[name] = running[place]
            if name.endswith("running_var"):
                state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(self.steps[place])
        return _copies(state)


class Separate:
    """K modules of any kind, each with an optimiser of torch's, stepped one after another."""

    def __init__(self, lanes: Sequence[Lane], source: Source, how: Execution, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.dtype, self.bf16 = source, dtype, how.precision == "bf16"
        self.lanes = list(lanes)
        self.modules = [nn.Module() for _ in lanes]
        self.optimizers: list[torch.optim.Optimizer] = [None] * len(lanes)  # type: ignore[list-item]
        for place, lane in enumerate(lanes):
            self.put(place, lane)

    def put(self, place: int, lane: Lane) -> None:
        """A fresh network in a lane's place."""
        module = _fresh(lane, self.source.split)
        # Channels last: a quarter less time on a CPU, and what a GPU's convolutions want.
        module.to(self.source.split.labels.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.lanes[place], self.modules[place] = lane, module
        self.optimizers[place] = _torch_optimizer(module, lane.training)

    def save(self, place: int) -> dict[str, Tensor]:
        """All that a lane's training goes on from, on the CPU."""
        optimizer = self.optimizers[place].state_dict()["state"]
        flat = {f"optimizer/{index}/{name}": value for index, slots in optimizer.items() for name, value in slots.items()}
        return _copies({f"module/{name}": tensor for name, tensor in self.modules[place].state_dict().items()} | flat)

    def load(self, place: int, progress: Mapping[str, Tensor]) -> None:
        """Go on from what `save` gave; the lane is already in this place."""
        module, optimizer = self.modules[place], self.optimizers[place]
        module.load_state_dict({name[7:]: tensor for name, tensor in progress.items() if name.startswith("module/")})
        for index, parameter in enumerate(module.parameters()):
            prefix = f"optimizer/{index}/"
            for name, value in progress.items():
                if name.startswith(prefix):
                    # Laid out in memory like its parameter: fused optimisers rely on it.
                    like = parameter.detach() if value.shape == parameter.shape else value.to(parameter.device)
                    optimizer.state[parameter][name.removeprefix(prefix)] = torch.empty_like(like).copy_(value)

    def step(
        self,
        samples: Int64[Tensor, "*lanes batch"],
        chosen: Int64[Tensor, "*lanes batch"],
        rates: Float[Tensor, " places"],
        steps: Int64[Tensor, " places"],
    ) -> Loss:
        """One optimiser step of every lane on these samples, each in its chosen view. Returns each lane's loss."""
        batch, losses = gather(self.source, samples, chosen, self.dtype), []
        for place, (step, rate) in enumerate(zip(steps.tolist(), rates.tolist(), strict=True)):
            own = Batch(*(None if t is None else t[place] if batch.images.ndim == 5 else t for t in batch))  # type: ignore[arg-type]
            with torch.random.fork_rng(_cuda_devices(rates.device)):
                torch.manual_seed(seed_of(self.lanes[place].training.seed, "dropout", step))
                losses.append(self._step(place, own, rate))
        return Loss(*(torch.stack(parts) for parts in zip(*losses, strict=True)))

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "lanes batch classes"]:
        """Every lane's logits of the same images, as in evaluation."""
        each = []
        for module in self.modules:
            module.eval()
            each.append(module(images.to(self.dtype)))
            module.train()
        return torch.stack(each)

    def state(self, place: int) -> dict[str, Tensor]:
        """A lane's state, as its own module names it, on the CPU."""
        return _copies(self.modules[place].state_dict())

    def _step(self, place: int, batch: Batch, rate: float) -> Loss:
        module, optimizer, how = self.modules[place], self.optimizers[place], self.lanes[place].distillation
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = module(batch.images).to(self.dtype)
        if batch.soft is None:
            student = label_loss(logits, batch.labels)
            loss = Loss(student, torch.zeros_like(student), student)
        else:
            loss = distillation_loss(logits, batch.soft, batch.labels, how.alpha, how.temperature, how.scale_by_t_squared)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        return Loss(*(part.detach() for part in loss))


Pack = Stacked | Separate


def pack_of(lanes: Sequence[Lane], source: Source, how: Execution, dtype: torch.dtype = torch.float32) -> Pack:
    """The pack for these lanes: one stacked network of them where there is such a form, else side by side."""
    kind = Stacked if lanes[0].network.architecture == "cnn" else Separate
    return kind(lanes, source, how, dtype)


def _masks(
    batch: int,
    widths: Sequence[int],
    drop: Float[Tensor, " lanes"],
    keys: Int64[Tensor, " lanes"],
    steps: Int64[Tensor, " lanes"],
) -> list[Tensor]:
    """The masks of both dropouts for one step of every lane."""
    return [dropout_mask(batch, width, drop, keys, steps, layer) for layer, width in enumerate(widths)]


def _losses(
    leaves: dict[str, Tensor],
    running: dict[str, Tensor],
    variables: Variables,
    source: Source,
    samples: Int64[Tensor, "*some batch"],
    chosen: Int64[Tensor, "*some batch"],
    form: Form,
) -> tuple[Loss, dict[str, Tensor]]:
    """Each lane's loss, and the running statistics after it. A function of its arguments alone: compiled once a form."""
    batch = gather(source, samples, chosen, form.dtype)
    images = batch.images
    if images.ndim == 5:  # lanes with images of their own: side by side, as channels
        images = images.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
    logits, after = _logits(leaves, running, images, form, variables)
    if batch.soft is None:
        student = label_loss(logits, batch.labels)
        return Loss(student, torch.zeros_like(student), student), after
    alpha, temperature = variables.alpha, variables.temperature
    return distillation_loss(logits, batch.soft, batch.labels, alpha, temperature, form.scale_by_t_squared), after


def _logits(
    leaves: dict[str, Tensor],
    running: dict[str, Tensor],
    x: Float[Tensor, "batch channels height width"],
    form: Form,
    training: Variables | None,
) -> tuple[Float[Tensor, "lanes batch classes"], dict[str, Tensor]]:
    """The pack's forward pass, in training where variables are given; names are those of `models.cnn`'s layers."""
    after, dtype = {}, form.dtype if training is None else form.narrow
    for block in range(form.blocks):
        convolution, norm = f"{4 * block}", f"{4 * block + 1}"
        weight, bias = (leaves[f"{convolution}.{name}"].to(dtype) for name in ("weight", "bias"))
        # BatchNorm subtracts what a bias adds: its gradient is 0 but for rounding, which Adam would turn into full steps.
        x = convolve(x.to(dtype), weight, bias.detach(), form.lowering)
        mean, var = f"{norm}.running_mean", f"{norm}.running_var"
        scale, shift = leaves[f"{norm}.weight"], leaves[f"{norm}.bias"]
        if training is None:
            known = running[mean].flatten(), running[var].flatten()
            x = F.batch_norm(x, *known, scale.flatten(), shift.flatten(), eps=BN_EPS)
        else:
            x, after[mean], after[var] = normalise(_windows(x).to(form.dtype), scale, shift, running[mean], running[var])
        x = _halve(F.relu(x.to(dtype)))
    lanes = len(leaves["0.weight"])
    if training is not None:  # before the values change their order: the mask's is that of channels last
        batch, _, height, width = x.shape
        mask = training.masks[0].view(lanes, batch, height, width, -1).permute(1, 0, 4, 2, 3)
        x = (x.unflatten(1, (lanes, -1)) * mask).flatten(1, 2)
    x = x.reshape(len(x), lanes, -1).transpose(0, 1)
    for number, layer in enumerate((4 * form.blocks + 2, 4 * form.blocks + 5)):
        if training is not None and number == 1:
            x = x * training.masks[1]
        dtype = form.dtype if number == 1 else dtype  # the logits are not rounded
        bias, weight = (leaves[f"{layer}.{name}"].to(dtype) for name in ("bias", "weight"))
        x = torch.baddbmm(bias[:, None], x.to(dtype), weight.transpose(1, 2))
        x = F.relu(x) if number == 0 else x
    return x, after


def convolve(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "lanes out in 3 3"],
    bias: Float[Tensor, "lanes out"],
    lowering: Lowering,
) -> Float[Tensor, "batch lanes*out height width"]:
    """A 3x3 convolution in every lane. Images that all lanes share take one ordinary convolution."""
    lanes, out, inner = weight.shape[:3]
    if x.shape[1] == inner or lowering == "grouped":
        groups = x.shape[1] // inner
        return F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=1, groups=groups)
    apart = x.unflatten(1, (lanes, inner))
    if lowering == "separate":
        return torch.cat([F.conv2d(apart[:, lane], weight[lane], bias[lane], padding=1) for lane in range(lanes)], 1)
    if lowering == "vmap":
        each = torch.vmap(lambda x, w, b: F.conv2d(x, w, b, padding=1), in_dims=(1, 0, 0), out_dims=1)
        return each(apart, weight, bias).flatten(1, 2)
    batch, _, height, width = x.shape
    padded = F.pad(apart.permute(1, 0, 3, 4, 2), (0, 0, 1, 1, 1, 1))  # [lanes, batch, height + 2, width + 2, in]
    nine = [padded[:, :, down : down + height, right : right + width] for down in range(3) for right in range(3)]
    patches = torch.cat(nine, -1).flatten(1, 3)  # [lanes, batch * height * width, 9 * in]
    columns = weight.permute(0, 3, 4, 2, 1).reshape(lanes, 9 * inner, out)
    product = torch.baddbmm(bias[:, None], patches, columns)
    return product.view(lanes, batch, height, width, out).permute(1, 0, 4, 2, 3).flatten(1, 2)


def _windows(x: Float[Tensor, "batch channels height width"]) -> Tensor:
    """Pixels by their 2x2 windows: [batch, channels, height / 2, 2, width / 2, 2]; compiled, and where all are whole.

    Normalised and pooled in this form, no pixel has to find its window by divisions, in backward above all.
    """
    height, width = x.shape[2:]
    if not torch.compiler.is_compiling() or height % 2 or width % 2:
        return x
    return x.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))


def _halve(x: Tensor) -> Float[Tensor, "batch channels half_height half_width"]:
    """Average pooling over 2x2 pixels. Compiled, as a mean over views: the compiler's own pooling is not vectorised."""
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, 2)
    if x.ndim == 4:
        x = _windows(x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2])
    return x.sum((3, 5)) * 0.25


def normalise(
    x: Float[Tensor, "batch stacked *pixels"],
    scale: Float[Tensor, "lanes channels"],
    shift: Float[Tensor, "lanes channels"],
    mean: Float[Tensor, "lanes channels"],
    var: Float[Tensor, "lanes channels"],
) -> tuple[Float[Tensor, "batch stacked *pixels"], Float[Tensor, "lanes channels"], Float[Tensor, "lanes channels"]]:
    """BatchNorm in training (arXiv:1502.03167, algorithm 1) and its new running statistics.

    Compiled, mean and variance come out of one pass over values shifted by the running mean, without which
    E[x^2] - E[x]^2 would cancel: 33 ms a step of the documented student, 42 ms by the compiler's own (Welford).
    """
    if not torch.compiler.is_compiling():
        new_mean, new_var = mean.flatten().clone(), var.flatten().clone()
        y = F.batch_norm(x, new_mean, new_var, scale.flatten(), shift.flatten(), True, BN_MOMENTUM, BN_EPS)
        return y, new_mean.view_as(mean), new_var.view_as(var)
    count, inner = x.numel() // x.shape[1], tuple(range(2, x.ndim))

    def in_each_image(values: Tensor) -> Tensor:  # so that backward, too, sums within each image first
        return values.flatten().expand(len(x), -1).unflatten(1, (-1, *[1] * len(inner)))

    shifted = x - in_each_image(mean)
    # Products in place of quotients, which backward would repeat for every pixel.
    offset = shifted.sum(inner).sum(0) * (1 / count)
    variance = (shifted * shifted).sum(inner).sum(0) * (1 / count) - offset * offset
    factor = torch.rsqrt(variance + BN_EPS) * scale.flatten()
    y = shifted * in_each_image(factor) + in_each_image(shift.flatten() - offset * factor)
    with torch.no_grad():
        new_mean = mean + BN_MOMENTUM * offset.view_as(mean)
        new_var = var + BN_MOMENTUM * (variance.view_as(var) * (count / max(count - 1, 1)) - var)
    return y, new_mean, new_var


@cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    # A student of other shape is compiled anew, which torch would refuse after 8 times.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(function, fullgraph=True, dynamic=False)


def _columns(parameters: Float[Tensor, "lanes parameters"], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Each layer's columns of the pack's parameters, shaped as the layer wants them: leaves on the same memory."""
    columns = parameters.split([shape.numel() for shape in shapes.values()], 1)
    return {
        name: block.unflatten(1, shape).detach().requires_grad_()
        for (name, shape), block in zip(shapes.items(), columns, strict=True)
    }


def _fresh(lane: Lane, like: Split) -> nn.Module:
    """A lane's network at its start: the same weights whatever was drawn before."""
    with torch.random.fork_rng([]):
        torch.manual_seed(lane.training.seed)
        return build(lane.network, like)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}


def _torch_optimizer(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if training.optimizer == "sgd" else {}
    return kinds[training.optimizer](
        module.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True, **extra
    )


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
