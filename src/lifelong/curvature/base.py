"""What the library asks of a curvature G: a symmetric (P, P) matrix in nats, in some structure.

A structure says which matrices it can hold; all answer the same questions. Read as the precision
of a Gaussian, G + damping I has a covariance (``inverse_mv``, ``inverse_diagonal``), draws
(``sample``) and a normaliser (``logdet``); ``half`` is a root of the covariance, by which J Sigma
Jᵀ is a product of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from ..errors import CheckpointError, StaleAnchorError
from ..models import Params

if TYPE_CHECKING:
    from .dense import Dense

Shapes = dict[str, torch.Size]

_LIMIT = 8 * 2**30  # bytes of one tensor


@runtime_checkable
class Curvature(Protocol):
    """G, a sum over examples of per-example curvatures; frozen, keyed by parameter name.

    Whatever inverts G + damping I raises ValueError where that matrix is not positive definite,
    with the damping that would do. Vectors of other names or shapes raise StaleAnchorError.
    """

    @property
    def shapes(self) -> Shapes:
        """Name -> shape of the parameters that G is over."""
        ...

    def quad(self, d: Mapping[str, Tensor]) -> Tensor:
        """<d, G d> in nats: a scalar, differentiable in d. There is no factor 1/2."""
        ...

    def mv(self, v: Mapping[str, Tensor]) -> Params:
        """G v."""
        ...

    def inverse_mv(self, v: Mapping[str, Tensor], damping: float = 0.0) -> Params:
        """(G + damping I)⁻¹ v."""
        ...

    def diagonal(self) -> Params:
        """The diagonal of G, in the shapes of the parameters."""
        ...

    def inverse_diagonal(self, damping: float = 0.0) -> Params:
        """The diagonal of (G + damping I)⁻¹: marginal variances."""
        ...

    def sample(
        self,
        damping: float = 0.0,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draws of N(0, (G + damping I)⁻¹): name -> (S, *shape).

        Raises ValueError also for fewer than one sample, and for more than fit in 8 GiB.
        """
        ...

    def logdet(self, damping: float | Tensor = 0.0) -> Tensor:
        """log |G + damping I|: a scalar, differentiable in a damping that is a tensor."""
        ...

    def half(self, rows: Mapping[str, Tensor], damping: float = 0.0) -> Tensor:
        """Name -> (..., *shape) to (..., R): half(u) . half(v) = uᵀ (G + damping I)⁻¹ v."""
        ...

    def dense(self) -> Dense:
        """The same matrix, whole. Raises ValueError where it would not fit in 8 GiB."""
        ...

    def __add__(self, other: Self) -> Self: ...

    def __mul__(self, factor: float) -> Self: ...

    def __rmul__(self, factor: float) -> Self: ...

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self: ...

    def state_dict(self) -> dict[str, Tensor]:
        """A flat dict of tensors, as safetensors holds it."""
        ...

    @property
    def num_bytes(self) -> int: ...


# --- vectors over named parameters --------------------------------------------------------------


def sizes(values: Mapping[str, Tensor]) -> Shapes:
    return {name: value.shape for name, value in values.items()}


def numel(shapes: Mapping[str, torch.Size]) -> int:
    """P."""
    return sum(shape.numel() for shape in shapes.values())


def flatten(shapes: Shapes, rows: Mapping[str, Tensor]) -> Tensor:
    """Name -> (..., *shape) to (..., P), in the order of ``shapes``."""
    return torch.cat(
        [rows[n].reshape(*rows[n].shape[: rows[n].ndim - len(s)], -1) for n, s in shapes.items()],
        dim=-1,
    )


def unflatten(shapes: Shapes, x: Tensor) -> Params:
    """(..., P) to name -> (..., *shape)."""
    parts = x.split([shape.numel() for shape in shapes.values()], dim=-1)
    return {
        name: part.reshape((*x.shape[:-1], *shape))
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def normal(shape: Iterable[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard normal numbers of the dtype of ``like`` and on its device, drawn where the
    generator is."""
    device = like.device if generator is None else generator.device
    noise = torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)


# --- named tensors in files ---------------------------------------------------------------------


def numbered(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys "prefix00000000.name": the position is part of the key, since a file may give its
    tensors back in another order."""
    return {
        f"{prefix}{i:08d}.{name}": value.contiguous()
        for i, (name, value) in enumerate(values.items())
    }


def from_numbered(prefix: str, state: Mapping[str, Tensor]) -> Params:
    """What ``numbered`` was given. Raises CheckpointError for a key without a position."""
    found = sorted(key for key in state if key.startswith(prefix))
    parts = [key.removeprefix(prefix).partition(".") for key in found]
    if not all(index.isdigit() and name for index, _, name in parts):
        raise CheckpointError(f"expected keys like '{prefix}00000000.name', got {found[:3]}")
    return {name: state[key] for key, (_, _, name) in zip(found, parts, strict=True)}


def shapes_state(prefix: str, shapes: Shapes) -> dict[str, Tensor]:
    sizes = {n: torch.tensor(list(shape), dtype=torch.int64) for n, shape in shapes.items()}
    return numbered(prefix, sizes)


def shapes_from_state(prefix: str, state: Mapping[str, Tensor]) -> Shapes:
    found = from_numbered(prefix, state)
    return {name: torch.Size(shape.tolist()) for name, shape in found.items()}


def require_state(
    state: Mapping[str, Tensor], what: str, names: Iterable[str], prefixes: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError where a tensor lacks, or one is of something else."""
    names = list(names)
    known = all(key in names or (prefixes and key.startswith(prefixes)) for key in state)
    if not state or not known or any(name not in state for name in names):
        expected = [*names, *(f"{prefix}..." for prefix in prefixes)]
        raise CheckpointError(
            f"expected the keys {expected}, got {sorted(state)[:3]}; "
            f"this is not a saved {what} curvature"
        )


class _Sized(Protocol):
    @property
    def shapes(self) -> Shapes: ...

    @property
    def num_bytes(self) -> int: ...


def describe(curvature: _Sized) -> str:
    """Its repr: how many parameters, in how many bytes, and not all of its numbers."""
    count = sum(shape.numel() for shape in curvature.shapes.values())
    name = type(curvature).__name__
    return f"{name}({count:,} parameters, {curvature.num_bytes:,} bytes)"


# --- guards -------------------------------------------------------------------------------------


def require_same(ours: Mapping[str, torch.Size], theirs: Mapping[str, Tensor], what: str) -> None:
    """Raise StaleAnchorError where names or shapes differ."""
    require_shapes(ours, sizes(theirs), what)


def require_rows(ours: Shapes, rows: Mapping[str, Tensor]) -> None:
    """Raise StaleAnchorError where names or the last dimensions differ."""
    trailing = {
        name: value.shape[max(0, value.ndim - len(ours[name])) :] if name in ours else value.shape
        for name, value in rows.items()
    }
    require_shapes(ours, trailing, "the rows")


def require_shapes(
    ours: Mapping[str, torch.Size], theirs: Mapping[str, torch.Size], what: str
) -> None:
    """Raise StaleAnchorError where names or shapes differ."""
    missing = [name for name in ours if name not in theirs]
    extra = [name for name in theirs if name not in ours]
    resized = [
        f"{name}: {tuple(shape)} -> {tuple(theirs[name])}"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    if missing or extra or resized:
        parts = [
            f"{label} {names[:5]}"
            for label, names in (("missing", missing), ("unknown", extra), ("resized", resized))
            if names
        ]
        raise StaleAnchorError(
            f"{what} has other parameters than this curvature: {'; '.join(parts)}. Expected the "
            "same names and shapes; take both from the same model with the same params filter"
        )


def require_positive(smallest: float, damping: float) -> None:
    """Raise ValueError where the smallest eigenvalue of G + damping I is not positive."""
    if not smallest > 0:
        enough = damping + max(-1.01 * smallest, 1e-6)
        raise ValueError(
            "the curvature plus damping is not positive definite (its smallest eigenvalue is "
            f"{smallest:.3g}), so it has no inverse; a damping of {enough:.3g} would do"
        )


def require_samples(num_samples: int, shapes: Shapes, like: Tensor) -> None:
    """Raise ValueError for no sample, and for more than fit in 8 GiB."""
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    each = max(1, numel(shapes) * like.element_size())
    if num_samples * each > _LIMIT:
        raise ValueError(
            f"{num_samples} samples of {numel(shapes)} parameters take "
            f"{num_samples * each / 2**30:.0f} GiB, expected at most {_LIMIT / 2**30:.0f}; draw "
            f"{max(1, _LIMIT // each)} at a time"
        )


def require_dense(shapes: Shapes, itemsize: int, instead: str) -> None:
    """Raise ValueError where a (P, P) matrix would not fit in 8 GiB."""
    size = numel(shapes)
    if size**2 * itemsize > _LIMIT:
        raise ValueError(
            f"a dense curvature of {size} parameters takes {size**2 * itemsize / 2**30:.0f} GiB; "
            f"{instead}"
        )


def log_sum(values: Tensor, damping: float | Tensor) -> Tensor:
    """sum log(values + damping): log |G + damping I| of the eigenvalues of G.

    Raises ValueError where one is not positive.
    """
    fixed = float(damping.detach()) if isinstance(damping, Tensor) else damping
    require_positive(float(values.min()) + fixed, fixed)
    return (values + damping).log().sum()


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of symmetric (..., n, n), in float64 inside.

    An eigenvalue within rounding of 0 is 0: half of the digits of a sum of squares are lost.
    """
    x_double = x.double()
    # Numbers that underflow when squared (dead weights' curvature) can keep LAPACK from converging.
    tiny = x_double.abs().amax((-1, -2), keepdim=True) * torch.finfo(torch.float64).eps ** 2
    x_double = x_double.masked_fill(x_double.abs() < tiny, 0.0)
    try:
        values, vectors = torch.linalg.eigh(x_double)
    except RuntimeError:  # LinAlgError; singular vectors always converge
        left, values, right = torch.linalg.svd(x_double)
        values, vectors = values * (left * right.mT).sum(-2).sign(), left
        values, order = values.sort(-1)
        vectors = vectors.gather(-1, order.unsqueeze(-2).expand_as(vectors))
    largest = values.abs().amax(-1, keepdim=True)
    rounding = values.shape[-1] * torch.finfo(x.dtype).eps * largest
    values = torch.where(values.abs() <= rounding, torch.zeros_like(values), values)
    return values.to(x.dtype), vectors.to(x.dtype)
