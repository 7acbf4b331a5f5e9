"""Soft labels of many classes: the largest outputs, and one number for the others."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Memory, Prior, Recipe, Regulariser
from lifelong.memory import memorise
from lifelong.recall import slope
from lifelong.store import open_store
from lifelong.terms import MemoryTerm
from lifelong.testing import cases, laws
from lifelong.top_outputs import TopOutputs

CASE = {c.name: c for c in cases.networks()}["mlp Categorical"]
SIZES = st.tuples(st.integers(1, 6), st.integers(2, 12), st.integers(1, 12), st.integers(0, 999))


def outputs(n: int, width: int, seed: int, scale: float = 3.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, width, generator=g, dtype=torch.float64)


# ------------------------------------------------------------------ one distribution


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_kept_and_the_rest_is_even(sizes: tuple[int, int, int, int]) -> None:
    n, width, k, seed = sizes
    f = outputs(n, width, seed)
    top = TopOutputs.of(f, k)
    p, q = f.softmax(1), top[slice(None)].softmax(1)
    order = p.argsort(1, descending=True)
    kept, left = order[:, :k], order[:, k:]
    torch.testing.assert_close(q.gather(1, kept), p.gather(1, kept))
    if k < width:
        mass = p.gather(1, left).sum(1, keepdim=True)
        torch.testing.assert_close(
            q.gather(1, left), (mass / (width - k)).expand(-1, width - k), atol=1e-12, rtol=1e-9
        )
    if k >= width - 1:
        torch.testing.assert_close(q, p)


@given(SIZES)
@settings(max_examples=60, deadline=None)
def test_the_error_is_bounded_by_the_mass_that_is_left(sizes: tuple[int, int, int, int]) -> None:
    n, width, k, seed = sizes
    f = outputs(n, width, seed)
    q = TopOutputs.of(f, k)[slice(None)]
    mass = 1 - f.softmax(1).topk(min(k, width), dim=1).values.sum(1)
    kl = Categorical().kl(f, q)
    spread = math.log(max(1, width - k))
    assert bool((kl <= mass.clamp(min=0) * spread + 1e-9).all())
    distance = (f.softmax(1) - q.softmax(1)).abs().sum(1)
    assert bool((distance <= 2 * mass.clamp(min=0) + 1e-9).all())


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_under_a_head_the_largest_of_the_head_are_kept(sizes: tuple[int, int, int, int]) -> None:
    n, width, k, seed = sizes
    f = outputs(n, width, seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, width, generator=g) > 0.5
    mask[torch.arange(n), torch.randint(width, (n,), generator=g)] = True  # never empty
    q = TopOutputs.of(f, k, mask)[slice(None)]
    assert bool(torch.isfinite(q).all())
    p, q = (x.masked_fill(~mask, -torch.inf).softmax(1) for x in (f, q))
    best = p.argsort(1, descending=True)[:, : min(k, width)]
    torch.testing.assert_close(q.gather(1, best), p.gather(1, best))
    torch.testing.assert_close(q.sum(1), torch.ones(n, dtype=torch.float64))


def test_rows_as_a_tensor_gives_them() -> None:
    f = outputs(7, 5, 0)
    top = TopOutputs.of(f, 5)
    assert (len(top), top.shape, top.k, top.dtype) == (7, (7, 5), 5, torch.float64)
    torch.testing.assert_close(top[slice(None)], f)
    index = torch.tensor([4, 0, 4])
    torch.testing.assert_close(top[index], f[index])
    torch.testing.assert_close(top.select(slice(2, 5))[slice(None)], f[2:5])
    joined = TopOutputs.of(f[:3], 2).join([TopOutputs.of(f[:3], 2), top.select(slice(3, 7))])
    assert joined.k == 5
    torch.testing.assert_close(joined[slice(3, None)], f[3:])
    assert top.to(dtype=torch.float32).dtype == torch.float32
    assert TopOutputs.of(f, 2).num_bytes == 7 * (2 * 8 + 8 + 2 * 4)
    with pytest.raises(ValueError, match="at least one output of each item must be kept, got k=0"):
        TopOutputs.of(f, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_and_back(dtype: torch.dtype) -> None:
    top = TopOutputs.of(outputs(4, 9, 1).to(dtype), 3)
    again = TopOutputs.unpacked(top.packed(), top.k, top.width, dtype)
    for name, column in top.columns.items():
        assert torch.equal(again.columns[name], column)


# ------------------------------------------------------------------ memories


def remembered(k: int | None, case: cases.Case = CASE, n: int = 8) -> tuple[nn.Module, Memory]:
    model = case.make_model(0)
    return model, memorise(model, case.data[0], case.likelihood, budget=n, top_outputs=k)


def test_a_memory_of_a_few_outputs() -> None:
    model, whole = remembered(None)
    _, top = remembered(2)
    assert whole.is_whole
    assert not top.is_whole
    assert torch.equal(top.origin, whole.origin)
    torch.testing.assert_close(top.outputs, TopOutputs.of(whole.outputs, 2)[slice(None)])
    assert top.num_bytes < whole.num_bytes + 8 * 100
    assert top.with_top(2) is top
    assert top.with_top(None) is top
    both = top.add(whole)
    assert not both.is_whole
    torch.testing.assert_close(both[slice(0, 8)].outputs, top.outputs)
    draw = top.draw(4, torch.Generator().manual_seed(0))
    sample = top.sample(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw.outputs, sample.reference)
    moved = laws.moved(model, by=0.3, seed=1)
    again = top.refresh(moved)
    assert not again.is_whole
    with torch.no_grad():
        f = moved(again.inputs)
    torch.testing.assert_close(again.outputs, TopOutputs.of(f, 2)[slice(None)])


def test_bytes_of_many_classes() -> None:
    """1,000 classes: 20 of them are a twentieth of the bytes of a soft label."""
    f = torch.randn(100, 1000)
    batch = lifelong.data.Batch(torch.arange(100), torch.arange(100), torch.arange(100))
    from lifelong.memory import remember

    whole = remember(batch, f)
    top = whole.with_top(20)
    assert whole.outputs.nbytes == 400_000
    assert top.reference.num_bytes == 100 * (20 * 8 + 4)  # type: ignore[union-attr]
    assert Memory.from_state_dict(top.state_dict()).num_bytes == top.num_bytes


def test_a_budget_in_bytes_holds_more() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 200)
    data = Examples(torch.randn(400, 3), torch.arange(400) % 200)
    few = memorise(model, data, Categorical(), budget="20kB", per_class=False)
    many = memorise(model, data, Categorical(), budget="20kB", per_class=False, top_outputs=5)
    assert len(many) > 5 * len(few)
    assert many.num_bytes <= 20_000


# ------------------------------------------------------------------ priors


def prior_of(k: int | None, **options: Any) -> Prior:
    recipe = Recipe("t", structure="diagonal", memory=6, top_outputs=k, **options)
    return Prior(CASE.likelihood, recipe, (Regulariser(0.5),))


@pytest.mark.parametrize("k", [1, 2])
def test_the_gradient_at_the_anchor_is_exact_all_the_same(k: int) -> None:
    """What is cut off a soft label is made up for in g; also after a rebase, a removal."""
    model, data = CASE.make_model(0), CASE.data[0]
    prior = prior_of(k)
    after = prior.update(model, data)
    assert after.memory is not None
    assert not after.memory.is_whole
    truth = laws.slope(model, laws.nats(CASE.likelihood, model, data) + prior(model))
    assert laws.distance(laws.slope(model, after(model)), truth) < 1e-12
    based = after.rebase(model)
    assert laws.distance(laws.slope(model, based(model)), truth) < 1e-12
    gone = after.memory.origin[:2]
    left = after.forget(model, ids=gone, on_indefinite="clip")
    rest = data[(~torch.isin(data.ids, gone)).nonzero().squeeze(1)]
    truth = laws.slope(model, laws.nats(CASE.likelihood, model, rest) + prior(model))
    assert laws.distance(laws.slope(model, left(model)), truth) < 1e-12
    second = after.update(model, CASE.data[1])
    both = laws.nats(CASE.likelihood, model, data, CASE.data[1]) + prior(model)
    assert laws.distance(laws.slope(model, second(model)), laws.slope(model, both)) < 1e-12


def test_all_outputs_kept_is_the_same_prior() -> None:
    model, data = CASE.make_model(0), CASE.data[0]
    width = model(CASE.data[0].batch(slice(0, 1)).inputs).shape[1]
    whole, top = (prior_of(k).update(model, data) for k in (None, width))
    place = laws.moved(model, by=0.3, seed=2)
    torch.testing.assert_close(top(place), whole(place), rtol=1e-9, atol=1e-9)
    for n in (None, 3):
        generator = torch.Generator().manual_seed(1)
        one = whole(place, batch_size=n, generator=generator)
        two = top(place, batch_size=n, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_files_stores_and_changes_keep_the_form(tmp_path: Path) -> None:
    model, data = CASE.make_model(0), CASE.data[0]
    prior = prior_of(2).update(model, data)
    laws.round_trip(prior, model, tmp_path)
    with open_store(tmp_path / "store", "a") as store:
        store.save_prior(prior)
        again = store.load_prior()
        assert again.memory is not None
        assert not again.memory.is_whole
        assert laws.identical(prior, again, model) == 0
        assert not store.memory().is_whole
        assert store.verify().ok
        assert store.memory([3]).outputs.shape == (1, again.memory.outputs.shape[1])
    for changed in (
        prior.discount(0.5),
        prior.to(dtype=torch.float32),
        prior.transfer(CASE.make_model(1), previous=model),
        prior.relabel(model, data[prior.memory.origin[:1]], [1]),  # type: ignore[union-attr]
    ):
        assert changed.memory is not None
        assert not changed.memory.is_whole
    kept = prior.memory
    assert kept is not None
    term = MemoryTerm(kept)
    torch.testing.assert_close(
        slope(term, model, CASE.likelihood)[next(iter(dict(model.named_parameters())))].shape,
        next(iter(model.parameters())).shape,
    )


def test_a_head_that_grows_and_loses_classes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 5).double()
    data = Examples(torch.randn(20, 4).double(), torch.arange(20) % 5)
    recipe = Recipe("t", memory=None, top_outputs=2)
    prior = Prior(Categorical(), recipe, (Regulariser(0.5),)).update(model, data)
    wider = nn.Linear(4, 7).double()
    before = prior.memory.outputs.softmax(1)  # type: ignore[union-attr]
    for new, whole in (("mask", False), ("zero", True)):  # until they are asked for again
        grown = prior.transfer(
            wider, classes=(0, 1, 2, 3, 4, None, None), previous=model, new_classes=new
        )  # type: ignore[arg-type]
        assert grown.memory is not None
        assert grown.memory.is_whole == whole
        assert grown.memory.outputs.shape == (20, 7)
        after = Categorical().mean(Categorical().mask(grown.memory.outputs, grown.memory.mask))
        torch.testing.assert_close(after[:, :5], before, atol=1e-6, rtol=1e-6)
        later = grown.update(wider, data)
        assert later.memory is not None
        assert not later.memory.is_whole
    fewer = prior.transfer(nn.Linear(4, 3).double(), classes=(0, 1, 2), previous=model)
    assert fewer.memory is not None
    assert not fewer.memory.is_whole
    assert fewer.memory.outputs.shape[1] == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_outputs": 0}, "top_outputs must be at least 1, got 0"),
        ({"top_outputs": 5, "divergence": lifelong.divergences.Logit()}, "only KL reads"),
        ({"top_outputs": 5, "kernel": "gp"}, "only KL reads"),
    ],
)
def test_what_a_recipe_cannot_be(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Recipe("t", memory=5, **options)


def test_parts_on_ranks_keep_the_form() -> None:
    _, top = remembered(2)
    parts = [top.spread(r, 2) for r in range(2)]
    whole = Memory.joined(parts)
    torch.testing.assert_close(whole.outputs, top.outputs)
    assert torch.equal(replace(whole, reference=top.reference).origin, top.origin)
