"""Curvature that follows a change of the model: each structure against the dense matrix P G Pᵀ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Prior, Recipe, Regulariser
from lifelong.curvature import BlockDiagonal, Curvature, estimate
from lifelong.curvature.follow import Place, follow, followed
from lifelong.errors import StaleAnchorError
from lifelong.models import parameters
from lifelong.refit import refit
from lifelong.testing import laws
from lifelong.testing.cases import First, build, linear_gaussian

FOLLOWS = ("diagonal", "dense", "low_rank", "kronecker", "block")


def conv(channels: int, features: int, outputs: int, *, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 3, 2, bias=bias), nn.Tanh(), nn.Flatten(), nn.Linear(features, outputs)
    ).double()


def matrix(curvature: Curvature, names: Any) -> Tensor:
    return curvature.dense().reordered(dict.fromkeys(names)).matrix


@given(
    structure=st.sampled_from(FOLLOWS),
    channels=st.integers(1, 3),
    features=st.integers(10, 14),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
    rows=st.permutations([0, 1, 2, 3, -1]),
)
def test_each_structure_follows_as_the_dense_matrix(
    structure, channels, features, outputs, bias, rows
):
    """A convolution with other channels, an output layer with other features and rows; a bias
    that goes; names that change."""
    torch.manual_seed(0)
    old = conv(2, 12, 4)
    data = torch.randn(6, 2, 3, 3).double(), torch.arange(6) % 4
    g = estimate(old, data, Categorical(), structure=structure)
    new = conv(channels, features, outputs, bias=bias)
    current = {f"body.{n}": p.detach() for n, p in parameters(new).items()}
    places = {
        n: Place(n.removeprefix("body."), torch.tensor(rows[:outputs]) if ".3." in n else None)
        for n in current
    }
    moved, lost = follow(g, current, places)
    assert lost == []
    truth, _ = follow(g.dense(), current, places)
    torch.testing.assert_close(matrix(moved, current), matrix(truth, current))
    assert {n: moved.shapes[n] for n in current} == {n: p.shape for n, p in current.items()}
    if structure in ("kronecker", "block") and min(rows[:outputs]) >= 0:
        assert isinstance(moved, BlockDiagonal)
        assert len(moved.blocks) == len(g.blocks)


def test_the_dense_matrix_follows_entry_by_entry():
    torch.manual_seed(0)
    old = {"a": torch.randn(3, 2), "b": torch.randn(2)}
    g = lifelong.Dense(torch.randn(8, 8), {n: v.shape for n, v in old.items()})
    new = {"b": torch.zeros(3), "x": torch.zeros(2, 1)}
    places = {"b": Place("b"), "x": Place("a", torch.tensor([2, -1]))}
    moved = matrix(follow(g, new, places)[0], new)
    at = torch.tensor([6, 7, -1, 4, -1])  # in the old flat vector
    for i, a in enumerate(at.tolist()):
        for j, b in enumerate(at.tolist()):
            assert moved[i, j] == (0 if min(a, b) < 0 else g.matrix[a, b])
    values = followed(old, {"b": torch.full((3,), 9.0), "x": torch.full((2, 1), 9.0)}, places)
    assert values["b"].tolist() == [*old["b"].tolist(), 9.0]
    assert values["x"].tolist() == [[float(old["a"][2, 0])], [9.0]]


def test_what_cannot_follow():
    with pytest.raises(StaleAnchorError, match=r"of shape \(3,\) cannot become one of \(3, 1\)"):
        Place("a").fit(torch.zeros(3), torch.zeros(3, 1))
    model = conv(2, 12, 4)
    data = torch.randn(6, 2, 3, 3).double(), torch.arange(6) % 4
    current = {n: p.detach() for n, p in parameters(conv(1, 12, 4)).items()}
    places = {n: Place(n) for n in current}
    g = estimate(model, data, Categorical(), structure="eigen_kronecker")
    with pytest.raises(ValueError, match=r"BlockDiagonal curvature of \['0.weight', '0.bias'\]"):
        follow(g, current, places)
    moved, lost = follow(g, current, places, leave=True)
    assert lost == ["0.weight", "0.bias"]
    dense = matrix(moved, current)
    assert not bool(dense[: 3 * 4 + 3].any())
    torch.testing.assert_close(dense[15:, 15:], matrix(g, parameters(model))[27:, 27:])
    # c I keeps its form where numbers go, and not where they come.
    g = estimate(model, data, Categorical(), structure="isotropic")
    assert follow(g, current, places)[0].shapes["0.weight"] == (3, 1, 2, 2)
    wider = {n: p.detach() for n, p in parameters(conv(3, 12, 4)).items()}
    with pytest.raises(ValueError, match="Isotropic curvature"):
        follow(g, wider, places)
    moved, _ = follow(g, wider, places, leave=True)
    assert not bool(matrix(moved, wider).any())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("first", ["weight", "bias"])
@pytest.mark.parametrize("structure", [*FOLLOWS, "eigen_kronecker"])
def test_a_layer_gains_its_bias_or_its_weight(structure, first, groups):
    """P G Pᵀ + G' by the sum = that of the dense matrices, in either order, in the blocks of G'."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, 2, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double()
    data = torch.randn(8, 2, 3, 3).double(), torch.arange(8) % 3
    likelihood, of = Categorical(), [f"0.{first}", f"3.{first}"]
    part = estimate(model, data, likelihood, structure=structure, params=of)
    new = estimate(model, data, likelihood, structure=structure)
    current = {n: p.detach() for n, p in parameters(model).items()}
    old, _ = follow(part, current, {n: Place(n if n in of else None) for n in current})
    truth = matrix(old, current) + matrix(new, current)
    assert bool(matrix(old, current).any())
    for total in (old + new, new + old):
        torch.testing.assert_close(matrix(total, current), truth)
        if isinstance(total, BlockDiagonal):
            assert [list(b.shapes) for b in total.blocks] == [list(b.shapes) for b in new.blocks]
            merged = total.merge() if "kronecker" in structure else total
            torch.testing.assert_close(matrix(merged, current).trace(), truth.trace())


@pytest.mark.parametrize("first", ["weight", "bias"])
@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "eigen_kronecker", "block"])
def test_a_prior_learns_on_after_a_layer_has_gained_a_part(structure, first):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    data = torch.randn(12, 4).double(), torch.arange(12) % 3
    model.get_parameter("bias" if first == "weight" else "weight").requires_grad_(False)
    prior = lifelong.recommended(Categorical(), memory=4, structure=structure)
    prior = prior.update(model, data)
    prior = prior.grow(model.requires_grad_()).update(model, data)
    assert set(prior.weight.curvature.shapes) == {"weight", "bias"}


@pytest.mark.parametrize("kind", ["rebase", "transfer"])
def test_shares_of_groups_follow(kind):
    """A group leaves unseen, also after the regulariser or the features have changed."""
    case = linear_gaussian()
    data = case.data[0]
    groups = torch.arange(len(data)) % 3
    model = build(lambda: First(4, 2))(0)
    prior = Prior(case.likelihood, Recipe(structure="dense", memory=0), (Regulariser(0.5),))
    refit(model, prior, data)
    prior = prior.update(model, data, groups=groups)
    if kind == "rebase":
        prior = prior.replace(regulariser=Regulariser(2.0))
    else:
        model = build(lambda: First(3, 2))(1)
        prior = prior.transfer(model)
    refit(model, prior)
    prior = prior.rebase(model).forget(model, groups=[1])
    refit(model, prior)
    rest = data[(groups != 1).nonzero().squeeze(1)]
    batch = laws.retrained(case, model, prior.regulariser, rest)
    assert laws.distance(laws.weights(model), laws.weights(batch)) < 1e-8


@pytest.mark.parametrize("to", ["diagonal", "dense"])
@pytest.mark.parametrize("structure", ["eigen_kronecker", "kronecker", "low_rank", "block"])
def test_shares_of_groups_are_converted_with_their_sum(structure, to):
    """Convert, then forget a group = forget it, then convert."""
    case = linear_gaussian()
    data, model = case.data[0], case.make_model(0)
    groups = torch.arange(len(data)) % 2
    recipe = Recipe(structure=structure, rank=40, memory=0)
    prior = Prior(case.likelihood, recipe, (Regulariser(0.5),)).update(model, data, groups=groups)
    before = prior.forget(model, groups=[1]).transfer(model, structure=to)
    after = prior.transfer(model, structure=to).forget(model, groups=[1])
    at = laws.moved(model)
    torch.testing.assert_close(after(at), before(at))
    assert type(after.weight.groups.shares[0].curvature) is type(after.weight.curvature)
