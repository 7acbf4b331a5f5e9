"""The benchmarks' networks: sizes as published, and uint8 images as good as scaled ones."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import lifelong
from lifelong import Categorical, Examples
from lifelong.curvature import diagonal_curvature, kronecker_curvature
from lifelong.networks import (
    CIFAR,
    Norm,
    Pixels,
    Residual,
    ResNet,
    cifarnet,
    mlp,
    resnet18,
    resnet50,
    small_vgg,
    strided_vgg,
)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_mlp_has_no_activation_on_its_outputs() -> None:
    assert [type(layer) for layer in mlp(4, 3, 2)] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]


def test_sizes_are_the_published_ones() -> None:
    """CifarNet: 1,276,508 for 60 outputs. The VGG: its layers one by one."""
    assert count(cifarnet(60)) == 1_276_508
    convolutions = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    linear = [(4096, 512), (512, 512), (512, 200)]
    expected = sum(9 * i * o + o for i, o in convolutions) + sum(i * o + o for i, o in linear)
    assert count(small_vgg(200)) == expected
    assert small_vgg(200)(torch.zeros(2, 3, 64, 64)).shape == (2, 200)


def test_the_strided_vgg_has_the_widths_at_half_the_resolution() -> None:
    convolutions = [(3, 32), (32, 64), (64, 128), (128, 256)]
    expected = sum(9 * i * o + o for i, o in convolutions) + 4097 * 512 + 513 * 200
    assert count(strided_vgg(200)) == expected
    assert strided_vgg(200)(torch.zeros(2, 3, 64, 64)).shape == (2, 200)


@pytest.mark.parametrize("make", [cifarnet, small_vgg])
def test_dropout_is_a_choice(make) -> None:
    rates = [m.p for m in make(10, dropout=0.5).modules() if isinstance(m, nn.Dropout)]
    assert rates == {cifarnet: [0.125, 0.125, 0.25], small_vgg: [0.5, 0.5]}[make]


def test_pixels_are_normalised_and_channels_last() -> None:
    torch.manual_seed(0)
    raw = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    layer = Pixels(*CIFAR)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CIFAR)
    expected = (raw.double() / 255 - mean) / std
    assert torch.allclose(layer(raw).double(), expected, atol=1e-6)
    assert torch.allclose(layer(raw.double() / 255), expected)
    assert layer(raw).is_contiguous(memory_format=torch.channels_last)
    assert not layer.state_dict()
    assert "0.491" in repr(layer)


def test_under_autocast_the_outputs_are_nearly_the_same() -> None:
    torch.manual_seed(0)
    model, x = cifarnet(10).eval(), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fast = model(x)
    assert fast.dtype == torch.bfloat16
    assert torch.allclose(fast.float(), plain, atol=0.02 * float(plain.abs().max()))


def test_curvature_of_uint8_images_is_that_of_scaled_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Pixels(*CIFAR), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3)
    )
    x, y = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6) % 3
    for estimate in (diagonal_curvature, kronecker_curvature):
        raw, scaled = (
            estimate(model, Examples(inputs, y), Categorical()).diagonal()
            for inputs in (x, x.float() / 255)
        )
        for name in raw:
            assert torch.allclose(raw[name], scaled[name], rtol=1e-4, atol=1e-6)


def test_what_is_remembered_of_uint8_images_stays_uint8() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Pixels(*CIFAR), nn.Flatten(), nn.Linear(3 * 64, 3))
    x, y = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3
    prior = lifelong.kprior(Categorical(), memory=6).update(model, Examples(x, y))
    assert prior.memory is not None
    assert torch.as_tensor(prior.memory.inputs).dtype == torch.uint8
    assert torch.isfinite(prior.loss(model, x, y, num_data=12))


# Residual networks --------------------------------------------------------------------------------


def tiny_resnet(norm: Norm = "group") -> ResNet:
    torch.manual_seed(0)
    return ResNet(5, (1, 1), norm=norm, width=8)


def test_residual_networks_have_the_published_sizes() -> None:
    with torch.device("meta"):
        assert count(resnet18(1000, norm="batch")) == 11_689_512
        assert count(resnet50(1000)) == 25_557_032


def test_residual_networks_have_the_usual_names() -> None:
    with torch.device("meta"):
        names = set(resnet18(10, norm="batch").state_dict())
    expected = {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv2.weight",
        "layer4.1.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.weight",
        "fc.bias",
    }
    assert expected <= names
    assert len(names) == 122  # as torchvision's


@pytest.mark.parametrize("norm", get_args(Norm))
def test_a_residual_block_is_the_papers(norm: Norm) -> None:
    block = Residual(8, 16, 2, norm).eval()
    x = torch.randn(2, 8, 6, 6)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    assert block.downsample is not None
    torch.testing.assert_close(block(x), (branch + block.downsample(x)).relu())
    assert Residual(8, 8, 1, norm).downsample is None


def test_what_the_norms_do_in_training() -> None:
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for norm in get_args(Norm):
        model = tiny_resnet(norm)
        before = {n: b.clone() for n, b in model.named_buffers()}
        training, evaluation = model.train()(x), model.eval()(x)
        moved = any(not torch.equal(before[n], b) for n, b in model.named_buffers())
        assert moved == (norm == "batch")
        assert torch.equal(training, evaluation) == (norm != "batch")
    assert not list(tiny_resnet("group").buffers())
    with pytest.raises(ValueError, match="norm must be one of"):
        tiny_resnet("layer")  # type: ignore[arg-type]


def test_curvature_of_a_residual_network_is_that_of_autograd() -> None:
    model = tiny_resnet().double()
    g = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(3, 3, 16, 16, generator=g).double(), torch.arange(3))
    ours = diagonal_curvature(model, data, Categorical())
    f = model.eval()(data.inputs)
    p = f.softmax(1)
    weights = dict(model.named_parameters())
    expected = {n: torch.zeros_like(w) for n, w in weights.items()}
    for i in range(3):
        for c in range(5):  # sum_c p_c (e_c - p) (e_c - p)ᵀ
            v = (torch.eye(5).double()[c] - p[i].detach()) * p[i, c].detach().sqrt()
            for (n, _), j in zip(
                weights.items(),
                torch.autograd.grad(f[i] @ v, list(weights.values()), retain_graph=True),
                strict=True,
            ):
                expected[n] += j.square()
    torch.testing.assert_close(dict(ours.values), expected)
