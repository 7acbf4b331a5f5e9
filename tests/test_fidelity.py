"""Fidelity: 1 for a full memory, the share remembered for a part, and intervals that hold."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import (
    Examples,
    Fidelity,
    Posterior,
    Prior,
    Recipe,
    Regulariser,
    Trail,
)
from lifelong.curvature import Dense
from lifelong.curve import Carry, probe
from lifelong.divergences import KL, Logit
from lifelong.models import parameters, snapshot
from lifelong.reconstruction import fidelity, fidelity_curve, rehearse
from lifelong.testing import cases, laws
from lifelong.testing.reference import ggn, gradient

GLMS = {case.name: case for case in (*cases.glms(), cases.linear_gaussian())}
BIG = {case.name: case for case in cases.glms(size=120)}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full(case: cases.Case, memory: int | None = None, **kw) -> Prior:
    recipe = Recipe("full", memory=memory, gradient="stored", **kw)
    return Prior(case.likelihood, recipe, (Regulariser(0.5),))


def laplace(case: cases.Case, model: nn.Module, precision: float = 0.5) -> Posterior:
    """With the dense GGN of the first task, from the slow reference."""
    shapes = {n: p.shape for n, p in parameters(model).items()}
    matrix = ggn(model, case.data[0], case.likelihood)
    return Posterior(snapshot(parameters(model)), Dense(matrix, shapes), precision)


def unflat(values: Tensor, model: nn.Module) -> dict[str, Tensor]:
    params = parameters(model)
    parts = values.split([p.numel() for p in params.values()])
    return {n: part.reshape(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([v.flatten() for v in values.values()])


# ------------------------------------------------------------------ laws


@pytest.mark.parametrize("case", GLMS.values(), ids=lambda c: c.name)
@pytest.mark.parametrize("norm", ["posterior", "euclidean"])
def test_a_full_memory_of_a_glm_is_exact_anywhere(case, norm):
    model = case.make_model(3)  # no minimum of anything
    prior = full(case).update(model, case.data[0])
    here = flat(snapshot(parameters(model)))
    path = [unflat(here + torch.randn(here.shape, generator=seeded()).double(), model)]
    found = fidelity(prior, model, case.data[0], path=path, norm=norm, generator=seeded())
    for part in (found.samples, found.path):
        assert part.fidelity == pytest.approx(1, abs=1e-8)
        assert part.cosine == pytest.approx(1, abs=1e-8)
        assert part.missed == pytest.approx(0, abs=1e-8 * abs(part.charged))
        assert part.interval is None
    assert found.anchor.relative_error <= 1e-8
    assert found.anchor.cosine == pytest.approx(1, abs=1e-8)
    shares = [*found.tasks.values(), *found.classes.values(), *found.strata]
    assert [s.value for s in shares] == pytest.approx([1.0] * len(shares), abs=1e-8)


def test_a_dense_quadratic_of_a_linear_gaussian_model_is_exact():
    case = cases.linear_gaussian()
    model = case.make_model(0)
    prior = full(case, 0, structure="dense").update(model, case.data[0])
    assert fidelity(prior, model, case.data[0]).fidelity == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("case", GLMS.values(), ids=lambda c: c.name)
def test_the_gradient_at_the_anchor_alone_is_worth_nothing(case):
    model = case.make_model(1)
    prior = full(case, 0).update(model, case.data[0])
    found = fidelity(prior, model, case.data[0], generator=seeded())
    assert found.fidelity == pytest.approx(0, abs=1e-8)
    assert found.samples.missed == pytest.approx(found.samples.charged)
    assert [s.value for s in found.strata] == pytest.approx([0.0] * len(found.strata), abs=1e-8)


@given(st.integers(1, 5))
@settings(max_examples=5)
def test_a_memory_of_copies_has_the_fidelity_of_its_share(copies):
    case = BIG["multinomial"]
    one = case.data[0][torch.arange(30)]
    data = Examples(one.inputs.repeat(5, 1), one.labels.repeat(5))
    model = case.make_model(0)
    prior = full(case)
    items = lifelong.memorise(model, data, case.likelihood, ids=torch.arange(30 * copies))
    found = fidelity(prior.recall(model, data, items), model, data, generator=seeded())
    assert found.fidelity == pytest.approx(copies / 5, abs=1e-8)
    assert found.samples.cosine == pytest.approx(1)
    assert list(found.classes) == [0, 1, 2]
    assert found.tasks[0].value == pytest.approx(copies / 5)


def test_the_numbers_are_those_of_their_formulas():
    case = GLMS["poisson"]
    model, data = case.make_model(2), case.data[0]
    prior = lifelong.kprior(case.likelihood, memory=6).update(model, data)
    posterior = laplace(case, model)
    path = [{n: p + 0.3 for n, p in snapshot(parameters(model)).items()}]
    got = fidelity(prior, model, data, posterior=posterior, samples=0, path=path)
    bare = replace(prior, terms=tuple(t for t in prior.terms if not isinstance(t, Regulariser)))
    other = deepcopy(model)
    other.load_state_dict(path[0])
    there, here = (gradient(m, data, case.likelihood) for m in (other, model))
    error, start = (laws.slope(m, bare(m)) - g for m, g in ((other, there), (model, here)))
    sigma = torch.linalg.inv(posterior.curvature.matrix + 0.5 * torch.eye(len(here)).double())
    change, d = there - here, flat(path[0]) - flat(dict(model.named_parameters())).detach()

    def size(v: Tensor) -> Tensor:
        return (v @ sigma @ v).sqrt()

    assert got.path.fidelity == pytest.approx(float(1 - size(error) / size(change)))
    assert got.path.error == pytest.approx(float(size(error)))
    assert got.path.points == pytest.approx((got.path.fidelity,))
    assert got.fidelity == got.path.fidelity
    assert got.samples is None
    claimed = change + error
    cosine = claimed @ sigma @ change / size(claimed) / size(change)
    assert got.path.cosine == pytest.approx(float(cosine))
    assert got.path.missed == pytest.approx(float(-0.5 * d @ (error + start)))
    assert got.path.charged == pytest.approx(float(0.5 * d @ change))
    assert got.anchor.error == pytest.approx(float(size(start)))


@pytest.mark.parametrize("name", ["logistic", "multinomial", "multinomial heads", "poisson"])
def test_near_the_anchor_it_is_the_curvature_that_is_forgotten(name):
    """1 - ‖Sigma^½ E Sigma^½‖ / ‖Sigma^½ G Sigma^½‖, from dense matrices."""
    case = BIG[name]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, 40).update(model, data)
    kept = prior.memory.origin - data.ids[0]
    forgotten = torch.ones(len(data), dtype=torch.float64)
    forgotten[kept] = 0.0
    E, G = (ggn(model, data, case.likelihood, weights=w) for w in (forgotten, None))
    posterior = laplace(case, model)
    root = torch.linalg.cholesky(
        torch.linalg.inv(posterior.curvature.matrix + 0.5 * torch.eye(len(G)).double())
    )
    truth = 1 - (root.T @ E @ root).norm() / (root.T @ G @ root).norm()
    # The columns of a root of Sigma: as a set of steps they have that covariance exactly.
    anchor = flat(snapshot(parameters(model)))
    path = [unflat(anchor + 1e-5 * column, model) for column in root.T]
    found = fidelity(prior, model, data, posterior=posterior, samples=0, path=path)
    assert found.fidelity == pytest.approx(float(truth), abs=1e-4)


def test_several_tasks_are_a_list_and_have_their_heads():
    case = GLMS["multinomial heads"]
    model, prior = case.make_model(0), full(case)
    for data in case.data:
        prior = prior.update(model, data)
    found = fidelity(prior, model, list(case.data))
    assert found.fidelity == pytest.approx(1, abs=1e-8)
    assert (list(found.tasks), len(found.strata)) == ([0, 1, 2], 6)
    assert found.num_data == found.num_examples == 54
    for line in ("54 examples", "posterior samples: 1.000", "share by task", "share by class"):
        assert line in str(found)


def test_kernels_have_a_gradient_too():
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    prior = lifelong.fromp(case.likelihood, memory=60, strength=1.0).update(model, data)
    step = torch.randn(15, generator=seeded(), dtype=torch.float64)
    path = [unflat(flat(snapshot(parameters(model))) + 0.1 * step, model)]
    found = fidelity(prior, model, data, samples=0, path=path, norm="euclidean")
    other = deepcopy(model)
    other.load_state_dict(path[0])
    truth = gradient(other, data, case.likelihood)
    error = laws.slope(other, prior(other)) - truth
    change = truth - gradient(model, data, case.likelihood)
    assert found.path.relative_error == pytest.approx(float(error.norm() / change.norm()))


# ------------------------------------------------------------------ samples of the past


def test_a_sample_that_is_everything_is_no_sample():
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, 30).update(model, data)
    whole = fidelity(prior, model, data, generator=seeded())
    assert whole == fidelity(prior, model, data, num_examples=120, generator=seeded())
    assert whole.num_examples == 120


@pytest.mark.parametrize("memory", [5, 60])
def test_the_interval_holds_the_value_of_all_examples(memory, monkeypatch):
    monkeypatch.setattr("lifelong.reconstruction._CHUNKS", 30)  # a gradient of each: time
    case = cases.glms(size=400)[1]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, memory).update(model, data)
    posterior = laplace(case, model)
    steps = posterior.sample(3, seeded())
    path = [{n: v[s] for n, v in steps.items()} for s in range(2)]

    def look(n: int | None, seed: int):
        return fidelity(
            prior, model, data, posterior=posterior, samples=0, path=path, num_examples=n,
            resamples=200, generator=seeded(seed),
        )  # fmt: skip

    truth, trials = look(None, 0), 20
    found = [look(120, 100 + t) for t in range(trials)]
    inside = sum(f.path.interval[0] - 1e-9 <= truth.fidelity <= f.path.interval[1] + 1e-9
                 for f in found)  # fmt: skip
    assert inside >= 16  # of 20 at 95 %: fewer has a probability of 1 in 390
    mean = sum(f.fidelity for f in found) / trials
    assert mean == pytest.approx(truth.fidelity, abs=0.05)
    assert all(116 <= f.num_examples <= 124 for f in found)
    assert found[0].classes[0].interval is not None
    assert max(f.path.interval[1] for f in found) <= 1


def test_a_larger_sample_is_surer():
    case = cases.glms(size=600)[0]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, 60).update(model, data)
    widths = []
    for n in (60, 500):
        low, high = fidelity(
            prior, model, data, num_examples=n, generator=seeded()
        ).samples.interval
        widths.append(high - low)
    assert widths[1] < widths[0] / 3


def test_the_model_comes_back_as_it_was():
    case = cases.networks()[0]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, 5).update(model, data)
    before, state = deepcopy(model.state_dict()), torch.get_rng_state()
    model.train()
    fidelity(prior, model, data, num_examples=10, generator=seeded())
    fidelity_curve(prior, model, data, generator=seeded())
    rehearse(prior, model, data, steps=2, every=1, generator=seeded())
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------ paths


def test_a_trail_is_a_callback_a_hook_and_a_call():
    model = cases.mlp(3, 2)(0)
    trail = Trail(model, every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(trail)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 3).double()).sum().backward()
        optimizer.step()
    trail("progress")
    assert len(trail.weights) == 2
    last = snapshot(parameters(model))
    assert all(torch.equal(v, last[n]) for n, v in trail.weights[1].items())
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Trail(model, every=0)


def test_a_rehearsal_needs_no_next_task_and_follows_the_prior():
    case = BIG["multinomial"]
    data = case.data[0]
    weak = lifelong.kprior(case.likelihood, memory=0, precision=1.0)
    model, weak = laws.learn(weak, case, tasks=1)
    strong = lifelong.kprior(case.likelihood, memory=None, precision=1.0).update(model, data)
    missed, moved = [], []
    for prior in (weak, strong):
        path = rehearse(prior, model, data, steps=30, every=15, generator=seeded())
        assert len(path) == 2
        found = fidelity(prior, model, data, samples=0, path=path[-1:])
        missed.append(found.path.missed)
        moved.append(float((flat(path[-1]) - flat(snapshot(parameters(model)))).norm()))
    assert missed[0] > 10 * abs(missed[1])
    assert min(moved) > 0


@pytest.mark.parametrize("name", ["multinomial heads", "logistic", "poisson"])
def test_a_rehearsal_of_other_labels_and_heads(name):
    case = GLMS[name]
    model, data = case.make_model(0), case.data[0]
    prior = full(case).update(model, data)
    assert len(rehearse(prior, model, [data], steps=3, every=1, generator=seeded())) == 3


def test_a_rehearsal_refuses():
    case = GLMS["multinomial"]
    model, data = case.make_model(0), case.data[0]
    prior = full(case).update(model, data)
    for name in ("steps", "every", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            rehearse(prior, model, data, **{name: 0})

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    named = Named()
    of_dicts = Examples({"x": data.inputs}, data.labels)
    with pytest.raises(TypeError, match="record a path with Trail instead"):
        rehearse(full(case).update(named, of_dicts), named, of_dicts)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": -1}, "samples must not be negative, got -1"),
        ({"num_examples": 1}, "num_examples must be at least 2, or None for all, got 1"),
        ({"norm": "l2"}, "norm must be 'posterior' or 'euclidean', got 'l2'"),
        ({"resamples": 0}, "at least one resample"),
        ({"level": 1.0}, "a level in \\(0, 1\\)"),
        ({"scale": 0.0}, "scale must be finite and positive, got 0.0"),
        ({"samples": 0}, "no weights to look at"),
    ],
)
def test_settings_out_of_range(wrong, message):
    case = GLMS["logistic"]
    model, data = case.make_model(0), case.data[0]
    prior = full(case).update(model, data)
    with pytest.raises(ValueError, match=message):
        fidelity(prior, model, data, **wrong)


# ------------------------------------------------------------------ the curve


@pytest.mark.parametrize("name", ["multinomial", "poisson"])
def test_the_curve_of_a_glm_is_that_of_dense_matrices(name):
    case = BIG[name]
    model, data = case.make_model(0), case.data[0]
    prior, sizes = full(case), (0, 6, 30, 90, 120)
    curve = fidelity_curve(
        prior, model, data, sizes=sizes, probes=200, scale=1e-4, generator=seeded()
    )
    G = ggn(model, data, case.likelihood)
    sigma = 1 / (G.diagonal() + 0.5)
    scaled = sigma.sqrt()[:, None] * G * sigma.sqrt()
    for m, value in zip(sizes, curve.values, strict=True):
        items = full(case, m).memorise(model, data)
        weights = torch.ones(len(data), dtype=torch.float64)
        if items is not None:
            weights[items.origin - data.ids[0]] = 0.0
        E = ggn(model, data, case.likelihood, weights=weights)
        truth = 1 - (sigma.sqrt()[:, None] * E * sigma.sqrt()).norm() / scaled.norm()
        assert value == pytest.approx(float(truth), abs=0.03)
    assert curve.values[0] == pytest.approx(0, abs=1e-12)
    assert curve.values[-1] == pytest.approx(1, abs=1e-12)
    assert curve.num_data == 120


@pytest.mark.parametrize("population", [False, True])
def test_a_dense_curvature_of_the_rest_leaves_nothing_out(population):
    case = BIG["poisson"]
    model, data = case.make_model(0), case.data[0]
    prior = full(case, 20, structure="dense", population=population)
    found = fidelity_curve(prior, model, data, sizes=(0, 10, 120), scale=1e-6, generator=seeded())
    values = found.values
    assert values[0] == pytest.approx(1, abs=1e-5)
    assert values[2] == pytest.approx(1, abs=1e-8)
    assert (values[1] < 0.99) == population  # items that stand for others count them twice
    twice = full(case, 20, structure="dense", exclude_memory=False)
    both = fidelity_curve(twice, model, data, sizes=(120,), scale=1e-6)
    assert both.values[0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("score", ["random", "lambda"])
def test_the_curve_weighs_items_as_the_prior_does(balanced, score):
    """Of unbalanced classes too, for every size, also where no item of some class is kept."""
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    order = torch.argsort(data.labels, stable=True)  # the first class whole, few of the others
    data = data[torch.cat([order[:50], order[-9:], order[60:64]])]
    for m in (1, 2, 5, 30, 63):
        prior = full(case, m, score=score, per_class=balanced, population=True)
        items = prior.memorise(model, data, generator=seeded())
        probed = probe(
            model, data, case.likelihood, prior.recipe.carry(), score=score, per_class=balanced,
            generator=seeded(),
        )  # fmt: skip
        ids = items.origin[:, None] == data.ids[None]
        kept = ids.nonzero()[:, 1]  # the probes draw too, so that other items are at random
        assert torch.allclose(items.soft_weight, probed._stands_for(kept))
        assert probed.value(0) == pytest.approx(0)
        of_prior = replace(probed, scores=-ids.any(0).double(), descending=False)
        carried = (items.soft_weight[:, None, None] * probed.items[kept]).sum(0)
        total = probed.whole.sum(0)
        mask = 1 - torch.eye(len(total)).double()
        truth = 1 - ((total - carried) * mask).norm() / (total * mask).norm()
        assert of_prior.value(m) == pytest.approx(float(truth))


@given(st.integers(0, 2**16), st.integers(0, 24))
@settings(max_examples=10)
def test_the_curve_sums_what_each_example_brings(seed, size):
    """At any size, score and rule: the same as the parts of the examples that are kept."""
    case = cases.networks()[0]
    model, data = case.make_model(0), case.data[0]
    size = min(size, len(data))
    probed = probe(model, data, case.likelihood, generator=seeded(seed), score="residual")
    kept = probed.chosen(size)
    total, some = probed.whole.sum(0), probed.whole[kept].sum(0)
    mask = 1 - torch.eye(len(total)).double()
    truth = 1 - ((total - some) * mask).norm() / (total * mask).norm()
    assert probed.value(size) == pytest.approx(float(truth))


def test_other_divergences_carry_their_own_curvature():
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]

    def items(divergence) -> Tensor:
        found = probe(
            model, data, case.likelihood, Carry(divergence=divergence), generator=seeded()
        )
        return found.items

    plain, warm = items(KL()), items(KL(2.0))
    assert torch.allclose(items(KL(2.0, rescale=True)), 4 * warm)
    assert not torch.allclose(plain, 4 * warm)
    squares = items(Logit())
    assert torch.allclose(squares, squares.mT)
    assert bool((squares.diagonal(dim1=-2, dim2=-1) >= plain.diagonal(dim1=-2, dim2=-1)).all())

    def own(likelihood, a, b):
        return likelihood.kl(a, b)

    with pytest.raises(ValueError, match="the curvature of a function is not known"):
        items(own)


def test_the_curve_refuses():
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    with pytest.raises(ValueError, match="sizes must lie in 0 to 120"):
        fidelity_curve(full(case), model, data, sizes=(121,))
    with pytest.raises(ValueError, match="at least 2 probes, got 1"):
        fidelity_curve(full(case), model, data, probes=1)
    with pytest.raises(ValueError, match="scale must be finite and positive, got 0"):
        fidelity_curve(full(case), model, data, scale=0)
    with pytest.raises(ValueError, match="k_centre orders examples without a score"):
        fidelity_curve(full(case, 5, score="k_centre"), model, data)
    with pytest.raises(ValueError, match="the fromp prior couples its examples"):
        fidelity_curve(lifelong.fromp(case.likelihood), model, data)


# ------------------------------------------------------------------ the budget


@given(st.floats(0.05, 1.0), st.booleans())
@settings(max_examples=10)
def test_the_smallest_memory_reaches_its_fidelity_and_no_smaller_one_does(target, balanced):
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    items = lifelong.memorise(
        model, data, case.likelihood, budget=Fidelity(target), per_class=balanced,
        generator=seeded(),
    )  # fmt: skip
    probed = probe(model, data, case.likelihood, per_class=balanced, generator=seeded())
    assert probed.value(len(items)) >= target - 1e-9
    if len(items) > 1:
        assert probed.value(len(items) - 1) < target
    assert set(items.origin.tolist()) == set((probed.chosen(len(items)) + data.ids[0]).tolist())
    assert torch.equal(items.labels, items.labels.sort().values)
    assert torch.equal(items.inputs, data.inputs[items.origin - data.ids[0]])
    assert probed.curve().smallest(target) >= len(items)


@pytest.mark.parametrize("make", [lifelong.kprior, lifelong.gradient_reconstruction])
def test_presets_take_a_fidelity_and_reach_it(make):
    case = BIG["multinomial"]
    prior = make(case.likelihood, memory=Fidelity(0.9), precision=0.5)
    model, after = laws.learn(prior, case, tasks=1)  # at a minimum, as both priors assume
    found = fidelity(after, model, case.data[0], scale=0.1, samples=64, generator=seeded(1))
    assert len(after.memory) < 120
    assert found.fidelity == pytest.approx(0.9, abs=0.05)


def test_a_fidelity_that_no_memory_reaches_is_refused():
    case = BIG["multinomial"]
    model, data = case.make_model(0), case.data[0]
    weak = lifelong.kprior(case.likelihood, memory=Fidelity(0.9), strength=0.5)
    with pytest.raises(
        ValueError, match=r"no memory reaches .* 0\.9: the best is 0\.500, with 120"
    ):
        weak.update(model, data)
    assert fidelity_curve(weak, model, data, sizes=(10,)).smallest(0.9) is None
