"""Unlearning and its audit: refits against retraining, attacks against what is known of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Prior, Recipe, Regulariser, unlearning
from lifelong.testing import cases, laws
from lifelong.unlearning import (
    Evidence,
    Shadows,
    attack,
    audit,
    confidence,
    distance,
    halves,
    lira,
    train_shadows,
    unlearn,
)

GLMS = {c.name: c for c in cases.glms()}
NETWORKS = {c.name: c for c in cases.networks()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(n: int, mean: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=seeded(seed), dtype=torch.float64) + mean


# ------------------------------------------------------------------ unlearn


@pytest.mark.parametrize("name", sorted(GLMS))
def test_unlearning_is_retraining_for_a_glm_in_memory(name: str) -> None:
    case = GLMS[name]
    prior = lifelong.kprior(case.likelihood, precision=0.5, memory=None)
    model, after = laws.learn(prior, case, tasks=2)
    data = case.data[0]
    done = unlearn(model, after, data[:5])
    rest = [data[5:], case.data[1]]
    truth = laws.retrained(case, model, Regulariser(0.5), *rest)
    assert laws.distance(laws.weights(model), laws.weights(truth)) < 1e-6
    assert done.refit.method == "newton"
    assert done.refit.converged
    assert done.removal.count == 5
    assert done.prior.num_data == sum(len(d) for d in rest)
    # The new prior stands at the new weights: nothing in it is the old anchor any more.
    assert done.prior.weight is not None
    assert torch.equal(
        laws.weights(model), torch.cat([v.flatten() for v in done.prior.weight.anchor.values()])
    )
    again = copy.deepcopy(model)
    unlearn(again, done.prior, data[5:9])
    truth = laws.retrained(case, model, Regulariser(0.5), data[9:], case.data[1])
    assert laws.distance(laws.weights(again), laws.weights(truth)) < 1e-6


def test_unlearning_a_group_twice_in_a_row_is_retraining():
    """Linear-Gaussian, nothing in memory, no example read again."""
    case = cases.linear_gaussian()
    prior = laws.law_prior(case.likelihood)
    prior = replace(prior, recipe=replace(prior.recipe, memory=0))
    model, data = case.make_model(0), case.data[0]
    model = laws.minimum(model, lambda m: laws.nats(case.likelihood, m, data) + prior(m))
    groups = torch.arange(len(data)) % 3
    after = prior.update(model, data, groups=groups)
    for group in (0, 2):
        after = unlearn(model, after, groups=[group]).prior
    truth = laws.retrained(case, model, Regulariser(0.5), data[(groups == 1).nonzero().squeeze(1)])
    assert laws.distance(laws.weights(model), laws.weights(truth)) < 1e-7


def test_refitting_on_what_stays_is_retraining_without_a_memory():
    case = GLMS["multinomial"]
    prior = lifelong.kprior(case.likelihood, precision=0.5, memory=4)
    model, after = laws.learn(prior, case, tasks=1)
    data = case.data[0]
    unlearn(model, after, data[:5], retained=data[5:])
    truth = laws.retrained(case, model, Regulariser(0.5), data[5:])
    assert laws.distance(laws.weights(model), laws.weights(truth)) < 1e-6


def test_what_stays_is_read_under_the_head():
    """Of a task that some of the outputs are for, given as it was learned."""
    data = GLMS["multinomial"].data[0]
    two = data[(data.labels < 2).nonzero().squeeze(1)]
    carried, plain = replace(two, head=(0, 1)), replace(two, head=None)
    ends = []
    for given, head in ((carried, None), (plain, (0, 1))):
        model = GLMS["multinomial"].make_model(0)
        prior = lifelong.kprior(GLMS["multinomial"].likelihood, precision=0.5, memory=None)
        after = prior.update(model, given, head=head)
        unlearn(model, after, given[:3], retained=given[3:], head=head)
        ends.append(laws.weights(model))
    torch.testing.assert_close(*ends)


def test_a_failed_unlearning_changes_nothing():
    case = NETWORKS["mlp Categorical"]
    prior = lifelong.gradient_reconstruction(case.likelihood, memory=6, precision=0.5)
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data, generator=seeded())
    with laws.untouched(model), pytest.raises(ValueError, match="method must be one of"):
        unlearn(model, after, data[:2], method="guess")  # type: ignore[arg-type]
    with laws.untouched(model), pytest.raises(ValueError, match="none of these examples"):
        unlearn(model, after, ids=torch.tensor([12345]))


def test_clipping_is_told():
    case = NETWORKS["mlp Categorical"]
    prior = Prior(case.likelihood, Recipe("t", structure="diagonal"), (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data).forget(model, data[:9])
    done = unlearn(model, after, data[:9], on_indefinite="clip", method="adam", max_iterations=5)
    assert 0 < done.removal.clipped <= 1


@pytest.mark.parametrize("gradient", ["stored", "none"])
@pytest.mark.parametrize("name", ["linear Gaussian", "mlp Categorical", "mlp Bernoulli"])
def test_rebasing_keeps_the_gradient_there(name: str, gradient: Any) -> None:
    """The prior's slope at the new weights is what it was; everywhere where it was exact."""
    case = NETWORKS[name]
    recipe = Recipe("t", structure="dense", memory=5, score="random", gradient=gradient)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data, groups=torch.arange(len(data)) % 2, generator=seeded())
    place = laws.moved(model, by=0.1, seed=4)
    with laws.untouched(place):
        there = after.rebase(place)
    if gradient == "stored":
        old, new = (laws.slope(place, p(place)) for p in (after, there))
        assert laws.distance(new, old) < 1e-12
    if name == "linear Gaussian" and gradient == "stored":
        other = laws.moved(model, by=0.3, seed=9)
        old, new = (laws.slope(other, p(other)) for p in (after, there))
        assert laws.distance(new, old) < 1e-12
        old, new = (p.forget(place, groups=[1]) for p in (after, there))
        old, new = (laws.slope(other, p(other)) for p in (old, new))
        assert laws.distance(new, old) < 1e-12


# ------------------------------------------------------------------ attacks


def test_auc_of_two_gaussians_is_phi():
    """N(1, 1) against N(0, 1): AUC = Phi(1 / sqrt 2), TPR at FPR a = 1 - Phi(z_a - 1)."""
    found = attack(normal(20_000, 1.0, seed=1), normal(20_000, seed=2))
    phi = torch.special.ndtr
    truth = float(phi(torch.tensor(1 / math.sqrt(2), dtype=torch.float64)))
    assert abs(found.auc - truth) < 4 * found.auc_error < 0.02
    z = torch.special.ndtri(torch.tensor(0.99, dtype=torch.float64))
    assert abs(found.tpr - float(1 - phi(z - 1))) < 0.02
    assert (found.members, found.others, found.fpr) == (20_000, 20_000, 0.01)


def test_the_error_of_an_auc_is_its_spread_over_draws():
    draws = [attack(normal(60, 0.7, seed=s), normal(90, seed=1000 + s)) for s in range(400)]
    auc = torch.tensor([d.auc for d in draws])
    told = torch.tensor([d.auc_error for d in draws]).mean()
    assert abs(float(auc.std() / told) - 1) < 0.15


def test_auc_counts_pairs():
    members, others = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([2.0, 0.0])
    wins = sum(
        1.0 if m > o else 0.5 if m == o else 0.0 for m in members.tolist() for o in others.tolist()
    )
    assert attack(members, others).auc == pytest.approx(wins / 6)
    assert attack(torch.ones(5), torch.ones(4)).auc == 0.5
    perfect = attack(torch.ones(5), torch.zeros(4), fpr=0.25)
    assert (perfect.auc, perfect.auc_error, perfect.tpr, perfect.tpr_error) == (1, 0, 1, 0)


def gaussian_world(
    shift: float, *, shadows: int = 64, n: int = 400, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of examples that are hard or easy, N(mu_i, s) where not learned and N(mu_i + shift, s)
    where learned: (target, shadows, inside, member)."""
    g = seeded(seed)
    mu = 5 * torch.randn(n, generator=g, dtype=torch.float64)
    inside = halves(shadows, n, g)
    member = torch.rand(n, generator=g) < 0.5
    noise = torch.randn(shadows + 1, n, generator=g, dtype=torch.float64)
    scores = mu + noise[:-1] + shift * inside
    return mu + noise[-1] + shift * member, scores, inside, member


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("pooled", [True, False, None])
def test_lira_finds_what_can_be_found(online: bool, pooled: bool | None) -> None:
    """With mu_i known the best test has AUC Phi(shift / sqrt 2); the threshold is blind beside it,
    since examples differ by far more than membership does."""
    shift = 1.5
    target, scores, inside, member = gaussian_world(shift, n=3000)
    found = lira(target, scores, inside, online=online, pooled=pooled)
    result = attack(found[member], found[~member])
    ideal = float(torch.special.ndtr(torch.tensor(shift / math.sqrt(2), dtype=torch.float64)))
    assert ideal - 0.04 < result.auc < ideal + 4 * result.auc_error
    blind = attack(target[member], target[~member])
    assert blind.auc < 0.65 < result.auc


def test_lira_of_a_model_that_never_saw_the_data_is_chance():
    target, scores, inside, member = gaussian_world(1.5, n=3000)
    never = target - 1.5 * member
    found = lira(never, scores, inside)
    result = attack(found[member], found[~member])
    assert abs(result.auc - 0.5) < 4 * result.auc_error < 0.06


def test_lira_by_hand():
    scores = torch.tensor([[1.0], [3.0], [-1.0], [1.0]], dtype=torch.float64)
    inside = torch.tensor([[True], [True], [False], [False]])
    t = torch.tensor([1.0], dtype=torch.float64)
    normal_in = torch.distributions.Normal(2.0, math.sqrt(2.0))
    normal_out = torch.distributions.Normal(0.0, math.sqrt(2.0))
    truth = normal_in.log_prob(t.float()) - normal_out.log_prob(t.float())
    for pooled in (True, False):
        found = lira(t, scores, inside, pooled=pooled)
        torch.testing.assert_close(found, truth.double(), rtol=1e-6, atol=1e-6)
        offline = lira(t, scores, inside, pooled=pooled, online=False)
        assert float(offline) == pytest.approx(1 / math.sqrt(2))


def test_halves():
    inside = halves(6, 50, seeded())
    assert torch.equal(inside.sum(0), torch.full((50,), 3))
    assert not torch.equal(inside, halves(6, 50, seeded(1)))
    for wrong in (3, 0):
        with pytest.raises(ValueError, match="an even number of models"):
            halves(wrong, 5)


def test_confidence_is_a_logit():
    model, x = nn.Linear(3, 4).double(), normal(15).reshape(5, 3)
    y = torch.tensor([0, 1, 2, 3, 1])
    p = model(x).softmax(1).gather(1, y[:, None]).squeeze(1)
    found = confidence(model, (x, y), Categorical())
    torch.testing.assert_close(found, torch.logit(p))
    inside_head = confidence(model, Examples(x, y % 2, head=(0, 1)), Categorical())
    p = model(x)[:, :2].softmax(1).gather(1, (y % 2)[:, None]).squeeze(1)
    torch.testing.assert_close(inside_head, torch.logit(p))
    binary = nn.Linear(3, 1).double()
    p = torch.sigmoid(binary(x)).squeeze(1)
    labels = torch.tensor([0.0, 1, 0, 1, 1], dtype=torch.float64)
    found = confidence(binary, (x, labels[:, None]), lifelong.Bernoulli())
    torch.testing.assert_close(found, torch.logit(torch.where(labels == 1, p, 1 - p)))
    gaussian = lifelong.Gaussian(0.5)
    found = confidence(binary, (x, labels[:, None]), gaussian)
    torch.testing.assert_close(found, -gaussian.nll(binary(x), labels[:, None]))


# ------------------------------------------------------------------ shadows


def noise_data(n: int = 60, seed: int = 0) -> Examples:
    """Labels that are pure chance: all that a model can know of them it has memorised."""
    x = torch.randn(n, 20, generator=seeded(seed))
    return Examples(x, torch.randint(2, (n,), generator=seeded(seed + 1)))


def make(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 2))


def test_a_stack_is_its_models():
    """One shadow of the stack = the same model trained alone on the same batches."""
    data = noise_data()
    inside = torch.ones(3, len(data), dtype=torch.bool)
    stack = train_shadows(
        make, data, Categorical(), inside, epochs=2, minibatch=60, precision=2.0, generator=seeded()
    )
    alone = make(1)
    optimizer = torch.optim.Adam(alone.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
    for _ in range(2):
        optimizer.zero_grad()
        f = alone(data.inputs)
        loss = nn.functional.cross_entropy(f, data.labels)
        (loss + sum(p.square().sum() for p in alone.parameters()) / len(data)).backward()
        optimizer.step()
        schedule.step()
    taken = stack.take(1)
    torch.testing.assert_close(laws.weights(taken), laws.weights(alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        stack.confidence(data, Categorical(), batch_size=7)[1],
        confidence(taken, data, Categorical()),
        rtol=1e-5,
        atol=1e-5,
    )
    assert len(stack) == 3


class Unchecked(Categorical):
    """Reads no number, for tensors that have none."""

    def validate(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("head", [None, (0, 1)])
def test_shadows_are_where_their_models_are(head, monkeypatch):
    """Data on the CPU, models on another device: here the one without numbers."""
    monkeypatch.setattr(unlearning, "require_finite", lambda *_: None)
    data, inside = replace(noise_data(6), head=head), halves(4, 6, seeded())
    stack = train_shadows(
        lambda seed: make(seed).to("meta"), data, Unchecked(), inside, epochs=1, minibatch=2
    )
    assert {p.device.type for p in stack.params.values()} == {"meta"}
    scores = stack.confidence(data, Unchecked())
    assert (scores.device.type, scores.shape) == ("meta", (4, 6))


def test_attacks_on_a_model_that_memorises():
    """Random labels, learned by heart: members are found; a model of other data gives chance."""
    data, test = noise_data(120, seed=3), noise_data(300, seed=7)
    inside = halves(17 - 1, len(data), seeded(2))
    inside = torch.cat([inside, torch.arange(len(data)).unsqueeze(0) < 60])
    stack = train_shadows(
        make, data, Categorical(), inside, epochs=60, minibatch=30, lr=1e-2, generator=seeded()
    )
    scores = stack.confidence(data, Categorical())
    found = lira(scores[-1], scores[:-1], inside[:-1])
    result = attack(found[:60], found[60:])
    assert result.auc - 8 * result.auc_error > 0.5
    offline = lira(scores[-1], scores[:-1], inside[:-1], online=False)
    result = attack(offline[:60], offline[60:])
    assert result.auc - 8 * result.auc_error > 0.5
    other = train_shadows(
        make, test, Categorical(), torch.ones(2, len(test), dtype=torch.bool), epochs=10, lr=1e-2
    )
    never = lira(other.confidence(data, Categorical())[0], scores[:-1], inside[:-1])
    result = attack(never[:60], never[60:])
    assert abs(result.auc - 0.5) < 3 * result.auc_error


# ------------------------------------------------------------------ audit


def test_an_audit_of_the_retrained_model_itself():
    data, test = noise_data(80), noise_data(50, seed=9)
    before, after = make(0), make(1)
    evidence = Evidence(
        normal(16 * 20).reshape(16, 20),
        halves(16, 20, seeded()),
        normal(16 * 50, seed=1).reshape(16, 50),
        halves(16, 50, seeded(1)),
    )
    with laws.untouched(before), laws.untouched(after):
        found = audit(
            before,
            after,
            copy.deepcopy(after),
            likelihood=Categorical(),
            removed=data[:20],
            kept=data[20:],
            test=test,
            evidence=evidence,
            seconds={"unlearning": 2.0, "retraining": 30.0},
        )
    assert set(found.attacks) == {"before", "unlearned", "retrained"}
    assert set(found.gap) == {"threshold", "lira online", "lira offline"}
    assert all(gap == 0 for gap in found.gap.values())
    assert all(
        d.disagreement == 0 and abs(d.kl_retrained_unlearned) < 1e-12
        for d in found.distances.values()
    )
    assert found.speedup == 15
    assert found.sizes == {"removed": 20, "kept": 60, "test": 50, "others": 50}
    by_hand = float((after(test.inputs).argmax(1) == test.labels).double().mean())
    assert found.quality["test"]["unlearned"].accuracy == pytest.approx(by_hand)
    told = found.to_dict()
    assert told["quality"]["test"]["before"]["rmse"] is None
    assert told["attacks"]["before"]["threshold"]["others"] == 50


@pytest.mark.parametrize(("members", "others"), [(1, 10), (3, 1), (2, 2)])
def test_an_audit_of_too_few_for_an_attack(members: int, others: int) -> None:
    data, test = noise_data(80), noise_data(50, seed=9)
    found = audit(
        make(0),
        make(1),
        make(1),
        likelihood=Categorical(),
        removed=data[:members],
        kept=data[20:],
        test=test,
        others=test[:others],
    )
    attacked = {"threshold"} if min(members, others) >= 2 else set()
    assert {name: set(a) for name, a in found.attacks.items()} == dict.fromkeys(
        ("before", "unlearned", "retrained"), attacked
    )
    assert set(found.gap) == attacked
    assert found.quality["removed"]["unlearned"].num_examples == members


def test_an_audit_without_a_retrained_model():
    data, test = noise_data(80), noise_data(50, seed=9)
    found = audit(
        make(0),
        make(1),
        likelihood=Categorical(),
        removed=data[:20],
        kept=data[20:],
        test=test,
        others=test[:10],
    )
    assert found.distances == {}
    assert found.gap == {}
    assert math.isnan(found.speedup)
    timed = {"unlearning": 0.0, "retraining": 3.0}
    assert replace(found, seconds=timed).speedup == math.inf
    assert math.isnan(replace(found, seconds={**timed, "retraining": 0.0}).speedup)
    assert found.sizes["others"] == 10


@torch.no_grad()
def test_distance_is_mean_kl():
    data = noise_data(30)
    a, b = make(0), make(1)
    p, q = a(data.inputs).softmax(1), b(data.inputs).softmax(1)
    found = distance(a, b, data, Categorical(), batch_size=7)
    assert found.kl_unlearned_retrained == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert found.kl_retrained_unlearned == pytest.approx(float((q * (q / p).log()).sum(1).mean()))
    assert found.disagreement == float((p.argmax(1) != q.argmax(1)).double().mean())
    regression = (data.inputs, data.inputs[:, :2])
    assert math.isnan(distance(a, b, regression, lifelong.Gaussian(1.0)).disagreement)
    flags = (data.inputs, (data.inputs[:, :2] > 0).float())
    found = distance(a, b, flags, lifelong.Bernoulli())
    fa, fb = a(data.inputs) > 0, b(data.inputs) > 0
    assert found.disagreement == pytest.approx(float((fa != fb).double().mean()))


def test_a_stack_of_models_that_take_a_dict():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    data = noise_data(12)
    named = Examples({"x": data.inputs}, data.labels)  # type: ignore[dict-item]
    inside = torch.ones(2, 12, dtype=torch.bool)
    stack = train_shadows(lambda seed: Named(), named, Categorical(), inside, epochs=1)
    assert stack.confidence(named, Categorical()).shape == (2, 12)


# ------------------------------------------------------------------ errors


def test_bad_input():
    scores, inside = torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.bool)
    data = noise_data(6)
    for call, message in (
        (lambda: attack(torch.zeros(1), torch.zeros(3)), "at least two members"),
        (lambda: attack(torch.zeros(3), torch.zeros(3), fpr=1.0), r"fpr must lie in \(0, 1\)"),
        (lambda: attack(torch.tensor([math.nan, 0]), torch.zeros(3)), "a score is NaN"),
        (lambda: lira(torch.zeros(2), scores, inside), "expected target"),
        (lambda: lira(torch.zeros(3), scores, inside), "0 shadow models that did not learn it"),
        (lambda: train_shadows(make, data, Categorical(), inside), r"inside must be \(S, 6\) bool"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    broken = torch.full((6, 20), math.nan)
    with pytest.raises(lifelong.errors.NonFiniteError, match="the loss of a shadow model"):
        train_shadows(
            make, Examples(broken, data.labels), Categorical(), torch.ones(2, 6, dtype=torch.bool)
        )


def test_shadows_are_values():
    stack = Shadows(make(0), {}, torch.ones(2, 3, dtype=torch.bool))
    assert len(stack) == 2


# ------------------------------------------------------------------ the step


def test_a_step_is_the_first_order_removal_and_exact_for_linear_gaussian_data():
    case = cases.linear_gaussian()
    recipe = Recipe("t", structure="dense", memory=0)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),))
    model, data = case.make_model(0), case.data[0]
    model = laws.minimum(model, lambda m: laws.nats(case.likelihood, m, data) + prior(m))
    after = prior.update(model, data)
    truth = laws.retrained(case, model, Regulariser(0.5), data[5:])
    done = unlearn(model, after, data[:5], step=True, method=None)
    assert done.refit is None
    assert laws.distance(laws.weights(model), laws.weights(truth)) < 1e-8


def test_a_step_needs_a_curvature():
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    after = lifelong.kprior(case.likelihood, memory=6).update(model, data, generator=seeded())
    with laws.untouched(model), pytest.raises(ValueError, match="a Newton step needs the curvatur"):
        unlearn(model, after, where=lambda m: m.labels == 1, step=True)


def test_the_experiment_runs(tmp_path: Any):
    from benchmarks import unlearning as benchmark

    config = replace(benchmark.SMOKE, shadows=4, targets=1, steps=(3,))
    result = benchmark.run(config, None, tmp_path, ("main", "lira"))
    assert result["chosen"] in benchmark.variants(config)
    assert {"1 %", "5 %", "class", "lira"} <= result.keys()
    files = {p.name for p in tmp_path.iterdir()}
    assert {"config.json", "validation.json", "test.json", "result.json", "lira.json"} <= files
