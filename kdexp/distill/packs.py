"""A pack: K networks of one fuse key that take their steps together.

`Stacked` trains K networks as one (see stacked.py), `Separate` steps any modules side by side.

Nothing of a lane reaches another: its result depends on K and on its slot, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from kdexp.config import Distillation, Network, Recipe, Training
from kdexp.distill.batches import pixels
from kdexp.distill.datasets import Split
from kdexp.distill.losses import Loss, Term, distillation_loss, label_loss
from kdexp.distill.models import ModelError, build, layout_of
from kdexp.distill.optimizers import Average, Optimizer
from kdexp.distill.randomness import drawing, dropout_mask, seed_of
from kdexp.distill.stacked import Form, Lowering, Plan, Stack, dropouts, forward, plan_of, strayed

__all__ = [
    "Batch",
    "Drawn",
    "Execution",
    "Lane",
    "Pack",
    "Separate",
    "Source",
    "Stacked",
    "fresh",
    "gather",
    "pack_of",
    "plan_for",
]

P = ParamSpec("P")
T = TypeVar("T")

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Lane:
    """One network to train and how. Lanes of a pack agree in `fuse_key`; what is not in it may
    differ.
    """

    network: Network
    training: Training
    distillation: Distillation
    start: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    """The weights that it begins from; None: they are drawn."""

    @classmethod
    def of(cls, recipe: Recipe) -> Lane:
        """The student of a recipe."""
        return cls(recipe.student, recipe.training, recipe.distillation)

    @property
    def term(self) -> Term:
        """How it listens to its teacher."""
        how = self.distillation
        return Term(how.loss, how.times_t_squared, how.beta, how.standard_deviation)

    @property
    def fuse_key(self) -> str:
        """What lanes must share to step together: everything but alpha, T, learning rate, weight
        decay, dropout, seed.
        """
        return "\n".join(
            [
                self.network.model_dump_json(include=set(Network.model_fields) - {"dropout"}),
                self.training.model_dump_json(
                    include=set(Training.model_fields) - {"learning_rate", "weight_decay", "seed"}
                ),
                self.distillation.model_dump_json(exclude={"alpha", "temperature"}),
            ]
        )


@dataclass(frozen=True)
class Execution:
    """How a training is carried out: not part of a recipe, but its last bits depend on it, so it is
    recorded.
    """

    lanes: int = 1
    shared: bool = True
    """All lanes see the same mini-batches: they start together and have one seed."""
    compiled: bool = False
    lowering: Lowering = "grouped"
    precision: Precision = "fp32"
    """Of activations and products in training; parameters, statistics, loss, optimiser and
    evaluation are in fp32.
    """

    def record(self, slot: int) -> dict[str, str]:
        """As text by name, with the slot of one lane."""
        return {
            "lanes": str(self.lanes),
            "lane": str(slot),
            "mini-batches": "shared" if self.shared else "own",
            "compiled": "yes" if self.compiled else "no",
            "lowering": self.lowering,
            "precision": self.precision,
        }

    @classmethod
    def recorded(cls, record: Mapping[str, str]) -> tuple[Execution, int]:
        """What `record` wrote: the execution, and the lane's slot. A run of a former version was
        alone and plain.
        """
        written = {**cls().record(0), **record}
        lowering = next(known for known in get_args(Lowering) if known == written["lowering"])
        precision = next(known for known in get_args(Precision) if known == written["precision"])
        shared, compiled = written["mini-batches"] == "shared", written["compiled"] == "yes"
        return cls(int(written["lanes"]), shared, compiled, lowering, precision), int(
            written["lane"]
        )


@dataclass(frozen=True)
class Source:
    """What batches are gathered from: the training images, the list of views, the teacher's raw
    logits in each.
    """

    split: Split
    views: Int64[Tensor, "views 3"]
    logits: Float[Tensor, "views samples classes"] | None
    columns: Int64[Tensor, " training"] | None = None
    """Which of the samples in `logits` each training image is; None: they are the same."""


class Batch(NamedTuple):
    """One mini-batch: with a lanes axis where lanes see different images."""

    images: Float[Tensor, "*lanes batch channels height width"]
    labels: Int64[Tensor, "*lanes batch"]
    soft: Float[Tensor, "*lanes batch classes"] | None
    """The teacher's raw logits for these images as they are seen here."""


class Drawn(NamedTuple):
    """What a step trains on: samples, the view of each, and what is erased of each, if anything."""

    samples: Int64[Tensor, "*lanes batch"]
    views: Int64[Tensor, "*lanes batch"]
    erased: Int64[Tensor, "*lanes batch 4"] | None = None


def gather(source: Source, drawn: Drawn, dtype: torch.dtype) -> Batch:
    """These samples, each in its chosen view."""
    samples, chosen, erased = drawn
    views = source.views[chosen.flatten()] if len(source.views) > 1 else None
    images = pixels(
        source.split, samples.flatten(), views, None if erased is None else erased.reshape(-1, 4)
    ).to(dtype)
    columns = samples if source.columns is None else source.columns[samples]
    soft = None if source.logits is None else source.logits[chosen, columns].to(dtype)
    return Batch(
        images.unflatten(0, samples.shape) if samples.ndim > 1 else images,
        source.split.labels[samples],
        soft,
    )


class Variables(NamedTuple):
    """What may differ from lane to lane within a step: tensors, so that other values compile
    nothing anew.
    """

    alpha: Float[Tensor, " lanes"]
    temperature: Float[Tensor, " lanes"]
    masks: list[Float[Tensor, "lanes batch features"]]
    """One for each dropout, of its own width."""


class Stacked:
    """K networks of one plan as one. Parameters are one [lanes, parameters] tensor, of which each
    layer sees its columns.
    """

    def __init__(
        self,
        lanes: Sequence[Lane],
        source: Source,
        how: Execution,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.how, self.dtype = source, how, dtype
        self.device = source.split.labels.device
        one, first = lanes[0], fresh(lanes[0], source.split)
        plan = _plan(first, source.split)
        assert plan is not None
        self.form = Form(
            plan, how.lowering, dtype, torch.bfloat16 if how.precision == "bf16" else dtype
        )
        self.term, self.smoothing = one.term, one.training.label_smoothing
        self._losses = _compiled(_losses) if how.compiled else _losses
        self._masks = _compiled(_masks) if how.compiled else _masks
        self.widths = [layer.width for layer in dropouts(plan)]
        shapes = {name: parameter.shape for name, parameter in first.named_parameters()}
        count = sum(shape.numel() for shape in shapes.values())
        self.parameters = torch.zeros(len(lanes), count, dtype=dtype, device=self.device)
        running = {
            name: torch.zeros(len(lanes), *buffer.shape, dtype=dtype, device=self.device)
            for name, buffer in first.named_buffers()
            if "running" in name
        }
        self.live = Stack(_columns(self.parameters, shapes), running)
        self.average = (
            Average(one.training.ema, [self.parameters, *running.values()])
            if one.training.ema
            else None
        )
        """Of the parameters and running statistics."""
        self.kept = self._averaged(shapes) if self.average else self.live
        """What is evaluated and handed out."""
        # alpha, temperature
        self.hyper = torch.zeros(2, len(lanes), dtype=dtype, device=self.device)
        self.drop = torch.zeros(len(self.widths), len(lanes), dtype=dtype, device=self.device)
        self.keys = torch.zeros(len(lanes), dtype=torch.int64, device=self.device)
        decay = torch.zeros(len(lanes), dtype=dtype, device=self.device)
        self.optimizer = Optimizer(one.training.optimizer, self.parameters, decay)
        self.steps = [0] * len(lanes)
        for slot, lane in enumerate(lanes):
            self.put(slot, lane)

    def put(self, slot: int, lane: Lane) -> None:
        """A fresh network in a lane's slot."""
        module = fresh(lane, self.source.split)
        if _plan(module, self.source.split) != self.form.plan:
            raise ModelError(
                f"{lane.network.architecture}: is built otherwise with another seed; let it draw"
                " weights only"
            )
        for stack in (self.live, self.kept):
            for name, parameter in module.named_parameters():
                stack.leaves[name].data[slot] = parameter.detach()
            for name in stack.running:
                stack.running[name][slot] = module.get_buffer(name)
        self.hyper[:, slot] = torch.tensor(
            [lane.distillation.alpha, lane.distillation.temperature], dtype=self.dtype
        )
        shares = [module.get_submodule(layer.name).p for layer in dropouts(self.form.plan)]
        self.drop[:, slot] = torch.tensor(shares, dtype=self.dtype)
        self.keys[slot] = seed_of(lane.training.seed, "dropout") % 2**32
        self.optimizer.reset(slot, lane.training.weight_decay)
        self.steps[slot] = 0

    def save(self, slot: int) -> dict[str, Tensor]:
        """All that a lane's training goes on from, on the CPU."""
        return _copies(self._progress(slot) | {"batches": torch.tensor(self.steps[slot])})

    def load(self, slot: int, progress: Mapping[str, Tensor]) -> None:
        """Go on from what `save` gave; the lane is already in this slot."""
        for name, tensor in self._progress(slot).items():
            tensor.copy_(progress[name])
        self.steps[slot] = int(progress["batches"])

    def _progress(self, slot: int) -> dict[str, Tensor]:
        optimizer = {
            f"optimizer/{name}": tensor for name, tensor in self.optimizer.state(slot).items()
        }
        running = {name: tensor[slot] for name, tensor in self.live.running.items()}
        average = enumerate(self.average.tensors if self.average else ())
        averages = {f"average/{number}": tensor[slot] for number, tensor in average}
        return {"parameters": self.parameters[slot], **running, **optimizer, **averages}

    def _averaged(self, shapes: Mapping[str, torch.Size]) -> Stack:
        assert self.average is not None
        parameters, *running = self.average.tensors
        return Stack(
            _columns(parameters, shapes), dict(zip(self.live.running, running, strict=True))
        )

    def step(
        self, drawn: Drawn, rates: Float[Tensor, " slots"], steps: Int64[Tensor, " slots"]
    ) -> Loss:
        """One optimiser step of every lane on what is drawn for it. Returns each lane's loss.

        `steps` are the lanes' own step numbers; samples have a lanes axis where lanes see different
        ones.
        """
        # Masks are drawn by themselves: within the network, their integers keep its last block from
        # being vectorised.
        masks = self._masks(drawn.samples.shape[-1], self.widths, self.drop, self.keys, steps)
        (alpha, temperature), live = self.hyper.unbind(), self.live
        variables = Variables(alpha, temperature, masks)
        fixed = self.source, self.form, self.term, self.smoothing
        loss, running = self._losses(live.leaves, live.running, variables, drawn, *fixed)
        astray = (
            strayed(live.running, running)
            if self.how.compiled and running
            else torch.zeros(1, dtype=torch.bool)
        )
        noticed = _noticed(astray)
        gradient = self._gradient(loss)
        # one pass over a batch that is far from the running mean: see stacked.normalise
        if noticed():
            careful, exact = _losses(live.leaves, live.running, variables, drawn, *fixed)
            gradient = _chosen(astray, self._gradient(careful), gradient)
            running = {name: _chosen(astray, exact[name], running[name]) for name in running}
            loss = Loss(*(_chosen(astray, *parts) for parts in zip(careful, loss, strict=True)))
        live.running.update(running)
        self.optimizer.step(gradient, rates)
        if self.average:
            self.average.update(
                [self.parameters, *live.running.values()], self.optimizer.steps[:, 0]
            )
        self.steps = [step + 1 for step in self.steps]
        return Loss(*(part.detach() for part in loss))

    def _gradient(self, loss: Loss) -> Float[Tensor, "lanes parameters"]:
        # The sum's gradient is one for every lane, also where a neighbour's loss is NaN.
        parts = torch.autograd.grad(
            loss.total.sum(), list(self.live.leaves.values()), materialize_grads=True
        )
        return torch.cat([part.flatten(1) for part in parts], 1)

    @torch.no_grad()
    def logits(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "lanes batch classes"]:
        """Every lane's logits of the same images, as in evaluation."""
        return forward(self.kept, images.to(self.dtype), self.form, None)[0]

    def state(self, slot: int) -> dict[str, Tensor]:
        """A lane's state, as its own module would name it, on the CPU."""
        state = {name: leaf[slot] for name, leaf in self.kept.leaves.items()}
        for name, running in self.kept.running.items():
            state[name] = running[slot]
            if name.endswith("running_var"):
                state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(
                    self.steps[slot]
                )
        return _copies(state)


class Separate:
    """K modules of any kind, each with an optimiser of torch's, stepped one after another."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        source: Source,
        how: Execution,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.dtype, self.bf16 = source, dtype, how.precision == "bf16"
        self.lanes = list(lanes)
        self.modules = [nn.Module() for _ in lanes]
        self.optimizers: list[torch.optim.Optimizer] = [None] * len(lanes)  # type: ignore[list-item]
        self.averages: list[Average | None] = [None] * len(lanes)
        for slot, lane in enumerate(lanes):
            self.put(slot, lane)

    def put(self, slot: int, lane: Lane) -> None:
        """A fresh network in a lane's slot."""
        module = fresh(lane, self.source.split)
        module.to(self.source.split.labels.device, self.dtype, memory_format=layout_of(module))  # type: ignore[call-overload]
        self.lanes[slot], self.modules[slot] = lane, module
        self.optimizers[slot] = _torch_optimizer(module, lane.training)
        self.averages[slot] = (
            Average(lane.training.ema, _floats(module)) if lane.training.ema else None
        )

    def save(self, slot: int) -> dict[str, Tensor]:
        """All that a lane's training goes on from, on the CPU."""
        optimizer = self.optimizers[slot].state_dict()["state"]
        flat = {
            f"optimizer/{index}/{name}": value
            for index, slots in optimizer.items()
            for name, value in slots.items()
        }
        average = self.averages[slot]
        averages = {
            f"average/{number}": tensor
            for number, tensor in enumerate(average.tensors if average else ())
        }
        module = self.modules[slot]
        state = {f"module/{name}": tensor for name, tensor in module.state_dict().items()}
        return _copies(state | _unstored(module) | flat | averages)

    def load(self, slot: int, progress: Mapping[str, Tensor]) -> None:
        """Go on from what `save` gave; the lane is already in this slot."""
        module, optimizer = self.modules[slot], self.optimizers[slot]
        module.load_state_dict(
            {name[7:]: tensor for name, tensor in progress.items() if name.startswith("module/")}
        )
        for name, buffer in _unstored(module).items():
            buffer.copy_(progress.get(name, buffer))  # which former versions did not save
        average = self.averages[slot]
        for number, tensor in enumerate(average.tensors if average else ()):
            tensor.copy_(progress[f"average/{number}"])
        for index, parameter in enumerate(module.parameters()):
            prefix = f"optimizer/{index}/"
            for name, value in progress.items():
                if name.startswith(prefix):
                    # Laid out in memory like its parameter: fused optimisers rely on it.
                    like = (
                        parameter.detach()
                        if value.shape == parameter.shape
                        else value.to(parameter.device)
                    )
                    optimizer.state[parameter][name.removeprefix(prefix)] = torch.empty_like(
                        like
                    ).copy_(value)

    def step(
        self, drawn: Drawn, rates: Float[Tensor, " slots"], steps: Int64[Tensor, " slots"]
    ) -> Loss:
        """One optimiser step of every lane on what is drawn for it. Returns each lane's loss."""
        batch, losses = gather(self.source, drawn, self.dtype), []
        for slot, (step, rate) in enumerate(zip(steps.tolist(), rates.tolist(), strict=True)):
            fused = batch.images.ndim == 5
            parts = (part[slot] if fused and part is not None else part for part in batch)
            own = Batch(*parts)  # type: ignore[arg-type]
            # a network may work in place, and the next one sees the same images
            if slot + 1 < len(self.modules):
                own = own._replace(images=own.images.clone())
            seed = seed_of(self.lanes[slot].training.seed, "dropout", step)
            with drawing(seed, _cuda_devices(rates.device)):
                losses.append(self._step(slot, own, rate))
            average = self.averages[slot]
            if average:
                average.update(_floats(self.modules[slot]), steps[slot] + 1)
        return Loss(*(torch.stack(parts) for parts in zip(*losses, strict=True)))

    @torch.no_grad()
    def logits(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "lanes batch classes"]:
        """Every lane's logits of the same images, as in evaluation."""
        each = []
        for slot, module in enumerate(self.modules):
            module.eval()
            kept = self._kept(slot) if self.averages[slot] else {}
            # a network may work in place
            own = images.to(self.dtype, copy=slot + 1 < len(self.modules))
            each.append(torch.func.functional_call(module, kept, (own,), tie_weights=False))
            module.train()
        return torch.stack(each)

    def state(self, slot: int) -> dict[str, Tensor]:
        """A lane's state, as its own module names it, on the CPU."""
        return _copies(self._kept(slot))

    def _kept(self, slot: int) -> dict[str, Tensor]:
        """The module's state, with its average in the place of what is averaged."""
        state, average = self.modules[slot].state_dict(), self.averages[slot]
        names = [name for name, tensor in state.items() if tensor.is_floating_point()]
        return {**state, **dict(zip(names, average.tensors, strict=True))} if average else state

    def _step(self, slot: int, batch: Batch, rate: float) -> Loss:
        module, optimizer, lane = self.modules[slot], self.optimizers[slot], self.lanes[slot]
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = module(batch.images).to(self.dtype)
        how = lane.distillation
        loss = _loss(
            logits, batch, how.alpha, how.temperature, lane.term, lane.training.label_smoothing
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        return Loss(*(part.detach() for part in loss))


Pack = Stacked | Separate


def pack_of(
    lanes: Sequence[Lane], source: Source, how: Execution, dtype: torch.dtype = torch.float32
) -> Pack:
    """The pack for these lanes: one stacked network of them where there is such a form, else side
    by side.
    """
    kind = Separate if plan_for(lanes[0], source.split) is None else Stacked
    return kind(lanes, source, how, dtype)


def plan_for(lane: Lane, like: Split) -> Plan | None:
    """The plan of a lane's network; None where it has no stacked form."""
    return _plan(fresh(lane, like), like)


def _plan(module: nn.Module, like: Split) -> Plan | None:
    return plan_of(module, (like.channels, *like.image_size))


def _masks(
    batch: int,
    widths: Sequence[int],
    drop: Float[Tensor, "dropouts lanes"],
    keys: Int64[Tensor, " lanes"],
    steps: Int64[Tensor, " lanes"],
) -> list[Tensor]:
    """The masks of every dropout for one step of every lane."""
    return [
        dropout_mask(batch, width, share, keys, steps * len(widths) + number)
        for number, (width, share) in enumerate(zip(widths, drop, strict=True))
    ]


def _losses(
    leaves: dict[str, Tensor],
    running: dict[str, Tensor],
    variables: Variables,
    drawn: Drawn,
    source: Source,
    form: Form,
    term: Term,
    smoothing: float,
) -> tuple[Loss, dict[str, Tensor]]:
    """Each lane's loss, and the running statistics after it. A function of its arguments alone:
    compiled once a form.
    """
    batch = gather(source, drawn, form.dtype)
    logits, after = forward(Stack(leaves, running), batch.images, form, variables.masks)
    return _loss(logits, batch, variables.alpha, variables.temperature, term, smoothing), after


def _loss(
    logits: Float[Tensor, "*lanes batch classes"],
    batch: Batch,
    alpha: float | Float[Tensor, "*lanes"],
    temperature: float | Float[Tensor, "*lanes"],
    term: Term,
    smoothing: float,
) -> Loss:
    """With a teacher's logits or on the labels alone."""
    if batch.soft is None:
        student = label_loss(logits, batch.labels, smoothing)
        return Loss(student, torch.zeros_like(student), student)
    return distillation_loss(logits, batch.soft, batch.labels, alpha, temperature, term, smoothing)


def _noticed(flags: Bool[Tensor, " lanes"]) -> Callable[[], bool]:
    """Whether any is set; on a GPU, what is launched before one asks does not have to be waited
    for.
    """
    found = flags.any().to("cpu", non_blocking=True)
    if flags.device.type != "cuda":
        return lambda: bool(found)
    copied = torch.cuda.Event()
    copied.record()

    def ask() -> bool:
        copied.synchronize()
        return bool(found)

    return ask


def _chosen(lanes: Bool[Tensor, " lanes"], one: Tensor, other: Tensor) -> Tensor:
    """In these lanes the one, in the rest the other."""
    return torch.where(lanes.view(-1, *[1] * (one.ndim - 1)), one, other)


@cache
def _compiled(function: Callable[P, T]) -> Callable[P, T]:
    # A student of other shape is compiled anew, which torch would refuse after 8 times.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(function, fullgraph=True, dynamic=False)


def _columns(
    parameters: Float[Tensor, "lanes parameters"], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Each layer's columns of the pack's parameters, shaped as the layer wants them: leaves on the
    same memory.
    """
    columns = parameters.split([shape.numel() for shape in shapes.values()], 1)
    return {
        name: block.unflatten(1, shape).detach().requires_grad_()
        for (name, shape), block in zip(shapes.items(), columns, strict=True)
    }


def fresh(lane: Lane, like: Split) -> nn.Module:
    """A lane's network at its start: the same weights whatever was drawn before."""
    with drawing(lane.training.seed):
        module = build(lane.network, like)
    if lane.start is not None:
        module.load_state_dict(lane.start)
    return module


def _unstored(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are not in a module's state_dict."""
    stored = module.state_dict().keys()
    return {
        f"buffer/{name}": buffer for name, buffer in module.named_buffers() if name not in stored
    }


def _floats(module: nn.Module) -> list[Tensor]:
    """What of a module can be averaged: parameters and running statistics."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }


def _torch_optimizer(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    extra = {"momentum": 0.9, "nesterov": True} if training.optimizer == "sgd" else {}
    return kinds[training.optimizer](
        module.parameters(),
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True,
        **extra,
    )


def _cuda_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
