"""The prior as a value: sums, multiples, files, and that yesterday's never changes."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    Examples,
    Gaussian,
    Prior,
    Recipe,
    Regulariser,
    checkpoint,
)

X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
DATA = Examples(X, torch.arange(20) % 4)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return model


PRIORS = {
    "full": lifelong.gradient_reconstruction(
        Categorical(), memory=8, replay=0.5, gradient="stored", precision=0.1, temperature=2.0
    ),
    "dense": lifelong.online_laplace(Categorical(), structure="dense"),
    "fromp": lifelong.fromp(Categorical(), memory=8),
    "derpp": lifelong.derpp(Categorical(), memory=8),
}


def learned(name: str) -> tuple[Prior, nn.Module]:
    """After one task, at weights that have moved on."""
    model = net()
    data = replace(DATA, head=(0, 1, 2, 3)) if name == "full" else DATA
    prior = PRIORS[name].update(model, data, generator=torch.Generator().manual_seed(0))
    return prior, moved(model)


def everything(value: Any) -> list[Tensor]:
    """All tensors inside a state, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [t for v in inner for t in everything(v)]


@pytest.mark.parametrize("name", PRIORS)
def test_a_sum_is_a_sum_and_a_multiple_a_multiple(name):
    one, model = learned(name)
    assert torch.allclose((one + one)(model), 2 * one(model))
    assert torch.allclose((0.3 * one)(model), 0.3 * one(model))
    assert torch.allclose((one * 2)(model), 2 * one(model))
    total = one + 0.5 * one
    assert (total.num_data, total.num_tasks) == (40, 2)
    grown = total.update(model, DATA)
    assert grown.num_data == 60
    assert torch.isfinite(grown(model))


def test_sums_of_fromp_keep_the_curvature_of_both():
    one, _ = learned("fromp")
    assert one.curvature is not None
    both = (one + one).curvature
    assert both is not None
    for n, v in both.diagonal().items():
        assert torch.allclose(v, 2 * one.curvature.diagonal()[n])


def test_a_discount_of_fromp_stays_in_the_curvature_that_kernels_are_made_of():
    one, model = learned("fromp")
    plain, less = one.update(model, DATA).curvature, one.discount(0.5).update(model, DATA).curvature
    assert one.curvature is not None
    assert plain is not None
    assert less is not None
    for n, v in one.curvature.diagonal().items():
        assert torch.allclose(less.diagonal()[n], plain.diagonal()[n] - 0.5 * v)


def test_what_is_no_prior_cannot_be_added():
    with pytest.raises(TypeError, match="unsupported operand"):
        Prior(Categorical()) + 1  # type: ignore[operator]


@pytest.mark.parametrize("name", PRIORS)
def test_an_update_makes_a_new_prior_and_leaves_the_old_one(name):
    prior, model = learned(name)
    before = [t.clone() for t in everything(prior.state_dict())]
    value = prior(model).detach()
    newer = prior.update(moved(model), DATA)
    newer.discount(0.5)
    assert newer is not prior
    assert all(map(torch.equal, everything(prior.state_dict()), before))
    with pytest.raises(FrozenInstanceError):
        prior.num_data = 3  # type: ignore[misc]
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1
    assert torch.allclose(prior(model), value)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("way", ["file", "pickle"])
def test_a_prior_comes_back_from_a_file_to_the_bit(tmp_path, name, way):
    prior, model = learned(name)
    if way == "file":
        path = checkpoint.save(tmp_path / "p", prior.state_dict(), kind="prior")
        again = Prior.from_state_dict(checkpoint.load(path, kind="prior"))
    else:
        again = pickle.loads(pickle.dumps(prior))
    assert torch.equal(again(model), prior(model))
    assert (again.recipe, again.likelihood, again.heads) == (
        prior.recipe, prior.likelihood, prior.heads,
    )  # fmt: skip
    draws = [
        p(model, batch_size=3, generator=torch.Generator().manual_seed(0)) for p in (prior, again)
    ]
    assert torch.equal(*draws)
    newer = [
        p.update(model, DATA, generator=torch.Generator().manual_seed(0)) for p in (prior, again)
    ]
    assert torch.equal(*(p(moved(net())) for p in newer))


def test_a_state_of_a_newer_version_warns_of_what_it_does_not_know():
    state = learned("full")[0].state_dict()
    state["recipe"] = {**state["recipe"], "telepathy": 1}
    with pytest.warns(UserWarning, match=r"Recipe: unknown keys \['telepathy'\] are ignored"):
        Prior.from_state_dict(state)


def test_a_state_with_something_missing_or_unknown_raises():
    state = learned("full")[0].state_dict()
    with warnings.catch_warnings(), pytest.raises(KeyError, match="terms"):
        Prior.from_state_dict({k: v for k, v in state.items() if k != "terms"})
    with pytest.raises(ValueError, match="unknown term 'Oracle'; a newer version"):
        Prior.from_state_dict({**state, "terms": [{"name": "Oracle"}]})
    with pytest.raises(ValueError, match="'system' is not known to lifelong.likelihoods"):
        Prior.from_state_dict({**state, "likelihood": {"name": "system"}})


def test_another_dtype_and_back():
    prior, model = learned("full")
    single = prior.to(dtype=torch.float32)
    assert single(net().float()).dtype == torch.float32
    assert torch.allclose(single.to(dtype=torch.float64)(model), prior(model), rtol=1e-5)


def test_replace_swaps_the_regulariser_alone():
    prior, model = learned("full")
    swapped = prior.replace(regulariser=Regulariser(3.0))
    assert prior.regulariser is not None
    gap = Regulariser(3.0)(model) - prior.regulariser(model)
    assert torch.allclose(swapped(model) - prior(model), gap)


def test_discount_leaves_the_regulariser():
    prior, model = learned("full")
    assert prior.regulariser is not None
    r = prior.regulariser(model)
    assert torch.allclose(prior.discount(0.25)(model) - r, 0.25 * (prior(model) - r))


def test_a_prior_of_nothing_is_zero_and_has_no_gradient():
    value = Prior(Categorical())(net())
    assert float(value) == 0
    assert not value.requires_grad


def test_the_memory_is_read_in_eval_mode_and_the_mode_is_restored():
    model = nn.Sequential(nn.Linear(2, 5), nn.Dropout(0.5), nn.Linear(5, 4)).double().train()
    prior = PRIORS["derpp"].update(model, DATA)
    assert torch.equal(prior(model), prior(model))
    assert model.training


@pytest.mark.parametrize("likelihood", [Gaussian(0.2), Bernoulli()])
def test_likelihoods_are_saved_with_their_settings(likelihood):
    assert Prior.from_state_dict(Prior(likelihood).state_dict()).likelihood == likelihood


def test_a_recipe_of_ones_own():
    recipe = Recipe("mine", structure="diagonal", memory=6, gradient="stored", score="leverage")
    prior = Prior(Categorical(), recipe, (Regulariser(0.5),)).update(net(), DATA)
    assert [type(t).__name__ for t in prior.terms] == ["Regulariser", "WeightTerm", "MemoryTerm"]
    assert prior.num_bytes == sum(t.num_bytes for t in prior.terms)
    scores = prior.identify(net(), DATA)
    assert bool((scores > 0).all())


@pytest.mark.parametrize("whole", [True, False])
def test_drawn_by_class_an_item_stands_for_its_own_class(whole):
    """100, 20 and 6 examples, as many of each kept: sums over memory are unbiased all the same."""
    labels = torch.tensor([0] * 100 + [1] * 20 + [2] * 6)
    inputs = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(0)).double()
    data = Examples(inputs, labels) if whole else TensorDataset(inputs, labels)
    model = torch.nn.Linear(4, 3).double()
    prior = lifelong.kprior(lifelong.Categorical(), memory=9, population=True, score="random")
    items = prior.memorise(model, data, generator=torch.Generator().manual_seed(0))
    weights = [items.soft_weight[items.labels == c] for c in range(3)]
    torch.testing.assert_close(
        torch.stack([w.sum() for w in weights]), torch.tensor([100.0, 20.0, 6.0]).double()
    )
