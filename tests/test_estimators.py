"""Estimators of the structures against slow loops and the dense reference, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lifelong import hooks
from lifelong.curvature import (
    BlockDiagonal,
    Curvature,
    Dense,
    Diagonal,
    EigenKronecker,
    Kronecker,
    block_curvature,
    dense_curvature,
    diagonal_curvature,
    estimate,
    estimators,
    isotropic_curvature,
    kfac,
    kronecker_curvature,
    low_rank_curvature,
)
from lifelong.data import Examples
from lifelong.errors import NonFiniteError, NotRepeatableError
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from lifelong.models import forward, rows
from lifelong.testing import reference
from test_jacobians import LABELS, MODELS, PAIRS, C, Largest, N, Routed, close

kfac_of = kronecker_curvature
ekfac_of = partial(kronecker_curvature, corrected=True)
STRUCTURES = {"isotropic", "kronecker", "eigen_kronecker", "low_rank", "block"}


def whole(g: Curvature, model: nn.Module) -> Tensor:
    """The matrix of G in the order of the model's trainable parameters."""
    return (
        g.dense().reordered({n: p for n, p in model.named_parameters() if p.requires_grad}).matrix
    )


def case(name: str, kind: str = "categorical") -> tuple[nn.Module, Examples, Likelihood]:
    make, draw, _ = MODELS[name]
    model, inputs = make().double(), draw()
    likelihood, labels = LABELS[kind]
    return model, Examples(inputs, labels()), likelihood


def mlp() -> tuple[nn.Module, Examples]:
    model, data, _ = case("mlp")
    return model, data


# --- K-FAC by a slow loop -------------------------------------------------------------------------


def positions_of(layer: nn.Module, a: Tensor) -> Tensor:
    """The inputs (L, groups, I) of one example's call."""
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        a = F.pad(a, layer._reversed_padding_repeated_twice, mode=mode)
        x = F.unfold(a, layer.kernel_size, layer.dilation, 0, layer.stride)[0]
        return x.T.reshape(x.shape[1], layer.groups, -1)
    return a.reshape(-1, 1, a.shape[-1])


def slow(model: nn.Module, layer: Any, data: Examples, s: Tensor, reduce: bool) -> Kronecker:
    """One example and one direction at a time: s (N, C, K) has s sᵀ = M."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, x: tuple, z: Tensor) -> Tensor:
        found.append((x[0].detach(), z))
        return z.clone()  # what follows may act in place

    handle = layer.register_forward_hook(keep)
    left = right = torch.zeros(())
    count = 0
    for n in range(len(data)):
        found.clear()
        f = forward(model, data.inputs[n : n + 1])[0]  # type: ignore[index]
        ((a, z),) = found
        x = positions_of(layer, a)
        if layer.bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=-1)
        x = x.mean(0, keepdim=True) if reduce else x
        right = right + torch.einsum("lgi,lgj->gij", x, x)
        count += len(x)
        for direction in s[n].T:
            (g,) = torch.autograd.grad(direction @ f, z, retain_graph=True)
            g = g[0].flatten(1).T if isinstance(layer, nn.Conv2d) else g.reshape(-1, g.shape[-1])
            g = g.sum(0, keepdim=True) if reduce else g
            g = g.reshape(len(g), x.shape[1], -1)
            left = left + torch.einsum("lgo,lgp->gop", g, g)
    handle.remove()
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {names[id(p)]: p.shape for p in layer.parameters()}
    return Kronecker(left.unsqueeze(0), (right / count).unsqueeze(0), shapes)


def directions(model: nn.Module, data: Examples, likelihood: Likelihood, estimator: str) -> Tensor:
    f = forward(model, data.inputs).detach()
    if estimator == "exact":
        return torch.linalg.cholesky(likelihood.hessian(f) + 1e-15 * torch.eye(C))
    return likelihood.residual(f, data.labels).unsqueeze(-1)


@pytest.mark.parametrize("rule", ["expand", "reduce"])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["linear", "mlp", "sequence", "conv2d", "windows"])
def test_factors_against_a_slow_loop(name: str, estimator: str, rule: str) -> None:
    model, data, likelihood = case(name)
    g = kfac_of(model, data, likelihood, estimator=estimator, positions=rule)
    s = directions(model, data, likelihood, estimator)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert layers
    for layer in layers:
        truth = slow(model, layer, data, s, rule == "reduce")
        block = g.block_of(next(iter(truth.shapes)))
        assert isinstance(block, Kronecker)
        gap = (block.dense().matrix - truth.dense().matrix).norm()
        assert gap <= 1e-6 * truth.dense().matrix.norm()  # the root of the Hessian is jittered


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_corrected_is_never_further_away(name: str, kind: str) -> None:
    model, data, likelihood = case(name, kind)
    truth = reference.ggn(model, data, likelihood)
    blocks = whole(block_curvature(model, data, likelihood), model)
    plain, corrected = (f(model, data, likelihood) for f in (kfac_of, ekfac_of))
    x, y = whole(plain, model), whole(corrected, model)
    scale = truth.norm()
    assert (y - truth).norm() <= (x - truth).norm() + 1e-12 * scale
    assert (blocks - truth).norm() <= (y - truth).norm() + 1e-12 * scale
    close(y.trace(), truth.trace())
    assert float(torch.linalg.eigvalsh(y)[0]) >= -1e-9 * float(scale)


def test_corrected_is_the_diagonal_in_the_eigenbasis() -> None:
    for name in ("mlp", "conv2d", "sequence"):
        model, data, likelihood = case(name)
        g = ekfac_of(model, data, likelihood)
        for block in g.blocks:
            assert isinstance(block, EigenKronecker)
            exact = dense_curvature(model, data, likelihood, params=list(block.shapes))
            unit = EigenKronecker(block.left, block.right, torch.ones_like(block.values),
                                  block.shapes)  # fmt: skip
            eye = {n: v.reshape(-1, *block.shapes[n]) for n, v in _identity(block).items()}
            basis = unit.half(eye)  # e_p in the eigenbasis: (P, P)
            close((basis.T @ exact.matrix @ basis).diagonal(), block.values.flatten())


def _identity(g: Curvature) -> dict[str, Tensor]:
    sizes = [shape.numel() for shape in g.shapes.values()]
    eye = torch.eye(sum(sizes), dtype=torch.float64)
    return dict(zip(g.shapes, eye.split(sizes, dim=1), strict=True))


# --- where it is exact ---------------------------------------------------------------------------


def linear_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, C)).double()


def pooled() -> nn.Sequential:
    """The mean over positions of a linear layer: the case that ``reduce`` is made for."""

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    return nn.Sequential(nn.Linear(4, 6), Mean(), nn.Linear(6, C)).double()


@pytest.mark.parametrize("build", [kfac_of, ekfac_of])
def test_exact_for_a_linear_layer_with_gaussian_noise(build: Callable) -> None:
    model, data, _ = case("linear", "gaussian")
    for likelihood in (Gaussian(), Gaussian(0.3)):
        close(whole(build(model, data, likelihood), model),
              reference.ggn(model, data, likelihood))  # fmt: skip


@pytest.mark.parametrize("build", [kfac_of, ekfac_of])
def test_exact_by_layer_for_a_deep_linear_net_with_gaussian_noise(build: Callable) -> None:
    """Bernacchia et al. 2018: gradients at a layer do not depend on its inputs."""
    model, x = linear_net(), torch.randn(N, 5, dtype=torch.float64)
    data = Examples(x, torch.randn(N, C, dtype=torch.float64))
    close(whole(build(model, data, Gaussian(0.5)), model),
          whole(block_curvature(model, data, Gaussian(0.5)), model))  # fmt: skip


def test_reduce_is_exact_for_a_mean_over_positions() -> None:
    model, x = pooled(), torch.randn(N, 3, 4, dtype=torch.float64)
    data = Examples(x, torch.randn(N, C, dtype=torch.float64))
    truth = whole(block_curvature(model, data, Gaussian(0.5)), model)
    close(whole(kfac_of(model, data, Gaussian(0.5), positions="reduce"), model), truth)
    expand = whole(kfac_of(model, data, Gaussian(0.5)), model)
    assert (expand - truth).norm() > 1e-2 * truth.norm()


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("build", [kfac_of, ekfac_of])
def test_exact_by_layer_for_one_example(build: Callable, estimator: str) -> None:
    model, data = mlp()
    one = data[:1]
    one = Examples(data.inputs[:1], data.labels[:1])  # type: ignore[index]
    options = {"estimator": estimator, "params": ["2.weight", "2.bias"]}
    close(build(model, one, Categorical(), **options).dense().matrix,
          dense_curvature(model, one, Categorical(), **options).matrix)  # fmt: skip


@pytest.mark.parametrize("params", [["2.bias"], ["3.weight"], ["3.bias"]])
def test_other_parameters_have_exact_dense_blocks(params: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, C)
    ).double()
    data = Examples(torch.randn(N, 5, dtype=torch.float64), torch.randint(0, C, (N,)))
    g = kfac_of(model, data, Categorical(), other="dense", params=params)
    close(g.dense().matrix, dense_curvature(model, data, Categorical(), params=params).matrix)
    diagonal = kfac_of(model, data, Categorical(), params=params)
    assert isinstance(diagonal.blocks[0], Diagonal)
    close(diagonal.diagonal()[params[0]], g.diagonal()[params[0]])


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.7), Poisson()])
@pytest.mark.parametrize("name", ["mlp", "conv2d"])
def test_the_other_structures(name: str, likelihood: Likelihood) -> None:
    model, data, _ = case(name)
    if not isinstance(likelihood, Categorical):
        data = Examples(data.inputs, torch.ones(N, C, dtype=torch.float64))
    truth = reference.ggn(model, data, likelihood)
    isotropic = isotropic_curvature(model, data, likelihood)
    close(isotropic.value, truth.trace() / len(truth))
    close(whole(low_rank_curvature(model, data, likelihood, rank=N * C), model), truth)
    blocks = block_curvature(model, data, likelihood)
    modules = [name.rpartition(".")[0] for name, p in model.named_parameters() for _ in p.flatten()]
    same = torch.tensor([[a == b for b in modules] for a in modules])
    close(whole(blocks, model), truth * same)
    assert all(isinstance(block, Dense) for block in blocks.blocks)


# --- estimators ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Always(Categorical):
    """Draws one and the same label."""

    label: int = 0

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((len(f),), self.label)


@pytest.mark.parametrize("structure", ["isotropic", "block", "eigen basis"])
def test_exact_is_the_expectation_of_mc(structure: str) -> None:
    """Over the labels of the model; K-FAC's left factor alone, since R is the data's."""
    model, data = mlp()
    p = Categorical().mean(forward(model, data.inputs)).detach()
    build = {"isotropic": isotropic_curvature, "block": block_curvature,
             "eigen basis": dense_curvature}[structure]  # fmt: skip
    parts = [build(model, data, Always(c), estimator="mc", weights=p[:, c]) for c in range(C)]
    expected = parts[0] + parts[1] + parts[2]
    close(whole(expected, model), whole(build(model, data, Categorical()), model))


@pytest.mark.parametrize("structure", sorted(STRUCTURES - {"low_rank"}))
def test_mc_converges_with_the_root_of_the_samples(structure: str) -> None:
    model, data = mlp()
    params = ["0.weight", "0.bias", "2.weight", "2.bias"]

    def estimated(**options: Any) -> Tensor:
        g = estimate(model, data, Categorical(), structure=structure, params=params, **options)  # type: ignore[arg-type]
        return g.dense().matrix

    exact = estimated()

    def error(num_samples: int) -> float:
        gaps = [
            estimated(
                estimator="mc", num_samples=num_samples,
                generator=torch.Generator().manual_seed(seed),
            ) - exact
            for seed in range(8)
        ]  # fmt: skip
        return float(torch.stack(gaps).square().mean().sqrt())

    assert 8 / 1.8 <= error(4) / error(256) <= 8 * 1.8  # 8 = sqrt(256 / 4)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_mc_is_seeded(structure: str) -> None:
    model, data = mlp()

    def draw(generator: torch.Generator | None = None) -> Tensor:
        return whole(estimate(model, data, Categorical(), structure=structure,  # type: ignore[arg-type]
                              estimator="mc", generator=generator), model)  # fmt: skip

    seeded = torch.Generator().manual_seed(1)
    first, second = draw(seeded), draw(seeded)
    assert torch.equal(first, draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)
    assert torch.equal(draw(), draw())


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_the_empirical_one_is_another_matrix(structure: str) -> None:
    """It vanishes where the labels are fitted, which curvature does not."""
    model, data = mlp()
    soft = Examples(data.inputs, Categorical().mean(forward(model, data.inputs)).detach())
    fit = partial(estimate, model, soft, Categorical(), structure=structure)
    assert whole(fit(estimator="empirical"), model).norm() < 1e-12
    assert whole(fit(), model).norm() > 1e-2


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_heads_weights_exclusion_batches(structure: str, estimator: str) -> None:
    """Excluding is leaving out, a weight of 2 is being there twice, and a head is a mask."""
    model, data = mlp()
    y = torch.tensor([0, 2])[torch.arange(N) % 2]
    ids = torch.arange(N) + 50
    fit = partial(estimate, structure=structure, estimator=estimator)
    w = torch.arange(N) % 3
    ours = fit(model, Examples(data.inputs, y, ids), Categorical(), head=(0, 2),
               weights=w.double(), exclude=torch.tensor([51, 54]), batch_size=2)  # fmt: skip
    keep = torch.cat([torch.arange(N)[(w >= k) & (ids != 51) & (ids != 54)] for k in (1, 2)])
    twice = Examples(data.inputs[keep], y[keep], head=(0, 2))  # type: ignore[index]
    close(whole(ours, model), whole(fit(model, twice, Categorical()), model))
    close(whole(ours * 0.0, model), torch.zeros_like(whole(ours, model)))
    none = fit(model, Examples(data.inputs, y, ids), Categorical(), exclude=ids)
    assert not whole(none, model).any()


@settings(max_examples=20)
@given(st.permutations(range(8)), st.integers(1, 8), st.integers(0, 12))
def test_saturated_examples_count_in_the_inputs(order, batch_size: int, log_set: int) -> None:
    """R is the mean over all examples, also over a batch whose Hessians are exactly 0."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2, bias=False).double(), torch.randn(8, 4, dtype=torch.float64)
    x[4:] *= 1e5  # gaps of thousands between the logits
    x = x[list(order)]
    h = Categorical().hessian(model(x).detach())
    assert int((h == 0).all(-1).all(-1).sum()) == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "WORKING_SET", 2**log_set)
        g = kfac_of(model, (x, torch.zeros(8).long()), Categorical(), batch_size=batch_size)
    close(whole(g, model), torch.kron(h.sum(0), x.T @ x / 8))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from(["kronecker", "eigen_kronecker"]))
def test_the_batch_size_does_not_matter(batch_size: int, log_set: int, structure: str) -> None:
    torch.manual_seed(0)
    model, data, likelihood = case("conv2d")
    fit = partial(estimate, model, data, likelihood, structure=structure)
    together = fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "WORKING_SET", 2**log_set)
        patch.setattr(kfac, "_CHUNK", 2**log_set)
        close(whole(fit(batch_size=batch_size), model), whole(together, model))


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    stride=st.integers(1, 2),
    height=st.integers(4, 7),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "circular"]),
)
def test_convolutions_by_rows(kernel, padding, stride, height, bias, mode) -> None:
    """The sums over rows are those of the patches, at every edge and with every weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, kernel, (1, stride), padding, bias=bias, padding_mode=mode),
        nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double()  # fmt: skip
    data = Examples(torch.randn(N, 2, height, 5, dtype=torch.float64), torch.zeros(N).long())
    w = torch.rand(N, dtype=torch.float64)
    by_rows = kfac_of(model, data, Categorical(), weights=w)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kfac, "_by_rows", lambda *_: None)
        patches = kfac_of(model, data, Categorical(), weights=w)
    close(whole(by_rows, model), whole(patches, model))


def test_blocks_of_columns_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, likelihood = case("conv2d")
    truth = whole(kfac_of(model, data, likelihood), model)
    monkeypatch.setattr(kfac, "_COLUMNS", 3)
    close(whole(kfac_of(model, data, likelihood), model), truth)


def test_negative_weights_take_out() -> None:
    model, data = mlp()
    minus = kfac_of(model, data, Categorical(), weights=-torch.ones(N))
    close(whole(minus, model), -whole(kfac_of(model, data, Categorical()), model))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_params_limit_the_result(structure: str) -> None:
    model, data = mlp()
    g = estimate(model, data, Categorical(), structure=structure, params=["2.weight", "4.bias"])  # type: ignore[arg-type]
    assert sorted(g.shapes) == ["2.weight", "4.bias"]
    by_filter = estimate(model, data, Categorical(), structure=structure,  # type: ignore[arg-type]
                         params=lambda name, _: name in ("2.weight", "4.bias"))  # fmt: skip
    close(g.dense().matrix, by_filter.dense().matrix)


def test_kinds_of_blocks() -> None:
    model, data, likelihood = case("norms")
    kinds = {n: type(kfac_of(model, data, likelihood).block_of(n)) for n, _ in
             model.named_parameters()}  # fmt: skip
    assert set(kinds.values()) == {Kronecker, Diagonal}
    tied, data, likelihood = case("tied")  # one weight with two biases: no layer's last column
    g = kfac_of(tied, data, likelihood)
    assert list(g.block_of("a.weight").shapes) == ["a.weight"]
    assert isinstance(g.block_of("a.bias"), Diagonal)


def test_layers_that_take_no_part_have_no_curvature() -> None:
    model = Routed().double()
    x = torch.rand(4, 5, dtype=torch.float64)
    g = kfac_of(model, Examples(x, torch.zeros(4).long()), Categorical())
    assert not g.diagonal()["right.weight"].any()
    both = Examples(torch.cat([x, -x]), torch.zeros(8).long())
    g = kfac_of(model, both, Categorical(), batch_size=4)
    assert g.diagonal()["right.weight"].any()
    assert g.diagonal()["left.weight"].any()


def test_low_rank_is_the_leading_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, C)).double()
    scale = 0.7 ** torch.arange(20, dtype=torch.float64)
    data = Examples(torch.randn(60, 20, dtype=torch.float64) * scale, torch.randint(0, C, (60,)))
    truth = reference.ggn(model, data, Categorical())
    values, vectors = torch.linalg.eigh(truth)
    for rank in (1, 4):
        top = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        errors = []
        for iterations in (0, 1, 2, 6):
            g = low_rank_curvature(model, data, Categorical(), rank=rank, iterations=iterations)
            assert g.rank == rank
            errors.append(float((whole(g, model) - top).norm() / top.norm()))
        # Each iteration multiplies it by the ratio of eigenvalues, on the whole.
        ratio = float(values[-rank - 11] / values[-rank])
        assert errors[2] <= 5 * ratio**2 * errors[0]
        assert errors[-1] < 1e-9


@pytest.mark.parametrize("structure", ["kronecker", "eigen_kronecker", "low_rank"])
def test_memory_does_not_grow_with_the_data(structure: str) -> None:
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 2))
    largest = []
    for n in (64, 640):
        data = Examples(torch.randn(n, 300), torch.randint(0, 2, (n,)))
        options = {"rank": 2} if structure == "low_rank" else {}
        with Largest() as seen:
            estimate(model, data, Categorical(), structure=structure, estimator="mc",  # type: ignore[arg-type]
                     batch_size=32, **options)  # fmt: skip
        largest.append(seen.numel)
    assert largest[1] <= max(largest[0], 640 * 300)  # the data themselves


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("name", ["mlp", "conv2d", "norms", "text"])
def test_nothing_is_touched(name: str, structure: str) -> None:
    model, data, likelihood = case(name)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            estimate(model, data, likelihood, structure=structure, estimator="mc")  # type: ignore[arg-type]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert not any(m._forward_hooks for m in model.modules())


def test_low_precision_is_summed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C))
    data = Examples(torch.randn(50, 4), torch.randint(0, C, (50,)))
    g = whole(kfac_of(model, data, Categorical()), model)
    low = Examples(data.inputs.bfloat16(), data.labels)  # type: ignore[union-attr]
    short = whole(kfac_of(model.bfloat16(), low, Categorical()), model)
    assert short.dtype == torch.float32
    assert (short - g).norm() <= 5e-2 * g.norm()


# --- what is refused -----------------------------------------------------------------------------


class NoHessian:
    """Squared error with a residual alone, as a user's likelihood may be."""

    validate, mask = Gaussian().validate, Gaussian().mask

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f - y


class OnlyHessian(NoHessian):
    def __init__(self, sign: float) -> None:
        self.sign = sign

    def hessian(self, f: Tensor) -> Tensor:
        return torch.diag_embed(self.sign * torch.ones_like(f))


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_a_likelihood_without_a_hessian(structure: str) -> None:
    model, data, _ = case("mlp", "gaussian")
    fit: Any = partial(estimate, model, data, structure=structure)
    for estimator, lacks in (("exact", "hessian_factor or hessian"), ("mc", "sample")):
        with pytest.raises(TypeError, match=f"NoHessian has no {lacks}, .*estimator='empirical'"):
            fit(NoHessian(), estimator=estimator)
    close(whole(fit(NoHessian(), estimator="empirical"), model),
          whole(fit(Gaussian(), estimator="empirical"), model))  # fmt: skip
    close(whole(fit(OnlyHessian(1.0)), model), whole(fit(Gaussian()), model))
    with pytest.raises(ValueError, match=r"indefinite .*smallest eigenvalue is -1.*estimator='mc'"):
        fit(OnlyHessian(-1.0))


def test_layers_without_factors() -> None:
    model, data, likelihood = case("text")
    with pytest.raises(ValueError, match=r"'embed.weight'.* no Kronecker factors; .*params="):
        kfac_of(model, data, likelihood, other="raise")
    kfac_of(model, data, likelihood, other="raise", params=["head.weight", "head.bias"])
    wide = nn.Sequential(nn.LayerNorm(5000), nn.Linear(5000, 2))
    big = Examples(torch.randn(2, 5000), torch.zeros(2).long())
    with pytest.raises(ValueError, match=r"'0.weight' has 5000 numbers, too many for a dense"):
        kfac_of(wide, big, Categorical(), other="dense")


def test_a_parameter_used_in_two_ways() -> None:
    class Switched(nn.Linear):
        """By the layer itself or by a functional call, as the batch has it."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad or float(x[0, 0]) > 0:
                return self.layer(x)
            return F.linear(x, self.layer.weight, self.layer.bias)

    x = torch.rand(4, 5, dtype=torch.float64)
    data = Examples(torch.cat([x, -x]), torch.zeros(8).long())
    with pytest.raises(ValueError, match=r"used in another way in one batch.*diagonal_curvature"):
        kfac_of(Model().double(), data, Categorical(), batch_size=4)


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_bad_input_is_named(structure: str) -> None:
    model = nn.Sequential(nn.Linear(5, C))
    x, y = torch.randn(N, 5), torch.randint(0, C, (N,))
    fit: Any = partial(estimate, structure=structure)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 0"):
        fit(model, (poisoned, y), Categorical())
    with pytest.raises(ValueError, match="'exact', 'mc' or 'empirical', got 'true'"):
        fit(model, (x, y), Categorical(), estimator="true")
    with pytest.raises(ValueError, match="labels run from"):
        fit(model, (x, y + C), Categorical())
    with pytest.raises(NotRepeatableError, match=r"model.eval\(\)"):
        fit(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, C)), (x, y), Categorical())
    with pytest.raises(ValueError, match="no trainable parameters of these names"):
        fit(model, (x, y), Categorical(), params=["old"])


def test_options_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = mlp()
    for options, message in (
        ({"positions": "sum"}, "positions must be 'expand' or 'reduce', got 'sum'"),
        ({"other": "none"}, "other must be 'diagonal', 'dense' or 'raise', got 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            kfac_of(model, data, Categorical(), **options)  # type: ignore[arg-type]
    for options in ({"rank": 0}, {"iterations": -1}):
        with pytest.raises(ValueError, match="a rank of at least 1 and iterations of at least 0"):
            low_rank_curvature(model, data, Categorical(), **options)
    with pytest.raises(ValueError, match="structure must be one of .*'kronecker'.*, got 'kfac'"):
        estimate(model, data, Categorical(), structure="kfac")  # type: ignore[arg-type]
    monkeypatch.setattr(estimators, "_DENSE_LIMIT", 1000)
    with pytest.raises(ValueError, match="directions of .* lower the rank"):
        low_rank_curvature(model, data, Categorical())
    with pytest.raises(ValueError, match="dense blocks take .* use kronecker_curvature"):
        block_curvature(model, data, Categorical())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_guard_counts_the_bytes_of_the_sums(monkeypatch, dtype: torch.dtype) -> None:
    """Refused just where the result would take more: sums are in float32 or better."""
    model, x = nn.Linear(5, C).to(dtype), torch.randn(4, 5, dtype=dtype)
    calls = {"dense": {}, "block": {}, "low_rank": {"rank": 2}}
    for structure, options in calls.items():
        fit = partial(estimate, model, (x, torch.randn(4, C)), Gaussian(), structure=structure)
        size = max(4, torch.finfo(dtype).bits // 8) * (6 * C) ** 2
        size = size if structure != "low_rank" else 2 * size * 12 // (6 * C)
        monkeypatch.setattr(estimators, "_DENSE_LIMIT", size)
        fit(**options)
        monkeypatch.setattr(estimators, "_DENSE_LIMIT", size - 1)
        with pytest.raises(ValueError, match="GiB"):
            fit(**options)


def test_by_name_it_is_the_same() -> None:
    model, data = mlp()
    for structure, build in (("diagonal", diagonal_curvature), ("dense", dense_curvature)):
        close(whole(estimate(model, data, Categorical(), structure=structure), model),  # type: ignore[arg-type]
              whole(build(model, data, Categorical()), model))  # fmt: skip
    assert isinstance(estimate(model, data, Categorical()), BlockDiagonal)
    assert rows(data.inputs) == N


class Sums(nn.Module):
    """Reads (B, L, 5), inside as (L, B, 5), and sums over L."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x.transpose(0, 1))).sum(0))


@pytest.mark.parametrize("batch_size", [9, 6, 4, 3, 2, 1])
def test_sequence_first_layers_have_factors_whatever_the_batch_size(batch_size: int) -> None:
    torch.manual_seed(0)
    model, x, y = Sums().double(), torch.randn(9, 6, 5).double(), torch.randn(9, 2).double()
    whole = kronecker_curvature(model, (x, y), Gaussian())
    parts = kronecker_curvature(model, (x, y), Gaussian(), batch_size=batch_size)
    assert [type(b) for b in parts.blocks] == [Kronecker, Kronecker]
    assert torch.allclose(parts.dense().matrix, whole.dense().matrix)
