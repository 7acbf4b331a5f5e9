"""Selection rules against brute force, streamed against direct, and the law of the reservoir."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lifelong import Bernoulli, Categorical, Examples, Prior, Recipe, select
from lifelong.data import Batch
from lifelong.memory import Memory, remember
from lifelong.recall import merge

# Few distinct scores, so that ties are common.
examples = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30)


def per_class_by_hand(scores: list[int], labels: list[int], k: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    quota = k // len(set(labels))
    within, left_over, taken = [], [], dict.fromkeys(labels, 0)
    for i in order:
        taken[labels[i]] += 1
        (within if taken[labels[i]] <= quota else left_over).append(i)
    return (within + left_over)[:k]


@given(examples, st.integers(0, 35))
def test_top_k_takes_the_best_and_of_equals_the_first(pairs, k):
    scores = torch.tensor([score for score, _ in pairs])
    expected = sorted(range(len(pairs)), key=lambda i: (-pairs[i][0], i))[:k]
    assert select.top_k(scores, k).tolist() == expected
    ascending = sorted(range(len(pairs)), key=lambda i: (pairs[i][0], i))[:k]
    assert select.top_k(scores, k, descending=False).tolist() == ascending


@given(examples, st.integers(0, 35))
def test_per_class_is_the_rule_done_by_hand(pairs, k):
    scores, labels = (list(column) for column in zip(*pairs, strict=True))
    found = select.per_class(torch.tensor(scores), torch.tensor(labels), k)
    assert found.tolist() == per_class_by_hand(scores, labels, k)


def test_per_class_fills_the_places_of_a_small_class_with_the_best_of_the_rest():
    scores = torch.tensor([9.0, 8, 7, 6, 5, 1])
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    # Quota 5 // 3 = 1 each: 0, 3, 5; the two places left over go to 1 and 2.
    assert select.per_class(scores, labels, 5).tolist() == [0, 3, 5, 1, 2]
    assert select.per_class(scores, labels, 5, descending=False).tolist() == [5, 4, 2, 3, 1]


@given(examples, st.integers(1, 12), st.integers(1, 9), st.booleans(), st.booleans())
def test_a_streamed_pool_of_candidates_selects_what_the_whole_would(
    pairs, k, batch_size, balanced, descending
):
    scores, labels = (torch.tensor(column) for column in zip(*pairs, strict=True))
    pool = torch.empty(0, dtype=torch.int64)
    for newcomers in torch.arange(len(pairs)).split(batch_size):
        pool = torch.cat([pool, newcomers])
        kept = select.candidates(
            scores[pool], labels[pool] if balanced else None, k, descending=descending
        )
        pool = pool[kept]
        assert len(pool) <= 2 * k + len(labels.unique())
    if balanced:
        streamed = pool[select.per_class(scores[pool], labels[pool], k, descending=descending)]
        direct = select.per_class(scores, labels, k, descending=descending)
    else:
        streamed = pool[select.top_k(scores[pool], k, descending=descending)]
        direct = select.top_k(scores, k, descending=descending)
    assert streamed.tolist() == direct.tolist()


def k_centre_by_hand(points: Tensor, k: int) -> list[int]:
    chosen = [0]
    while len(chosen) < min(k, len(points)):
        rest = [i for i in range(len(points)) if i not in chosen]
        near = [min(float((points[i] - points[j]).square().sum()) for j in chosen) for i in rest]
        chosen.append(rest[near.index(max(near))])
    return chosen


@given(st.lists(st.tuples(*[st.integers(-3, 3)] * 2), min_size=1, max_size=12), st.integers(1, 14))
def test_k_centre_takes_the_farthest_and_no_index_twice(points, k):
    features = torch.tensor(points, dtype=torch.float64)
    assert select.k_centre(features, k).tolist() == k_centre_by_hand(features, k)


def test_k_centre_covers_within_twice_the_best_radius():
    points = torch.rand(9, 2, dtype=torch.float64)

    def radius(chosen: list[int]) -> float:
        return float(torch.cdist(points, points[chosen]).amin(1).max())

    best = min(radius(list(c)) for c in itertools.combinations(range(9), 3))
    assert radius(select.k_centre(points, 3).tolist()) <= 2 * best


@pytest.mark.parametrize("rule", ["top_k", "per_class", "candidates", "k_centre"])
def test_a_negative_size_is_refused(rule):
    args = (torch.ones(3), torch.zeros(3, dtype=torch.int64))[: 1 if rule == "top_k" else 2]
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        getattr(select, rule)(*(args[:1] if rule == "k_centre" else args), -1)


def test_k_centre_needs_a_start_that_exists():
    with pytest.raises(ValueError, match="start must lie in 0 to 2, got 3"):
        select.k_centre(torch.ones(3, 1), 2, start=3)


@given(st.lists(st.integers(-1, 4), max_size=30), st.integers(0, 30))
def test_what_is_kept_represents_all_and_each_class_its_own(labels: list[int], k: int) -> None:
    kept = labels[:k]
    found = select.represented(torch.tensor(kept).long(), torch.tensor(labels).long())
    by_hand = [labels.count(c) / kept.count(c) for c in kept]
    missed = len(labels) / max(1, sum(labels.count(c) for c in set(kept)))
    assert found.tolist() == pytest.approx([n * missed for n in by_hand])
    assert found.sum() == pytest.approx(len(labels) if kept else 0)


def items(ids: Tensor, task: int) -> Memory:
    labels = torch.zeros(len(ids), dtype=torch.int64)
    return remember(Batch(ids.unsqueeze(1), labels, ids), torch.zeros(len(ids), 2), task=task)


def reservoir(sizes: list[int], memory: int, generator: torch.Generator) -> Memory:
    """A stream of tasks of these sizes through a total memory."""
    recipe = Recipe(memory=memory, total=True, score="random", per_class=False, population=True)
    held, seen = None, 0
    for task, size in enumerate(sizes):
        ids = torch.randperm(size, generator=generator)[: min(memory, size)] + seen
        new = items(ids, task).scaled(size / len(ids))
        held = merge(held, new, recipe, seen, size, Categorical(), generator).held
        seen += size
    assert held is not None
    return held


def test_a_reservoir_holds_every_example_of_the_stream_equally_often():
    sizes, memory, rounds = [3, 12, 5], 5, 500
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(sum(sizes))
    for _ in range(rounds):
        held = reservoir(sizes, memory, generator)
        assert len(held) == memory
        assert len(held.origin.unique()) == memory
        counts[held.origin] += 1
    p = memory / sum(sizes)
    z = (counts - rounds * p) / (rounds * p * (1 - p)) ** 0.5
    assert z.abs().max() < 4  # 20 of them: 1e-3 by chance, and the seed is fixed
    by_task = torch.stack([part.sum() for part in counts.split(sizes)])
    assert torch.allclose(by_task / counts.sum(), torch.tensor(sizes) / sum(sizes), atol=0.03)


def test_the_items_of_a_reservoir_stand_for_all_that_was_seen():
    held = reservoir([30, 50], 10, torch.Generator().manual_seed(0))
    assert held.soft_weight.tolist() == [8.0] * 10


def in_total(counts: list[list[int]], recipe: Recipe, seed: int = 0) -> Memory:
    """The memory of a prior that learned tasks of so many examples of each class."""
    net = torch.nn.Linear(1, max(len(c) for c in counts)).double()
    prior, generator = Prior(Categorical(), recipe), torch.Generator().manual_seed(seed)
    for task in counts:
        labels = torch.arange(len(task)).repeat_interleave(torch.tensor(task))
        inputs = torch.randn(len(labels), 1, generator=generator, dtype=torch.float64)
        prior = prior.update(net, Examples(inputs, labels), generator=generator)
    assert prior.memory is not None
    return prior.memory


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=3, max_size=3), min_size=1, max_size=3),
    st.integers(1, 12),
    st.sampled_from([1.0, 0.5]),
    st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_balanced_total_memory_stands_for_as_many_of_each_class(
    counts: list[list[int]], memory: int, discount: float, seed: int
) -> None:
    """Of all classes together where it has no place for some; with the shares of each label."""
    recipe = Recipe(
        memory=memory, total=True, score="random", population=True, gradient="none",
        discount=discount, soft=0.25, hard=0.75,
    )  # fmt: skip
    held = in_total(counts, recipe, seed)
    age = torch.arange(len(counts) - 1, -1, -1, dtype=torch.float64)
    believed = (torch.tensor(counts) * discount ** age[:, None]).sum(0)
    stands_for = held.soft_weight + held.hard_weight
    found = torch.bincount(held.labels, stands_for, minlength=3)
    if memory >= 3:
        torch.testing.assert_close(found, believed)
    torch.testing.assert_close(found.sum(), believed.sum())
    torch.testing.assert_close(held.soft_weight, 0.25 * stands_for)


@pytest.mark.parametrize("score", ["random", "lambda"])
def test_a_past_that_was_discounted_stays_so_in_a_total_memory(score: str) -> None:
    recipe = Recipe(
        memory=20, total=True, score=score, per_class=False, population=True, gradient="none",
        discount=0.5,
    )  # fmt: skip
    for tasks, total in (2, 60 / 2 + 90), (3, 60 / 4 + 90 / 2 + 60):
        held = in_total([[30, 30], [30, 60], [60, 0]][:tasks], recipe)
        assert held.soft_weight.sum() == pytest.approx(total)
        old, new = (held.soft_weight[held.task == task] for task in (0, 1))
        assert len(old) > 1 < len(new)
        assert old.tolist() == pytest.approx([float(new[0]) / 2] * len(old))
        assert new.tolist() == pytest.approx([float(new[0])] * len(new))


def test_items_kept_by_their_true_label_stay_so_in_a_total_memory() -> None:
    recipe = Recipe(
        memory=20, total=True, score="random", per_class=False, population=True, gradient="none",
        replay_fraction=0.5,
    )  # fmt: skip
    held = in_total([[30, 30]], recipe)
    assert int((held.hard_weight > 0).sum()) == 10
    held = in_total([[30, 30], [20, 20]], recipe)
    assert bool(((held.hard_weight > 0) != (held.soft_weight > 0)).all())
    assert 0 < int((held.hard_weight > 0).sum()) < 20
    torch.testing.assert_close(held.hard_weight + held.soft_weight, torch.full((20,), 5.0).double())


def test_several_labels_for_each_example_are_not_balanced():
    generator = torch.Generator().manual_seed(0)
    x, f = torch.randn(8, 1, generator=generator), torch.randn(8, 3, generator=generator)
    labels = (torch.randn(8, 3, generator=generator) > 0).long()
    both = remember(Batch(x, labels, torch.arange(8)), f, task=0)
    recipe = Recipe(memory=5, total=True, score="lambda")
    held = merge(both[:4], both[4:], recipe, 4, 4, Bernoulli(), generator).held
    best = select.top_k(Bernoulli().hessian_trace(f), 5)
    assert held is not None
    assert set(held.origin.tolist()) == set(best.tolist())


def test_who_has_to_leave_the_reservoir_is_told():
    recipe = Recipe(memory=4, total=True, score="random", per_class=False)
    old, new = items(torch.arange(4), 0), items(torch.arange(4, 8), 1)
    generator = torch.Generator().manual_seed(0)
    merged = merge(old, new, recipe, 4, 4, Categorical(), generator)
    assert merged.held is not None
    assert merged.evicted is not None
    left = set(range(4)) - set(merged.held.origin.tolist())
    assert set(merged.evicted.origin.tolist()) == left


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=60),
    st.integers(1, 8),
    st.integers(1, 20),
    st.booleans(),
    st.booleans(),
)
def test_who_does_not_pass_the_bar_is_never_chosen(
    rows: list[tuple[int, int]], k: int, cut: int, balanced: bool, descending: bool
) -> None:
    """A bar of any earlier pool loses nobody who is chosen in the end."""
    scores = torch.tensor([float(s) for s, _ in rows])
    labels = torch.tensor([c for _, c in rows])
    seen = labels if balanced else None
    early = None if seen is None else seen[:cut]
    bar = select.bar(scores[:cut], early, k, descending=descending)
    late = None if seen is None else seen[cut:]
    passed = cut + select.passing(scores[cut:], late, bar, descending=descending)
    pool = torch.cat([torch.arange(min(cut, len(rows))), passed])
    if balanced:
        direct = select.per_class(scores, labels, k, descending=descending)
        found = pool[select.per_class(scores[pool], labels[pool], k, descending=descending)]
    else:
        direct = select.top_k(scores, k, descending=descending)
        found = pool[select.top_k(scores[pool], k, descending=descending)]
    assert found.tolist() == direct.tolist()
