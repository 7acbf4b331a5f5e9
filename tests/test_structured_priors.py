"""Priors whose curvature is Kronecker-factored, of low rank, or in blocks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Gaussian, Prior, Regulariser
from lifelong.curvature import BlockDiagonal, Curvature, estimate
from lifelong.recall import Pass, fit_curvature
from lifelong.recipe import Fitted, Recipe
from lifelong.removal import _is_indefinite
from lifelong.testing import cases, laws

EXACT = ("kronecker", "eigen_kronecker", "block", "low_rank")  # for a linear layer, Gaussian noise
STRUCTURES = (*EXACT, "isotropic")
LINEAR = cases.linear_gaussian()
PRESETS: dict[str, Any] = {
    "laplace": lifelong.online_laplace,
    "reconstruction": lambda f, **kw: lifelong.gradient_reconstruction(f, memory=4, **kw),
}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def task(seed: int, head: tuple[int, ...] | None = None) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    labels = torch.tensor(head or range(4))[torch.arange(20) % len(head or range(4))]
    return Examples(x, labels, torch.arange(20) + 20 * seed, head)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return model


def nats(prior: Prior, model: nn.Module) -> float:
    return float(prior(model).detach())


def curvature_of(prior: Prior) -> Curvature:
    weight = prior.weight
    assert weight is not None
    assert weight.curvature is not None
    return weight.curvature


def matrix(g: Curvature) -> Tensor:
    return g.dense().reordered(dict(net().named_parameters())).matrix


@pytest.mark.parametrize("structure", EXACT)
def test_tasks_in_a_row_are_exact_bayes(structure: Any) -> None:
    prior = lifelong.online_laplace(LINEAR.likelihood, structure=structure, precision=0.3)
    assert laws.add(prior, LINEAR, tasks=3) < 1e-7


@pytest.mark.parametrize("structure", EXACT)
def test_removing_is_never_having_learned(structure: Any) -> None:
    prior = lifelong.gradient_reconstruction(
        LINEAR.likelihood, memory=5, structure=structure, precision=0.3, population=False,
        gradient="stored",
    )  # fmt: skip
    assert laws.remove(prior, LINEAR, task=0, tasks=1) < 1e-6


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_sum_over_tasks(structure: Any, preset: str, tmp_path: Path) -> None:
    model, likelihood = net(), Categorical()
    prior = unmerged(PRESETS[preset](likelihood, structure=structure, strength=2.0))
    total = torch.zeros(())
    for seed in range(2):
        data = task(seed)
        prior = prior.update(model, data, generator=torch.Generator().manual_seed(0))
        memory = prior.memory
        kept = None if memory is None else memory.origin
        fitted = estimate(model.eval(), data, likelihood, structure=structure, exclude=kept)
        total = total + 2.0 * matrix(fitted)
        model = moved(model)
    gap = (matrix(curvature_of(prior)) - total).norm()
    assert gap <= 1e-9 * total.norm()
    back = Prior.load(prior.save(tmp_path / "prior.safetensors"))
    assert nats(back, model) == pytest.approx(nats(prior, model), rel=1e-12)
    assert type(curvature_of(back)) is type(curvature_of(prior))
    short = prior.to(dtype=torch.float32)
    assert nats(short, net().float()) == pytest.approx(nats(prior, net()), rel=1e-4)
    assert nats(0.5 * prior, model) == pytest.approx(0.5 * nats(prior, model), rel=1e-9)


@pytest.mark.parametrize("structure", ["kronecker", "eigen_kronecker"])
def test_a_head_for_each_task(structure: Any) -> None:
    """The head of one task takes no part in the other."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(2, 5)
            self.heads = nn.ModuleList([nn.Linear(5, 2), nn.Linear(5, 2)])
            self.current = 0

        def forward(self, x: Tensor) -> Tensor:
            return self.heads[self.current](torch.tanh(self.body(x)))

    model = Heads().double()
    prior = lifelong.online_laplace(Categorical(), structure=structure)
    for index in range(2):
        model.current = index
        prior = prior.update(model, task(index, (0, 1)))
    g = curvature_of(prior)
    assert isinstance(g, BlockDiagonal)
    assert all(bool(v.any()) for v in g.diagonal().values())
    assert list(g.shapes) == [name for name, _ in model.named_parameters()]


def unmerged(prior: Prior) -> Prior:
    """A product for each task."""
    return replace(prior, recipe=replace(prior.recipe, merge=False))


@pytest.mark.parametrize("structure", ["kronecker", "eigen_kronecker"])
def test_products_of_all_tasks_merge_to_one(structure: Any) -> None:
    merged, model = lifelong.online_laplace(Categorical(), structure=structure), net()
    whole = unmerged(merged)
    sizes = []
    for seed in range(3):
        merged, whole = (prior.update(model, task(seed)) for prior in (merged, whole))
        g, exact = curvature_of(merged), curvature_of(whole)
        assert isinstance(g, BlockDiagonal)
        assert isinstance(exact, BlockDiagonal)
        assert [block.num_products for block in g.blocks] == [1, 1]  # type: ignore[attr-defined]
        counts = [block.num_products for block in exact.blocks]  # type: ignore[attr-defined]
        assert counts == [seed + 1, seed + 1]
        for one, every in zip(g.blocks, exact.blocks, strict=True):
            traces = [sum(float(v.sum()) for v in b.diagonal().values()) for b in (one, every)]
            assert traces[0] == pytest.approx(traces[1])
        sizes.append(merged.num_bytes)
    assert len(set(sizes)) == 1


def test_the_same_task_again_merges_exactly() -> None:
    merged, model = lifelong.online_laplace(Categorical(), structure="kronecker"), net()
    whole = unmerged(merged)
    for _ in range(3):
        merged, whole = (prior.update(model, task(0)) for prior in (merged, whole))
    gap = matrix(curvature_of(merged)) - matrix(curvature_of(whole))
    assert gap.norm() <= 1e-9 * matrix(curvature_of(whole)).norm()


def test_rounded_it_is_nearly_the_prior() -> None:
    """By the rounding of bfloat16's eight bits in each product; anchors and g are not rounded."""
    model, here = net(), moved(net())
    for gradient in ("stored", "stationary"):
        prior = lifelong.online_laplace(Categorical(), structure="kronecker", precision=0.3)
        prior = replace(prior, recipe=replace(prior.recipe, gradient=gradient))
        prior = prior.update(model, task(0))
        light = prior.rounded(torch.bfloat16)
        assert nats(light, here) == pytest.approx(nats(prior, here), rel=2e-2)
        assert nats(light, here) != nats(prior, here)
        params = list(here.parameters())
        slopes = [torch.autograd.grad(q.weight_space(here), params) for q in (light, prior)]
        assert all(a.dtype == b.dtype for a, b in zip(*slopes, strict=True))
        light_g, g = (torch.cat([x.flatten() for x in slope]) for slope in slopes)
        assert (light_g - g).norm() <= 1e-2 * g.norm()
        exact = prior.rounded(torch.float64)
        assert nats(exact, here) == pytest.approx(nats(prior, here), rel=1e-12)


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "kronecker"])
def test_what_has_no_kronecker_factors_is_not_rounded(structure: Any) -> None:
    prior = lifelong.online_laplace(Categorical(), structure=structure).update(net(), task(0))
    here = moved(net())
    assert nats(prior.rounded(), here) == nats(prior, here)


def test_a_rounded_prior_scales_and_is_not_kept() -> None:
    model = net()
    prior = lifelong.online_laplace(Categorical(), structure="kronecker").update(model, task(0))
    light, here = prior.rounded(), moved(model)
    assert nats(0.5 * light, here) == pytest.approx(0.5 * nats(light, here))
    with pytest.raises(TypeError, match="not to be kept"):
        light.state_dict()
    with pytest.raises(ValueError, match="update the prior that it was made of"):
        light.update(model, task(0))


def test_directions_are_kept_for_each_task() -> None:
    model = net()
    ranks = lifelong.online_laplace(Categorical(), structure="low_rank")
    for seed in range(2):
        ranks = ranks.update(model, task(seed))
    assert curvature_of(ranks).rank == 40  # type: ignore[attr-defined]


@pytest.mark.parametrize("structure", ["kronecker", "block", "low_rank"])
def test_forgetting_what_was_not_learned(structure: Any) -> None:
    model = net()
    prior = lifelong.online_laplace(Categorical(), structure=structure).update(model, task(0))
    strange = task(1)
    strange = Examples(20 * strange.inputs, strange.labels, strange.ids)  # type: ignore[operator]
    with pytest.raises(ValueError, match="the curvature would be indefinite"):
        prior.forget(model, strange)
    assert float(prior.forget(model, task(0)).num_data) == 0


def test_an_indefinite_difference_that_its_diagonal_hides() -> None:
    g = lifelong.Kronecker(
        torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]), torch.eye(3).expand(1, 1, 3, 3),
        {"w": torch.Size((2, 3))},
    )  # fmt: skip
    assert _is_indefinite(g, beside=g)
    positive = lifelong.Kronecker(g.left + 2 * torch.eye(2), g.right, g.shapes)
    assert not _is_indefinite(positive, beside=positive)
    assert not _is_indefinite(0.0 * positive, beside=positive)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_changed_model_needs_a_structure_that_follows(structure: Any) -> None:
    model = net()
    prior = lifelong.online_laplace(Categorical(), structure=structure).update(model, task(0))
    same = prior.transfer(model)
    assert nats(same, moved(net())) == pytest.approx(nats(prior, moved(net())), rel=1e-12)
    names = {n.replace("0.", "body."): n for n, _ in model.named_parameters()}
    renamed = nn.Sequential(OrderedDict([("body", model[0]), ("1", model[1]), ("2", model[2])]))
    other = prior.transfer(renamed, parameters=names)
    assert nats(other, moved(renamed)) == pytest.approx(nats(prior, moved(net())), rel=1e-12)
    at = moved(net())
    before = nats(prior, at)
    lifelong.widen(model, "2", 6)
    if structure in ("isotropic", "eigen_kronecker"):
        with pytest.raises(ValueError, match="cannot follow a change of the model; pass structure"):
            prior.grow(model)
        with pytest.warns(UserWarning, match="leaves behind .*2.weight"):
            left = prior.transfer(model, allow_unmatched=True)
        assert not bool(curvature_of(left).diagonal()["2.weight"].any())
        left.update(model, task(1))
        for converted in ("diagonal", "dense"):
            grown = prior.transfer(model, structure=converted)
            assert grown.recipe.structure == converted
            grown.update(model, task(1))
        return
    grown = prior.grow(model)
    lifelong.widen(at, "2", 6)
    with torch.no_grad():  # where the new rows are as at the anchor, nothing is new
        at[2].weight[4:], at[2].bias[4:] = model[2].weight[4:], model[2].bias[4:]
    new = sum(float(p[4:].detach().square().sum()) for p in (at[2].weight, at[2].bias))
    precision = 0.0 if prior.regulariser is None else prior.regulariser.precision
    assert nats(grown, at) - 0.5 * precision * new == pytest.approx(before, rel=1e-10)
    grown.update(model, task(1))


def test_recipes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Recipe(structure="low_rank", rank=0)
    for structure in (None, "path"):
        with pytest.raises(ValueError, match="is not fitted to data; name one that is"):
            fit_curvature(Recipe(structure=structure), Pass(net(), task(0), Gaussian()))  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", get_args(Fitted))
@pytest.mark.parametrize("score", ["leverage", "sensitivity"])
def test_scores_that_need_a_variance_read_it_off_any_structure(structure: str, score: str) -> None:
    recipe = Recipe(structure=structure, memory=4, score=score, gradient="anchored")
    prior = Prior(Categorical(), recipe, (Regulariser(1.0),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for _ in range(2):
        data = torch.randn(8, 3).double(), torch.arange(8) % 2
        prior = prior.update(model, data)
    assert len(prior.memory) == 8


@pytest.mark.parametrize("structure", ["diagonal", "isotropic", "block", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_can_be_forgotten_in_other_batches(structure: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    data = torch.randn(20, 4).to(dtype), torch.randint(0, 3, (20,))
    prior = Prior(Categorical(), Recipe(structure=structure, gradient="anchored"))
    left = prior.update(model, data).forget(model, data, batch_size=7)
    before = prior.update(model, data).weight.curvature
    largest = max(float(v.abs().max()) for v in left.weight.curvature.diagonal().values())
    assert largest < 1e-5 * max(float(v.max()) for v in before.diagonal().values())
