"""The laws of ``lifelong.testing.laws``, crossed with the cases, and the table of the presets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lifelong
from lifelong import Categorical, Examples, Gaussian, KernelTerm, MemoryTerm, Prior, Recipe
from lifelong.errors import ClippedWarning, NotHeldWarning
from lifelong.likelihoods import Likelihood
from lifelong.models import evaluating, parameters, snapshot
from lifelong.presets import PRESETS
from lifelong.terms import Regulariser, WeightTerm
from lifelong.testing import cases, laws
from lifelong.testing.cases import SPLITS, Case, Split

NETWORKS = {case.name: case for case in cases.networks()}
GLMS = {case.name: case for case in cases.glms()}
GAUSSIAN = cases.linear_gaussian()
ORTHOGONAL = cases.orthogonal()
WHOLE = [split for split in SPLITS if split.memory == 1]

by_name = pytest.mark.parametrize("name", NETWORKS)
by_glm = pytest.mark.parametrize("name", GLMS)
by_split = pytest.mark.parametrize("split", SPLITS, ids=lambda s: s.name)
by_whole = pytest.mark.parametrize("split", WHOLE, ids=lambda s: s.name)


def exact(case: Case) -> Prior:
    return laws.law_prior(case.likelihood)


# -------------------------------------------------------------------- 1 at the anchor


@by_split
@by_name
def test_gradient_at_the_anchor(name: str, split: Split) -> None:
    assert laws.gradient_at_anchor(NETWORKS[name], split, tasks=2) < 2e-13


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param(name, split, id=f"{name}: {split.name}")
        for name in NETWORKS
        for split in (*SPLITS, Split("half function", memory=0.5))
        # A replayed example of a network that bends brings more than its GGN.
        if name.startswith("linear") or not (split.replay or split.blend)
    ],
)
def test_curvature_at_the_anchor(name: str, split: Split) -> None:
    assert laws.curvature_at_anchor(NETWORKS[name], split) < 1e-13


@settings(max_examples=15)
@given(
    memory=st.floats(0, 1),
    replay=st.floats(0, 1),
    blend=st.floats(0, 1),
    seed=st.integers(0, 1000),
    name=st.sampled_from(sorted(NETWORKS)),
)
def test_gradient_at_the_anchor_for_any_split(
    memory: float, replay: float, blend: float, seed: int, name: str
) -> None:
    split = Split("any", memory, replay, blend)
    assert laws.gradient_at_anchor(NETWORKS[name], split, tasks=2, seed=seed) < 2e-13


MEMORIES: tuple[dict, ...] = (
    {"memory": 10, "total": True, "score": "random"},
    {"memory": 10, "total": True, "score": "random", "soft": 0.4, "hard": 0.6},
    {"memory": 10, "total": True, "score": "random", "per_class": False, "soft": 0.0, "hard": 1.0},
    {"memory": 10, "total": True, "score": "lambda", "soft": 0.5, "hard": 0.5},
    {"memory": 10, "total": True, "score": "residual", "descending": False},
    {"memory": 5, "population": True, "soft": 0.5, "hard": 0.5},
    {"memory": 5, "total": True, "population": True, "score": "random", "soft": 0.5, "hard": 0.5},
    {"memory": 5, "discount": 0.8, "replay_fraction": 0.4},
    {"memory": 5, "refresh": False, "soft": 0.5, "hard": 0.5},
    {"memory": 10, "total": True, "score": "random", "refresh": False, "discount": 0.9},
)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda m: " ".join(f"{k}={m[k]}" for k in m))
@pytest.mark.parametrize("name", ["mlp Categorical", "mlp Categorical heads", "conv Gaussian"])
def test_gradient_at_the_anchor_whatever_the_memory_does(name: str, memory: dict) -> None:
    """Also where items are evicted, weighted anew, discounted or keep old soft labels."""
    case, recipe = NETWORKS[name], Recipe(structure="diagonal", gradient="stored", **memory)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    for task, data in enumerate(case.data):
        model = case.make_model(task)
        past = prior.discount(recipe.discount)
        truth = laws.slope(model, laws.nats(case.likelihood, model, data) + past(model))
        prior = prior.update(model, data, generator=torch.Generator().manual_seed(task))
        assert laws.distance(laws.slope(model, prior(model)), truth) < 2e-13


# -------------------------------------------------------------------- 2 add


@by_split
def test_add_linear_gaussian(split: Split) -> None:
    assert laws.add(exact(GAUSSIAN), GAUSSIAN, tasks=3, split=split) < 1e-9


@by_split
def test_add_to_an_anchor_that_never_converged(split: Split) -> None:
    assert laws.add_at_any_anchor(GAUSSIAN, split) < 1e-9


@pytest.mark.parametrize(
    "memory", [m for m in MEMORIES[:5] if "soft" not in m or m["soft"] + m["hard"] == 1], ids=str
)
def test_add_where_a_bounded_memory_evicts(memory: dict) -> None:
    """Who leaves the memory, or never enters it, goes on in g and G."""
    recipe = Recipe(structure="dense", gradient="stored", **memory)
    prior = Prior(GAUSSIAN.likelihood, recipe, (Regulariser(0.5),))
    assert laws.add(prior, GAUSSIAN, tasks=3) < 1e-9


@by_whole
@by_glm
def test_add_glm(name: str, split: Split) -> None:
    assert laws.add(exact(GLMS[name]), GLMS[name], split=split) < 9e-7
    assert laws.add_at_any_anchor(GLMS[name], split) < 9e-7


@pytest.mark.parametrize("name", ["logistic"])
def test_the_error_falls_as_memory_grows(name: str) -> None:
    errors = laws.partial_memory(GLMS[name], (0.0, 0.05, 0.1, 0.25, 0.5, 1.0), seeds=2)
    assert all(more < 1.02 * less for less, more in pairwise(errors))
    assert errors[0] > 1e-3, "the quadratic alone is exact here, so nothing is tested"
    assert errors[4] < 0.75 * errors[0]
    assert errors[5] < 9e-7


# -------------------------------------------------------------------- 3 remove


@pytest.mark.parametrize(("task", "tasks"), [(0, 1), (1, 3)])
@by_split
def test_remove_gaussian(split: Split, task: int, tasks: int) -> None:
    """In memory or not; of the only task, or of one in the middle."""
    assert laws.remove(exact(GAUSSIAN), GAUSSIAN, task=task, tasks=tasks, split=split) < 2e-8


@by_whole
@by_glm
def test_remove_glm(name: str, split: Split) -> None:
    assert laws.remove(exact(GLMS[name]), GLMS[name], split=split) < 2e-7


def test_remove_glm_from_an_old_task() -> None:
    case = GLMS["multinomial"]
    assert laws.remove(exact(case), case, task=0, tasks=2, split=Split("all")) < 2e-7


@by_split
@pytest.mark.parametrize("name", [name for name in NETWORKS if not name.startswith("linear")])
def test_remove_at_the_anchor(name: str, split: Split) -> None:
    assert laws.remove_at_anchor(NETWORKS[name], split) < 2e-13


@pytest.mark.parametrize("strength", [1.0, 2.0])
@pytest.mark.parametrize("population", [True, False])
def test_remove_an_item_whatever_it_counts(population: bool, strength: float) -> None:
    """A soft label that stands for more than itself still takes one residual with it."""
    case = GLMS["multinomial"]
    prior = lifelong.kprior(
        case.likelihood, precision=0.5, memory=6, population=population, strength=strength
    )
    model, after = laws.learn(prior, case, tasks=1)
    assert after.memory is not None
    ids = after.memory.origin[:3]
    rest = case.data[0][(~torch.isin(case.data[0].ids, ids)).nonzero().squeeze(1)]
    truth = laws.slope(model, laws.nats(case.likelihood, model, rest) + prior(model))
    forgotten = after.forget(model, ids=ids, task=0)
    assert laws.distance(laws.slope(model, forgotten(model)), truth) < 1e-9


@pytest.mark.parametrize("preset", ["si", "fromp"])
def test_priors_that_mix_examples_do_not_forget(preset: str) -> None:
    case = NETWORKS["mlp Categorical"]
    model, prior = updated(small(preset), case, tasks=1)
    with pytest.raises(ValueError, match="cannot forget single examples"):
        prior.forget(model, case.data[0][:2])


# -------------------------------------------------------------------- 4 and 5


@by_split
def test_change_the_regulariser_gaussian(split: Split) -> None:
    assert laws.change_regulariser(exact(GAUSSIAN), GAUSSIAN, tasks=2, split=split) < 5e-9


@by_whole
@by_glm
def test_change_the_regulariser_glm(name: str, split: Split) -> None:
    assert laws.change_regulariser(exact(GLMS[name]), GLMS[name], split=split) < 2e-7


@by_whole
@by_glm
def test_change_the_model(name: str, split: Split) -> None:
    case = GLMS[name]
    assert laws.transfer_gradient(exact(case), case, split=split) < 1e-14
    assert laws.transfer_refit(exact(case), case, split=split) < 7e-7


# -------------------------------------------------------------------- 6 blended labels


@by_name
def test_blended_labels_are_two_terms(name: str) -> None:
    assert laws.blended(NETWORKS[name]) < 3e-14


@settings(max_examples=10)
@given(blend=st.floats(0, 1), seed=st.integers(0, 1000), name=st.sampled_from(sorted(NETWORKS)))
def test_any_blend(blend: float, seed: int, name: str) -> None:
    assert laws.blended(NETWORKS[name], blend=blend, seed=seed) < 3e-14


# -------------------------------------------------------------------- 7, 8, 9


@settings(max_examples=6)
@given(tasks=st.integers(1, 4), features=st.integers(1, 5), seed=st.integers(0, 1000))
def test_chain_of_quadratics_is_bayes(tasks: int, features: int, seed: int) -> None:
    case = cases.linear_gaussian(tasks=tasks, features=features, size=6, outputs=1, seed=seed)
    prior = lifelong.online_laplace(case.likelihood, structure="dense", precision=0.3)
    assert laws.add(prior, case, tasks=tasks) < 1e-8


@by_glm
def test_rebase_three_tasks(name: str) -> None:
    case = GLMS[name]
    assert laws.add(exact(case), case, tasks=3, split=Split("all")) < 2e-7


@by_split
def test_gaussian_process(split: Split) -> None:
    assert laws.gaussian_process(exact(GAUSSIAN), GAUSSIAN, tasks=3, split=split) < 7e-7


# -------------------------------------------------------------------- 10 identities of presets


def updated(prior: Prior, case: Case, *, tasks: int = 2, seed: int = 0) -> tuple[nn.Module, Prior]:
    """The prior after some tasks at random weights, with nothing fitted."""
    model = case.make_model(seed)
    for task, data in enumerate(case.data[:tasks]):
        model = case.make_model(seed + task)
        prior = prior.prepare(model, data)
        path = laws._watched(model, prior, data) if prior.recipe.structure == "path" else None
        generator = torch.Generator().manual_seed(seed + task)
        prior = prior.update(model, data, path=path, generator=generator)
    return model, prior


def same(a: Prior, b: Prior, name: str = "mlp Categorical heads", **kwargs: bool) -> None:
    """Two presets, or two ways to write one, after the same two tasks."""
    case = NETWORKS[name]
    model, first = updated(a, case)
    _, second = updated(b, case)
    assert laws.identical(first, second, model, **kwargs) < 1e-14


def test_online_ewc_is_online_laplace_without_precision() -> None:
    for f in (Categorical(), Gaussian(0.5)):
        name = "mlp Gaussian" if isinstance(f, Gaussian) else "mlp Categorical heads"
        laplace = lifelong.online_laplace(f, precision=0.0, discount=0.7, strength=3.0)
        same(lifelong.ewc(f, online=True, discount=0.7, strength=3.0), laplace, name)
        same(lifelong.online_ewc(f, discount=0.7, strength=3.0), laplace, name)


def test_offline_ewc_is_a_sum_of_one_quadratic_per_task() -> None:
    case = NETWORKS["mlp Categorical heads"]
    strength, terms = 3.0, []
    for task, data in enumerate(case.data):
        model = case.make_model(task)
        fisher = lifelong.diagonal_curvature(model, data, case.likelihood) * strength
        terms.append(WeightTerm(snapshot(parameters(model)), None, fisher))
    explicit = Prior(case.likelihood, terms=tuple(terms))
    model, ewc = updated(lifelong.ewc(case.likelihood, strength=strength), case, tasks=3)
    assert sum(isinstance(t, WeightTerm) for t in ewc.terms) == 1
    assert laws.identical(ewc, explicit, model, constant=True) < 1e-13


def test_derpp_without_replay_is_der() -> None:
    f = Categorical()
    same(lifelong.derpp(f, memory=7, beta=0.0), lifelong.der(f, memory=7))


def test_derpp_is_der_and_replay() -> None:
    case = NETWORKS["mlp Categorical heads"]
    f = case.likelihood
    model, both = updated(lifelong.derpp(f, memory=9, alpha=0.3, beta=0.6), case)
    _, der = updated(lifelong.der(f, memory=9, alpha=0.3), case)
    _, replay = updated(lifelong.experience_replay(f, memory=9, strength=0.6), case)
    assert laws.identical(both, der + replay, model) < 1e-14


def test_joint_is_the_nll_of_all_the_past() -> None:
    case = NETWORKS["mlp Categorical heads"]
    model, joint = updated(lifelong.joint(case.likelihood, precision=0.2), case, tasks=3)
    for by in (0.0, 0.5):
        at = laws.moved(model, by=by)
        truth = laws.nats(case.likelihood, at, *case.data) + Regulariser(0.2)(at)
        assert laws.distance(joint(at).detach(), truth.detach()) < 1e-14
        assert laws.distance(laws.slope(at, joint(at)), laws.slope(at, truth)) < 1e-14


def test_replay_of_everything_is_joint() -> None:
    f = Categorical()
    same(lifelong.experience_replay(f, memory=10_000), lifelong.joint(f))
    same(lifelong.experience_replay(f, memory=12, total=False), lifelong.joint(f))


def test_a_kprior_without_memory_is_weight_decay_round_the_anchor() -> None:
    case = NETWORKS["mlp Categorical heads"]
    model, kprior = updated(lifelong.kprior(case.likelihood, precision=0.3, memory=0), case)
    decay = Prior(case.likelihood, terms=(Regulariser(0.3, snapshot(parameters(model))),))
    assert laws.identical(kprior, decay, model, constant=True) < 1e-14


def test_gradient_reconstruction_without_its_quadratic_is_a_kprior() -> None:
    f = Categorical()
    reconstruction = lifelong.gradient_reconstruction(
        f, memory=6, weight=False, precision=0.2, population=False
    )
    same(reconstruction, lifelong.kprior(f, memory=6, precision=0.2, score="random"))


def test_gradient_reconstruction_without_memory_is_online_laplace() -> None:
    f = Categorical()
    reconstruction = lifelong.gradient_reconstruction(f, memory=0, precision=0.2)
    same(reconstruction, lifelong.online_laplace(f, precision=0.2))


def test_recommended_is_gradient_reconstruction_where_tasks_are_of_one_size() -> None:
    case = NETWORKS["mlp Categorical heads"]
    size = len(case.data[0].labels)
    ours, theirs = (
        make(case.likelihood, memory=6, precision=0.2)
        for make in (
            lifelong.recommended,
            partial(
                lifelong.gradient_reconstruction, curvature_examples=2_000, structure="kronecker"
            ),
        )
    )
    values = []
    for prior in (ours, theirs):
        model, prior = updated(prior, case)
        prior = prior.prepare(model, case.data[2][:size])
        values.append(prior(laws.moved(model)).detach())
    assert torch.allclose(values[0], values[1], rtol=1e-12)


def test_gradient_reconstruction_blends_as_one_term() -> None:
    case = NETWORKS["mlp Categorical heads"]
    prior = lifelong.gradient_reconstruction(case.likelihood, memory=6, blend=0.3)
    model, blended = updated(prior, case)
    term = next(t for t in blended.terms if isinstance(t, MemoryTerm))
    others = tuple(t for t in blended.terms if t is not term)
    soft = MemoryTerm(term.memory.weighted(term.memory.soft_weight, 0.0))
    hard = MemoryTerm(term.memory.weighted(0.0, term.memory.hard_weight))
    assert soft.has_soft
    assert hard.has_hard
    two = replace(blended, terms=(*others, soft, hard))
    assert laws.identical(blended, two, model) < 3e-14


@pytest.mark.parametrize("preset", ["finetune", "separate"])
def test_no_memory_of_the_past_is_zero(preset: str) -> None:
    model, prior = updated(PRESETS[preset](Categorical()), NETWORKS["mlp Categorical heads"])
    assert prior(laws.moved(model)).item() == 0.0
    assert prior.num_bytes == 0


def test_weight_decay_is_its_formula_at_all_times() -> None:
    model, prior = updated(
        lifelong.weight_decay(Categorical(), precision=0.7), NETWORKS["mlp Categorical"]
    )
    at = laws.moved(model)
    theta = laws.weights(at)
    assert laws.distance(prior(at).detach(), 0.35 * theta @ theta) < 1e-14
    assert laws.distance(laws.slope(at, prior(at)), 0.7 * theta) < 1e-14


def test_lwf_is_distillation_on_the_inputs_at_hand() -> None:
    case, temperature = NETWORKS["mlp Categorical heads"], 2.0
    f = case.likelihood
    old, prior = updated(lifelong.lwf(f, temperature=temperature, strength=0.7), case, tasks=2)
    new = case.data[2]
    prepared = prior.prepare(old, new)
    at = laws.moved(old)
    seen = list(range(4))
    with torch.no_grad():
        belief = torch.softmax(old(new.inputs)[:, seen] / temperature, 1)
    log_p = torch.log_softmax(at(new.inputs)[:, seen] / temperature, 1)
    kl = (belief * (belief.log() - log_p)).sum()
    truth = 0.7 * temperature**2 * kl
    assert laws.distance(prepared(at).detach(), truth.detach()) < 1e-13
    assert laws.distance(laws.slope(at, prepared(at)), laws.slope(at, truth)) < 1e-13


# -------------------------------------------------------------------- 11 unbiased


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
@pytest.mark.parametrize("name", ["mlp Categorical heads", "conv Poisson"])
def test_memory_batches_average_to_the_whole(name: str, batch_size: int) -> None:
    case = NETWORKS[name]
    items = Split("some", memory=0.5, blend=0.3).remember(case, case.make_model(0), 0)
    assert items is not None
    assert len(items) == 6
    random = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    term = MemoryTerm(items.weighted(*random))
    model = laws.moved(case.make_model(0))
    assert laws.unbiased(term, model, case.likelihood, batch_size) < 1e-14


@pytest.mark.parametrize("batch_size", [1, 4, 8, 11])
@pytest.mark.parametrize("kernel", ["gp", "identity"])
def test_kernel_batches_average_to_the_whole(kernel: str, batch_size: int) -> None:
    case = NETWORKS["mlp Categorical heads"]
    prior = lifelong.fromp(case.likelihood, memory=4, kernel=kernel)  # type: ignore[arg-type]
    model, prior = updated(prior, case, tasks=3)
    (term,) = prior.terms
    assert isinstance(term, KernelTerm)
    with evaluating(model):
        assert laws.unbiased(term, laws.moved(model), case.likelihood, batch_size) < 1e-13


@pytest.mark.parametrize("batch_size", [1, 5, 7, 13])
def test_batches_that_do_not_divide_the_memory(batch_size: int) -> None:
    case = NETWORKS["mlp Categorical heads"]
    prior = lifelong.gradient_reconstruction(case.likelihood, memory=9, replay=0.5)
    model, prior = updated(prior, case)
    assert laws.unbiased_z(prior, laws.moved(model), batch_size, draws=200) < 4.5


def test_a_biased_draw_is_found_out() -> None:
    """Both tests see a mini-batch that counts a fifth too much."""

    class Biased(MemoryTerm):
        def value(self, f: torch.Tensor, drawn: Any, likelihood: Likelihood) -> torch.Tensor:
            value = super().value(f, drawn, likelihood)
            return value if len(f) == len(self.memory) else 1.2 * value

    case = NETWORKS["mlp Categorical heads"]
    model, prior = updated(lifelong.experience_replay(case.likelihood, memory=9), case)
    (term,) = prior.terms
    assert isinstance(term, MemoryTerm)
    biased = Biased(term.memory, term.divergence)
    assert laws.unbiased_z(replace(prior, terms=(biased,)), laws.moved(model), 3) > 5
    assert laws.unbiased(biased, laws.moved(model), case.likelihood, 3) > 0.1


# -------------------------------------------------------------------- 12 side effects


class Moody(nn.Module):
    """Batch normalisation, dropout and a frozen layer: all that a careless call would change."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))
        self.frozen = nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(6, 6)
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.head(torch.tanh(self.frozen(self.body(x))))
        if self.fails:
            raise RuntimeError("this model fails")
        return h


def moody() -> Moody:
    """In mixed modes, with gradients and a hook of the user's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Moody().double()
    model.train()
    model.body[1].eval()
    model.head.register_forward_hook(lambda *_: None)
    for p in parameters(model).values():
        p.grad = torch.full_like(p, 0.5)
    return model


SMALL: dict[str, dict] = {
    "kprior": {"memory": 4},
    "fromp": {"memory": 4},
    "gradient_reconstruction": {"memory": 4, "replay": 0.5},
    "recommended": {"memory": 4},
    "experience_replay": {"memory": 6},
    "der": {"memory": 6},
    "derpp": {"memory": 6},
}
FORGETS = [name for name in PRESETS if name not in ("si", "fromp")]


def small(preset: str, likelihood: Likelihood | None = None) -> Prior:
    return PRESETS[preset](likelihood or Categorical(), **SMALL.get(preset, {}))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_call_changes_the_model_or_the_random_state(preset: str) -> None:
    case, model = NETWORKS["mlp Categorical heads"], moody()
    prior, path = small(preset), None
    for data in case.data[:2]:
        optimizer = torch.optim.SGD(parameters(model).values(), lr=0.1)
        if prior.recipe.structure == "path":
            path = lifelong.PathIntegral(model, optimizer, prior, len(data))
        generator = torch.Generator().manual_seed(0)
        with laws.untouched(model):
            prior = prior.prepare(model, data)
            items = prior.memorise(model, data, generator=generator)
            prior.identify(model, data, generator=generator)
            prior.recall(model, data, items, path=path, generator=generator)
            prior = prior.update(model, data, path=path, generator=generator)
            value = prior(model) + prior(model, batch_size=3, generator=generator)
            if value.requires_grad:
                torch.autograd.grad(value, list(parameters(model).values()), allow_unused=True)
            prior.replace(regulariser=Regulariser(2.0)), prior.discount(0.5), 0.5 * prior
            prior.transfer(model), prior.grow(model), prior.to(dtype=torch.float32)
            prior.state_dict()
            told = preset != "ewc" or prior.num_tasks == 1  # it tells tasks' anchors apart no more
            if preset in FORGETS and len(data) > 4 and told:
                _forgotten(prior, model, data)
    model.eval()
    with laws.untouched(model):
        prior.loss(model, data.inputs, data.labels, num_data=12, head=data.head)


def _forgotten(prior: Prior, model: nn.Module, data: Examples) -> None:
    """Two examples; of a prior that holds none but those in memory, all of the task."""
    if prior.recipe.gradient != "none":  # of Kronecker factors, all less some may be indefinite
        how: Any = "clip" if prior.recipe.structure == "kronecker" else "raise"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ClippedWarning)
            prior.forget(model, data[:2], task=prior.num_tasks - 1, on_indefinite=how)
    elif prior.memory is None:
        with pytest.raises(ValueError, match="there is nothing to forget"):
            prior.forget(model, data[:2], task=prior.num_tasks - 1)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotHeldWarning)
            prior.forget(model, data, task=prior.num_tasks - 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_call_that_raises_changes_nothing(preset: str) -> None:
    case, model = NETWORKS["mlp Categorical heads"], moody()
    path = lifelong.PathIntegral(model, torch.optim.SGD(parameters(model).values(), lr=0.1))
    data = case.data[0]
    prior = small(preset).update(model, data, path=path, generator=torch.Generator().manual_seed(0))
    before = deepcopy(prior.state_dict())
    generator = torch.Generator().manual_seed(0)
    wrong = replace(data, labels=data.labels + 2)  # outside of the head
    calls: tuple[Callable[[], object], ...] = (
        lambda: prior.loss(model, wrong.inputs, wrong.labels, num_data=12, head=wrong.head),
        lambda: lifelong.identify(model, wrong, Categorical()),
        lambda: lifelong.memorise(model, wrong, Categorical()),
        lambda: lifelong.diagonal_curvature(model.eval(), wrong, Categorical()),
    )
    for call in calls[1:3]:
        with pytest.raises(ValueError, match="head"), laws.untouched(model):
            call()
    model.fails = True
    for call in (
        lambda: prior.memorise(model, data, generator=generator),
        lambda: prior.update(model, data, path=path, generator=generator),
        lambda: prior.prepare(model, data),
        lambda: prior(model),
        lambda: prior.forget(model, data[:2]),
    ):
        with laws.untouched(model):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                assert "fails" in str(error) or "forget" in str(error)  # noqa: PT017
    model.fails = False
    generator = torch.Generator().manual_seed(1)
    assert laws._same(flat(prior.state_dict()), flat(before))


def flat(state: object) -> object:
    """Nested lists and dicts of tensors as one dict, for comparison."""
    if isinstance(state, dict):
        return {k: flat(v) for k, v in state.items()}
    if isinstance(state, (list, tuple)):
        return {str(i): flat(v) for i, v in enumerate(state)}
    return state


def test_the_guard_sees_every_change() -> None:
    def mode(m: Moody) -> None:
        m.body.eval()

    def buffer(m: Moody) -> None:
        m.body[1].running_mean.add_(1)

    def gradient(m: Moody) -> None:
        m.head.weight.grad.add_(1)  # type: ignore[union-attr]

    def frozen(m: Moody) -> None:
        m.frozen.requires_grad_(True)

    def hook(m: Moody) -> None:
        m.head.register_forward_pre_hook(lambda *_: None)

    def weight(m: Moody) -> None:
        m.head.weight.data.add_(1)

    def random(_: Moody) -> None:
        torch.rand(1)

    for change in (mode, buffer, gradient, frozen, hook, weight, random):
        model = moody()
        with pytest.raises(AssertionError, match="left changed"), laws.untouched(model):
            change(model)


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_forward_gives_the_loss_of_two(preset: str, batch_size: int | None) -> None:
    case = NETWORKS["mlp Categorical heads"]
    model, prior = updated(small(preset), case)
    data = case.data[2]
    prior = prior.prepare(model, data)
    assert laws.fused(prior, laws.moved(model), data, batch_size=batch_size) < 1e-14


def test_distributed_over_one_process_is_plain() -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this build of torch has no distributed package")
    case = NETWORKS["mlp Categorical heads"]
    model, prior = updated(small("gradient_reconstruction"), case)
    data = case.data[2]
    plain = laws.slope(model, laws.nats(case.likelihood, model, data) + prior(model))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        f = case.likelihood.mask(wrapped(data.inputs), lifelong.data.head_mask(data.head, 6))
        (case.likelihood.nll(f, data.labels).sum() + prior(wrapped.module)).backward()
        # Before the group: one that ends with the last wrapper may wait for its own thread forever.
        del wrapped, f
    finally:
        distributed.destroy_process_group()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
    assert laws.distance(grads, plain) < 1e-14


# -------------------------------------------------------------------- presets × laws


@dataclass(frozen=True)
class Row:
    """A preset in the configuration in which a law holds for it, and the case to try it on."""

    make: Callable[[Likelihood], Prior]
    case: Case


P = 0.5
GAUSS1 = cases.linear_gaussian()
POISSON = GLMS["poisson"]
NOTHING = "keeps nothing of the past"
QUADRATIC = "a quadratic, which is exact for Gaussian likelihoods alone"
PATH = "its curvature is read off the path, which depends on the optimiser"
NO_BLEND = "never mixes soft and true labels"
NO_MEMORY = "has no memory to draw from"
NO_R = "has no regulariser, so that its Gaussian process would have infinite variance"
AT_INSERTION = "its logits are of the time of insertion, where the newer task was not yet flat"
ONE_TASK = "distils on the new inputs alone, which stand for one task"

ewc = Row(lifelong.ewc, ORTHOGONAL)
online_ewc = Row(lifelong.online_ewc, ORTHOGONAL)
laplace = Row(lambda f: lifelong.online_laplace(f, precision=P), ORTHOGONAL)
laplace_dense = Row(lambda f: lifelong.online_laplace(f, structure="dense", precision=P), GAUSSIAN)
# As many examples as weights span the features, so that the kernel knows all directions.
fromp = Row(
    lambda f: lifelong.fromp(f, memory=4, strength=1.0, prior_precision=1e-12, jitter=1e-13),
    ORTHOGONAL,
)
# population=False: every past example's curvature counts once, as the accounting rule says.
reconstruction = Row(
    lambda f: lifelong.gradient_reconstruction(
        f, memory=5, replay=0.4, precision=P, population=False
    ),
    ORTHOGONAL,
)
reconstruction_full = Row(
    lambda f: lifelong.gradient_reconstruction(
        f, memory=None, replay=0.4, precision=P, population=False
    ),
    POISSON,
)
reconstruction_dense = Row(
    lambda f: lifelong.gradient_reconstruction(
        f, memory=5, structure="dense", precision=P, population=False
    ),
    GAUSSIAN,
)
recommended = Row(lambda f: lifelong.recommended(f, memory=None, precision=P), POISSON)
recommended_gauss = replace(recommended, case=GAUSSIAN)
kprior = Row(lambda f: lifelong.kprior(f, memory=None, precision=P), POISSON)
kprior_gauss = replace(kprior, case=GAUSSIAN)
replay = Row(lambda f: lifelong.experience_replay(f, memory=10_000), POISSON)
joint = Row(lambda f: lifelong.joint(f, precision=P), POISSON)
joint_gauss = replace(joint, case=GAUSSIAN)
der = Row(lambda f: lifelong.der(f, memory=10_000, alpha=1.0), ORTHOGONAL)
derpp = Row(lambda f: lifelong.derpp(f, memory=10_000, alpha=0.7, beta=0.3), ORTHOGONAL)
lwf = Row(lifelong.lwf, cases.same_inputs(ORTHOGONAL))
lwf_glm = Row(lambda f: lifelong.lwf(f, temperature=1.0), cases.same_inputs(POISSON))
si = Row(lifelong.si, POISSON)

Entry = Row | Callable[[], None] | str
NONE: dict[str, Entry] = dict.fromkeys(("finetune", "weight_decay", "separate"), NOTHING)


def mostly(reason: str, **entries: Entry) -> dict[str, Entry]:
    """A row for every preset: ``reason`` where nothing else is said."""
    return {**dict.fromkeys(PRESETS, reason), **NONE, **entries}


def partial_memory() -> None:
    """Law 2'' for a preset: the error of the GLM falls to nothing as memory grows."""
    case = GLMS["multinomial"]
    errors = []
    for memory in (0, 9, 18):
        prior = lifelong.gradient_reconstruction(
            case.likelihood, memory=memory, structure="dense", precision=P, population=False
        )
        errors.append(laws.add(prior, case))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 9e-7


def unbiased(name: str) -> Callable[[], None]:
    def check() -> None:
        case = NETWORKS["mlp Categorical heads"]
        model, prior = updated(small(name), case)
        prior = prior.prepare(model, case.data[2])
        assert laws.unbiased_z(prior, laws.moved(model), 4, draws=100) < 4.5

    return check


TOLERANCES: dict[str, tuple[Callable[..., float], float]] = {
    "1 gradient at the anchor": (laws.gradient_at_minimum, 2e-13),
    "2 add, linear-Gaussian": (laws.add, 1e-9),
    "2' add, GLM": (laws.add, 9e-7),
    "3 remove": (laws.remove, 2e-8),
    "4 change the regulariser": (laws.change_regulariser, 5e-9),
    "5 change the model": (laws.transfer_refit, 7e-7),
    "7 chain": (lambda prior, case: laws.add(prior, case, tasks=3), 1e-8),
    "8 rebase": (lambda prior, case: laws.add(prior, case, tasks=3), 2e-7),
    "9 GP": (laws.gaussian_process, 7e-7),
}
TABLE: dict[str, dict[str, Entry]] = {
    "1 gradient at the anchor": {
        **NONE,
        "ewc": replace(ewc, case=POISSON),
        "online_ewc": replace(online_ewc, case=POISSON),
        "si": si,
        "online_laplace": replace(laplace, case=POISSON),
        "kprior": Row(lambda f: lifelong.kprior(f, memory=5, precision=P), POISSON),
        "fromp": Row(lambda f: lifelong.fromp(f, memory=5), POISSON),
        "gradient_reconstruction": replace(reconstruction, case=POISSON),
        "recommended": recommended,
        "lwf": replace(lwf, case=POISSON),
        "experience_replay": replay,
        "der": Row(lambda f: lifelong.der(f, memory=5), POISSON),
        "derpp": derpp,
        "joint": joint,
    },
    "2 add, linear-Gaussian": {
        **NONE,
        "ewc": ewc,
        "online_ewc": online_ewc,
        "si": PATH,
        "online_laplace": laplace,
        "kprior": kprior_gauss,
        "fromp": fromp,
        "gradient_reconstruction": reconstruction,
        "recommended": recommended_gauss,
        "lwf": lwf,
        "experience_replay": replace(replay, case=GAUSSIAN),
        "der": der,
        "derpp": derpp,
        "joint": joint_gauss,
    },
    "2' add, GLM": mostly(
        QUADRATIC,
        si=PATH,
        kprior=kprior,
        gradient_reconstruction=reconstruction_full,
        recommended=recommended,
        lwf=lwf_glm,
        experience_replay=replay,
        joint=joint,
    ),
    "2'' partial memory": mostly(
        "has no memory beside a quadratic of the rest", gradient_reconstruction=partial_memory
    ),
    "3 remove": mostly(
        NOTHING,
        ewc=ewc,
        online_ewc=online_ewc,
        si="its path mixes the examples, so forget raises",
        online_laplace=laplace,
        kprior=kprior_gauss,
        fromp="its kernels mix the examples, so forget raises",
        gradient_reconstruction=reconstruction,
        recommended=recommended,
        lwf="holds no past example, only the new inputs",
        experience_replay=replace(replay, case=GAUSSIAN),
        der="holds soft labels without the gradient that would leave with them",
        derpp="holds soft labels without the gradient that would leave with them",
        joint=joint_gauss,
    ),
    "4 change the regulariser": mostly(
        ONE_TASK,
        ewc=ewc,
        online_ewc=online_ewc,
        si=PATH,
        online_laplace=laplace,
        kprior=kprior_gauss,
        fromp=fromp,
        gradient_reconstruction=reconstruction,
        recommended=recommended,
        experience_replay=replace(replay, case=GAUSSIAN),
        der=der,
        derpp=derpp,
        joint=joint_gauss,
    ),
    "5 change the model": mostly(
        ONE_TASK,
        ewc=ewc,
        online_ewc=online_ewc,
        si=PATH,
        online_laplace=laplace,
        kprior=kprior,
        fromp=fromp,
        gradient_reconstruction=reconstruction_full,
        recommended=recommended,
        experience_replay=replay,
        der=der,
        derpp=derpp,
        joint=joint,
    ),
    "6 blended labels": mostly(
        NO_BLEND,
        gradient_reconstruction=test_gradient_reconstruction_blends_as_one_term,
        derpp=test_derpp_is_der_and_replay,
    ),
    "7 chain": mostly(
        "has no curvature to chain; see law 8",
        ewc="several anchors count the earlier tasks again: not Bayes' rule (Huszár 2018)",
        online_ewc=online_ewc,
        si=PATH,
        online_laplace=laplace_dense,
        fromp="the kernel of every task is of all data, so the past counts once a task",
        gradient_reconstruction=reconstruction_dense,
        recommended=recommended,
        lwf=ONE_TASK,
        der=AT_INSERTION,
        derpp=AT_INSERTION,
    ),
    "8 rebase": mostly(
        "has no soft labels to refresh",
        kprior=kprior,
        fromp=QUADRATIC,
        gradient_reconstruction=reconstruction_full,
        recommended=recommended,
        lwf=ONE_TASK,
        experience_replay=replay,
        der=AT_INSERTION,
        derpp=AT_INSERTION,
        joint=joint,
    ),
    "9 GP": mostly(
        NO_R,
        si=PATH,
        online_laplace=laplace_dense,
        kprior=kprior_gauss,
        gradient_reconstruction=reconstruction_dense,
        recommended=recommended_gauss,
        joint=joint_gauss,
    ),
    "10 presets": {
        "finetune": lambda: test_no_memory_of_the_past_is_zero("finetune"),
        "weight_decay": test_weight_decay_is_its_formula_at_all_times,
        "ewc": test_offline_ewc_is_a_sum_of_one_quadratic_per_task,
        "online_ewc": test_online_ewc_is_online_laplace_without_precision,
        "si": "is equal to no other preset; test_oracles.py follows its path",
        "online_laplace": test_gradient_reconstruction_without_memory_is_online_laplace,
        "kprior": test_a_kprior_without_memory_is_weight_decay_round_the_anchor,
        "fromp": "is equal to no other preset; test_oracles.py writes out its formula",
        "gradient_reconstruction": test_gradient_reconstruction_without_its_quadratic_is_a_kprior,
        "recommended": test_recommended_is_gradient_reconstruction_where_tasks_are_of_one_size,
        "lwf": test_lwf_is_distillation_on_the_inputs_at_hand,
        "experience_replay": test_replay_of_everything_is_joint,
        "der": test_derpp_without_replay_is_der,
        "derpp": test_derpp_is_der_and_replay,
        "joint": test_joint_is_the_nll_of_all_the_past,
        "separate": lambda: test_no_memory_of_the_past_is_zero("separate"),
    },
    "11 unbiased": {
        **dict.fromkeys(PRESETS, NO_MEMORY),
        **{
            name: unbiased(name)
            for name in (
                "kprior", "fromp", "gradient_reconstruction", "recommended", "lwf",
                "experience_replay", "der", "derpp", "joint",
            )
        },
    },
}  # fmt: skip


def entries() -> list:
    return [
        pytest.param(law, preset, id=f"{law}: {preset}")
        for law, row in TABLE.items()
        for preset, entry in row.items()
        if not isinstance(entry, str)
    ]


@pytest.mark.parametrize(("law", "preset"), entries())
def test_preset_keeps_the_law(law: str, preset: str) -> None:
    entry = TABLE[law][preset]
    if isinstance(entry, Row):
        error, tolerance = TOLERANCES[law]
        assert error(entry.make(entry.case.likelihood), entry.case) < tolerance
        assert entry.make(Gaussian()).recipe.name == preset
    else:
        assert callable(entry)
        entry()


@pytest.mark.parametrize("law", TABLE)
def test_every_preset_has_an_entry_for_every_law(law: str) -> None:
    """A law that does not apply to a preset says why. Law 12 holds for all: see the tests of side
    effects above, and of the round trip and the seed below."""
    assert set(TABLE[law]) == set(PRESETS)
    for preset, entry in TABLE[law].items():
        assert not isinstance(entry, str) or len(entry.split()) > 3, (law, preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip(preset: str, tmp_path: Path) -> None:
    case = NETWORKS["mlp Categorical heads"]
    model, prior = updated(small(preset), case)
    laws.round_trip(prior.prepare(model, case.data[2]), model, tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_gives_the_same_bits(preset: str) -> None:
    case = NETWORKS["mlp Categorical heads"]

    def make(generator: torch.Generator) -> Prior:
        prior = small(preset)
        for task, data in enumerate(case.data[:2]):
            model = case.make_model(task)
            path = laws._watched(model, prior, data) if preset == "si" else None
            prior = prior.update(model, data, path=path, generator=generator)
        return prior.prepare(case.make_model(1), case.data[2])

    laws.deterministic(make, case.make_model(1))


def test_yesterdays_prior_stays_as_it_was() -> None:
    case = NETWORKS["mlp Categorical heads"]
    for preset in PRESETS:
        model, prior = updated(small(preset), case)
        before = deepcopy(prior.state_dict())
        path = lifelong.PathIntegral(model, torch.optim.SGD(model.parameters(), lr=0.1))
        prior.update(model, case.data[2], path=path, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        assert laws._same(flat(prior.state_dict()), flat(before)), preset


def test_examples_are_found_by_their_own_ids() -> None:
    """The cases give each task ids of its own, as a stream does."""
    ids = torch.cat([task.ids for task in GAUSSIAN.data])
    assert len(ids.unique()) == len(ids)
    assert isinstance(GAUSSIAN.data[0], Examples)
