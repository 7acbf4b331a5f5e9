"""A memory on disk: what goes in comes out, in every version that has it."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.store_trust import examples, needles, prior_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as serialise
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Gaussian, Memory, Prior, checkpoint
from lifelong.errors import (
    CheckpointError,
    ForgottenError,
    StoreDamagedError,
    StoreError,
    StoreReadOnlyError,
    StoreVersionError,
)
from lifelong.groups import Groups, Share
from lifelong.kernel_methods import KernelPrior
from lifelong.kernels import RBF
from lifelong.run_memory import without
from lifelong.store import MemoryStore, Where, open_store, read_export, scrub
from lifelong.store.scrub import marginal
from lifelong.terms import MemoryTerm, WeightTerm

in_folder = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["store", "store.lance"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MemoryStore]:
    with open_store(tmp_path / request.param) as opened:
        yield opened


def memory_of(inputs: Any, n: int, **changes: Any) -> Memory:
    g = torch.Generator().manual_seed(n)
    found = Memory(
        inputs=inputs,
        labels=torch.arange(n) % 3,
        reference=torch.randn(n, 3, generator=g),
        soft_weight=torch.rand(n, generator=g),
        hard_weight=torch.rand(n, generator=g),
        task=torch.arange(n) // 4,
        origin=torch.arange(n) * 10,
        head=torch.arange(n) % 2,
        heads=(None, (0, 2)),
    )
    return replace(found, **changes)


def same(a: Any, b: Any) -> bool:
    """Equal in every bit, type and shape."""
    if isinstance(a, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()
            if a.dtype != torch.bfloat16
            else torch.equal(a, b)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_memory(a: Memory, b: Memory) -> bool:
    """Also where heads are numbered in another order."""
    heads = [[m.heads[i] for i in m.head.tolist()] for m in (a, b)]
    strip = [
        {k: v for k, v in m.state_dict().items() if k not in ("head", "heads")} for m in (a, b)
    ]
    return heads[0] == heads[1] and same(*strip)


# ------------------------------------------------------------------- round trips


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


@in_folder
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)  # fmt: skip
def test_memories_come_back_bit_by_bit(tmp_path_factory, dtype, shape, n, floating, soft_labels):
    x = (torch.randn(n, *shape) * 3).to(dtype)
    labels = torch.randn(n, 2).to(floating) if soft_labels else torch.arange(n)
    memory = memory_of(x, n, labels=labels, reference=torch.randn(n, 3, dtype=floating))
    with open_store(tmp_path_factory.mktemp("s")) as store:
        assert store.append(memory) == 1
        assert same_memory(store.memory(), memory)
        order = list(range(n))[::-1]
        numbers = [item.item for item in store.items()]
        assert same_memory(store.memory([numbers[i] for i in order]), memory[torch.tensor(order)])
        assert same_memory(store.batch(torch.tensor([0, 0])), memory[torch.tensor([0, 0])])
        assert all(same(store.raw(i), row) for i, row in zip(numbers, x, strict=True))


def test_dicts_of_tensors_come_back(store: MemoryStore) -> None:
    inputs = {"input_ids": torch.arange(12).reshape(4, 3), "mask": torch.eye(4).bool()}
    memory = memory_of(inputs, 4)
    store.append(memory)
    assert same_memory(store.memory(), memory)
    assert same(store.raw(1), {k: v[0] for k, v in inputs.items()})
    assert store.items()[0].kind == "dict"


def encoded(seed: int, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> bytes:
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_encoded_images_come_back_as_they_came(store: MemoryStore, mode: str) -> None:
    images = [encoded(i, mode) for i in range(3)]
    store.append(memory_of(torch.empty(3, 0), 3), inputs=images)
    assert [store.raw(i) for i in (1, 2, 3)] == images
    pixels = store.memory().inputs
    assert isinstance(pixels, Tensor)
    assert pixels.shape == (3, 3 if mode == "RGB" else 1, 5, 6)
    first = np.asarray(Image.open(io.BytesIO(images[0])))
    assert np.array_equal(pixels[0].permute(1, 2, 0).squeeze(-1).numpy(), first)
    halves = store.memory(decode=lambda raw: torch.tensor([len(r) for r in raw])).inputs
    assert same(halves, torch.tensor([len(i) for i in images]))


def test_texts_need_a_decoder(store: MemoryStore) -> None:
    store.append(memory_of(torch.empty(2, 0), 2), inputs=["a\0b", "ü 語"])
    assert [store.raw(1), store.raw(2)] == ["a\0b", "ü 語"]
    with pytest.raises(ValueError, match="texts need a tokenizer; pass decode="):
        store.memory()
    lengths = store.memory(decode=lambda texts: torch.tensor([[len(t)] for t in texts])).inputs
    assert same(lengths, torch.tensor([[3], [3]]))


def test_images_that_do_not_fit_say_so(store: MemoryStore) -> None:
    store.append(memory_of(torch.empty(2, 0), 2), inputs=[encoded(0), encoded(1, size=(3, 3))])
    with pytest.raises(ValueError, match=r"several sizes, .*pass a decode= that crops"):
        store.memory()
    store.append(memory_of(torch.empty(1, 0), 1), inputs=[b"no image"])
    with pytest.raises(ValueError, match="input 0 is no image that Pillow reads"):
        store.memory([3])


def test_items_of_several_shapes_are_not_one_memory(store: MemoryStore) -> None:
    store.append(memory_of(torch.zeros(2, 3), 2))
    store.append(memory_of(torch.zeros(2, 4), 2, task=torch.full((2,), 7)))
    with pytest.raises(ValueError, match="differ in type or shape"):
        store.memory()
    assert len(store.memory(Where(task=7))) == 2


# ---------------------------------------------------------------------- versions


def test_each_commit_is_a_version_and_each_can_be_read(store: MemoryStore) -> None:
    memory = examples([1, 2, 3, 4, 5, 6])
    assert store.version == 0
    assert (len(store), store.history(), store.items()) == (0, [], [])
    assert store.append(memory[:4], message="first") == 1
    assert store.append(memory[4:]) == 2
    assert store.drop([1, "0:2"], message="wrong") == 3
    assert store.restore(1) == 4
    assert [len(store.items(version=v)) for v in range(5)] == [0, 4, 6, 4, 4]
    assert same_memory(store.memory(version=2), memory)
    assert same_memory(store.memory(version=3), memory[2:])
    assert same_memory(store.memory(), memory[:4])
    assert [(v.kind, v.message, v.added, v.dropped, v.size) for v in store.history()] == [
        ("append", "first", 4, 0, 4),
        ("append", "", 2, 0, 6),
        ("drop", "wrong", 0, 2, 4),
        ("restore", "", 2, 2, 4),
    ]
    between = store.diff(2, 3)
    assert (between.added, between.dropped, between.changed) == ((), (1, 2), ())
    assert store.diff(3, 1).added == (1, 2)
    assert store.diff(4, 1) == replace(store.diff(1, 1), a=4)
    store.restore(0)
    assert len(store) == 0
    assert store.verify().ok


def test_compacting_keeps_the_newest_versions_and_gives_room_back(store: MemoryStore) -> None:
    store.append(examples(list(range(1, 40)), 20_000))
    store.drop(Where(label=1))
    store.append(examples([50]), message="last")
    today, size = store.memory(Where(origin=50)), store.num_bytes
    dropped = store.diff(1, 2).dropped
    assert store.compact(keep=2) == 4
    assert [v.number for v in store.history()] == [2, 3, 4][-3:] or len(store.history()) >= 2
    assert same_memory(store.memory(Where(origin=50)), today)
    store.compact()
    assert store.num_bytes < 0.9 * size
    with pytest.raises(StoreVersionError, match="there is no version 1: 4 to 5 are kept"):
        store.restore(1)
    with pytest.raises(ValueError, match="no version has an item"):
        store.raw(dropped[0])
    item = store.append(examples([60])) and store.items(Where(origin=60))[0].item
    assert item == 41  # numbers of what went are not used again
    assert store.verify().ok
    with pytest.raises(ValueError, match="at least today's version is kept, got keep=0"):
        store.compact(keep=0)


def test_a_store_is_known_again_and_told_from_others(store: MemoryStore, tmp_path: Path) -> None:
    first = store.identity
    store.append(examples([1, 2]))
    store.compact()
    with open_store(store.path, "r") as again:
        assert store.identity == again.identity == first
    for name in ("other", "other.lance"):
        with open_store(tmp_path / name) as other:
            assert other.identity != first


@pytest.mark.parametrize("name", ["store", "store.lance"])
@in_folder
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3))
def test_versions_are_as_they_were_or_given_up(tmp_path_factory, name, keeps):
    """Whatever is compacted in which order: no version is kept by half, none comes back."""
    then: dict[int, list[int]] = {0: []}
    with open_store(tmp_path_factory.mktemp("s") / name) as store:
        for step, keep in enumerate(keeps):
            for call in (
                lambda n=step: store.append(examples([10 * n + 1, 10 * n + 2])),
                lambda: store.drop([store.items()[0].item]),
                lambda k=keep: store.compact(keep=k),
            ):
                version = call()
                then[version] = [item.item for item in store.items()]
        oldest = max(3 * step - keep for step, keep in enumerate(keeps, 1))
        for version, items in then.items():
            if version < oldest:
                with pytest.raises(StoreVersionError, match="are kept"):
                    store.memory(version=version)
            else:
                assert [item.item for item in store.items(version=version)] == items
        assert store.verify().ok


def test_draws_are_those_of_the_memory(store: MemoryStore) -> None:
    memory = examples(list(range(1, 50)))
    store.append(memory)
    for n in (1, 7, 48, 49, 1000):
        theirs = memory.draw(n, torch.Generator().manual_seed(n))
        assert same_memory(store.draw(n, torch.Generator().manual_seed(n)), theirs)
    with pytest.raises(ValueError, match="at least one item, got n=0"):
        store.draw(0)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 49\), got -1 to 49"):
        store.batch([-1, 49])


# ----------------------------------------------------------------------- listing


@in_folder
@given(st.data())
def test_filters_agree_with_a_plain_loop(tmp_path_factory, data):
    n = data.draw(st.integers(1, 30))
    small = st.integers(0, 3)
    columns = {name: data.draw(st.lists(small, min_size=n, max_size=n)) for name in ("t", "y")}
    words = data.draw(st.lists(st.text("ab é", max_size=3), min_size=n, max_size=n))
    memory = memory_of(torch.empty(n, 0), n, task=torch.tensor(columns["t"]),
                       labels=torch.tensor(columns["y"]))  # fmt: skip
    with open_store(tmp_path_factory.mktemp("s")) as store:
        store.append(memory, inputs=words, ids=[str(i) for i in range(n)], notes=words[::-1])
        task, label = data.draw(st.none() | small), data.draw(st.none() | small)
        text = data.draw(st.none() | st.text("ab é1", max_size=2))
        where = Where(task=task, label=label, text=text)
        expected = [
            i
            for i in range(n)
            if (task is None or columns["t"][i] == task)
            and (label is None or columns["y"][i] == label)
            and (text is None or text in words[i] or text in words[::-1][i] or text in str(i))
        ]
        assert [item.id for item in store.items(where)] == [str(i) for i in expected]
        assert store.count(where) == len(expected)
        if len(expected) < n and expected:
            store.drop(where)
            assert store.count() == n - len(expected)
            assert store.count(where) == 0
            assert store.count(where, version=1) == len(expected)


@pytest.mark.parametrize("huge", [2**63, 10**30, -(2**63) - 1, -(10**30)])
def test_numbers_beyond_64_bits_match_nothing(store: MemoryStore, huge: int) -> None:
    store.append(examples([1, 2]))
    for where in (Where(task=huge), Where(origin=huge), Where(label=huge)):
        assert (store.items(where), store.count(where)) == ([], 0)
        for change in (store.drop, store.forget, store.find):
            with pytest.raises(ValueError, match="no item of"):
                change(where)
    assert len(store.items(after=huge)) == (0 if huge > 0 else 2)
    assert len(store.items(limit=abs(huge))) == 2
    for call in (store.raw, lambda n: store.memory([n]), lambda n: store.forget([n])):
        with pytest.raises(ValueError, match=r"has? (an|no) items? "):
            call(huge)
    with pytest.raises(StoreVersionError):
        store.items(version=huge)


def test_what_a_forget_would_take_is_told_before(store: MemoryStore) -> None:
    store.append(examples([1, 2, 3]), ids=["a", "a", "b"])
    store.drop(["b"])
    assert store.find(["a"]) == [1, 2]
    assert store.find(["b", 1]) == [1, 3]
    assert store.find(Where()) == [1, 2, 3]
    assert store.version == 2
    assert store.forget(["b", 1]).items == 2
    with pytest.raises(ValueError, match="any version has no items"):
        store.find(["b"])


def test_history_tells_which_versions_have_a_prior(store: MemoryStore) -> None:
    """in_force: where ``load_prior`` gives one."""

    def loads(version: int) -> bool:
        try:
            return store.load_prior(version).num_data > 0
        except ValueError:
            return False

    def check(saved: list[int]) -> None:
        history = store.history()
        assert [v.in_force for v in history] == [loads(v.number) for v in history]
        assert [v.number for v in history if v.prior] == saved

    store.append(examples([1, 2, 3]))
    check([])
    store.save_prior(prior_of(examples([1, 2]), 1))
    store.drop(["0:1"])
    store.restore(1)
    check([2])
    store.restore(2)
    store.save_prior(prior_of(examples([1]), 1))
    check([2, 6])
    store.forget(["0:2"])
    check([6])
    store.drop(["0:1"])
    store.compact()
    check([])
    assert store.history()[-1].in_force


def test_pages_meet_every_item_once(store: MemoryStore) -> None:
    store.append(examples(list(range(1, 24))), scores={"lambda": torch.arange(23) / 4})
    seen, after = [], 0
    while page := store.items(after=after, limit=5):
        assert len(page) <= 5
        seen += page
        after = page[-1].item
    assert [item.origin for item in seen] == list(range(1, 24))
    assert [item.scores["lambda"] for item in seen] == [i / 4 for i in range(23)]
    assert seen[0].id == "0:1"
    assert seen[0].shape == (600,)
    assert seen[0].num_bytes == 600
    assert (seen[0].since, seen[0].head, seen[0].soft_weight) == (1, None, 1.0)


def test_labels_of_other_types_are_found(store: MemoryStore) -> None:
    store.append(memory_of(torch.zeros(3, 1), 3, labels=torch.tensor([0.5, 1.0, 2.0])))
    store.append(memory_of(torch.zeros(2, 1), 2, labels=torch.tensor([[0.5, 1.0], [1.0, 1.0]])))
    third = torch.tensor([1 / 3, 1 / 3], dtype=torch.float64)
    store.append(memory_of(torch.zeros(2, 1), 2, labels=third), ids=["x", "y"])
    assert [store.count(Where(label=y)) for y in (0.5, 1, 3, 1 / 3)] == [1, 1, 0, 2]
    store.drop(["x", "y"])
    assert store.items()[3].label == [0.5, 1.0]
    assert store.count(Where(kind="tensor")) == 5
    assert store.count(Where(kind="image")) == 0


# ------------------------------------------------------------------------ priors


def priors() -> dict[str, Prior]:
    """Priors of every kind of term, after two tasks with heads."""
    made = {}
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=g), torch.arange(24) % 4
    for name, prior in {
        "kprior": lifelong.kprior(Categorical(), memory=6),
        "fromp": lifelong.fromp(Categorical(), memory=6),
        "derpp": lifelong.derpp(Categorical(), memory=6),
        "ewc": lifelong.online_ewc(Categorical()),
        "gradient_reconstruction": lifelong.gradient_reconstruction(Categorical(), memory=6),
    }.items():
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        for task, head in enumerate([(0, 1), (2, 3)]):
            rows = torch.isin(y, torch.tensor(head))
            data = lifelong.Examples(x[rows], y[rows], head=head)
            prior = prior.update(model, data, generator=g)
            with torch.no_grad():
                model.weight.add_(0.1 * task)
        made[name] = prior
    made["sum"] = made["kprior"] + made["kprior"]
    return made


PRIORS = priors()


@pytest.mark.parametrize("name", PRIORS)
def test_priors_come_back_exactly(store: MemoryStore, name: str) -> None:
    prior = PRIORS[name]
    version = store.save_prior(prior, message="task 2")
    again = store.load_prior()
    assert same(again.state_dict(), prior.state_dict())
    assert len(store) == (0 if prior.memory is None else len(prior.memory))
    assert [(v.kind, v.prior) for v in store.history()] == [("prior", True)]
    store.save_prior(prior)
    assert store.diff(version, version + 1) == replace(store.diff(0, 0), a=1, b=2)
    assert same(store.load_prior(version).state_dict(), prior.state_dict())
    assert store.verify().ok


def test_a_prior_whose_beliefs_changed_keeps_its_items(store: MemoryStore) -> None:
    store.append(
        examples([1, 2, 3]), ids=["a", "b", "c"], notes=["x", "y", "z"], scores={"s": [1.0, 2, 3]}
    )
    memory = examples([1, 2, 4])
    believed = replace(memory, reference=memory.reference * 2)
    store.save_prior(prior_of(believed, 1))
    change = store.diff(1, 2)
    assert (change.added, change.dropped, change.changed) == ((4,), (3,), (1, 2))
    assert [(i.id, i.note, i.scores) for i in store.items()] == [
        ("a", "x", {"s": 1.0}), ("b", "y", {"s": 2.0}), ("0:4", "", {})
    ]  # fmt: skip
    assert same_memory(store.memory(), believed)
    assert same_memory(store.memory(version=1), examples([1, 2, 3]))
    assert [v.size for v in store.history()] == [3, 3]


def test_a_prior_of_another_make_is_told(store: MemoryStore, monkeypatch) -> None:
    store.save_prior(prior_of(examples([1]), 1))

    def refuse(state: Any) -> Prior:
        raise KeyError("terms")

    monkeypatch.setattr(Prior, "from_state_dict", refuse)
    with pytest.raises(StoreDamagedError, match=r"the prior cannot be read \(KeyError"):
        store.load_prior()


def test_a_prior_goes_with_its_version(store: MemoryStore) -> None:
    with pytest.raises(ValueError, match="version 0 has no prior; store.history"):
        store.load_prior()
    store.save_prior(prior_of(examples([1, 2]), 1))
    store.append(examples([3]))
    store.save_prior(prior_of(examples([2, 3]), 2))

    def anchors(*versions: int) -> list[float]:
        found = [store.load_prior(v).weight for v in versions]
        return [float(w.anchor["w"][0]) for w in found if w is not None]

    assert anchors(1, 2, 3) == [1, 1, 2]
    store.restore(1)
    assert anchors(3, 4) == [2, 1]
    store.restore(0)
    with pytest.raises(ValueError, match="version 5 has no prior"):
        store.load_prior()


def test_dropped_items_leave_the_prior_until_they_are_restored(store: MemoryStore) -> None:
    prior = prior_of(examples([1, 2, 3]), 1)
    store.save_prior(prior)
    store.drop(["0:2"])
    memory = store.load_prior().memory
    assert memory is not None
    assert same_memory(memory, examples([1, 3]))
    store.drop(Where())
    memory = store.load_prior().memory
    assert memory is not None
    assert len(memory) == 0
    store.restore(1)
    assert same(store.load_prior().state_dict(), prior.state_dict())


def test_a_kernel_is_marginalised_over_what_leaves_it(store: MemoryStore) -> None:
    prior = PRIORS["fromp"]
    store.save_prior(prior)
    gone = store.items()[1]
    store.drop([gone.item])
    fewer = store.load_prior()
    (before,), (after,) = prior.terms, fewer.terms
    keep = [i for i in range(len(before.memory)) if i != 1]
    kernel = [torch.linalg.inv(p.double()) for b in before.blocks for p in [b.precision]]
    block = after.blocks[0]
    expected = torch.linalg.inv(
        kernel[0][:, [i for i in keep if i < before.blocks[0].stop]][
            :, :, [i for i in keep if i < before.blocks[0].stop]
        ]
    )
    torch.testing.assert_close(block.precision.double(), expected, rtol=1e-4, atol=1e-4)
    assert [b.stop - b.start for b in after.blocks] == [
        b.stop - b.start - (b.start <= 1 < b.stop) for b in before.blocks
    ]
    fewer(nn.Linear(3, 4)).backward()


def test_compacting_takes_dropped_items_out_of_a_kernels_file(store: MemoryStore) -> None:
    store.save_prior(PRIORS["fromp"])
    store.drop([2])
    before = store.load_prior().state_dict()
    sizes = [p.stat().st_size for p in Path(store.path).glob("prior-*")]
    store.compact()
    if not store.path.endswith(".lance"):  # there, a row
        (smaller,) = [p.stat().st_size for p in Path(store.path).glob("prior-*")]
        assert [smaller] < sizes
    assert same(store.load_prior().state_dict(), before)
    assert store.verify().findings == ()


@pytest.mark.parametrize("name", list(PRIORS))
@pytest.mark.parametrize("places", [[1], slice(None), []])
def test_a_prior_without_items_is_as_if_they_were_dropped(
    tmp_path: Path, name: str, places: Any
) -> None:
    """Leaving out before it is saved = dropping afterwards."""
    memory = PRIORS[name].memory
    pairs = [] if memory is None else list(zip(memory.task.tolist(), memory.origin.tolist()))
    gone = pairs[places] if isinstance(places, slice) else [pairs[i] for i in places if pairs]
    with open_store(tmp_path / "store") as store:
        store.save_prior(PRIORS[name])
        numbers = [i.item for i in store.items() if (i.task, i.origin) in gone]
        if numbers:
            store.drop(numbers)
        dropped = store.load_prior().state_dict()
    assert same(without(PRIORS[name], gone).state_dict(), dropped)


def test_marginals_are_exact_and_empty_blocks_go() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, 5, generator=g, dtype=torch.float64)
    kernel = a @ a.mT + torch.eye(5, dtype=torch.float64)
    block = {"start": 0, "stop": 5, "head": None, "mean": torch.randn(5, 2, generator=g),
             "precision": torch.linalg.inv(kernel)}  # fmt: skip
    plain = {"start": 5, "stop": 7, "head": [0], "mean": torch.zeros(2, 1), "precision": None}
    last = {**plain, "start": 7, "stop": 8, "mean": torch.zeros(1, 1)}
    keep = torch.tensor([True, False, True, True, False, True, False, False])
    one, two = marginal([block, plain, last], keep)
    stay = [0, 2, 3]
    torch.testing.assert_close(
        one["precision"], torch.linalg.inv(kernel[:, stay][:, :, stay]), rtol=1e-12, atol=1e-12
    )
    assert torch.equal(one["mean"], block["mean"][stay])
    assert (one["start"], one["stop"], two["start"], two["stop"]) == (0, 3, 3, 4)
    assert two["precision"] is None


# -------------------------------------------------------------- forget, in words


def test_forgotten_items_are_in_no_version_and_leave_a_tombstone(store: MemoryStore) -> None:
    store.append(examples([1, 2, 3]), message="with 0:2 in it")
    store.append(examples([4]), message="nothing of them; see 0:20 and xx0:2")
    store.append(examples([5]), message="as for 0:2.")
    store.drop(["0:2"], message="wrong")
    report = store.forget(["0:2"], message="consent withdrawn")
    assert (report.version, report.items, report.priors, report.influenced) == (5, 1, 0, False)
    assert [v.size for v in store.history()] == [2, 3, 4, 4, 4]
    assert [v.message for v in store.history()] == [
        "", "nothing of them; see 0:20 and xx0:2", "", "", "consent withdrawn"
    ]  # fmt: skip
    tomb = store.forgotten("0:2")
    assert tomb is not None
    assert (tomb.version, tomb.time) == (5, store.history()[-1].time)
    assert store.forgotten("0:1") is None
    store.restore(1)
    assert [item.id for item in store.items()] == ["0:1", "0:3"]
    for which in (["0:2"], [2]):
        with pytest.raises(ValueError, match=r"has no items .*store.forgotten\(id\) tells"):
            store.forget(which)
    with pytest.raises(ValueError, match="no version has an item 2"):
        store.raw(2)
    store.compact()
    assert store.forgotten("0:2") is not None


def test_what_was_forgotten_does_not_come_back_unasked(store: MemoryStore) -> None:
    store.append(examples([1, 2]))
    store.forget(["0:2"])
    for write in (
        lambda: store.append(examples([2])),
        lambda: store.save_prior(prior_of(examples([2]), 1)),
    ):
        with pytest.raises(ForgottenError, match=r"'0:2' was forgotten in version 2; .*readmit"):
            write()
    assert store.version == 2
    store.append(examples([2]), readmit=True)
    assert len(store) == 2


def test_a_stale_prior_does_not_bring_a_forgotten_item_back(store: MemoryStore) -> None:
    """A prior holds no ids: what was forgotten by the user's id is known by place and input."""
    memory = examples([1, 2, 3])
    stale = prior_of(memory, 1)
    store.append(memory, ids=["a", "b", "c"])
    store.save_prior(stale)
    store.forget(["b"])
    elsewhere = replace(memory, origin=memory.origin + 100)  # the same inputs at other places
    other = examples([4, 5, 6]).inputs
    changed = replace(memory, inputs=other)  # other inputs at the same places
    for held, said in (
        (memory, "'0:2'"),
        (elsewhere, "the input of '0:102'"),
        (changed, "'0:2'"),
    ):
        with pytest.raises(ForgottenError, match=f"{said} was forgotten in version 3"):
            store.save_prior(prior_of(held, 1))
    with pytest.raises(ForgottenError, match="the input of 'new' was forgotten"):
        store.append(elsewhere[1:2], ids=["new"])
    assert (store.version, len(store)) == (3, 2)
    # Neither an item that stays, nor another one under an id of the user's own, is refused.
    store.save_prior(prior_of(memory[torch.tensor([0, 2])], 2))
    store.append(changed[1:2], ids=["other"])
    assert [item.id for item in store.items()] == ["a", "c", "other"]
    tombs = [store.forgotten(i) for i in ("a", "b", "0:1", "0:2", "0:3")]
    assert [tomb is not None for tomb in tombs] == [False, True, False, True, False]


def test_readmitting_takes_the_tombstones_away(store: MemoryStore) -> None:
    memory = examples([1, 2])
    store.append(memory, ids=["a", "b"])
    store.forget(["a", "b"])
    store.append(memory[:1], ids=["a"], readmit=True)
    assert store.forgotten("a") is None
    assert store.forgotten("0:1") is None
    store.drop(["a"])
    store.append(memory[:1])  # as if it had never been forgotten
    with pytest.raises(ForgottenError, match="'0:2' was forgotten"):
        store.save_prior(prior_of(memory, 1))
    store.save_prior(prior_of(memory, 1), readmit=True)
    store.compact()
    store.drop(["0:2"])
    store.save_prior(prior_of(memory, 1))
    assert store.forgotten("0:2") is None
    with open_store(store.path, "r") as again:
        assert [again.forgotten(i) is None for i in ("a", "0:1", "0:2", "b")] == [1, 1, 1, 0]


def test_forgetting_reaches_priors(store: MemoryStore, tmp_path: Path) -> None:
    store.save_prior(prior_of(examples([1, 2, 3]), 1))
    store.save_prior(prior_of(examples([2, 3, 4]), 2))
    report = store.forget(["0:3"])
    assert (report.priors, report.influenced) == (1, True)
    assert same(
        store.load_prior().state_dict(),
        prior_of(examples([2, 4]), 2).state_dict() | {"num_data": 3},
    )
    with pytest.raises(ValueError, match="version 1 has no prior; .*forget removes"):
        store.load_prior(1)
    files = list(Path(store.path).glob("prior-*"))
    assert len(files) == (0 if store.path.endswith(".lance") else 1)  # there, a row
    assert not store.forget(["0:1"]).influenced


def test_forgetting_reaches_runs_and_exports(store: MemoryStore, tmp_path: Path) -> None:
    run, memory = tmp_path / "run", examples([1, 2, 3])
    moved = replace(memory, origin=memory.origin + 100)  # the same inputs under other ids
    path = run / "seed-0" / "learner.safetensors"
    state = {"prior": prior_of(moved, 1).state_dict(), "within": {"epoch": 2}, "model": {}}
    checkpoint.save(path, state, kind="learner")
    prior_of(examples([7, 8]), 1).save(run / "other.safetensors")
    before = (run / "other.safetensors").read_bytes()
    (run / "report.html").write_text("pictures")
    (run / "log.txt").write_text("kept")
    store.append(memory)
    inside = store.export(Path(store.path) / "copy.safetensors")
    report = store.forget([1], runs=[run])
    assert {Path(p).name for p in report.files if not p.endswith(".lance")} == {
        "learner.safetensors",
        "report.html",
        "copy.safetensors",
    }
    assert [Path(p).name for p in report.foreign] == ["log.txt"]
    again = checkpoint.load(path, kind="learner")
    assert again["within"] == {"epoch": 2}
    left = Prior.from_state_dict(again["prior"]).memory
    assert left is not None
    assert same_memory(left, moved[1:])
    assert (run / "other.safetensors").read_bytes() == before
    assert (run / "log.txt").read_text() == "kept"
    assert same_memory(read_export(inside)[0].memory, memory[1:])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        store.forget([2], runs=[tmp_path / "missing"])
    assert len(store) == 2


def test_forgetting_takes_places_out_of_groups(store: MemoryStore, tmp_path: Path) -> None:
    """members: (task, origin, group) of the items in memory."""
    memory = examples([1, 2, 3])
    prior = prior_of(memory, 1)
    members = torch.tensor([[0, 1, 7], [0, 2, 7], [0, 3, 8]])
    groups = Groups({7: Share(2, {"w": torch.ones(50)})}, members)
    terms = tuple(
        replace(t, groups=groups) if isinstance(t, WeightTerm) else t for t in prior.terms
    )
    prior = replace(prior, terms=terms)

    def left(prior: Prior) -> list[list[int]]:
        (found,) = [t.groups for t in prior.terms if isinstance(t, WeightTerm)]
        assert found is not None
        assert same(found.state_dict()["shares"], groups.state_dict()["shares"])
        return found.members.tolist()

    path = prior.save(tmp_path / "run" / "prior.safetensors")
    moved = replace(memory, origin=memory.origin + 100)
    state = {"prior": replace(prior, terms=(terms[1], MemoryTerm(moved))).state_dict()}
    state["prior"]["terms"][0]["groups"]["members"] = members + torch.tensor([0, 100, 0])
    other = checkpoint.save(tmp_path / "run" / "learner.safetensors", state, kind="learner")
    store.save_prior(prior)
    store.forget(["0:2"], runs=[tmp_path / "run"])
    assert left(Prior.load(path)) == [[0, 1, 7], [0, 3, 8]]
    assert left(store.load_prior()) == [[0, 1, 7], [0, 3, 8]]
    state = checkpoint.load(other, kind="learner")  # by the input
    assert left(Prior.from_state_dict(state["prior"])) == [[0, 101, 7], [0, 103, 8]]


def odd_header(header: str) -> bytes:
    return serialise({"0": torch.zeros(1)}, metadata={"lifelong": header})


def test_what_forgetting_could_not_look_into_is_told_of(store: MemoryStore, tmp_path: Path) -> None:
    """Every file below the folders either holds no trace of the item, or is listed."""
    memory, run = examples([1, 2]), tmp_path / "run"
    store.append(memory)
    whole = prior_of(memory, 1).save(run / "a.safetensors").read_bytes()
    numbers = dict.fromkeys(memory.state_dict(), 1)
    deep = '{"version": 1, "kind": "memory", "state": ' + "[" * 200_000 + "]" * 200_000 + "}"
    checkpoint.save(run / "ints.safetensors", {"memory": numbers}, kind="memory")
    odd = {
        "cut.safetensors": whole[:-4],
        "deep.safetensors": odd_header(deep),
        "pairs.safetensors": odd_header(
            '{"version": 1, "kind": "memory", "state": {"__pairs__": [[1, 2, 3]]}}'
        ),
        "newer.safetensors": odd_header('{"version": 99, "kind": "prior", "state": {}}'),
        "log.txt": b"memorised 0:1",
        "inputs.pt": needles(1)[0],
    }
    for name, data in odd.items():
        (run / name).write_bytes(data)
    kernel = KernelPrior(RBF(), Gaussian()).update(
        Examples(torch.randn(4, 3).double(), torch.randn(4, 1).double())
    )
    kernel.save(run / "kernel.safetensors")
    (run / "link.safetensors").symlink_to(run / "a.safetensors")
    (run / "folder").symlink_to(tmp_path, target_is_directory=True)
    copies = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    checkpoint.save(Path(store.path) / "ints.safetensors", {"memory": numbers}, kind="memory")
    report = store.forget([1], runs=[run])
    told = {*odd, "ints.safetensors", "kernel.safetensors", "link.safetensors", "folder"}
    assert {Path(p).name for p in report.foreign if Path(p).parent == run} == told
    assert str(Path(store.path) / "ints.safetensors") in report.foreign
    assert str(run / "a.safetensors") in report.files
    for path in run.iterdir():
        if path.is_file() and path.name in told - {"link.safetensors"}:
            assert path.read_bytes() == copies[path.name]
        elif path.is_file():
            assert not any(needle in path.read_bytes() for needle in needles(1))


def test_a_folder_that_cannot_be_looked_into_stops_a_forget(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is read before anything is written."""
    store.append(examples([1, 2]))
    run = tmp_path / "run"
    path = prior_of(examples([1, 2]), 1).save(run / "a.safetensors")
    (run / "report.html").write_text("pictures")
    (run / "locked").mkdir()
    before, scan = path.read_bytes(), os.scandir

    def denied(path: Any = ".") -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", denied)
        with pytest.raises(StoreError, match=r"cannot look into the folder .*locked .*move it"):
            store.forget([1], runs=[run])
    assert (path.read_bytes(), store.version, len(store)) == (before, 1, 2)
    assert (run / "report.html").exists()


def test_a_half_written_checkpoint_is_taken_from_its_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that still wanted it fails; what it was to replace is unharmed."""
    path = checkpoint.save(tmp_path / "learner.safetensors", {"x": 1}, kind="learner")
    before, replace_ = path.read_bytes(), os.replace
    match = scrub.Match(frozenset(), frozenset())

    def late(source: Any, target: Any) -> None:
        """The rename of the writer comes in the middle of the erasing."""
        moved = []

        def sync(handle: int) -> None:
            if not moved:
                moved.append(1)
                with pytest.raises(FileNotFoundError):
                    replace_(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            done = scrub.carry_out(scrub.survey(tmp_path, match), match)
        assert moved
        assert [str(p) for p in done] == [str(source)]
        replace_(source, target)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(FileNotFoundError, match="What was there before is unharmed"):
        checkpoint.save(path, {"x": 2}, kind="learner")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_files_are_told_of(store: MemoryStore, tmp_path: Path) -> None:
    store.append(examples([1, 2]))
    (Path(store.path) / "notes.txt").write_text("mine")
    assert [Path(p).name for p in store.forget([1]).foreign] == ["notes.txt"]
    found = store.verify()
    assert found.ok
    assert [(f.place, f.damage) for f in found.findings] == [("notes.txt", False)]


# ----------------------------------------------------------------------- exports


def test_an_export_is_a_store_again(store: MemoryStore, tmp_path: Path) -> None:
    memory = memory_of(torch.randn(4, 2), 4)
    store.append(memory, ids=list("abcd"), notes=["n"] * 4, scores={"s": [1.0, 2, 3, 4]})
    store.append(memory_of(torch.empty(2, 0), 2), inputs=["text", "ü"])
    store.append(memory_of(torch.empty(1, 0), 1), inputs=[encoded(0)])
    store.drop(["d"])
    path = store.export(tmp_path / "e.safetensors", version=3)
    with open_store(tmp_path / "again") as again:
        for group in read_export(path):
            again.append(group.memory, inputs=group.inputs, ids=group.ids, notes=group.notes,
                         scores=group.scores)  # fmt: skip
        strip = [replace(item, since=0) for item in store.items(version=3)]
        assert [replace(item, since=0) for item in again.items()] == strip
        assert all(same(again.raw(i), store.raw(i)) for i in range(1, 8))
        assert same_memory(again.memory(Where(kind="tensor")), memory)


def test_a_parquet_export_is_read_by_others(store: MemoryStore, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    images = [encoded(i) for i in range(3)]
    store.append(memory_of(torch.empty(3, 0), 3), inputs=images)
    store.append(memory_of(torch.ones(2, 2), 2), notes=["a", "b"])
    rows = pq.read_table(store.export(tmp_path / "e.parquet")).to_pylist()
    assert [row["input"] for row in rows[:3]] == images
    assert np.frombuffer(rows[3]["input"], np.float32).tolist() == [1, 1]
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1]
    assert [row["note"] for row in rows] == ["", "", "", "a", "b"]
    assert rows[3]["reference"] == pytest.approx(store.memory([4]).reference[0].tolist())
    store.append(memory_of(torch.ones(1, 2), 1, labels=torch.tensor([[0.5, 1]])))
    rows = pq.read_table(store.export(tmp_path / "e.parquet")).to_pylist()
    assert json.loads(rows[-1]["label"]) == [0.5, 1]


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_an_export_replaces_exports_alone(store: MemoryStore, tmp_path: Path, suffix: str) -> None:
    store.append(examples([1]))
    path = store.export(tmp_path / f"e{suffix}")
    store.append(examples([2]))
    before = path.read_bytes()
    assert store.export(path).read_bytes() != before
    other = prior_of(examples([1]), 1).save(tmp_path / "prior.safetensors").read_bytes()
    for data in (other, b"mine", b""):
        path.write_bytes(data)
        with pytest.raises(FileExistsError, match="is no export.*choose another name, or remove"):
            store.export(path)
        assert path.read_bytes() == data
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match="is no export"):
        store.export(path)
    with pytest.raises(ValueError, match=r"ends in .safetensors or .parquet"):
        store.export(tmp_path)


def test_an_odd_export_is_an_error(tmp_path: Path) -> None:
    memory = examples([1]).state_dict()
    whole = {"memory": memory, "ids": ["a"], "notes": [""], "scores": {}}
    for state in (
        {},
        {"groups": 1},
        {"groups": [whole | {"ids": []}]},
        {"groups": [{k: v for k, v in whole.items() if k != "notes"}]},
        {"groups": [whole | {"memory": {**memory, "heads": 3}}]},
        {"groups": [whole | {"memory": {"inputs": 1}}]},
    ):
        path = checkpoint.save(tmp_path / "e.safetensors", state, kind="memory")
        with pytest.raises(CheckpointError, match="holds a memory that cannot be read"):
            read_export(path)


@pytest.mark.parametrize("name", ["memory.sqlite", "memory.version", "x.parquet"])
def test_exports_stay_off_the_stores_files(store: MemoryStore, name: str) -> None:
    store.append(examples([1]))
    with pytest.raises(ValueError, match="lies in the store; choose"):
        store.export(Path(store.path) / name)
    with pytest.raises(ValueError, match=r"ends in .safetensors or .parquet"):
        store.export(Path(store.path).parent / "e.csv")


# --------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.append(examples([9]), ids=["a", "b"]), ValueError, "expected 1 ids, .*got 2"),
        (lambda s: s.append(examples([9]), notes=[]), ValueError, "expected 1 notes"),
        (lambda s: s.append(examples([9]), scores={"s": []}), ValueError, "1 scores 's'"),
        (lambda s: s.append(examples([9]), inputs=[]), ValueError, "expected 1 inputs"),
        (lambda s: s.append(examples([9]), inputs=[3]), TypeError, "texts as str, got int"),
        (lambda s: s.append(examples([9]), ids=[9]), TypeError, "must be text, got int"),
        (lambda s: s.append(examples([9]), ids=["\ud800"]), ValueError, "that UTF-8 can write"),
        (lambda s: s.append(examples([9]), message=None), TypeError, "message must be text"),
        (
            lambda s: s.append(memory_of(torch.zeros(1).to(torch.float8_e5m2), 1)),
            TypeError,
            "a store holds .* got torch.float8_e5m2",
        ),
        (lambda s: s.drop([99]), ValueError, r"today's memory has no items \[99\]"),
        (lambda s: s.drop([1, "x"]), ValueError, r"has no items \['x'\]"),
        (lambda s: s.drop([]), ValueError, "no ids were given"),
        (lambda s: s.drop("0:1"), TypeError, r"expected ids in a list.*pass \['0:1'\]"),
        (lambda s: s.drop([1.5]), TypeError, "numbers .int. or ids .str., got 1.5"),
        (lambda s: s.drop([True]), TypeError, "got True"),
        (lambda s: s.drop(Where(task=5)), ValueError, "no item of today's memory has task 5"),
        (lambda s: s.forget(Where(task=5)), ValueError, "no item of any version has task 5"),
        (lambda s: s.forget(["0:1"], message="of 0:1"), ValueError, "names an item that is to be"),
        (lambda s: s.restore(7), StoreVersionError, "no version 7: 0 to 1 are kept"),
        (lambda s: s.memory(version=-1), StoreVersionError, "no version -1"),
        (lambda s: s.memory([77]), ValueError, r"version 1 has no items \[77\]"),
        (lambda s: s.memory(Where(task=9)), ValueError, "there are no such items"),
        (lambda s: s.raw(77), ValueError, "no version has an item 77"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(store: MemoryStore, call, error, message) -> None:
    store.append(examples([1, 2, 3]), message="before")
    items, history = store.items(), store.history()
    with pytest.raises(error, match=message):
        call(store)
    assert (store.items(), store.history(), store.version) == (items, history, 1)
    assert store.verify().ok


def test_reading_mode_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no store at"):
        open_store(tmp_path / "none", "r")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match='mode must be "r" or "a"'):
        open_store(tmp_path, "w")  # type: ignore[arg-type]
    with open_store(tmp_path) as store:
        store.append(examples([1]))
    with open_store(tmp_path, "r") as store:
        assert len(store) == 1
        for write in (
            lambda: store.append(examples([2])),
            lambda: store.forget([1]),
            store.compact,
        ):
            with pytest.raises(StoreReadOnlyError, match="was opened for reading; use open_store"):
                write()
    with pytest.raises(StoreError, match="is closed; open_store opens it again"):
        len(store)
