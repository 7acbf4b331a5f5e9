"""Networks of the benchmarks, each a function of the number of outputs.

Weights come from torch's global generator, which the caller seeds. The convolutional ones take
uint8 images as a stream keeps them (a quarter of the memory), and compute in channels-last, which
with autocast to bfloat16 is three times as fast on processors that multiply matrices in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .planning import Layer, Network


class Pixels(nn.Module):
    """(x / 255 - mean) / std for uint8 images, without the division for others; channels-last.

    x: (B, C, H, W); mean and std: one number for each channel, of values in [0, 1]. No
    parameters and no buffers, so a checkpoint does not change with it. It is the network's first
    layer rather than a transform of the data, so that what is remembered stays uint8.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, x: Tensor) -> Tensor:
        scale, dtype = 1.0, x.dtype
        if x.dtype == torch.uint8:
            scale, dtype = 255.0, torch.get_default_dtype()
        shift = torch.tensor(self.mean, dtype=dtype, device=x.device).view(-1, 1, 1)
        width = torch.tensor(self.std, dtype=dtype, device=x.device).view(-1, 1, 1)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return x * (1 / (scale * width)) - shift / width

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


# Mean and standard deviation of the channels, of values in [0, 1].
CIFAR = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))  # of CIFAR-10's training images
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers of these sizes on the flattened input, ``activation`` between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (narrow, wide) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(narrow, wide)] if i == 0 else [activation(), nn.Linear(narrow, wide)]
    return nn.Sequential(*layers)


def cifarnet(outputs: int, *, dropout: float = 1.0) -> nn.Sequential:
    """The convolutional network of FROMP and of gradient reconstruction for 32 x 32 colour images.

    Two blocks of two 3 x 3 convolutions (32, 32, then 64, 64 channels; the second of each without
    padding), max pooling and dropout of 1/4, then 2304-512 with dropout of 1/2, and the outputs:
    1,276,508 parameters with 60 of them. ``dropout`` multiplies the three rates.
    """

    def block(inputs: int, channels: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25 * dropout),
        ]

    return nn.Sequential(
        Pixels(*CIFAR),
        *block(3, 32),
        *block(32, 64),
        nn.Flatten(),
        nn.Linear(2304, 512),
        nn.ReLU(),
        nn.Dropout(0.5 * dropout),
        nn.Linear(512, outputs),
    )


def small_vgg(outputs: int, *, dropout: float = 0.0) -> nn.Sequential:
    """The small VGG of gradient reconstruction for 64 x 64 colour images, without normalisation.

    3 x 3 convolutions of 64, M, 64, M, 128, 128, M, 256, 256, M channels (M: max pooling by 2),
    then 4096-512-512 and the outputs; ``dropout`` after either hidden linear layer.
    """
    layers: list[nn.Module] = [Pixels(*IMAGENET)]
    inputs = 3
    for channels in ((64,), (64,), (128, 128), (256, 256)):
        for wide in channels:
            layers += [nn.Conv2d(inputs, wide, 3, padding=1), nn.ReLU()]
            inputs = wide
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten()]
    for narrow, wide in ((256 * 4 * 4, 512), (512, 512)):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(512, outputs))


def strided_vgg(outputs: int) -> nn.Sequential:
    """``small_vgg`` at a third of its cost: one convolution of each width, at half the resolution.

    3 x 3 convolutions of 32 (stride 2), 64, M, 128, M, 256, M channels, then 4096-512 and the
    outputs. The first layer's map of 64 x 64 x 64 took most of the time there.
    """
    layers: list[nn.Module] = [
        Pixels(*IMAGENET),
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
    ]
    for inputs, wide in pairwise((32, 64, 128, 256)):
        layers += [nn.Conv2d(inputs, wide, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(256 * 4 * 4, 512), nn.ReLU(), nn.Linear(512, outputs)
    )


# Residual networks --------------------------------------------------------------------------------

Norm = Literal["group", "batch", "frozen"]


class Frozen(nn.BatchNorm2d):
    """Batch normalisation by its running statistics, in training too: a fixed affine map."""

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)


def normalisation(channels: int, norm: Norm) -> nn.Module:
    """A layer on (B, channels, H, W). Raises ValueError for a name that is none."""
    if norm == "group":
        return nn.GroupNorm(min(32, channels), channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "frozen":
        return Frozen(channels)
    raise ValueError(f"norm must be one of {get_args(Norm)}, got {norm!r}")


class Residual(nn.Module):
    """relu(x' + conv, norm, relu, conv, norm); ``bottleneck``: three convolutions of 1, 3 and 1.

    x' is x, or where the shapes differ its 1 x 1 convolution of that stride, normalised.
    """

    def __init__(
        self, inputs: int, width: int, stride: int, norm: Norm, *, bottleneck: bool = False
    ) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        # (kernel, stride, out); the stride of a bottleneck is in its 3 x 3 convolution.
        plain = ((3, stride, width), (3, 1, width))
        narrow = ((1, 1, width), (3, stride, width), (1, 1, outputs))
        wide = inputs
        self.depth = 3 if bottleneck else 2
        for i, (kernel, step, out) in enumerate(narrow if bottleneck else plain, start=1):
            conv = nn.Conv2d(wide, out, kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", normalisation(out, norm))
            wide = out
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), normalisation(outputs, norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for i in range(1, self.depth + 1):
            branch = self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(branch))
            branch = branch.relu() if i < self.depth else branch
        return (branch + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Residual network for large images (He et al. 2016): (B, 3, H, W) to (B, outputs).

    7 x 7 convolution of stride 2, max pooling, four stages of residual blocks with 64, 128, 256 and
    512 channels, each after the first at half the resolution; the mean over places, then a linear
    layer. Parameters are named as in torchvision, whose weights load (``norm="frozen"``, or
    ``strict=False`` for "group", which has no running statistics).

    norm: "group" (Wu & He 2018), the default here, is the same function in training and evaluation,
    of each image by itself. Batch normalisation's running statistics are a part of the past that no
    prior protects: while a new task is learned they move to its images, and all that was learned
    before is read through them; new and remembered examples also need two passes (docs/gotchas.md).
    "batch" is as published; "frozen" keeps the statistics of pretrained weights.
    """

    def __init__(
        self,
        outputs: int,
        depths: Sequence[int] = (2, 2, 2, 2),
        *,
        bottleneck: bool = False,
        norm: Norm = "group",
        width: int = 64,
    ) -> None:
        super().__init__()
        self.pixels = Pixels(*IMAGENET)
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = normalisation(width, norm)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        inputs = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                stride, channels = (2 if stage and i == 0 else 1), width * 2**stage
                blocks.append(Residual(inputs, channels, stride, norm, bottleneck=bottleneck))
                inputs = channels * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(depths)
        self.fc = nn.Linear(inputs, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(self.pixels(x))).relu())
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def resnet18(outputs: int, *, norm: Norm = "group") -> ResNet:
    """11,689,512 parameters with 1000 outputs, 3.6e9 operations for 224 x 224 pixels."""
    return ResNet(outputs, norm=norm)


def resnet50(outputs: int, *, norm: Norm = "group") -> ResNet:
    """25,557,032 parameters with 1000 outputs, 8.2e9 operations for 224 x 224 pixels."""
    return ResNet(outputs, (3, 4, 6, 3), bottleneck=True, norm=norm)


# By name, for ``lifelong plan``: how one is made, and the shape of an image.
NETWORKS: Mapping[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = MappingProxyType(
    {
        "mlp": (lambda outputs: mlp(784, 256, 256, outputs), (1, 28, 28)),
        "cifarnet": (cifarnet, (3, 32, 32)),
        "small_vgg": (small_vgg, (3, 64, 64)),
        "strided_vgg": (strided_vgg, (3, 64, 64)),
        "resnet18": (resnet18, (3, 224, 224)),
        "resnet50": (resnet50, (3, 224, 224)),
    }
)


# Counting and timing them -------------------------------------------------------------------------


def counted(
    name: str, make: Callable[[], nn.Module], shape: Sequence[int], input_bytes: float | None = None
) -> Network:
    """What the cost model needs of a network, by a forward pass that computes nothing (on torch's
    meta device): operations of products and convolutions, and the numbers that its layers put out,
    which is what a training step keeps.

    make: makes the network; shape: of one input. input_bytes: by default a byte for each number.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = make()
        x = torch.empty(1, *shape)
    kept, layers = 0, []

    def keep(module: nn.Module, args: object, out: Tensor) -> None:
        nonlocal kept
        kept += out.numel()
        if isinstance(module, nn.Linear | nn.Conv2d):
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            weight = module.weight
            inputs = weight[0].numel() + (module.bias is not None)
            positions = out.numel() / len(weight)
            sliding = isinstance(module, nn.Conv2d) and module.stride[0] == 1 and groups == 1
            height = weight.shape[2] if sliding else 1
            layers.append(Layer(len(weight) / groups, inputs, positions, groups, height))

    hooks = [m.register_forward_hook(keep) for m in model.modules() if not list(m.children())]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        outputs = model(x).shape[1]
    for hook in hooks:
        hook.remove()
    return Network(
        name,
        parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        flops=counter.get_total_flops(),
        input_bytes=math.prod(shape) if input_bytes is None else input_bytes,
        outputs=outputs,
        activations=kept,
        buffers=sum(b.numel() * b.element_size() for b in model.buffers()),
        layers=tuple(layers),
    )


def measured(
    model: nn.Module, shape: Sequence[int], *, batch: int = 8, steps: int = 3
) -> tuple[float, float]:
    """(examples a second in training, bytes a second of sums over vectors), on the model's device:
    the fastest of a few steps, after one that is not timed."""
    device = next(model.parameters()).device
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, *shape, generator=g).to(device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    weights = list(model.parameters())

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def fastest(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(steps):
            wait()
            start = time.perf_counter()
            work()
            wait()
            times.append(time.perf_counter() - start)
        return min(times)

    def train() -> object:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights)

    a, b = (torch.ones(4_000_000, device=device) for _ in range(2))
    return batch / fastest(train), 3 * 4 * a.numel() / fastest(lambda: a.add_(b))
