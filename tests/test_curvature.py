"""Curvature against the dense reference in float64; the structures' algebra; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lifelong import hooks
from lifelong.curvature import (
    Curvature,
    Dense,
    Diagonal,
    dense_curvature,
    diagonal_curvature,
    from_state_dict,
)
from lifelong.data import Examples
from lifelong.errors import CheckpointError, NonFiniteError, NotRepeatableError, StaleAnchorError
from lifelong.jacobians import choose
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from lifelong.models import Inputs, evaluating, forward
from lifelong.testing import reference
from test_jacobians import LABELS, MODELS, PAIRS, C, Largest, N, Routed, close, flat

BOTH: list[Callable] = [diagonal_curvature, dense_curvature]


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Inputs]:
    make, inputs, _ = MODELS[request.param]
    return make().double(), inputs()


@pytest.fixture
def mlp() -> nn.Module:
    return MODELS["mlp"][0]().double()


def examples(head: tuple[int, ...] | None = None, n: int = N) -> Examples:
    classes = torch.tensor(head or range(C))
    labels = classes[torch.randint(0, len(classes), (n,))]
    return Examples(torch.randn(n, 5, dtype=torch.float64), labels, head=head)


def agrees(model: nn.Module, data: Examples, likelihood: Likelihood, truth: Tensor, **kw) -> None:
    dense = dense_curvature(model, data, likelihood, **kw)
    close(dense.matrix, truth)
    assert list(dense.shapes) == list(choose(model))
    close(flat(diagonal_curvature(model, data, likelihood, **kw).values), truth.diagonal())


# --- estimators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_against_the_reference(name: str, kind: str, estimator: str) -> None:
    make, draw, _ = MODELS[name]
    model, inputs = make().double(), draw()
    likelihood, labels = LABELS[kind]
    data = Examples(inputs, labels())
    truth = {"exact": reference.ggn, "empirical": reference.empirical_fisher}[estimator]
    agrees(model, data, likelihood, truth(model, data, likelihood), estimator=estimator)


@pytest.mark.parametrize("head", [(0, 2), (1,), (2, 1, 0)])
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_heads(mlp: nn.Module, head: tuple[int, ...], estimator: str) -> None:
    data = examples(head)
    truth = {"exact": reference.ggn, "empirical": reference.empirical_fisher}[estimator]
    agrees(mlp, data, Categorical(), truth(mlp, data, Categorical()), estimator=estimator)


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_rows_of_unused_heads_are_exactly_zero(mlp: nn.Module, estimator: str) -> None:
    g = diagonal_curvature(mlp, examples((0, 2)), Categorical(), estimator=estimator)
    for name in ("4.weight", "4.bias"):
        assert not g.values[name][1].any()
        assert g.values[name][0].any()
        assert g.values[name][2].any()


def test_an_argument_overrules_the_head_of_the_data(mlp: nn.Module) -> None:
    data = examples((0, 2))
    truth = reference.ggn(mlp, data, Categorical(), head=(0, 1, 2))
    agrees(mlp, data, Categorical(), truth, head=(0, 1, 2))


def test_weights_and_excluded_examples(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    data = Examples(inputs, torch.randint(0, C, (N,)), ids=torch.arange(N) + 50)
    w = torch.rand(N, dtype=torch.float64) - 0.3
    out = torch.tensor([52, 55, 56, 57])
    kept = w * ~torch.isin(data.ids, out)
    truth = reference.ggn(model, data, Categorical(), weights=kept)
    agrees(model, data, Categorical(), truth, weights=w, exclude=out, batch_size=2)


def test_leaving_out_all_is_zero(mlp: nn.Module) -> None:
    data = examples()
    assert not dense_curvature(mlp, data, Categorical(), exclude=data.ids).matrix.any()


@settings(max_examples=15)
@given(st.integers(1, 12), st.integers(0, 20), st.sampled_from(["exact", "empirical"]))
def test_the_batch_size_does_not_matter(batch_size: int, log_set: int, estimator: str) -> None:
    torch.manual_seed(0)
    model, data = MODELS["conv2d"][0]().double(), MODELS["conv2d"][1]()
    y = torch.randint(0, C, (N,))
    whole = diagonal_curvature(model, (data, y), Categorical(), estimator=estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "WORKING_SET", 2**log_set)
        patch.setattr(hooks, "_CHUNK", 2**log_set)
        part = diagonal_curvature(
            model, (data, y), Categorical(), estimator=estimator, batch_size=batch_size
        )
    close(flat(part.values), flat(whole.values))


@dataclass(frozen=True)
class Always(Categorical):
    """Draws one and the same label."""

    label: int = 0

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.full((len(f),), self.label)


@pytest.mark.parametrize("build", BOTH)
def test_exact_is_the_expectation_of_mc(mlp: nn.Module, build: Callable) -> None:
    data = examples((0, 2))
    p = (
        Categorical()
        .mean(Categorical().mask(forward(mlp, data.inputs), torch.tensor([True, False, True])))
        .detach()
    )
    parts = [build(mlp, data, Always(c), estimator="mc", weights=p[:, c]) for c in (0, 2)]
    expected = parts[0] + parts[1]
    exact = build(mlp, data, Categorical())
    close(flat(expected.diagonal()), flat(exact.diagonal()))
    if isinstance(exact, Dense):
        close(expected.matrix, exact.matrix)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian(0.7), Poisson()])
def test_mc_converges_with_the_root_of_the_samples(mlp: nn.Module, likelihood: Likelihood) -> None:
    data = examples()
    if not isinstance(likelihood, Categorical):
        data = Examples(data.inputs, torch.ones(N, C, dtype=torch.float64))
    exact = flat(diagonal_curvature(mlp, data, likelihood).values)

    def error(num_samples: int) -> float:
        gaps = [
            flat(
                diagonal_curvature(
                    mlp, data, likelihood, estimator="mc", num_samples=num_samples,
                    generator=torch.Generator().manual_seed(seed),
                ).values
            ) - exact
            for seed in range(8)
        ]  # fmt: skip
        return float(torch.stack(gaps).square().mean().sqrt() / exact.square().mean().sqrt())

    few, many = error(2), error(128)
    assert 8 / 1.7 <= few / many <= 8 * 1.7  # 8 = sqrt(128 / 2)


def test_mc_is_seeded(mlp: nn.Module) -> None:
    data = examples()

    def draw(generator: torch.Generator | None = None) -> Tensor:
        g = diagonal_curvature(mlp, data, Categorical(), estimator="mc", generator=generator)
        return flat(g.values)

    seeded = torch.Generator().manual_seed(1)
    first, second = draw(seeded), draw(seeded)
    assert torch.equal(first, draw(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)
    assert torch.equal(draw(), draw())


def test_the_empirical_one_is_another_matrix(mlp: nn.Module) -> None:
    """It vanishes where the labels are fitted, which curvature does not."""
    data = examples()
    soft = Examples(data.inputs, Categorical().mean(forward(mlp, data.inputs)).detach())
    assert not flat(
        diagonal_curvature(mlp, soft, Categorical(), estimator="empirical").values
    ).any()
    exact = diagonal_curvature(mlp, soft, Categorical()).values
    assert all(value.any() for value in exact.values())


def test_layers_that_take_no_part_have_no_curvature() -> None:
    model = Routed().double()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.randint(0, C, (4,))
    agrees(model, Examples(x, y), Categorical(), reference.ggn(model, (x, y), Categorical()))
    g = diagonal_curvature(
        model, (torch.cat([x, -x]), torch.cat([y, y])), Categorical(), batch_size=4
    )
    assert (g.values["left.weight"] > 0).all()
    assert (g.values["right.weight"] > 0).all()


def test_params_limit_the_result(mlp: nn.Module) -> None:
    data = examples()
    whole = diagonal_curvature(mlp, data, Categorical()).values
    part = diagonal_curvature(mlp, data, Categorical(), params=["2.weight", "4.bias"]).values
    assert list(part) == ["2.weight", "4.bias"]
    for name, value in part.items():
        close(value, whole[name])
    dense = dense_curvature(mlp, data, Categorical(), params=lambda name, _: name == "0.bias")
    close(flat(dense.diagonal()), whole["0.bias"])


def test_any_data(mlp: nn.Module) -> None:
    data = examples()
    whole = flat(diagonal_curvature(mlp, data, Categorical()).values)
    dataset = TensorDataset(data.inputs, data.labels)  # type: ignore[arg-type]
    for other in (
        (data.inputs, data.labels),
        dataset,
        DataLoader(dataset, batch_size=2),
        [(data.inputs[:4], data.labels[:4]), (data.inputs[4:], data.labels[4:])],
    ):
        close(flat(diagonal_curvature(mlp, other, Categorical()).values), whole)


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_low_precision_is_summed_in_float32(estimator: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, C))
    data = Examples(torch.randn(50, 4), torch.randint(0, C, (50,)))
    g = flat(diagonal_curvature(model, data, Categorical(), estimator=estimator).values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = flat(diagonal_curvature(model, data, Categorical(), estimator=estimator).values)
    low = Examples(data.inputs.bfloat16(), data.labels)  # type: ignore[union-attr]
    short = diagonal_curvature(model.bfloat16(), low, Categorical(), estimator=estimator)
    for other in (cast, flat(short.values)):
        assert other.dtype == torch.float32
        assert (other - g).norm() <= 5e-2 * g.norm()


def test_memory_does_not_grow_with_the_data() -> None:
    model = nn.Sequential(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 2))
    count = sum(p.numel() for p in model.parameters())
    largest = []
    for n in (32, 320):
        data = Examples(torch.randn(n, 700), torch.randint(0, 2, (n,)))
        with Largest() as seen:
            diagonal_curvature(model, data, Categorical(), batch_size=16)
        largest.append(seen.numel)
    assert largest[0] <= count  # one matrix of a layer's size, where B x P is 16 of them
    assert largest[1] <= max(largest[0], 320 * 700)  # the data themselves


def test_a_large_batch_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, C))
    data = Examples(torch.randn(200, 1, 8, 8), torch.randint(0, C, (200,)))
    monkeypatch.setattr(hooks, "WORKING_SET", 2**18)
    monkeypatch.setattr(hooks, "_CHUNK", 2**15)
    with Largest() as seen:
        diagonal_curvature(model, data, Categorical())
    assert seen.numel <= max(200 * 64, 2**16)


def test_nothing_is_touched(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    data = Examples(inputs, torch.randint(0, C, (N,)))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    for estimator in ("exact", "mc", "empirical"):
        for build in BOTH:
            with torch.no_grad():
                build(model, data, Categorical(), estimator=estimator)
            with torch.inference_mode():
                build(model, data, Categorical(), estimator=estimator)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert not any(m._forward_hooks for m in model.modules())


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("build", BOTH)
def test_models_that_are_not_functions_of_one_example(build: Callable) -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    data = Examples(torch.randn(N, 5), torch.randint(0, C, (N,)))
    dropout = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, C))
    norm = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, C))
    rng = torch.get_rng_state()
    for model, message in (
        (dropout, r"1 \(Dropout\).*model.eval\(\).*evaluating"),
        (norm, r"1 \(BatchNorm1d\).*model.eval\(\).*evaluating"),
        (Noisy(5, C), "the model is random"),
        (Centred(5, C), "depends on the other examples"),
    ):
        with pytest.raises(NotRepeatableError, match=message):
            build(model, data, Categorical())
    assert int(norm[1].num_batches_tracked) == 0  # type: ignore[arg-type]
    for model in (dropout, norm, nn.Sequential(nn.Dropout(0.0), nn.Linear(5, C))):
        with evaluating(model):
            build(model, data, Categorical())
    build(nn.Sequential(nn.Dropout(0.0), nn.Linear(5, C)), data, Categorical())
    assert rng.shape == torch.get_rng_state().shape


@pytest.mark.parametrize("build", BOTH)
def test_data_that_do_not_repeat(build: Callable) -> None:
    dataset = TensorDataset(torch.randn(N, 5), torch.randint(0, C, (N,)))
    with pytest.raises(NotRepeatableError, match="shuffle"):
        build(nn.Linear(5, C), DataLoader(dataset, shuffle=True), Categorical())
    noisy = Examples(
        torch.randn(N, 5), torch.randint(0, C, (N,)), transform=lambda x: x + torch.rand(1)
    )
    with pytest.raises(NotRepeatableError, match="augments"):
        build(nn.Linear(5, C), noisy, Categorical())


@pytest.mark.parametrize("build", BOTH)
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_bad_input_is_named(build: Callable, estimator: str) -> None:
    model = nn.Linear(5, C)
    x, y = torch.randn(N, 5), torch.randint(0, C, (N,))
    poisoned = torch.cat([x, x])
    poisoned[N + 1] = torch.nan

    def call(*args, **kw) -> None:  # type: ignore[no-untyped-def]
        build(*args, estimator=estimator, **kw)

    with pytest.raises(NonFiniteError, match="batch 1"):
        call(model, (poisoned, torch.cat([y, y])), Categorical(), batch_size=N)
    with pytest.raises(ValueError, match="labels run from"):
        call(model, (x, y + C), Categorical())
    with pytest.raises(ValueError, match="outside of the head"):
        call(model, (x, torch.ones(N).long()), Categorical(), head=(0, 2))
    with pytest.raises(ValueError, match="grow the model's head"):
        call(model, (x, y), Categorical(), head=(0, C))
    with pytest.raises(TypeError, match="int64"):
        call(model, (x, y.int()), Categorical())
    with pytest.raises(ValueError, match="no classes to choose from"):
        call(model, (x, torch.zeros(N, C)), Gaussian(), head=(0,))
    with pytest.raises(ValueError, match="no examples"):
        call(model, (x[:0], y[:0]), Categorical())
    with pytest.raises(ValueError, match="one weight for each example"):
        call(model, (x, y), Categorical(), weights=torch.ones(2))
    with pytest.raises(ValueError, match="num_samples"):
        call(model, (x, y), Categorical(), num_samples=0)
    with pytest.raises(ValueError, match="no trainable parameters of these names"):
        call(model, (x, y), Categorical(), params=["old"])


def test_estimators_have_names(mlp: nn.Module) -> None:
    with pytest.raises(ValueError, match="'exact', 'mc' or 'empirical', got 'true'"):
        diagonal_curvature(mlp, examples(), Categorical(), estimator="true")  # type: ignore[arg-type]


def test_a_matrix_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="GiB; use diagonal_curvature"):
        dense_curvature(nn.Linear(50_000, 1), examples(), Gaussian())


# --- structures ---------------------------------------------------------------------------------


def both() -> list[Diagonal | Dense]:
    model, data = MODELS["mlp"][0]().double(), examples()
    return [build(model, data, Categorical()) for build in BOTH]


def matrix(g: Diagonal | Dense) -> Tensor:
    return g.matrix if isinstance(g, Dense) else torch.diag(flat(g.values))


def vector(g: Diagonal | Dense) -> dict[str, Tensor]:
    return {name: torch.randn_like(value) for name, value in g.diagonal().items()}


@pytest.mark.parametrize("which", [0, 1])
def test_products(which: int) -> None:
    g = both()[which]
    assert isinstance(g, Curvature)
    d, G = vector(g), matrix(g)
    close(flat(g.mv(d)), G @ flat(d))
    close(g.quad(d), flat(d) @ G @ flat(d))
    close(flat(g.diagonal()), G.diagonal())
    assert g.quad(d).shape == ()
    assert [v.shape for v in g.mv(d).values()] == [v.shape for v in d.values()]
    solved = torch.linalg.solve(G + 0.1 * torch.eye(len(G), dtype=G.dtype), flat(d))
    close(flat(g.inverse_mv(d, damping=0.1)), solved)


@pytest.mark.parametrize("which", [0, 1])
def test_quad_is_differentiable(which: int) -> None:
    g = both()[which]
    d = {name: value.requires_grad_() for name, value in vector(g).items()}
    grads = torch.autograd.grad(g.quad(d), list(d.values()))
    close(torch.cat([x.flatten() for x in grads]), 2 * flat(g.mv(d)))


@pytest.mark.parametrize("which", [0, 1])
def test_sums_and_multiples(which: int) -> None:
    g, h = both()[which], both()[which]
    close(matrix(g + 3.0 * h), matrix(g) + 3 * matrix(h))
    close(matrix(g * 0.5), matrix(g) / 2)
    zero = type(g).zeros_like(g.diagonal())
    close(matrix(g + zero), matrix(g))
    with pytest.raises(TypeError):
        g + 1.0  # type: ignore[operator]
    with pytest.raises(TypeError):
        g + both()[1 - which]  # type: ignore[operator]


def test_dense_sums_follow_names_not_places() -> None:
    g = both()[1]
    assert isinstance(g, Dense)
    names = list(reversed(g.shapes))
    at = g._shaped(torch.arange(len(g.matrix)))
    index = torch.cat([at[name].flatten() for name in names])
    turned = Dense(g.matrix[index][:, index], {name: g.shapes[name] for name in names})
    close((g + turned).matrix, 2 * g.matrix)


@pytest.mark.parametrize("which", [0, 1])
def test_saved_and_moved(which: int) -> None:
    g = both()[which]
    back = from_state_dict(load(save(g.state_dict())))
    assert type(back) is type(g)
    assert torch.equal(matrix(back), matrix(g)) or which == 0
    for name, value in g.diagonal().items():
        assert torch.equal(back.diagonal()[name], value)
    assert torch.equal(matrix(type(g).from_state_dict(g.state_dict())), matrix(g))
    short = g.to("cpu", torch.float32)
    assert matrix(short).dtype == torch.float32
    assert matrix(g).dtype == torch.float64
    assert short.num_bytes * 2 == g.num_bytes
    assert g.num_bytes == 8 * (matrix(g).numel() if which else len(matrix(g)))


def test_what_is_no_saved_curvature() -> None:
    diagonal, dense = (g.state_dict() for g in both())
    for state in ({}, {"x": torch.zeros(1)}, diagonal | dense):
        for load_ in (from_state_dict, Diagonal.from_state_dict, Dense.from_state_dict):
            with pytest.raises(CheckpointError):
                load_(state)
    with pytest.raises(CheckpointError):
        Dense.from_state_dict({k: v for k, v in dense.items() if k != "dense.matrix"})
    with pytest.raises(ValueError, match="expected a matrix"):
        Dense.from_state_dict({"dense.matrix": torch.zeros(2, 2)})


@pytest.mark.parametrize("which", [0, 1])
def test_other_parameters_are_refused(which: int) -> None:
    g = both()[which]
    d = vector(g)
    missing = {name: value for name, value in d.items() if name != "0.bias"}
    extra = d | {"new": torch.zeros(1)}
    resized = d | {"0.bias": torch.zeros(2)}
    for bad, message in ((missing, "missing"), (extra, "unknown"), (resized, "resized")):
        for call in (g.quad, g.mv, g.inverse_mv):
            with pytest.raises(StaleAnchorError, match=message):
                call(bad)
        with pytest.raises(StaleAnchorError, match=message):
            g + type(g).zeros_like(bad)  # type: ignore[operator]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_the_damping_that_would_do_does(which: int, damping: float) -> None:
    g = both()[which] * -1.0
    d = vector(g)
    with pytest.raises(ValueError, match="a damping of .* would do") as error:
        g.inverse_mv(d, damping)
    enough = float(str(error.value).split("a damping of ")[1].split()[0])
    assert all(bool(x.isfinite().all()) for x in g.inverse_mv(d, enough).values())
    zero = type(g).zeros_like(d)
    with pytest.raises(ValueError, match="not positive definite"):
        zero.inverse_mv(d)


def test_frozen() -> None:
    for g in both():
        with pytest.raises(AttributeError):
            g.values = {}  # type: ignore[misc,union-attr]


# --- the reference's minimiser ------------------------------------------------------------------


def test_minimise_reaches_the_tolerance() -> None:
    model, data = nn.Linear(5, C).double(), examples(n=30)

    def loss() -> Tensor:
        nll = Categorical().nll(model(data.inputs), data.labels).sum()
        return nll + 0.05 * sum(p.square().sum() for p in model.parameters())

    reference.minimise(model, loss)
    grads = torch.autograd.grad(loss(), list(model.parameters()))
    assert torch.cat([g.flatten() for g in grads]).norm() < 1e-10
    assert all(p.grad is None for p in model.parameters())


def test_minimise_says_where_it_fails() -> None:
    model = nn.Linear(2, 1).double()
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="above the tolerance"):
        reference.minimise(model, lambda: model.weight.sum(), max_iter=20)
    assert torch.equal(model.weight, before)
    with pytest.raises(ValueError, match="float64"):
        reference.minimise(nn.Linear(2, 1), lambda: torch.zeros(()))
