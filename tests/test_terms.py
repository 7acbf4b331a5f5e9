"""Each term against its formula in float64: value, gradient, strength, bytes, dtype."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong import (
    KL,
    BlockDiagonal,
    Categorical,
    Dense,
    Diagonal,
    KernelTerm,
    Kronecker,
    Logit,
    MemoryTerm,
    Prior,
    Recipe,
    Regulariser,
    StaleAnchorError,
    WeightTerm,
    recall,
)
from lifelong.data import Batch
from lifelong.memory import Memory, remember
from lifelong.models import parameters, snapshot
from lifelong.terms import Block, Part, kernel_term, quadratic, to


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def slope(term: object, model: nn.Module) -> Tensor:
    params = list(parameters(model).values())
    grads = torch.autograd.grad(term(model), params, materialize_grads=True)  # type: ignore[operator]
    return torch.cat([g.flatten() for g in grads])


def memory_of(model: nn.Module, n: int = 6, head: tuple[int, ...] | None = None) -> Memory:
    x, y = torch.randn(n, 3).double(), torch.arange(n) % 2
    return remember(Batch(x, y, torch.arange(n)), model(x).detach(), head=head)


@pytest.mark.parametrize("with_mean", [False, True])
def test_regulariser(with_mean):
    model = mlp()
    theta = flat(parameters(model)).detach()
    mean = snapshot(parameters(mlp(1))) if with_mean else None
    centre = flat(mean) if mean else torch.zeros_like(theta)
    term = Regulariser(0.3, mean)
    assert torch.allclose(term(model), 0.15 * (theta - centre).square().sum())
    assert torch.allclose(slope(term, model), 0.3 * (theta - centre))
    assert torch.allclose(flat(term.gradient(parameters(model))), slope(term, model))
    assert torch.allclose((2 * term)(model), 2 * term(model))
    assert Regulariser(0.0)(model) == 0
    assert term.num_bytes == (theta.numel() * 8 if with_mean else 0)


@pytest.mark.parametrize("gradient", ["stationary", "anchored", "stored"])
def test_a_regulariser_covers_the_parameters_that_its_mean_names(gradient):
    """Its gradient is that of its value, so that R is flat where a preset pulls it to."""
    model = mlp()
    names = ["0.weight", "2.bias"]
    mean = {n: torch.randn_like(p) for n, p in parameters(model).items() if n in names}
    term = Regulariser(0.3, mean)
    assert torch.allclose(flat(term.gradient(parameters(model))), slope(term, model))
    prior = Prior(Categorical(), Recipe(gradient=gradient), (term,))
    x, y = torch.randn(6, 3).double(), torch.arange(6) % 3
    prior = prior.update(model, (x, y))
    expected = torch.zeros_like(slope(term, model))
    if gradient == "stored":  # data and R as they are
        expected = slope(lambda m: F.cross_entropy(m(x), y, reduction="sum") + term(m), model)
    assert torch.allclose(slope(prior, model), expected)


def weight_term(structure: str, with_gradient: bool) -> tuple[WeightTerm, Tensor, Tensor, Tensor]:
    anchor = snapshot(parameters(mlp(1)))
    p = flat(anchor).numel()
    shapes = {n: a.shape for n, a in anchor.items()}
    g, root = torch.randn(p).double(), torch.randn(p, p).double()
    matrix = root @ root.T if structure == "dense" else torch.diag(root.diagonal().square())

    def split(v: Tensor) -> dict[str, Tensor]:
        parts = v.split([s.numel() for s in shapes.values()])
        return {n: part.reshape(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}

    curvature = {
        "dense": lambda: Dense(matrix, shapes),
        "diagonal": lambda: Diagonal(split(matrix.diagonal())),
        "none": lambda: None,
    }[structure]()
    if structure == "none":
        matrix = torch.zeros(p, p).double()
    term = WeightTerm(anchor, split(g) if with_gradient else None, curvature)
    return term, flat(anchor), g if with_gradient else torch.zeros_like(g), matrix


@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("structure", ["none", "diagonal", "dense"])
def test_weight_term(structure, with_gradient):
    term, anchor, g, matrix = weight_term(structure, with_gradient)
    model = mlp()
    d = flat(parameters(model)).detach() - anchor
    value = g @ d + 0.5 * d @ matrix @ d
    assert torch.allclose(term(model), value)
    if structure != "none" or with_gradient:
        assert torch.allclose(slope(term, model), g + matrix @ d)
    assert torch.allclose(flat(term.slope(parameters(model))), g + matrix @ d)
    assert torch.allclose((0.5 * term)(model), 0.5 * value)
    assert term(mlp(1)) == 0


def test_the_diagonal_quadratic_has_a_second_derivative():
    term, _, _, matrix = weight_term("diagonal", True)
    model = mlp()
    first = torch.cat(
        [
            g.flatten()
            for g in torch.autograd.grad(
                term(model), list(parameters(model).values()), create_graph=True
            )
        ]
    )
    again = torch.autograd.grad(first.sum(), list(parameters(model).values()))
    assert torch.allclose(torch.cat([g.flatten() for g in again]), matrix.diagonal())


def test_weights_in_bfloat16_meet_a_curvature_in_float32():
    model = mlp().bfloat16()
    anchor = snapshot(parameters(mlp(1).bfloat16()))
    term = WeightTerm(anchor, None, Diagonal({n: torch.ones(a.shape) for n, a in anchor.items()}))
    d = flat(parameters(model)).float() - flat(anchor).float()
    assert torch.allclose(term(model), 0.5 * d.square().sum(), rtol=1e-2)
    assert slope(term, model).dtype == torch.bfloat16


def test_another_model_is_refused_by_name_and_shape():
    term, *_ = weight_term("diagonal", True)
    model = mlp()
    model[2] = nn.Linear(4, 5).double()
    with pytest.raises(StaleAnchorError, match=r"2\.weight: \(3, 4\) -> \(5, 4\).*prior.grow"):
        term(model)
    with pytest.raises(StaleAnchorError, match=r"0\.weight"):
        term(nn.Linear(3, 4).double())


@pytest.mark.parametrize("head", [None, (0, 1)])
@pytest.mark.parametrize("divergence", [KL(), KL(2.0, rescale=True), Logit()])
def test_memory_term(divergence, head):
    old, model = mlp(1), mlp()
    memory = memory_of(old, head=head)
    soft, hard = torch.rand(6).double(), torch.rand(6).double()
    memory = memory.weighted(soft, hard)
    term = MemoryTerm(memory, divergence)
    f, f_ref = model(memory.inputs)[:, : len(head or range(3))], memory.reference
    f_ref = f_ref[:, : f.shape[1]]
    t = divergence.temperature if isinstance(divergence, KL) else 1.0
    if isinstance(divergence, Logit):
        distance = 0.5 * (f - f_ref).square().sum(-1)
    else:
        distance = t**2 * F.kl_div(
            F.log_softmax(f / t, -1), F.softmax(f_ref / t, -1), reduction="none"
        ).sum(-1)
    nll = F.cross_entropy(f, memory.labels, reduction="none")
    expected = (soft * distance + hard * nll).sum()
    value = term.value(model(memory.inputs), memory, Categorical())
    assert torch.allclose(value, expected)
    assert torch.allclose((3 * term).value(model(memory.inputs), (3 * term).memory, Categorical()),
                          3 * expected)  # fmt: skip
    assert term.num_bytes == memory.num_bytes


def test_a_kernel_term_is_the_mahalanobis_distance_of_the_means():
    old, model = mlp(1), mlp()
    memory = memory_of(old).add(memory_of(old))
    memory = Memory(**{**vars(memory), "task": torch.tensor([0] * 6 + [1] * 6)})
    variance = {n: torch.rand_like(p) for n, p in snapshot(parameters(old)).items()}
    term = kernel_term(old, memory, Categorical(), variance=variance, jitter=1e-3, strength=2.0)
    expected = torch.zeros(()).double()
    for rows in (slice(0, 6), slice(6, 12)):
        x = memory.inputs[rows]
        jacobian = torch.autograd.functional.jacobian(
            lambda *p, x=x: torch.func.functional_call(old, dict(zip(variance, p, strict=True)), x)
            .softmax(-1),
            tuple(snapshot(parameters(old)).values()),
        )  # fmt: skip
        j = torch.cat([part.flatten(2) for part in jacobian], -1)  # (M, C, P)
        gap = model(x).softmax(-1) - old(x).softmax(-1)
        for c in range(3):
            k = (j[:, c] * flat(variance)) @ j[:, c].T + 1e-3 * torch.eye(6).double()
            expected = expected + 0.5 * gap[:, c] @ torch.linalg.solve(k, gap[:, c])
    value = term.value(model(memory.inputs), term.draw(None), Categorical())
    assert torch.allclose(value, 2.0 * expected)


def test_the_blocks_that_are_drawn_are_whole_and_unbiased():
    memory = memory_of(mlp(5)).add(memory_of(mlp(6)), memory_of(mlp(7)))
    blocks = tuple(
        Block(6 * i, 6 * i + 6, None, memory.reference[6 * i : 6 * i + 6].softmax(-1), None)
        for i in range(3)
    )
    term = KernelTerm(memory, blocks)
    f = mlp(1).requires_grad_(False)
    whole = float(term.value(f(memory.inputs), term.draw(None), Categorical()))
    values = []
    for seed in range(60):
        drawn = term.draw(7, torch.Generator().manual_seed(seed))
        assert (len(drawn.inputs), drawn.scale) == (6, 3.0)
        values.append(float(term.value(f(drawn.inputs), drawn, Categorical())))
    seen = {round(v, 9) for v in values}
    assert len(seen) == 3
    assert math.isclose(sum(seen) / 3, whole, rel_tol=1e-6)


def test_a_task_with_two_heads_has_no_kernel():
    memory = memory_of(mlp(), head=(0, 1)).add(memory_of(mlp(), head=(1, 2)))
    with pytest.raises(ValueError, match="task 0 has examples of several heads .*give each a task"):
        kernel_term(mlp(), memory, Categorical(), variance=None, jitter=0.1, strength=1.0)


def test_terms_move_to_another_dtype():
    old = mlp(1)
    term, *_ = weight_term("diagonal", True)
    memory = memory_of(old)
    kernel = kernel_term(
        old, memory, Categorical(), variance=snapshot(parameters(old)), jitter=9.0, strength=1.0
    )
    regulariser = Regulariser(1.0, snapshot(parameters(old)))
    for each in (term, regulariser):
        moved = to(each, dtype=torch.float32)
        assert moved(mlp().float()).dtype == torch.float32
        assert torch.allclose(moved(mlp().float()).double(), each(mlp()), rtol=1e-5)
    for each in (MemoryTerm(memory), kernel):
        moved = to(each, dtype=torch.float32)
        f = mlp()(memory.inputs)
        value = moved.value(f.float(), moved.draw(None), Categorical())
        assert value.dtype == torch.float32
        assert torch.allclose(
            value.double(), each.value(f, each.draw(None), Categorical()), rtol=1e-4
        )
    own = object()  # of the user's, which cannot move
    assert to(own, dtype=torch.float32) is own


@pytest.mark.parametrize("precision", [-1.0, math.nan, math.inf])
def test_a_precision_is_finite_and_not_negative(precision):
    with pytest.raises(ValueError, match="precision must be finite and not negative, got"):
        Regulariser(precision)


@pytest.mark.parametrize("products", [0, 1, 3])
def test_a_curvature_of_all_parameters_is_half_its_quadratic_form(products):
    """Twice differentiable, with g and a part of its own beside it; against autograd through
    ``quad``; 0 products: a dense G."""
    model = mlp()
    d = [torch.randn_like(p, requires_grad=True) for p in parameters(model).values()]
    names = tuple(parameters(model))
    shapes = {n: p.shape for n, p in parameters(model).items()}
    if products:
        blocks = []
        for layer in ("0", "2"):
            part = {n: s for n, s in shapes.items() if n.startswith(layer)}
            rows, inputs = part[f"{layer}.weight"]
            left, right = (torch.randn(products, 1, k, k).double() for k in (rows, inputs + 1))
            blocks.append(Kronecker(left @ left.mT, right @ right.mT, part))
        curvature = BlockDiagonal(tuple(blocks))
    else:
        factor = torch.randn(31, 31).double()
        curvature = Dense(factor @ factor.T, shapes)
    anchors = [torch.randn_like(x) for x in d]
    g = [torch.randn_like(x) for x in d]
    parts = {
        n: Part(a, x if i % 2 else None, (None, 0.7, x.square())[i % 3])
        for i, (n, a, x) in enumerate(zip(names, anchors, g, strict=True))
    }

    def of(*params: Tensor) -> Tensor:
        return quadratic(parts, dict(zip(names, params, strict=True)), curvature)

    def slowly(*params: Tensor) -> Tensor:
        gaps = [p - a for p, a in zip(params, anchors, strict=True)]
        value = 0.5 * curvature.quad(dict(zip(names, gaps, strict=True)))
        for x, part in zip(gaps, parts.values(), strict=True):
            own = 0.0 if part.curvature is None else part.curvature
            value = value + 0.5 * (own * x.square()).sum()
            value = value + (0.0 if part.gradient is None else (part.gradient * x).sum())
        return value

    value, slow = of(*d), slowly(*d)
    assert torch.allclose(value, slow)
    for fast, other in zip(torch.autograd.grad(value, d), torch.autograd.grad(slow, d)):
        assert torch.allclose(fast, other)

    assert torch.autograd.gradcheck(of, d)
    assert torch.autograd.gradgradcheck(of, d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_slope_of_a_memory_of_a_model_in_half_precision_is_summed_in_float32(dtype):
    """Item by item it is the sum of the gradients that backward gives, each rounded once."""
    model = mlp().to(dtype)
    memory = memory_of(mlp(1), n=40).to(dtype=torch.float32).weighted(0.0, 1.0)
    memory = replace(memory, inputs=memory.inputs.to(dtype))
    found = recall.slope(MemoryTerm(memory), model, Categorical(), batch_size=1)
    each = [
        slope(lambda m, i=i: F.cross_entropy(m(memory.inputs[i]).float(), memory.labels[i]), model)
        for i in torch.arange(40).split(1)
    ]
    assert torch.equal(flat(found), torch.stack(each).float().cumsum(0)[-1])
