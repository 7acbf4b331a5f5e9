"""Every structure of curvature against its matrix, written out by the definition, in float64."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from lifelong.curvature import (
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    EigenKronecker,
    Isotropic,
    Kronecker,
    LowRank,
    base,
    from_state_dict,
)
from lifelong.errors import CheckpointError, StaleAnchorError

Size = torch.Size
LAYER = {"w": Size((6, 2, 2)), "b": Size((6,))}


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def gram(x: Tensor) -> Tensor:
    return x @ x.mT


# --- one of each --------------------------------------------------------------------------------


def isotropic(seed: int) -> Isotropic:
    return Isotropic(draw(seed)().square(), dict(LAYER))


def diagonal(seed: int) -> Diagonal:
    randn = draw(seed)
    return Diagonal({name: randn(*shape).square() for name, shape in LAYER.items()})


def dense(seed: int) -> Dense:
    return Dense(gram(draw(seed)(30, 20)), dict(LAYER))


def kronecker(seed: int, products: int = 1, groups: int = 1) -> Kronecker:
    randn, o = draw(seed), 6 // groups
    left, right = randn(products, groups, o, o - 1), randn(products, groups, 5, 7)
    return Kronecker(gram(left), gram(right), dict(LAYER))


def grouped(seed: int) -> Kronecker:
    return kronecker(seed, groups=3)


def no_bias(seed: int) -> Kronecker:
    randn = draw(seed)
    return Kronecker(gram(randn(1, 1, 3, 3)), gram(randn(1, 1, 4, 4)), {"w": Size((3, 4))})


def table(seed: int) -> Kronecker:
    """An embedding: the factor of its rows is diagonal."""
    randn = draw(seed)
    return Kronecker(randn(1, 1, 6).square(), gram(randn(1, 1, 4, 4)), {"w": LAYER["w"]})


def diagonal_right(seed: int) -> Kronecker:
    randn = draw(seed)
    return Kronecker(gram(randn(1, 2, 3, 3)), randn(1, 2, 5).square(), dict(LAYER))


def eigen(seed: int) -> EigenKronecker:
    randn = draw(seed)
    left, right = (torch.linalg.qr(randn(1, 2, n, n))[0] for n in (3, 5))
    return EigenKronecker(left, right, randn(1, 2, 3, 5).square(), dict(LAYER))


def eigen_table(seed: int) -> EigenKronecker:
    randn = draw(seed)
    right = torch.linalg.qr(randn(1, 1, 4, 4))[0]
    return EigenKronecker(None, right, randn(1, 1, 6, 4).square(), {"w": LAYER["w"]})


def low_rank(seed: int) -> LowRank:
    randn = draw(seed)
    return LowRank({n: randn(4, *s) for n, s in LAYER.items()}, randn(4).square())


def full_rank(seed: int) -> LowRank:
    randn = draw(seed)
    return LowRank({n: randn(40, *s) for n, s in LAYER.items()}, randn(40).square())


def blocks(seed: int) -> BlockDiagonal:
    randn = draw(seed)
    norm = Diagonal({"norm": randn(3).square()})
    last = Dense(gram(randn(2, 4)), {"scale": Size(()), "shift": Size((1,))})
    return BlockDiagonal((kronecker(seed), norm, last))


ONE: dict[str, Callable[[int], Any]] = {
    f.__name__: f
    for f in (isotropic, diagonal, dense, kronecker, grouped, no_bias, table, diagonal_right,
              eigen, eigen_table, low_rank, full_rank, blocks)
}  # fmt: skip
SUMS: dict[str, Callable[[int], Any]] = {
    "sum of products": lambda seed: kronecker(seed, 3, groups=2),
    "sum of eigen": lambda seed: eigen(seed) + eigen(seed + 1),
    "sum of tables": lambda seed: table(seed) + Kronecker(
        gram(draw(seed)(1, 1, 6, 6)), gram(draw(seed)(1, 1, 4, 4)), {"w": LAYER["w"]}
    ),
    "sum of blocks": lambda seed: blocks(seed) + blocks(seed + 1),
}  # fmt: skip
EVERY = ONE | SUMS

every = pytest.mark.parametrize("build", EVERY.values(), ids=EVERY.keys())
one = pytest.mark.parametrize("build", ONE.values(), ids=ONE.keys())
seeds = given(st.integers(0, 10**6))
few = settings(max_examples=10, deadline=None)


# --- their matrices, by the definitions ----------------------------------------------------------


def matrix(g: Curvature) -> Tensor:
    """The (P, P) matrix, parameters flattened in the order of the shapes."""
    size = base.numel(g.shapes)
    if isinstance(g, Dense):
        return g.matrix
    if isinstance(g, Isotropic):
        return g.value * torch.eye(size, dtype=torch.float64)
    if isinstance(g, Diagonal):
        return torch.diag(torch.cat([v.flatten() for v in g.values.values()]))
    if isinstance(g, LowRank):
        v = torch.cat([x.flatten(1) for x in g.factors.values()], dim=1)
        return sum(w * torch.outer(x, x) for w, x in zip(g.weights, v, strict=True))  # type: ignore[return-value]
    if isinstance(g, BlockDiagonal):
        return torch.block_diag(*[matrix(block) for block in g.blocks])
    assert isinstance(g, (Kronecker, EigenKronecker))
    n, o, a = places(g)
    out = torch.zeros(size, size, dtype=torch.float64)
    for t in range(g.num_products):
        left, right = sides(g, t)
        if isinstance(g, Kronecker):
            rows, columns = (
                left[n.unsqueeze(1), o.unsqueeze(1), o],
                right[n.unsqueeze(1), a.unsqueeze(1), a],
            )
            each = rows * columns
        else:
            rows, columns = left[n, o], right[n, a]  # of U and V
            basis = (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1)
            each = torch.einsum("ik,jk,ik->ij", basis, basis, g.values[t].flatten(1)[n])
        out += each * (n.unsqueeze(1) == n)
    return out


def places(g: Kronecker | EigenKronecker) -> Tensor:
    """(group, row, column) of each number: (3, P). A group holds successive output channels, and
    the bias is the last column."""
    groups = g.left.shape[1] if isinstance(g, Kronecker) else g.values.shape[1]
    found = []
    for shape in g.shapes.values():
        rows, width = shape[0] // groups, shape[1:].numel()
        for channel, column in itertools.product(range(shape[0]), range(width)):
            at = column if len(shape) > 1 else g.shapes["w"][1:].numel()
            found.append((channel // rows, channel % rows, at))
    return torch.tensor(found).T


def sides(g: Kronecker | EigenKronecker, t: int) -> tuple[Tensor, Tensor]:
    """The matrices (N, O, O) and (N, I, I) of a term."""
    if isinstance(g, Kronecker):
        left, right = (torch.diag_embed(x) if x.ndim == 3 else x for x in (g.left, g.right))
        return left[t], right[t]
    _, groups, rows, columns = g.values.shape
    left, right = (
        torch.eye(size, dtype=torch.float64).expand(groups, size, size) if x is None else x[t]
        for x, size in ((g.left, rows), (g.right, columns))
    )
    return left, right


def vector(g: Curvature, *lead: int) -> dict[str, Tensor]:
    randn = draw(7)
    return {name: randn(*lead, *shape) for name, shape in g.shapes.items()}


def flat(g: Curvature, v: dict[str, Tensor]) -> Tensor:
    return base.flatten(g.shapes, v)


def close(x: Tensor, y: Tensor) -> None:
    assert x.shape == y.shape
    assert (x - y).norm() <= 1e-9 * (y.norm() + 1e-300)


def damped(g: Curvature, damping: float) -> Tensor:
    G = matrix(g)
    return G + damping * torch.eye(len(G), dtype=G.dtype)


# --- laws ---------------------------------------------------------------------------------------


@every
@few
@seeds
def test_products(build: Callable, seed: int) -> None:
    g = build(seed)
    assert isinstance(g, Curvature)
    v, G = vector(g), matrix(g)
    close(g.dense().matrix, G)
    assert g.dense().shapes == g.shapes
    close(flat(g, g.mv(v)), G @ flat(g, v))
    close(g.quad(v), flat(g, v) @ G @ flat(g, v))
    close(flat(g, g.diagonal()), G.diagonal())
    assert base.sizes(g.mv(v)) == base.sizes(g.diagonal()) == g.shapes


@every
def test_quad_is_differentiable(build: Callable) -> None:
    g = build(0)
    d = {name: value.requires_grad_() for name, value in vector(g).items()}
    grads = torch.autograd.grad(g.quad(d), list(d.values()))
    close(torch.cat([x.flatten() for x in grads]), 2 * flat(g, g.mv(d)).detach())


@one
@few
@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_inverses(build: Callable, seed: int, damping: float) -> None:
    g = build(seed)
    v, u, inverse = vector(g), vector(g, 2, 3), torch.linalg.inv(damped(g, damping))
    close(flat(g, g.inverse_mv(v, damping)), inverse @ flat(g, v))
    close(flat(g, g.inverse_diagonal(damping)), inverse.diagonal())
    half = g.half(u, damping)
    assert half.shape[:2] == (2, 3)
    close(half @ g.half(v, damping), flat(g, u) @ inverse @ flat(g, v))
    close(g.logdet(damping), damped(g, damping).logdet())


@one
@few
@given(st.integers(0, 10**6), st.floats(1e-2, 1e2))
def test_the_determinant_is_differentiable_in_the_damping(
    build: Callable, seed: int, damping: float
) -> None:
    g = build(seed)
    at = torch.tensor(damping, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(g.logdet(at), at)
    close(slope, torch.linalg.inv(damped(g, damping)).trace())


@one
def test_samples_have_the_covariance(build: Callable) -> None:
    g, count = build(3), 40_000
    truth = torch.linalg.inv(damped(g, 0.5))
    x = flat(g, g.sample(0.5, num_samples=count, generator=torch.Generator().manual_seed(0)))
    bound = 3 * (len(truth) / count) ** 0.5
    assert (x.T @ x / count - truth).norm() <= bound * truth.norm()
    assert x.mean(0).norm() <= 3 * (truth.trace() / count).sqrt()
    shapes = {name: value.shape[1:] for name, value in g.sample(0.5).items()}
    assert shapes == g.shapes


@one
def test_samples_are_seeded(build: Callable) -> None:
    g = build(3)

    def once(seed: int) -> Tensor:
        return flat(g, g.sample(0.5, generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


@every
@few
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_sums_and_multiples(build: Callable, seed: int, factor: float) -> None:
    g, h = build(seed), build(seed + 1)
    close(matrix(g + h), matrix(g) + matrix(h))
    close(matrix(factor * g), factor * matrix(g))
    both = g + factor * h
    v = vector(g)
    close(flat(g, both.mv(v)), flat(g, g.mv(v)) + factor * flat(g, h.mv(v)))
    assert isinstance(both, type(g))
    with pytest.raises(TypeError):
        g + 1.0


@every
def test_what_was_added_can_be_taken_out(build: Callable) -> None:
    g, h = build(1), build(2)
    back = (g + h) + -1 * h
    close(matrix(back), matrix(g))


@every
def test_saved_loaded_and_moved(build: Callable) -> None:
    g = build(5)
    for back in (
        from_state_dict(load(save(g.state_dict()))),
        from_state_dict(g.state_dict()),
        pickle.loads(pickle.dumps(g)),
    ):
        assert type(back) is type(g)
        assert torch.equal(flat(g, back.mv(vector(g))), flat(g, g.mv(vector(g))))
        assert list(back.shapes) == list(g.shapes)
    short = g.to("cpu", torch.float32)
    assert all(v.dtype == torch.float32 for v in short.mv(short.diagonal()).values())
    assert all(v.dtype == torch.float64 for v in g.diagonal().values())
    assert short.num_bytes * 2 == g.num_bytes
    tensors = [v for k, v in g.state_dict().items() if "shape." not in k]
    assert g.num_bytes == sum(8 * v.numel() for v in tensors)


@every
def test_frozen(build: Callable) -> None:
    g = build(0)
    for name in ("values", "shapes", "blocks", "left"):
        with pytest.raises(AttributeError):
            setattr(g, name, None)


def test_zeros() -> None:
    zero = Isotropic.zeros_like(vector(isotropic(0)))
    assert zero.shapes == LAYER
    assert float(zero.value) == 0.0


# --- Kronecker products --------------------------------------------------------------------------


def rearranged(g: Kronecker, n: int) -> Tensor:
    """sum_t vec(L_t) vec(R_t)ᵀ of a group: its singular pairs are Kronecker products."""
    left, right = (torch.diag_embed(x) if x.ndim == 3 else x for x in (g.left, g.right))
    return torch.einsum("ta,tb->ab", left[:, n].flatten(1), right[:, n].flatten(1))


@few
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_merged_is_the_nearest_product(seed: int, products: int) -> None:
    g = kronecker(seed, products, groups=2)
    merged = g.merge()
    assert merged.num_products == 1
    rest = sum(float(torch.linalg.svdvals(rearranged(g, n))[1:].square().sum()) for n in (0, 1))
    whole = matrix(g)
    group = places(g)[0]
    gap = 0.0
    for n in (0, 1):  # of each group the nearest product, and then a scale that keeps the trace
        at = (group == n).nonzero().squeeze(1)
        found, wanted = (x[at.unsqueeze(1), at] for x in (matrix(merged), whole))
        close(found.trace(), wanted.trace())
        nearest = found * (found * wanted).sum() / found.square().sum()
        gap += float((nearest - wanted).square().sum())
    assert gap == pytest.approx(rest, rel=1e-8)
    assert float(torch.linalg.eigvalsh(matrix(merged))[0]) >= -1e-9 * float(matrix(g).norm())


def test_a_difference_merges_to_the_nearest_without_a_scale() -> None:
    g = kronecker(0)
    rest = Kronecker(
        torch.cat([g.left, -2.0 * kronecker(1).left]),
        torch.cat([g.right, kronecker(1).right]),
        g.shapes,
    )
    merged = matrix(rest.merge())
    assert float(matrix(rest).trace()) < 0
    assert float((merged * matrix(rest)).sum()) == pytest.approx(float(merged.square().sum()))


def side_by_side(g: Any, other: Any) -> Any:
    """The sum of two, as terms of their own whatever they share."""
    if not isinstance(g, Kronecker):
        return g + other
    return Kronecker(torch.cat([g.left, other.left]), torch.cat([g.right, other.right]), g.shapes)


@few
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.sampled_from([kronecker, grouped, table]))
def test_products_of_one_left_factor_become_one(seed: int, factor: float, build: Any) -> None:
    """Their sum is a product, so that it costs no more over any number of tasks."""
    g, other = build(seed), build(seed + 1)
    alike = Kronecker(factor * g.left, other.right, g.shapes)
    both = g + alike
    assert both.num_products == 1
    assert both.num_bytes == g.num_bytes
    close(matrix(both), matrix(g) + matrix(alike))
    three = (g + other) + alike
    assert three.num_products == 2
    close(matrix(three), matrix(g) + matrix(other) + matrix(alike))


@few
@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_merging_multiples_of_one_product_is_exact(seed: int, factor: float) -> None:
    for g in (grouped(seed), table(seed), diagonal_right(seed), eigen(seed), eigen_table(seed)):
        both = side_by_side(g, factor * g)
        close(matrix(both.merge()), (1 + factor) * matrix(g))  # type: ignore[union-attr]
        assert g.merge() is g
        close(matrix(side_by_side(-factor * g, -1 * g).merge()), -(1 + factor) * matrix(g))  # type: ignore[union-attr]


@few
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.sampled_from(["left", "right"]))
def test_products_with_a_common_factor_add_to_one(seed: int, factor: float, common: str) -> None:
    for build in (grouped, table, diagonal_right, no_bias):
        g, other = build(seed), build(seed + 1)
        other = replace(other, **{common: factor * getattr(g, common)})
        both = g + other
        assert both.num_products == 1
        close(matrix(both), matrix(g) + matrix(other))
        assert (both + build(seed + 2)).num_products == 2
        assert (build(seed + 2) + g + other + build(seed + 2)).num_products == 2


def test_a_product_of_zeros_adds_nothing() -> None:
    g = grouped(0)
    zero = Kronecker(0 * g.left, 0 * g.right, g.shapes)
    for both in (g + zero, zero + g):
        close(matrix(both), matrix(g))
    assert (g + zero).num_products == 1


def test_a_common_factor_is_common_in_every_group() -> None:
    g, other = kronecker(0, groups=2), kronecker(1, groups=2)
    left = torch.stack([g.left[:, 0], other.left[:, 1]], dim=1)
    both = g + Kronecker(left, other.right, g.shapes)
    assert both.num_products == 2
    close(matrix(both), matrix(g) + matrix(Kronecker(left, other.right, g.shapes)))
    each = torch.tensor([2.0, 3.0], dtype=torch.float64)[None, :, None, None]
    assert (g + Kronecker(each * g.left, other.right, g.shapes)).num_products == 1


def test_merged_in_any_order() -> None:
    parts = [kronecker(seed) for seed in range(3)]
    close(matrix((parts[0] + parts[1] + parts[2]).merge()),
          matrix((parts[2] + parts[0] + parts[1]).merge()))  # fmt: skip


@few
@seeds
def test_merged_eigen_terms_keep_the_diagonal_in_their_basis(seed: int) -> None:
    g = eigen(seed) + eigen(seed + 1)
    merged = g.merge()
    assert merged.left is not None
    assert merged.right is not None
    group, row, column = places(g)
    for n in range(2):
        inside = (group == n).nonzero().squeeze(1)
        at = inside[(row[inside] * 5 + column[inside]).argsort()]
        basis = torch.kron(merged.left[0, n].contiguous(), merged.right[0, n].contiguous())
        block = matrix(g)[at.unsqueeze(1), at]
        close((basis.T @ block @ basis).diagonal(), merged.values[0, n].flatten())
    close(matrix(merged).trace(), matrix(g).trace())


def test_added_factors_would_count_cross_terms() -> None:
    g = kronecker(0)
    factors_added = Kronecker(2 * g.left, 2 * g.right, g.shapes)
    close(matrix(factors_added), 2 * matrix(g + g))


def test_eigen_is_the_same_matrix() -> None:
    for build in (kronecker, grouped, table, diagonal_right, no_bias):
        g = build(4)
        close(matrix(g.eigen), matrix(g))
    assert table(4).eigen.left is None
    assert diagonal_right(4).eigen.right is None


def test_a_sum_of_products_has_no_inverse() -> None:
    for g in (kronecker(0, 3), eigen(0) + eigen(1), blocks(0) + blocks(1)):
        v = vector(g)
        for call in (
            lambda g=g, v=v: g.inverse_mv(v, 1.0),
            lambda g=g: g.inverse_diagonal(1.0),
            lambda g=g: g.sample(1.0),
            lambda g=g: g.logdet(1.0),
            lambda g=g, v=v: g.half(v, 1.0),
        ):
            with pytest.raises(ValueError, match=r"a sum of [23], .* call merge\(\)"):
                call()
        close(flat(g, g.merge().mv(g.merge().inverse_mv(v, 1e-3))) + 1e-3 * flat(
            g, g.merge().inverse_mv(v, 1e-3)), flat(g, v))  # fmt: skip


# --- low rank -----------------------------------------------------------------------------------


@few
@given(st.integers(0, 10**6), st.integers(1, 6))
def test_truncated_is_the_nearest_of_its_rank(seed: int, rank: int) -> None:
    g = low_rank(seed) + -0.5 * low_rank(seed + 1)
    values, vectors = torch.linalg.eigh(matrix(g))
    keep = values.abs().argsort(descending=True)[:rank]
    close(matrix(g.truncate(rank)), (vectors[:, keep] * values[keep]) @ vectors[:, keep].T)
    assert g.truncate(rank).rank == rank
    close(matrix(g.truncate(100)), matrix(g))


def test_a_rank_is_positive() -> None:
    with pytest.raises(ValueError, match="a rank of at least 1, got 0"):
        low_rank(0).truncate(0)


# --- blocks -------------------------------------------------------------------------------------


def test_blocks_add_by_their_names() -> None:
    g = blocks(0)
    turned = BlockDiagonal(tuple(reversed(g.blocks)))
    close(matrix(g + turned), 2 * matrix(g))
    assert g.block_of("norm") is g.blocks[1]
    with pytest.raises(KeyError, match="'other' is in no block"):
        g.block_of("other")


def test_zeros_give_way_to_any_block() -> None:
    """A head that took no part in one task is a diagonal of zeros there."""
    g = blocks(0)
    zero = BlockDiagonal(tuple(
        Diagonal({n: torch.zeros(s, dtype=torch.float64)}) for n, s in g.shapes.items()
    ))  # fmt: skip
    close(matrix(zero + g), matrix(g))
    close(matrix(g + zero), matrix(g))
    assert list((zero + g).shapes) == list(g.shapes)
    assert not matrix(zero + zero).any()


def test_blocks_that_do_not_fit() -> None:
    g = blocks(0)
    with pytest.raises(ValueError, match=r"\['norm'\] are in two"):
        BlockDiagonal((*g.blocks, g.blocks[1]))
    with pytest.raises(ValueError, match="at least one block"):
        BlockDiagonal(())
    whole = BlockDiagonal((Diagonal(g.diagonal()),))
    with pytest.raises(ValueError, match="in other blocks .* the same blocks in both"):
        g + whole
    diagonal_blocks = BlockDiagonal(tuple(Diagonal(b.diagonal()) for b in g.blocks))
    with pytest.raises(TypeError):
        g + diagonal_blocks


# --- what is refused ----------------------------------------------------------------------------


@every
def test_other_parameters_are_refused(build: Callable) -> None:
    g = build(0)
    v = vector(g)
    resized = v | {"w": torch.zeros(9, 9, dtype=torch.float64)}
    for bad, message in (({}, "missing"), (v | {"new": torch.zeros(1)}, "unknown"),
                         (resized, "resized")):  # fmt: skip
        for call in (g.quad, g.mv):
            with pytest.raises(StaleAnchorError, match=message):
                call(bad)
    with pytest.raises(StaleAnchorError, match="missing"):
        g + renamed(g)


def renamed(g: Any) -> Any:
    state = {
        key.replace(".00000000.w", ".00000000.other"): value
        for key, value in g.state_dict().items()
    }
    return from_state_dict(state)


@one
def test_rows_of_other_parameters_are_refused(build: Callable) -> None:
    g = build(0)
    u = vector(g, 2)
    for bad in ({}, u | {"new": torch.zeros(1)}, u | {"w": torch.zeros(9, 9, 9, 9)}):
        with pytest.raises(StaleAnchorError):
            g.half(bad, 1.0)
    for bad in ({}, vector(g) | {"new": torch.zeros(1)}):
        with pytest.raises(StaleAnchorError):
            g.inverse_mv(bad, 1.0)


@one
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_damping_that_would_do_does(build: Callable, damping: float) -> None:
    g = build(1) * -1.0
    v = vector(g)
    enough = damping
    for _ in range(len(getattr(g, "blocks", "1"))):  # each block names its own
        with pytest.raises(ValueError, match="a damping of .* would do") as error:
            g.inverse_mv(v, enough)
        enough = float(str(error.value).split("a damping of ")[1].split()[0])
        if torch.linalg.eigvalsh(damped(g, enough))[0] > 0:
            break
    for call in (g.inverse_diagonal, g.sample, g.logdet):
        with pytest.raises(ValueError, match="not positive definite"):
            call(damping)
        call(enough)
    with pytest.raises(ValueError, match="not positive definite"):
        g.half(v, damping)
    assert flat(g, g.inverse_mv(v, enough)).isfinite().all()


@pytest.mark.parametrize("build", [kronecker, no_bias, low_rank])
def test_singular_without_damping(build: Callable) -> None:
    g = build(0)
    if build is no_bias:
        g = g + -1 * g
        g = Kronecker(g.left[:1] * 0, g.right[:1], g.shapes)
    for call in (g.logdet, g.inverse_diagonal, g.sample):
        with pytest.raises(ValueError, match="a damping of .* would do"):
            call()


@one
def test_more_samples_than_memory_allows(build: Callable) -> None:
    g = build(0)
    with pytest.raises(ValueError, match=r"samples .* GiB, expected at most 8; draw \d+ at a time"):
        g.sample(1.0, num_samples=10**10)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        g.sample(1.0, num_samples=0)


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "kronecker", "eigen", "low_rank",
                                  "blocks"])  # fmt: skip
def test_a_matrix_that_does_not_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_LIMIT", 100)
    with pytest.raises(ValueError, match="a dense curvature of .* GiB; keep it"):
        EVERY[name](0).dense()


def test_parts_that_do_not_fit() -> None:
    eye = torch.eye(3).expand(1, 1, 3, 3)
    with pytest.raises(ValueError, match="scalar"):
        Isotropic(torch.zeros(2), {})
    for left, right in ((eye, eye), (eye[0], eye), (eye.expand(2, 1, 3, 3), eye)):
        with pytest.raises(ValueError, match="expected a (left|right) factor|expected a weight"):
            Kronecker(left, right, {"w": Size((3, 4))})
    for shapes in ({}, {"b": Size((3,))}, {"w": Size((3, 3)), "b": Size((2,))}):
        with pytest.raises(ValueError, match="expected a weight"):
            Kronecker(eye, eye, shapes)
    with pytest.raises(ValueError, match="in N groups"):
        Kronecker(eye.expand(1, 2, 3, 3), eye.expand(1, 2, 3, 3), {"w": Size((3, 3))})
    with pytest.raises(ValueError, match="2 and of 3 groups"):
        kronecker(0, groups=2) + kronecker(0, groups=3)
    with pytest.raises(ValueError, match="1 and of 2 groups"):
        kronecker(0).eigen + eigen(0)
    with pytest.raises(ValueError, match="expected values"):
        EigenKronecker(None, None, torch.zeros(1, 1, 2, 2), {"w": Size((3, 3))})
    with pytest.raises(ValueError, match="expected a left basis"):
        EigenKronecker(torch.eye(3), None, torch.zeros(1, 1, 3, 3), {"w": Size((3, 3))})
    for factors in ({}, {"w": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match="expected weights"):
            LowRank(factors, torch.zeros(2))


@every
def test_what_is_no_saved_curvature(build: Callable) -> None:
    g = build(0)
    state = g.state_dict()
    for bad in ({}, {"x": torch.zeros(1)}, state | {"x": torch.zeros(1)}):
        with pytest.raises(CheckpointError):
            from_state_dict(bad)
        if not isinstance(g, BlockDiagonal):
            with pytest.raises(CheckpointError, match="not a saved"):
                type(g).from_state_dict(bad)
    if not isinstance(g, (BlockDiagonal, Diagonal)):
        first = next(key for key in state if "shape" not in key and "basis" not in key)
        needed = {"kronecker.left", "low_rank.weights", "dense.matrix", "isotropic.value"}
        if first in needed:
            with pytest.raises(CheckpointError):
                from_state_dict({k: v for k, v in state.items() if k != first})


def test_eigenvectors_by_singular_vectors_where_lapack_gives_up(monkeypatch):
    x = draw(0)(4, 6, 6)
    x = x + x.mT  # of both signs
    values, vectors = base.eigh(x)

    def fail(_: Tensor) -> None:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    again, others = base.eigh(x)
    assert torch.allclose(again, values)
    assert torch.allclose(others @ torch.diag_embed(again) @ others.mT, x)
    assert torch.allclose((others.mT @ vectors).abs(), torch.eye(6).double().expand(4, 6, 6))


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_positive_part_of_a_difference(diagonal: bool) -> None:
    """Positive semi-definite, of no smaller trace than the difference; a product that is positive
    is its own, also as a difference of two with a common factor."""
    one, other = kronecker(0, groups=2), kronecker(1, groups=2)
    if diagonal:
        one, other = (
            Kronecker(x.left, x.right.diagonal(dim1=-2, dim2=-1), x.shapes) for x in (one, other)
        )
    size = one.dense().matrix.trace() / other.dense().matrix.trace()
    left = one + other * (-0.3 * float(size))
    positive = left.positive_part()
    assert positive.num_products == 1
    assert float(torch.linalg.eigvalsh(positive.dense().matrix)[0]) > -1e-10
    assert positive.dense().matrix.trace() >= left.dense().matrix.trace() * (1 - 1e-9)
    same = one + Kronecker(one.left * -0.4, one.right, one.shapes)
    torch.testing.assert_close(
        same.positive_part().dense().matrix, 0.6 * one.dense().matrix, rtol=1e-8, atol=1e-10
    )
