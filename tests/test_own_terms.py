"""Terms of the user's own: beliefs beside the data, which stay whatever is learned or forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lifelong
from lifelong import Learner, Prior, Recipe, Regulariser, Task
from lifelong.errors import CheckpointError
from lifelong.terms import MemoryTerm, belief_gradient
from lifelong.testing import cases, laws
from lifelong.unlearning import unlearn

GAUSSIAN = cases.linear_gaussian()
NETWORKS = {c.name: c for c in cases.networks()}


@dataclass(frozen=True, eq=False)
class Towards:
    """½ strength ‖theta - where‖², as a user may write it."""

    where: float
    strength: float = 1.0
    num_bytes: int = 0

    def __call__(self, model: nn.Module) -> Tensor:
        gaps = [(p - self.where).square().sum() for p in model.parameters()]
        return 0.5 * self.strength * torch.stack(gaps).sum()

    def __mul__(self, factor: float) -> Towards:
        return replace(self, strength=self.strength * factor)


OWN = Towards(0.3, 2.0)


def own_of(prior: Prior) -> list[Towards]:
    return [t for t in prior.terms if isinstance(t, Towards)]


@pytest.mark.parametrize("split", cases.SPLITS, ids=lambda s: s.name)
def test_it_is_part_of_what_is_minimised_through_all_tasks(split: cases.Split) -> None:
    """Linear-Gaussian, any split: learning in turn = batch training with the same belief."""
    prior = laws.law_prior(GAUSSIAN.likelihood).with_term(OWN)
    model, after = laws.learn(prior, GAUSSIAN, tasks=3, split=split)
    start = laws.moved(model, by=1.0, seed=91)
    batch = laws.minimum(
        start,
        lambda m: laws.nats(GAUSSIAN.likelihood, m, *GAUSSIAN.data) + Regulariser(0.5)(m) + OWN(m),
    )
    assert laws.distance(laws.weights(model), laws.weights(batch)) < 1e-9
    assert own_of(after) == [OWN]


@pytest.mark.parametrize("gradient", ["stationary", "anchored"])
def test_gradients_that_are_minus_that_of_beliefs_know_it(gradient: str) -> None:
    """At a minimum of data and beliefs, the data's gradient is minus that of all beliefs."""
    recipe = Recipe("t", structure="dense", gradient=gradient, memory=0)  # type: ignore[arg-type]
    prior = Prior(GAUSSIAN.likelihood, recipe, (Regulariser(0.5),)).with_term(OWN)
    model, after = laws.learn(prior, GAUSSIAN, tasks=1)
    assert float(laws.slope(model, after(model)).abs().max()) < 1e-9
    data = laws.slope(model, laws.nats(GAUSSIAN.likelihood, model, GAUSSIAN.data[0]))
    assert after.weight is not None
    assert after.weight.gradient is not None
    held = torch.cat([after.weight.gradient[n].flatten() for n, _ in model.named_parameters()])
    assert laws.distance(held, data) < 1e-9


def test_it_stays_whatever_changes() -> None:
    case = NETWORKS["mlp Categorical"]
    prior = lifelong.gradient_reconstruction(case.likelihood, memory=6).with_term(OWN)
    model, data = case.make_model(0), case.data[0]
    after = prior.update(model, data)
    for changed in (
        after.update(model, case.data[1]),
        after.forget(model, data[:2], on_indefinite="clip"),
        after.relabel(model, data[:2], (data.labels[:2] + 1) % 3),
        after.rebase(model),
        after.discount(0.5),
        after.replace(regulariser=Regulariser(3.0)),
        after.transfer(case.make_model(1), previous=model),
        after.to(dtype=torch.float32),
    ):
        assert own_of(changed) == [OWN]
    (half,) = own_of(0.5 * after)
    assert half.strength == 1.0


def test_it_counts_in_the_value_and_for_every_step() -> None:
    case = NETWORKS["mlp Categorical"]
    plain = lifelong.kprior(case.likelihood, memory=6)
    model, data = case.make_model(0), case.data[0]
    plain = plain.update(model, data)
    prior = plain.with_term(OWN)
    place = laws.moved(model, by=0.2, seed=1)
    torch.testing.assert_close(prior(place), plain(place) + OWN(place))
    batch = data.batch(slice(0, 4))
    torch.testing.assert_close(
        prior.loss(place, batch.inputs, batch.labels, num_data=len(data)),
        plain.loss(place, batch.inputs, batch.labels, num_data=len(data)) + OWN(place) / len(data),
    )


def test_an_unlearning_that_reads_what_is_left_keeps_it() -> None:
    prior = laws.law_prior(GAUSSIAN.likelihood).with_term(OWN)
    model, after = laws.learn(prior, GAUSSIAN, tasks=1)
    data = GAUSSIAN.data[0]
    done = unlearn(model, after, data[:3], retained=data[3:])
    batch = laws.minimum(
        laws.moved(model, by=1.0, seed=3),
        lambda m: laws.nats(GAUSSIAN.likelihood, m, data[3:]) + Regulariser(0.5)(m) + OWN(m),
    )
    assert own_of(done.prior) == [OWN]
    assert laws.distance(laws.weights(model), laws.weights(batch)) < 1e-6


def test_a_term_that_reads_no_weight_has_no_gradient() -> None:
    class Constant(Towards):
        def __call__(self, model: nn.Module) -> Tensor:
            return torch.ones(())

    model = GAUSSIAN.make_model(0)
    found = belief_gradient(Constant(0.0), model, dict(model.named_parameters()))
    assert all(not bool(g.any()) for g in found.values())


def test_files_hold_its_name_and_whoever_loads_gives_it_again(tmp_path: Path) -> None:
    case = NETWORKS["mlp Categorical"]
    model, data = case.make_model(0), case.data[0]
    prior = lifelong.kprior(case.likelihood, memory=6).with_term(OWN).update(model, data)
    file = tmp_path / "prior.safetensors"
    prior.save(file)
    again = Prior.load(file, own=[OWN])
    assert laws.identical(prior, again, model) == 0
    for own in ([], [OWN, OWN], [MemoryTerm(prior.memory)]):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"own=\[Towards\], got \["):
            Prior.load(file, own=own)
    learner = Learner(case.make_model(0), lifelong.kprior(case.likelihood, memory=6).with_term(OWN))
    learner.learn(Task(0, "a", data))
    learner.save(tmp_path / "learner.safetensors")
    other = Learner(case.make_model(1), lifelong.kprior(case.likelihood, memory=6).with_term(OWN))
    other.load(tmp_path / "learner.safetensors")
    assert own_of(other.prior) == [OWN]
    bare = Learner(case.make_model(1), lifelong.kprior(case.likelihood, memory=6))
    with pytest.raises(CheckpointError, match=r"own=\[Towards\]"):
        bare.load(tmp_path / "learner.safetensors")


def test_it_goes_to_another_device_by_itself() -> None:
    class Moves(Towards):
        def to(self, device: object, dtype: object) -> Moves:
            return Moves(self.where, 9.0)

    prior = lifelong.kprior(lifelong.Categorical()).with_term(Moves(0.0))
    assert own_of(prior.to(dtype=torch.float64))[0].strength == 9.0


def test_what_is_no_term() -> None:
    prior = lifelong.kprior(lifelong.Categorical())
    with pytest.raises(TypeError, match="got int without __call__, num_bytes"):
        prior.with_term(3)
    with pytest.raises(TypeError, match="got Regulariser; update makes those"):
        prior.with_term(Regulariser(1.0))
