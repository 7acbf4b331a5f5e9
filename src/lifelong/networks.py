"""Networks of the benchmarks, each a function of the number of outputs.

Weights come from torch's global generator, which the caller seeds. The convolutional ones take
uint8 images as a stream keeps them (a quarter of the memory), and compute in channels-last, which
with autocast to bfloat16 is three times as fast on processors that multiply matrices in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


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
