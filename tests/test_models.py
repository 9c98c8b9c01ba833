"""Networks: the documented student to the number, teachers by name, networks of one's own."""

from __future__ import annotations

import sys

import pytest
import torch
import torchvision
from torch import nn

from kdexp.config import Network, Student, Teacher
from kdexp.distill.datasets import Split
from kdexp.distill.models import FromPixels, ModelError, build, measure, summary, weights_hash

# DESIGN: the recipe's layer table (kind, output shape, parameters).
LAYER_TABLE = [
    ("Conv2d", (16, 28, 28), 448),
    ("BatchNorm2d", (16, 28, 28), 32),
    ("ReLU", (16, 28, 28), 0),
    ("AvgPool2d", (16, 14, 14), 0),
    ("Conv2d", (32, 14, 14), 4_640),
    ("BatchNorm2d", (32, 14, 14), 64),
    ("ReLU", (32, 14, 14), 0),
    ("AvgPool2d", (32, 7, 7), 0),
    ("Conv2d", (64, 7, 7), 18_496),
    ("BatchNorm2d", (64, 7, 7), 128),
    ("ReLU", (64, 7, 7), 0),
    ("AvgPool2d", (64, 3, 3), 0),
    ("Dropout", (64, 3, 3), 0),
    ("Flatten", (576,), 0),
    ("Linear", (128,), 73_856),
    ("ReLU", (128,), 0),
    ("Dropout", (128,), 0),
    ("Linear", (10,), 1_290),
]


def images(channels: int = 3, size: int = 28, classes: int = 10) -> Split:
    stored = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    return Split(
        stored,
        torch.zeros(2, dtype=torch.int64),
        tuple(map(str, range(classes))),
        channels,
        0.5,
        0.5,
    )


def test_the_documented_student_equals_the_layer_table_line_by_line() -> None:
    student, x = build(Student(), images()), torch.zeros(1, 3, 28, 28)
    found = []
    for layer in student:
        x = layer(x)
        found.append(
            (type(layer).__name__, tuple(x.shape[1:]), sum(p.numel() for p in layer.parameters()))
        )
    assert found == LAYER_TABLE
    assert sum(parameters for _, _, parameters in found) == 98_954


def test_the_documented_students_details() -> None:
    student = build(Student(), images())
    assert [layer.p for layer in student if isinstance(layer, nn.Dropout)] == [0.2, 0.2]
    assert all(
        c.kernel_size == (3, 3) and c.padding == (1, 1) for c in student if isinstance(c, nn.Conv2d)
    )


def test_the_documented_students_size() -> None:
    size = measure(build(Student(), images()), images())
    assert size.parameters == 98_954
    assert size.multiply_adds == 2_242_346  # 2.24 M, torchinfo's count
    # weights, batch counters, running statistics
    assert size.bytes == 4 * 98_954 + 3 * 8 + 4 * 2 * (16 + 32 + 64)


def test_the_summary_names_every_layer_and_the_total() -> None:
    text = summary(build(Student(), images()), images())
    assert "98,954" in text
    assert all(f"{parameters:,}" in text for _, _, parameters in LAYER_TABLE if parameters)


def test_the_documented_teacher_is_resnet50_with_10_outputs() -> None:
    assert measure(build(Teacher(), images()), images()).parameters == 23_528_522


@pytest.mark.parametrize(
    ("architecture", "channels", "parameters"),
    [
        ("resnet18", 3, 11_173_962),
        ("resnet18", 1, 11_172_810),
        ("resnet50", 3, 23_520_842),
        ("resnet50", 1, 23_519_690),
    ],
)
def test_a_small_stem_is_a_3x3_convolution_of_as_many_channels_as_there_are(
    architecture, channels, parameters
) -> None:
    module = build(Teacher(architecture=architecture, stem="small"), images(channels))
    assert measure(module, images(channels)).parameters == parameters
    assert module.maxpool(module.conv1(torch.zeros(1, channels, 28, 28))).shape == (1, 64, 28, 28)


def test_imagenets_stem_is_torchvisions_network_to_the_bit() -> None:
    def seeded(make):
        torch.manual_seed(0)
        return weights_hash(make().state_dict())

    network = Teacher(architecture="resnet18")
    assert seeded(lambda: build(network, images())) == seeded(
        lambda: torchvision.models.resnet18(num_classes=10)
    )


@pytest.mark.parametrize(
    ("channels", "hidden", "parameters"), [((4, 8, 16), 32, 6_602), ((8, 16, 32), 128, 44_426)]
)
def test_the_student_generalises_by_channels_and_hidden_width(channels, hidden, parameters) -> None:
    assert (
        measure(build(Student(channels=channels, hidden=hidden), images()), images()).parameters
        == parameters
    )


def test_a_student_can_be_a_teacher() -> None:
    assert measure(build(Teacher(architecture="cnn"), images()), images()).parameters == 98_954


def test_a_network_of_ones_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\ndef flat(channels, image_size, classes, width):\n    return"
        " nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], width),\n"
        "                         nn.Linear(width, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = build(Network(architecture="my_nets:flat", options={"width": 4}), images(channels=1))
    assert measure(module, images(channels=1)).parameters == 784 * 4 + 4 + 4 * 10 + 10
    with pytest.raises(ModelError, match="cannot be built"):
        build(Network(architecture="my_nets:flat"), images())
    with pytest.raises(ModelError, match="cannot import 'my_nets:none'"):
        build(Network(architecture="my_nets:none"), images())
    sys.modules.pop("my_nets")


@pytest.mark.parametrize(
    ("network", "like", "says"),
    [
        (
            Network(architecture="resnet5"),
            images(),
            "no network named 'resnet5'; did you mean resnet50?",
        ),
        (
            Network(architecture="resnet18"),
            images(channels=1),
            "take 3 channels, data.channels is 1; set it to 3, or",
        ),
        (
            Network(architecture="shufflenet_v2_x1_0", stem="small"),
            images(),
            "has no stem that could be small",
        ),
        (
            Network(architecture="mobilenet_v2", stem="small"),
            images(channels=1),
            "set stem to imagenet",
        ),
        (Network(architecture="cnn", channels=(1,) * 5), images(), "halvings leave nothing"),
        (Network(architecture="alexnet"), images(), "cannot be built"),
        (
            Network(architecture="torch.nn:Identity"),
            images(),
            r"gives \(2, 3, 28, 28\) for 2 images, expected logits",
        ),
        (
            Network(architecture="builtins:dict"),
            images(),
            "made a dict, expected a torch.nn.Module",
        ),
        (Network(architecture="fcn_resnet50"), images(), "no network named 'fcn_resnet50'"),
        (Network(architecture="vit_b_16"), images(), "cannot be built for"),
    ],
)
def test_what_does_not_fit_is_said(network, like, says) -> None:
    with pytest.raises(ModelError, match=says):
        build(network, like)


def test_equal_seeds_give_equal_weights() -> None:
    def made(seed: int) -> str:
        torch.manual_seed(seed)
        return weights_hash(build(Student(), images()).state_dict())

    assert made(1) == made(1) != made(2)


def test_the_registered_form_takes_pixels() -> None:
    like = images()
    student = build(Student(), like).eval()
    pixels = torch.randint(256, (4, 3, 28, 28)).float()
    assert torch.equal(FromPixels(student, like)(pixels), student((pixels / 255 - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("architecture", "channels", "blocks", "parameters"),
    [
        ("residual", (2, 4, 8), 3, 4_520),
        ("residual", (4, 8, 16), 3, 17_462),
        ("residual", (16, 32, 64), 3, 272_186),
    ],
)
def test_the_residual_family_is_cifars_resnet_20(
    architecture, channels, blocks, parameters
) -> None:
    """20 layers, a projection where a stage begins, grey images as one channel."""
    network = Student(architecture=architecture, channels=channels, blocks=blocks)
    assert measure(build(network, images(channels=1)), images(channels=1)).parameters == parameters


def test_pooling_globally_leaves_out_the_hidden_layer() -> None:
    assert (
        measure(build(Student(hidden=0), images()), images()).parameters
        == 448 + 32 + 4_640 + 64 + 18_496 + 128 + 650
    )


@pytest.mark.parametrize("architecture", ["cnn", "residual", "separable"])
def test_a_stride_of_two_keeps_the_parameters_and_spares_multiply_adds(architecture) -> None:
    one, two = (
        measure(
            build(
                Student(architecture=architecture, channels=(4, 8), hidden=0, stride=stride),
                images(),
            ),
            images(),
        )
        for stride in (1, 2)
    )
    assert one.parameters == two.parameters
    assert two.multiply_adds < 0.3 * one.multiply_adds


def test_separable_convolutions_cost_a_fraction_of_whole_ones() -> None:
    whole, apart = (
        measure(build(Student(architecture=a, channels=(16, 32)), images()), images()).parameters
        for a in ("residual", "separable")
    )
    assert apart < 0.2 * whole


def _computed(kind: str) -> nn.Module:
    """A network of a convolution and a linear layer whose weights are computed from others."""
    from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

    wrap = {
        "plain": lambda layer: layer,
        "weight_norm": weight_norm,
        "spectral_norm": spectral_norm,
        "parametrized weight_norm": parametrizations.weight_norm,
        "parametrized spectral_norm": parametrizations.spectral_norm,
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    }[kind]
    torch.manual_seed(0)
    layers = (
        wrap(nn.Conv2d(1, 4, 3, padding=1)),
        nn.ReLU(),
        nn.Flatten(),
        wrap(nn.Linear(4 * 8 * 8, 10)),
    )
    return nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "weight_norm",
        "spectral_norm",
        "parametrized weight_norm",
        "parametrized spectral_norm",
        "pruned",
    ],
)
def test_a_weight_that_is_computed_costs_what_a_plain_one_costs(digits, kind: str) -> None:
    plain = measure(_computed("plain"), digits.train)
    assert plain.multiply_adds == 64 * (4 * 9 + 4) + 10 * 256 + 10
    assert measure(_computed(kind), digits.train).multiply_adds == plain.multiply_adds
