"""J Sigma Jᵀ against dense algebra in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lifelong import (
    Bernoulli,
    Categorical,
    Dense,
    Diagonal,
    Gaussian,
    NonFiniteError,
    NotRepeatableError,
    StaleAnchorError,
    dense_curvature,
    diagonal_curvature,
    hooks,
)
from lifelong.curvature import BlockDiagonal, Curvature, Isotropic, Kronecker, LowRank
from lifelong.function_space import function_covariance, function_kernel
from lifelong.jacobians import leverage
from lifelong.models import parameters
from lifelong.testing.reference import flatten, jacobian

DELTA = 0.3
FITS = {"diagonal": diagonal_curvature, "dense": dense_curvature}


def net(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), *extra, nn.Tanh(), nn.Linear(3, 4)).double()


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).double()


def curvature(structure: str) -> Diagonal | Dense:
    return FITS[structure](net(), (draw(9), torch.arange(9) % 4), Categorical())


def sigma(g: Diagonal | Dense) -> Tensor:
    """(G + delta I)⁻¹ as a matrix."""
    matrix = (
        g.matrix
        if isinstance(g, Dense)
        else torch.diag(torch.cat([v.flatten() for v in g.values.values()]))
    )
    return torch.linalg.inv(matrix + DELTA * torch.eye(len(matrix)).double())


def truth(g: Diagonal | Dense, x: Tensor, y: Tensor) -> Tensor:
    j, k = flatten(jacobian(net(), x)), flatten(jacobian(net(), y))
    return torch.einsum("bcp,pq,ndq->bcnd", j, sigma(g), k)


@pytest.mark.parametrize("structure", FITS)
@pytest.mark.parametrize("working_set", [1, hooks.WORKING_SET])
def test_covariance_and_kernels_are_the_dense_ones(structure, working_set, monkeypatch):
    monkeypatch.setattr(hooks, "WORKING_SET", working_set)
    g, x, y = curvature(structure), draw(5, 1), draw(3, 2)
    square = truth(g, x, x)
    assert torch.allclose(
        function_covariance(net(), x, g, DELTA), torch.einsum("bcbd->bcd", square)
    )
    for others, full in ((None, square), (y, truth(g, x, y))):
        for outputs, expected in {
            "full": full,
            "diag": torch.einsum("bcnc->bn", full),
            "sum": full.sum((1, 3)),
        }.items():
            made = function_kernel(net(), x, g, DELTA, others=others, outputs=outputs)  # type: ignore[arg-type]
            assert torch.allclose(made, expected), outputs


@given(st.sets(st.integers(0, 3), min_size=1))
def test_a_mask_leaves_zeros_outside_and_changes_nothing_inside(head):
    mask = torch.tensor([c in head for c in range(4)])
    x, g, keep = draw(3, 1), curvature("dense"), mask.double()
    every = function_kernel(net(), x, g, DELTA)
    made = function_kernel(net(), x, g, DELTA, likelihood=Categorical(), mask=mask)
    assert torch.allclose(made, every * keep[:, None, None] * keep)
    made = function_covariance(net(), x, g, DELTA, mask=mask)
    assert torch.allclose(made, torch.einsum("bcbd->bcd", every) * keep[:, None] * keep)
    small = function_kernel(net(), x, g, DELTA, outputs="sum", mask=mask)
    assert torch.allclose(small, torch.einsum("bcnd,c,d->bn", every, keep, keep))


def structures(model: nn.Module, layers: tuple[str, ...]) -> dict[str, Curvature]:
    """One of each kind over a model's parameters; layers: those with a Kronecker block."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = parameters(model)
    shapes = {n: p.shape for n, p in params.items()}
    products: list[Curvature] = []
    for layer in layers:
        own = {n: s for n, s in shapes.items() if n.startswith(layer)}
        o, i = shapes[f"{layer}.weight"][0], shapes[f"{layer}.weight"][1:].numel() + len(own) - 1
        left, right = randn(1, 1, o, o), randn(1, 1, i, i)
        products.append(Kronecker(left @ left.mT, right @ right.mT, own))
    eigen = [b.eigen if isinstance(b, Kronecker) else b for b in products]
    rest = {n: randn(*s).square() for n, s in shapes.items() if n.split(".")[0] not in layers}
    more = (Diagonal(rest),) if rest else ()
    return {
        "isotropic": Isotropic(torch.tensor(0.5).double(), shapes),
        "diagonal": Diagonal({n: randn(*s).square() for n, s in shapes.items()}),
        "kronecker": BlockDiagonal((*products, *more)),
        "eigen": BlockDiagonal((*more, *eigen)),
        "low rank": LowRank({n: randn(3, *s) for n, s in shapes.items()}, randn(3).square()),
        "mixed": BlockDiagonal((products[0].dense(), *eigen[1:], *more)),
    }


class Tied(nn.Module):
    """One layer used twice, one without a bias, and a bias of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.last = nn.Linear(2, 3, bias=False)
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.inner(x).tanh()).tanh()) + self.shift


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 2)),
        nn.Conv2d(1, 2, (1, 2)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "kind", ["isotropic", "diagonal", "kronecker", "eigen", "low rank", "mixed"]
)
@pytest.mark.parametrize(
    ("make", "layers"), [(net, ("0", "2")), (Tied, ("inner", "last")), (conv, ("1", "4"))]
)
def test_every_structure_on_every_layer(make, layers, kind, masked, monkeypatch):
    monkeypatch.setattr(hooks, "WORKING_SET", 2000)  # a few examples at a time
    torch.manual_seed(0)
    model, x = make().double(), draw(5, 1)
    g = structures(model, layers)[kind]
    j = flatten(jacobian(model, x))
    whole = (Dense.zeros_like(parameters(model)) + Dense(g.dense().matrix, g.shapes)).matrix
    expected = j @ torch.linalg.inv(whole + DELTA * torch.eye(len(whole)).double()) @ j.mT
    mask = None
    if masked:
        mask = torch.arange(j.shape[1]) != 1
        expected = expected * mask[:, None] * mask
    made = function_covariance(model, x, g, DELTA, mask=mask)
    assert torch.allclose(made, expected)


@pytest.mark.parametrize("kind", ["diagonal", "kronecker", "eigen", "isotropic"])
def test_a_linear_layers_jacobian_is_never_multiplied_out(kind, monkeypatch):
    def fail(self: hooks.Outer) -> Tensor:
        raise AssertionError("multiplied out")

    model, x = net(), draw(3)
    g = structures(model, ("0", "2"))[kind]
    expected = function_covariance(model, x, g.dense(), DELTA)
    monkeypatch.setattr(hooks.Outer, "rows", fail)
    assert torch.allclose(function_covariance(model, x, g, DELTA), expected)


def test_the_diagonal_is_the_leverage():
    x, g = draw(6, 1), curvature("diagonal")
    variance = {name: 1 / (v + DELTA) for name, v in g.diagonal().items()}
    made = function_covariance(net(), x, g, DELTA).diagonal(dim1=1, dim2=2)
    assert torch.allclose(made, leverage(net(), x, Categorical(), variance))


def test_the_model_is_left_as_it_was():
    model, x = net(), draw(4)
    model[0].bias.grad = torch.ones(3).double()
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        function_covariance(model, x, curvature("diagonal"), DELTA)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model[0].bias.grad, torch.ones(3).double())
    assert model[0].weight.grad is None
    assert all(not m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("structure", FITS)
def test_indefinite_curvature_names_the_damping_that_would_do(structure):
    g = curvature(structure) * -1.0
    with pytest.raises(ValueError, match="not positive definite.*a damping of .* would do"):
        function_covariance(net(), draw(2), g, 1e-3)


def test_errors():
    g, x = curvature("diagonal"), draw(2)
    with pytest.raises(ValueError, match=r"outputs must be one of \('full', 'diag', 'sum'\)"):
        function_kernel(net(), x, g, DELTA, outputs="all")  # type: ignore[arg-type]
    for mask in (torch.ones(3).bool(), torch.zeros(4).bool()):
        with pytest.raises(ValueError, match=r"expected a mask of shape \(4,\) with an output"):
            function_covariance(net(), x, g, DELTA, mask=mask)
    for likelihood in (Gaussian(), Bernoulli()):
        with pytest.raises(ValueError, match="no classes to choose from"):
            function_covariance(
                net(), x, g, DELTA, likelihood=likelihood, mask=torch.ones(4).bool()
            )
    with pytest.raises(ValueError, match="at least one example"):
        function_covariance(net(), x[:0], g, DELTA)
    with pytest.raises(StaleAnchorError, match="missing from the model"):
        function_covariance(net(), x, Diagonal({"w": torch.ones(2)}), DELTA)
    with pytest.raises(NotRepeatableError, match="training mode"):
        function_covariance(nn.Sequential(*net(), nn.Dropout(0.5)), x, g, DELTA)
    with pytest.raises(NonFiniteError, match="an output of the model"):
        function_covariance(net(), x * float("nan"), g, DELTA)
