"""The four adaptations by refit: exact where they must be, and what raises leaves all as it was."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from inspect import signature
from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong.data import Examples
from lifelong.errors import NotHeldWarning, StaleAnchorError
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian
from lifelong.models import parameters, snapshot
from lifelong.presets import PRESETS
from lifelong.prior import Prior
from lifelong.recipe import Recipe
from lifelong.refit import refit
from lifelong.terms import MemoryTerm, Regulariser, WeightTerm
from lifelong.testing import laws
from lifelong.testing.cases import SPLITS, First, build, glms, linear_gaussian, mlp, networks

CASES = {case.name: case for case in (linear_gaussian(), *glms())}
KINDS = ("add", "remove", "regularise", "transfer")
HEADS = "multinomial heads"


def exact(name: str, **options: Any) -> Prior:
    return laws.law_prior(CASES[name].likelihood, **options)


# -------------------------------------------------------------------- laws


@pytest.mark.parametrize("gradient", ["stored", "stationary"])
@pytest.mark.parametrize("kind", [*KINDS, "relabel"])
@pytest.mark.parametrize("name", CASES)
def test_one_adaptation_is_batch_training(name, kind, gradient):
    if name == HEADS and kind == "relabel":
        pytest.skip("another label lies in another head")
    assert laws.adapted(exact(name, gradient=gradient), CASES[name], (kind,)) < 1e-8


@pytest.mark.parametrize("kinds", list(permutations(KINDS, 3)), ids=" ".join)
@pytest.mark.parametrize("name", CASES)
def test_three_in_a_row_are_batch_training(name, kinds):
    assert laws.adapted(exact(name), CASES[name], kinds) < 1e-8


@settings(max_examples=15)
@given(
    name=st.sampled_from([n for n in CASES if n != HEADS]),
    kinds=st.permutations([*KINDS, "relabel", "regularise", "remove"]).map(lambda x: x[:5]),
    gradient=st.sampled_from(["stored", "stationary"]),
    precision=st.floats(0.05, 5.0),
    seed=st.integers(0, 10**4),
)
def test_any_five_in_a_row(name, kinds, gradient, precision, seed):
    prior = exact(name, gradient=gradient, precision=precision)
    assert laws.adapted(prior, CASES[name], kinds, seed=seed) < 1e-6


@pytest.mark.parametrize("kinds", [*((k,) for k in KINDS), *permutations(KINDS, 3)])
def test_linear_gaussian_without_memory(kinds):
    """The matrix G says all that the examples said."""
    prior = exact("linear-gaussian")
    prior = replace(prior, recipe=replace(prior.recipe, memory=0))
    case = CASES["linear-gaussian"]
    assert laws.adapted(prior, case, kinds) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_what_leaves_and_comes_again_leaves_no_trace(name):
    assert laws.add_after_remove(exact(name), CASES[name]) < 1e-8


@pytest.mark.parametrize("rebase", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_smaller_model_forgets_what_the_larger_one_said(name, rebase):
    """A residual leaves by the stored belief: the old model's, until rebase asks the new one."""
    prior, case = exact(name), CASES[name]
    assert laws.adapted(prior, case, ("transfer", "remove"), rebase=rebase) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_rebase_keeps_the_function(name):
    case = CASES[name]
    model, prior = laws.learn(exact(name), case, tasks=2, split=SPLITS[3])
    other = laws.moved(model)
    moved = prior.rebase(other)
    assert laws.weights(other).equal(torch.cat([p.flatten() for p in moved.weight.anchor.values()]))
    if name == "linear-gaussian":
        assert laws.identical(prior, moved, model, constant=True) < 1e-10
    else:  # G is of the old anchor, its quadratic is the same function; soft labels too
        assert laws.identical(prior, moved, other, constant=True) < 1e-10


@pytest.mark.parametrize("case", networks(), ids=lambda c: c.name)
def test_rebase_keeps_the_gradient_of_a_network(case):
    model, prior = case.make_model(0), laws.law_prior(case.likelihood, structure="diagonal")
    prior = prior.recall(model, case.data[0], SPLITS[3].remember(case, model, 0))
    other = laws.moved(model)
    moved = prior.rebase(other)
    assert laws.distance(laws.slope(other, moved(other)), laws.slope(other, prior(other))) < 1e-12
    assert torch.equal(moved.memory.reference, prior.memory.refresh(other).reference)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_rebase_of_each_preset_keeps_the_gradient(name):
    case = next(c for c in networks() if c.name == "mlp Categorical")
    options = {"memory": 6} if "memory" in signature(PRESETS[name]).parameters else {}
    prior, model = PRESETS[name](Categorical(), **options), case.make_model(0)
    if name == "si":
        model, prior = laws.learn(prior, case, tasks=1)
    else:
        prior = prior.update(model, case.data[0])
    if not prior.terms:
        assert prior.rebase(model).terms == ()
        return
    other = laws.moved(model)
    moved = prior.rebase(other)
    assert laws.distance(laws.slope(other, moved(other)), laws.slope(other, prior(other))) < 1e-10


# -------------------------------------------------------------------- transfer


class Lifted(nn.Module):
    """Linear in features that the model before did not have."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.cat([x, x.square()], dim=1))


class Renamed(nn.Module):
    """A linear model by another name."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("name", CASES)
def test_any_other_linear_model_with_full_memory(name):
    """Features that were not there before: g knows nothing of them, the labels do."""
    case = CASES[name]
    outputs = len(case.make_model(0).weight)
    other = build(lambda: Lifted(4, outputs))(3)
    with pytest.raises(StaleAnchorError, match=r"map them by parameters"):
        laws.learn(exact(name), case, tasks=1)[1].transfer(other)
    assert laws.transfer_by_labels(case, other, parameters={}) < 1e-8
    shared = {"linear.weight": "weight", "linear.bias": "bias"}
    assert laws.transfer_by_labels(case, other, parameters=shared) < 1e-8


@pytest.mark.parametrize("name", CASES)
def test_a_group_leaves_another_linear_model(name):
    """Memory holds all: g and G stay behind, whose example each was does not."""
    case = CASES[name]
    data, model = case.data[0], case.make_model(0)
    groups = torch.arange(len(data)) % 3
    prior = exact(name)
    refit(model, prior, data)
    prior = prior.update(model, data, groups=groups)
    other = build(lambda: Lifted(4, len(model.weight)))(3)
    prior = prior.transfer(other, parameters={}, allow_unmatched=True)
    refit(other, prior)
    prior = prior.rebase(other).forget(other, groups=[1])
    assert prior.weight.groups.known == {0, 2}
    refit(other, prior)
    rest = data[(groups != 1).nonzero().squeeze(1)]
    batch = laws.retrained(case, other, prior.regulariser, rest)
    assert laws.distance(laws.weights(other), laws.weights(batch)) < 1e-8


def test_a_group_goes_with_its_class():
    case = CASES["multinomial"]
    data, model = case.data[0], case.make_model(0)
    prior = exact("multinomial").update(model, data, groups=data.labels)
    smaller = build(lambda: nn.Linear(4, 2))(1)
    after = prior.transfer(smaller, classes=(0, 1), previous=model)
    assert len(after.weight.groups.members) == len(after.memory)
    assert after.weight.groups.known == {0, 1}
    left = after.forget(smaller, groups=[0])
    assert bool((left.memory.labels == 1).all())


def test_a_part_in_memory_leaves_what_was_shared_and_keeps_whose_it_is():
    """With labels=True what is remembered can leave a model that shares nothing."""
    case = CASES["multinomial"]
    data, model = case.data[0], case.make_model(0)
    prior = exact("multinomial")
    prior = replace(prior, recipe=replace(prior.recipe, memory=6))
    groups = torch.arange(len(data)) % 3
    prior = prior.update(model, data, groups=groups)
    other = build(lambda: Lifted(4, 3))(3)
    with pytest.warns(UserWarning, match="leaves behind"):
        after = prior.transfer(other, parameters={}, labels=True, allow_unmatched=True)
    with pytest.warns(NotHeldWarning, match="only the others were taken out"):
        left = after.forget(other, groups=[1])  # what was not in memory was left behind
    stays = after.memory[(groups[after.memory.origin] != 1).nonzero().squeeze(1)]
    assert torch.equal(left.memory.origin, stays.origin)
    assert not any(bool(v.any()) for v in left.weight.gradient.values())


@pytest.mark.parametrize("kept", [(0, 2), (2, 0), (1, 2), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("gradient", ["stored", "stationary"])
def test_classes_that_are_dropped(kept, gradient):
    prior = exact("multinomial", gradient=gradient)
    assert laws.drop_classes(prior, CASES["multinomial"], kept) < 1e-8


@pytest.mark.parametrize("kept", [(0,), (1,), (1, 0)], ids=str)
@pytest.mark.parametrize("name", ["linear-gaussian", "logistic", "poisson"])
def test_outputs_that_are_dropped(name, kept):
    assert laws.drop_classes(exact(name), CASES[name], kept) < 1e-8


def test_classes_of_a_head_that_are_dropped():
    assert laws.drop_classes(exact(HEADS), CASES[HEADS], (4, 1, 0, 5)) < 1e-8


def soft_case():
    case = CASES["multinomial"]
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(case.data[0]), 3, generator=generator, dtype=torch.float64)
    return replace(case, data=(replace(case.data[0], labels=logits.softmax(-1)),))


def test_soft_labels_are_renormalised():
    """Examples of soft labels stay, with what they say of the classes that are kept."""
    case = soft_case()
    kept = (2, 0)
    model, prior = laws.learn(laws.law_prior(Categorical()), case, tasks=1)
    smaller = build(lambda: nn.Linear(4, 2))(1)
    prior = prior.transfer(smaller, classes=kept, previous=model)
    labels = case.data[0].labels[:, list(kept)]
    data = replace(case.data[0], labels=labels / labels.sum(-1, keepdim=True))
    batch = laws.retrained(case, smaller, prior.regulariser, data)
    refit(smaller, prior)
    assert laws.distance(laws.weights(smaller), laws.weights(batch)) < 1e-8
    gone = case.data[0]
    certain = torch.eye(3, dtype=torch.float64)[torch.arange(len(gone)) % 3]
    model, prior = laws.learn(
        laws.law_prior(Categorical()), replace(case, data=(replace(gone, labels=certain),)), tasks=1
    )
    assert len(prior.transfer(smaller, classes=kept, previous=model).memory) == 12


@pytest.mark.parametrize("labels", [False, True])
def test_the_gradient_at_the_anchor_for_any_network(labels):
    """Permuted and dropped classes of a network of which a part is remembered: at the anchor, the
    prior's gradient is that of the data that are left, in the model that is left."""
    case = next(c for c in networks() if c.name == "mlp Categorical")
    data, kept = case.data[0], (2, 0)
    model = case.make_model(0)
    prior = laws.law_prior(Categorical(), structure="diagonal")
    half = SPLITS[1].remember(case, model, 0)
    half = half[torch.randperm(len(half), generator=torch.Generator().manual_seed(0))[:8]]
    outside = ~torch.isin(data.ids, half.origin)
    # What is not in memory must not be of a dropped class: those would have to be forgotten first.
    outside &= data.labels != 1
    seen = data[(outside | torch.isin(data.ids, half.origin)).nonzero().squeeze(1)]
    prior = prior.recall(model, seen, half)
    smaller = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    after = prior.transfer(smaller, classes=kept, previous=model, labels=labels)
    smaller.load_state_dict(after.weight.anchor)
    torch.testing.assert_close(smaller(data.inputs), model(data.inputs)[:, list(kept)])
    # Of those outside, g is under all three classes still; of the others, under two.
    index = torch.isin(seen.ids, half.origin) & (seen.labels != 1)
    inside = seen[index.nonzero().squeeze(1)]
    inside = replace(inside, labels=(inside.labels == 0).long())
    rest = data[outside.nonzero().squeeze(1)]
    truth = laws.nats(Categorical(), smaller, inside) + prior.regulariser(smaller)
    of_rest = laws.slope(model, laws.nats(Categorical(), model, rest))
    names = {n: p.shape for n, p in parameters(model).items()}
    split = dict(zip(names, of_rest.split([s.numel() for s in names.values()])))
    split = {n: v.reshape(names[n]) for n, v in split.items()}
    split["2.weight"], split["2.bias"] = (split[n][list(kept)] for n in ("2.weight", "2.bias"))
    expected = laws.slope(smaller, truth) + torch.cat([v.flatten() for v in split.values()])
    assert laws.distance(laws.slope(smaller, after(smaller)), expected) < 1e-12


@given(
    order=st.permutations(range(5)),
    size=st.integers(5, 9),
    structure=st.sampled_from(["diagonal", "dense", "kronecker", "low_rank", "block"]),
    seed=st.integers(0, 1000),
)
def test_permuted_classes_and_hidden_units_as_they_were(order, size, structure, seed):
    """Another order of the classes is another name for the same function, in every structure."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 5)).double()
    other = nn.Sequential(nn.Linear(3, size), nn.Tanh(), nn.Linear(size, 5)).double()
    data = Examples(torch.randn(12, 3).double(), torch.arange(12) % 5)
    recipe = Recipe(structure=structure, memory=5, gradient="stored")
    prior = Prior(Categorical(), recipe, (Regulariser(0.3),)).update(model, data)
    after = prior.transfer(other, classes=order)
    assert torch.equal(after.memory.labels, torch.tensor(order).argsort()[prior.memory.labels])
    at = laws.moved(model, seed=seed)
    other.load_state_dict(at.state_dict())
    with torch.no_grad():
        other[2].weight.copy_(at[2].weight[list(order)])
        other[2].bias.copy_(at[2].bias[list(order)])
    assert after(other).item() == pytest.approx(prior(at).item(), rel=1e-10)
    back = after.transfer(model, classes=torch.tensor(order).argsort().tolist())
    assert laws.identical(back, prior, at) < 1e-12


def test_kernels_follow_an_order_and_lose_no_class():
    case = next(c for c in networks() if c.name == "mlp Categorical")
    model = case.make_model(0)
    prior = lifelong.fromp(Categorical(), memory=6).update(model, case.data[0])
    other = case.make_model(1)
    after = prior.transfer(other, classes=(2, 0, 1))
    at = laws.moved(model)
    other.load_state_dict(at.state_dict())
    with torch.no_grad():
        other[2].weight.copy_(at[2].weight[[2, 0, 1]])
        other[2].bias.copy_(at[2].bias[[2, 0, 1]])
    assert after(other).item() == pytest.approx(prior(at).item(), rel=1e-10)
    smaller = mlp(4, 2)(0)
    with pytest.raises(ValueError, match="kernels couple the means of all classes"):
        prior.transfer(smaller, classes=(0, 1))
    with pytest.raises(ValueError, match="a kernel has no place for true labels"):
        prior.transfer(model, labels=True)


def test_the_curvature_behind_kernels_is_not_lost_in_silence():
    case = next(c for c in networks() if c.name == "mlp Categorical")
    model = case.make_model(0)
    prior = lifelong.fromp(Categorical(), memory=6).update(model, case.data[0])
    other = build(lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))(1)
    with pytest.raises(StaleAnchorError, match="map them by parameters"):
        prior.transfer(other, parameters={})
    with pytest.warns(UserWarning, match="4 parameters"):
        after = prior.transfer(other, parameters={}, allow_unmatched=True)
    assert not any(bool(v.any()) for v in after.curvature.diagonal().values())
    assert torch.isfinite(after(other))


def test_distillation_leaves_memory_and_the_regulariser():
    """Nothing shared: R of the new model and D(f*, f) on what is remembered, nothing else."""
    case = next(c for c in networks() if c.name == "mlp Categorical")
    _, prior = laws.learn(lifelong.kprior(Categorical(), precision=0.5, memory=8), case, tasks=1)
    other = build(lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)))(1)
    with pytest.warns(UserWarning, match=r"leaves behind .* 4 parameters .*2.weight"):
        after = prior.transfer(other, parameters={}, allow_unmatched=True)
    assert [type(t) for t in after.terms] == [Regulariser, MemoryTerm]
    truth = 0.5 * sum((p.square().sum() for p in other.parameters()), torch.zeros(())) * 0.5
    reference = prior.memory.reference
    truth = truth + Categorical().kl(reference, other(prior.memory.inputs)).sum()
    assert after(other).item() == pytest.approx(truth.item(), rel=1e-12)
    with pytest.warns(UserWarning, match="leaves behind"):
        replay = prior.transfer(other, parameters={}, allow_unmatched=True, labels=True)
    assert torch.equal(replay.memory.hard_weight, prior.memory.soft_weight)
    assert not bool(replay.memory.soft_weight.any())


def test_fewer_and_more_layers_share_what_has_a_name():
    case = next(c for c in networks() if c.name == "mlp Categorical")
    deep = build(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(),
                              nn.Linear(6, 3))
    )(0)  # fmt: skip
    shallow = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))(1)
    prior = lifelong.gradient_reconstruction(Categorical(), memory=6, precision=0.5)
    known = prior.update(deep, case.data[0])
    shared = {"0.weight": "0.weight", "0.bias": "0.bias", "2.weight": "4.weight",
              "2.bias": "4.bias"}  # fmt: skip
    with pytest.raises(StaleAnchorError, match="'2.bias', '2.weight'"):
        known.transfer(shallow, parameters=shared)
    with pytest.warns(UserWarning, match="2 parameters"):
        fewer = known.transfer(shallow, parameters=shared, allow_unmatched=True)
    torch.testing.assert_close(fewer.weight.anchor["2.weight"], known.weight.anchor["4.weight"])
    back = fewer.transfer(deep, parameters={old: new for new, old in shared.items()})
    assert not bool(back.weight.gradient["2.weight"].any())
    assert refit(deep, back, max_iterations=5).value <= float(back(deep).detach()) + 1.0


def test_a_frozen_regulariser_mean_follows():
    model, smaller = build(lambda: First(4, 2))(0), build(lambda: First(3, 2))(1)
    mean = {n: torch.full_like(p, 0.3) for n, p in snapshot(parameters(model)).items()}
    prior = Prior(Gaussian(), terms=(Regulariser(2.0, mean),)).transfer(smaller)
    assert {n: v.shape for n, v in prior.regulariser.mean.items()} == {
        n: p.shape for n, p in parameters(smaller).items()
    }
    assert all(bool((v == 0.3).all()) for v in prior.regulariser.mean.values())


def test_more_outputs_of_yes_or_no_have_labels_too():
    """A remembered example of which a new question was not asked says no to it."""
    case = CASES["logistic"]
    _, prior = laws.learn(exact("logistic"), case, tasks=1, split=SPLITS[2])
    wider = build(lambda: nn.Linear(4, 3))(0)
    after = prior.transfer(wider, classes=(1, None, 0))
    labels = prior.memory.labels
    none = torch.zeros(len(labels), dtype=torch.float64)
    assert torch.equal(after.memory.labels, torch.stack([labels[:, 1], none, labels[:, 0]], 1))
    assert torch.isfinite(after(wider))


# -------------------------------------------------------------------- what raises


CATEGORICAL = next(c for c in networks() if c.name == "mlp Categorical")


@pytest.mark.parametrize(
    ("outputs", "options", "error", "match"),
    [
        (2, {}, StaleAnchorError, "say which are kept: classes"),
        (2, {"classes": (0, 3)}, ValueError, "different numbers of 0 to 2"),
        (2, {"classes": (0, 0)}, ValueError, "different numbers"),
        (2, {"classes": (None, None)}, ValueError, "at least one"),
        (2, {"classes": (0, 1, 2)}, ValueError, "names 3 outputs, but the model has 2"),
        (2, {"classes": (0, 1)}, ValueError, "pass previous="),
        (3, {"labels": True}, ValueError, "pass previous="),
        (
            3,
            {"classes": (1, 0, 2), "head": ("0.weight",)},
            ValueError,
            "no trained parameters with",
        ),
        (3, {"parameters": {"x": "0.weight"}}, ValueError, r"names \['x'\]"),
        (3, {"parameters": {"0.weight": "y"}}, ValueError, r"names \['y'\]"),
        (3, {"parameters": {"0.bias": "0.bias", "2.bias": "0.bias"}}, ValueError, "count twice"),
        (3, {"structure": "block"}, ValueError, "structure must be 'diagonal' or 'dense'"),
        (4, {"new_classes": "one"}, ValueError, "new_classes must be"),
    ],
)
def test_transfers_that_raise(outputs, options, error, match):
    model = CATEGORICAL.make_model(0)
    prior = laws.law_prior(Categorical(), structure="diagonal")
    prior = prior.recall(model, CATEGORICAL.data[0], SPLITS[3].remember(CATEGORICAL, model, 0))
    other = mlp(4, outputs)(1)
    before = laws.weights(other)
    with pytest.raises(error, match=match):
        prior.transfer(other, **options)
    assert torch.equal(laws.weights(other), before)


def test_without_a_memory_the_head_must_be_named():
    model = CATEGORICAL.make_model(0)
    prior = lifelong.online_laplace(Categorical()).update(model, CATEGORICAL.data[0])
    other = mlp(4, 2)(0)
    with pytest.raises(ValueError, match="name them: head="):
        prior.transfer(other, classes=(2, 0))
    after = prior.transfer(other, classes=(2, 0), head=("2.weight", "2.bias"))
    torch.testing.assert_close(
        after.weight.anchor["2.weight"], prior.weight.anchor["2.weight"][[2, 0]]
    )


@pytest.mark.parametrize("structure", ["dense", "block", "kronecker"])
def test_without_a_memory_leading_classes_are_kept_as_others_are(structure):
    """No weight of a class that is dropped counts as 0, wherever its rows lay."""
    torch.manual_seed(0)
    data = Examples(torch.randn(20, 4).double(), torch.arange(20) % 3)
    model, smaller = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()
    recipe = Recipe(structure=structure, memory=0)
    prior = Prior(Categorical(), recipe, (Regulariser(0.5),)).update(model, data)
    with pytest.raises(ValueError, match="name them: head="):
        prior.transfer(smaller, classes=(0, 1))
    head = ("weight", "bias")
    leading = prior.transfer(smaller, classes=(0, 1), head=head)
    turned = prior.transfer(smaller, classes=(1, 0), head=head)
    at = laws.moved(smaller)
    torch.testing.assert_close(leading(at), turned.transfer(at, classes=(1, 0), head=head)(at))
    assert torch.equal(leading.weight.gradient["bias"], prior.weight.gradient["bias"][:2])


def test_a_bias_that_is_dropped_counts_as_0():
    """As a feature does: what is left is the model that never had one."""
    case = CASES["linear-gaussian"]
    prior = exact("linear-gaussian")
    prior = replace(prior, recipe=replace(prior.recipe, memory=0))
    _, prior = laws.learn(prior, case, tasks=2)
    other = build(lambda: First(4, 2, bias=False))(1)
    with pytest.warns(UserWarning, match=r"leaves behind .*bias"):
        after = prior.transfer(other, allow_unmatched=True)
    refit(other, after)
    batch = laws.retrained(case, other, prior.regulariser, *case.data[:2])
    assert laws.distance(laws.weights(other), laws.weights(batch)) < 1e-8


def test_a_bias_that_is_frozen_stays_at_its_anchor():
    model, prior = laws.learn(exact("linear-gaussian"), CASES["linear-gaussian"], tasks=1)
    for other, names in (
        (deepcopy(model), None),
        (Renamed(4, 2).double(), {"fc.weight": "weight"}),
    ):
        layer = other.fc if names else other
        layer.bias.requires_grad_(False)
        with pytest.warns(UserWarning, match=r"leaves behind .*bias"):
            after = prior.transfer(other, parameters=names, labels=False, allow_unmatched=True)
        (moved,) = after.weight.gradient.values()
        assert torch.equal(moved, prior.weight.gradient["weight"])


def test_a_module_that_is_gone_stays_at_its_anchor():
    """A layer in the middle is no sum of which a part could be 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    other = nn.Sequential(nn.Linear(3, 3)).double()
    data = Examples(torch.randn(12, 3).double(), torch.arange(12) % 3)
    recipe = Recipe(structure="dense", memory=0)
    prior = Prior(Categorical(), recipe, (Regulariser(0.5),)).update(model, data)
    with pytest.warns(UserWarning, match="2 parameters"):
        after = prior.transfer(other, allow_unmatched=True)
    assert torch.equal(after.weight.gradient["0.weight"], prior.weight.gradient["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_new_class_is_finite_in_a_smaller_dtype(dtype):
    case = CASES["multinomial"]
    model, prior = laws.learn(lifelong.kprior(Categorical(), memory=8), case, tasks=1)
    wider = build(lambda: nn.Linear(4, 5))(1)
    with torch.no_grad():
        wider.weight[:3], wider.bias[:3] = model.weight, model.bias
    after = prior.transfer(wider)
    value = after(wider)
    small = after.to(dtype=dtype)(wider.to(dtype))
    assert small.item() == pytest.approx(value.item(), rel=8 * torch.finfo(dtype).eps)


def test_anchors_that_differ_cannot_give_residuals_back():
    model = CATEGORICAL.make_model(0)
    prior = laws.law_prior(Categorical(), structure="diagonal")
    prior = prior.recall(model, CATEGORICAL.data[0], SPLITS[3].remember(CATEGORICAL, model, 0))
    with pytest.raises(ValueError, match="a sum of priors has several anchors"):
        (prior + prior).transfer(mlp(4, 2)(0), classes=(0, 1), previous=model)


def test_learned_vectors_lose_no_class():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    data = Examples(torch.randn(20, 4), torch.arange(20) % 3)
    prior = lifelong.compact_memory(Categorical(), memory=5).update(model, data)
    with pytest.raises(ValueError, match="compact vectors mix all classes"):
        prior.transfer(nn.Linear(4, 2), classes=(0, 1), previous=model)
    order = prior.transfer(nn.Linear(4, 3), classes=(2, 0, 1))
    assert torch.equal(order.memory.reference, prior.memory.reference[:, [2, 0, 1]])


def test_a_bernoulli_label_of_one_output_stays():
    torch.manual_seed(0)
    model, other = nn.Linear(3, 1), nn.Linear(3, 1)
    data = Examples(torch.randn(10, 3), (torch.arange(10) % 2).float())
    prior = lifelong.kprior(Bernoulli(), memory=4).update(model, data)
    after = prior.transfer(other, classes=(0,))
    assert torch.equal(after.memory.labels, prior.memory.labels)
    assert isinstance(after.weight, WeightTerm)
