"""Arrays in, checked once; words for numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import NonFiniteError

Array: TypeAlias = "Tensor | NDArray[Any] | Sequence[Any]"
Numbers: TypeAlias = NDArray[np.float64]

_MAX_NAME = 14  # characters of a class name; longer ones have "…" inside


def to_numpy(values: Any) -> Any:
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def numbers(values: Any, name: str, shape: tuple[int | None, ...]) -> Numbers:
    """float64 in this shape (None: any length above 0), all finite."""
    try:
        array = np.asarray(to_numpy(values), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers: {error}") from error
    fits = array.ndim == len(shape) and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits:
        expected = ", ".join("≥ 1" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({expected}), got {array.shape}")
    if not np.isfinite(array).all():
        at = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise NonFiniteError(
            f"{name} must be finite, got {array[at]} at {list(at)}; leave such examples out, or "
            "look at how they were computed"
        )
    return array


def integers(labels: Any, name: str, n: int) -> NDArray[np.int64]:
    array = np.asarray(to_numpy(labels))
    if array.shape != (n,) or array.dtype.kind not in "iub":
        raise ValueError(
            f"{name} must be {n} integers, one for each example, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return array.astype(np.int64)


def classes_of(
    labels: Any, n: int, class_names: Sequence[str] | None
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """The class of each example (0 without labels), and the name of each class."""
    if labels is None:
        return np.zeros(n, dtype=np.int64), {0: ""}
    classes = integers(labels, "labels", n)
    if class_names is None:
        return classes, {int(c): str(c) for c in np.unique(classes)}
    if classes.min() < 0 or classes.max() >= len(class_names):
        raise ValueError(
            f"expected a name for each class, labels {classes.min()} .. {classes.max()}, got "
            f"{len(class_names)} names"
        )
    return classes, dict(enumerate(map(str, class_names)))


def steps_of(steps: Any, length: int) -> Numbers:
    if steps is None:
        return np.arange(1.0, length + 1)
    x = numbers(steps, "steps", (length,))
    if not (np.diff(x) > 0).all():
        raise ValueError("steps must increase: one for each row of the trace, in order")
    return x


def extremes(
    scores: Numbers, members: NDArray[np.intp], k: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The members of the highest scores, falling, and of the lowest, rising; disjoint."""
    order = members[np.argsort(-scores[members], kind="stable")]
    upper = math.ceil(len(order) / 2)
    return order[: min(k, upper)], order[::-1][: min(k, len(order) - upper)]


def mean_and_error(values: Numbers) -> tuple[Numbers, Numbers]:
    """Over the first dimension; the standard error of one value is not known, and drawn as 0."""
    n = len(values)
    error = values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.zeros(values.shape[1])
    return values.mean(axis=0), error


def padded(low: float, high: float) -> tuple[float, float]:
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def brief(text: str, length: int = _MAX_NAME, tail: int = 4) -> str:
    """On one line, cut so that the last characters, where names often differ, stay."""
    text = " ".join(str(text).split())
    if len(text) <= length:
        return text
    return text[: length - 1 - tail].rstrip() + "…" + text[len(text) - tail :]


def short(value: float) -> str:
    """Two digits where they fit in five characters, else one."""
    two = f"{value:.2g}"
    return two if len(two) <= 5 else f"{value:.1g}"


def counted(n: int, noun: str, plural: str = "s") -> str:
    return f"{n:,} {noun}{plural if n != 1 else ''}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]
