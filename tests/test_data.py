"""Data: every kind gives the same examples, in the same order, with the same ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

import lifelong
from lifelong.data import (
    Examples,
    among,
    batches,
    head_mask,
    head_of,
    num_examples,
    require_repeatable,
)
from lifelong.errors import NotRepeatableError
from lifelong.models import rows

N = 7
X = torch.arange(2.0 * N).reshape(N, 2)
Y = torch.arange(N) % 3


class Batches:
    """A re-iterable of batches that is neither a Dataset nor a loader."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Pairs(Dataset):
    """Map-style, with plain numbers for labels, as torchvision's sets give them."""

    def __init__(self, transform: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(X[index]), int(Y[index])


class Records(Dataset):
    """Map-style dicts with the key "labels", the Hugging Face convention."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "labels": Y[index]}


KINDS = {
    "Examples": lambda: Examples(X, Y),
    "pair of tensors": lambda: (X, Y),
    "pair of arrays": lambda: (X.numpy(), Y.numpy()),
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Dataset": lambda: Pairs(),
    "loader over a Dataset": lambda: DataLoader(Pairs(), batch_size=3),
    "loader over Examples": lambda: DataLoader(Examples(X, Y), batch_size=3),
    "loader over a stream": lambda: DataLoader(Stream(), batch_size=3),
    "list of batches": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "re-iterable": lambda: Batches([(X[:4], Y[:4]), [X[4:], Y[4:]]]),
    "with an empty batch": lambda: [(X[:4], Y[:4]), (X[:0], Y[:0]), (X[4:], Y[4:])],
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_every_kind_gives_the_same_examples(make: Callable[[], Any]) -> None:
    data = make()
    for _ in range(2):
        read = list(batches(data, batch_size=3))
        assert torch.equal(torch.cat([b.inputs for b in read]), X)  # type: ignore[misc]
        assert torch.equal(torch.cat([b.labels for b in read]), Y)
        assert torch.equal(torch.cat([b.ids for b in read]), torch.arange(N))
    assert num_examples(data) == N
    require_repeatable(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Examples({"x": X}, Y),
        lambda: ({"x": X}, Y),
        lambda: Records(),
        lambda: DataLoader(Records(), batch_size=3),
        lambda: [{"x": X[:4], "labels": Y[:4]}, ({"x": X[4:]}, Y[4:])],
    ],
    ids=["Examples", "pair", "Dataset", "loader", "list of batches"],
)
def test_dict_inputs(make: Callable[[], Any]) -> None:
    data = make()
    read = list(batches(data, batch_size=3))
    assert all(set(b.inputs) == {"x"} for b in read)
    assert torch.equal(torch.cat([b.inputs["x"] for b in read]), X)
    assert torch.equal(torch.cat([b.labels for b in read]), Y)
    assert num_examples(data) == N
    require_repeatable(data)


@given(n=st.integers(1, 12), batch_size=st.integers(1, 15))
def test_batches_cover_every_example_once(n: int, batch_size: int) -> None:
    data = Examples(torch.arange(n), torch.arange(n), ids=torch.arange(n) + 100)
    read = list(batches(data, batch_size))
    assert [int(i) for b in read for i in b.ids] == [100 + i for i in range(n)]
    assert all(rows(b.inputs) == len(b.labels) == len(b.ids) for b in read)
    assert all(len(b.ids) == batch_size for b in read[:-1])


@pytest.mark.parametrize(
    ("loader", "n"),
    [
        (DataLoader(Pairs(), batch_size=3, drop_last=True), 6),
        (DataLoader(Pairs(), batch_size=3, sampler=range(4)), 4),
        (DataLoader(Pairs(), batch_sampler=[[0, 1], [2]]), 3),
    ],
    ids=["drop_last", "sampler", "batch_sampler"],
)
def test_examples_are_counted_as_they_are_read(loader: DataLoader, n: int) -> None:
    assert num_examples(loader) == sum(len(b.labels) for b in batches(loader)) == n


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(lifelong.Stream(lambda: zip(X, Y, strict=True), length=N + 1), batch_size=3),
         "the stream says that it has 8 examples, and gave 7; pass its true length"),
        (DataLoader(Pairs(), batch_size=3, collate_fn=lambda items: default_collate(items[:2])),
         "the loader says that it has 7 examples, and gave 5; pass a collate_fn"),
    ],
)  # fmt: skip
def test_a_loader_gives_as_many_examples_as_it_says(loader: DataLoader, message: str) -> None:
    """By that number losses are divided, and N is what a prior stands for."""
    assert num_examples(loader) != sum(len(labels) for _, labels in loader)
    with pytest.raises(ValueError, match=message):
        list(batches(loader))


def test_reading_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    loader = DataLoader(Pairs(), batch_size=3)
    list(batches(loader))
    require_repeatable(loader)
    with pytest.raises(NotRepeatableError):
        require_repeatable(Pairs(noisy))
    assert torch.equal(torch.get_rng_state(), state)


# Examples


def test_examples_of_arrays() -> None:
    data = Examples(np.zeros((3, 2), np.float32), np.array([0, 1, 2]), head=np.array([0, 2]))  # type: ignore[arg-type]
    assert isinstance(data.inputs, Tensor)
    assert data.labels.dtype == torch.int64
    assert data.ids.tolist() == [0, 1, 2]
    assert data.head == (0, 2)
    assert len(data) == 3


def test_slices_keep_ids_head_and_transform() -> None:
    data = Examples(X, Y, head=(0, 1, 2), transform=lambda x: -x)  # type: ignore[operator]
    for index in (slice(2, 5), torch.tensor([2, 3, 4]), torch.tensor([0, 0, 1, 1, 1, 0, 0]) > 0):
        part = data[index]
        assert part.ids.tolist() == [2, 3, 4]
        assert part.head == (0, 1, 2)
        assert torch.equal(part.batch(slice(None)).inputs, -X[2:5])  # type: ignore[arg-type]
    assert data[slice(2, 5)][torch.tensor([1])].ids.tolist() == [3]


def test_one_example_is_transformed() -> None:
    data = Examples(X, Y, transform=lambda x: -x)  # type: ignore[operator]
    for index in (3, -4, np.int64(3), torch.tensor(-4)):
        x, y = data[index]
        assert torch.equal(x, -X[3])
        assert int(y) == int(Y[3])
    with pytest.raises(IndexError):
        data[N]


def test_transforms_are_applied_as_a_batch_is_read() -> None:
    seen = []
    data = Examples(X, Y, transform=lambda x: seen.append(len(x)) or x)
    assert not seen
    list(batches(data, batch_size=3))
    assert seen == [3, 3, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": X, "labels": Y[:-1]},
        {"inputs": {"x": X}, "labels": Y[:-1]},
        {"inputs": X, "labels": Y, "ids": torch.arange(3)},
    ],
    ids=["labels", "dict inputs", "ids"],
)
def test_examples_of_different_lengths(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="as many labels and ids as inputs, got 7 inputs"):
        Examples(**arguments)


# Bad data


@pytest.mark.parametrize(
    "data",
    [Examples(X[:0], Y[:0]), (X[:0], Y[:0]), [], [(X[:0], Y[:0])]],
    ids=["Examples", "pair", "no batch", "empty batch"],
)
def test_no_examples(data: Any) -> None:
    with pytest.raises(ValueError, match="the data hold no examples"):
        list(batches(data))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (iter([(X, Y)]), TypeError, "got an iterator; pass the dataset or the loader"),
        (((X, Y) for _ in range(1)), TypeError, "got an iterator"),
        (3, TypeError, "cannot read int: expected Examples, a pair"),
        ([X], TypeError, r"batches of \(inputs, labels\), .* got Tensor"),
        ([{"x": X}], TypeError, "key 'labels', got dict"),
        ([(X, Y, Y)], TypeError, "got tuple"),
        ([(X, Y[:3])], ValueError, "a batch has 7 inputs but 3 labels"),
    ],
    ids=["iterator", "generator", "number", "tensors", "dict", "triple", "lengths"],
)
def test_unreadable_data(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(batches(data))


# Repeatable data


def noisy(x: Any) -> Any:
    return x + torch.rand_like(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Pairs(), batch_size=3, shuffle=True),
        lambda: DataLoader(Pairs(noisy), batch_size=3),
        lambda: Pairs(noisy),
        lambda: Examples(X, Y, transform=noisy),
        lambda: DataLoader(
            Pairs(),
            batch_size=3,
            sampler=torch.utils.data.WeightedRandomSampler([1.0] * N, num_samples=1000),
        ),
    ],
    ids=["shuffled", "augmented loader", "augmented Dataset", "augmented Examples", "sampler"],
)
def test_unrepeatable_data(make: Callable[[], Any]) -> None:
    with pytest.raises(NotRepeatableError, match="pass the dataset itself"):
        require_repeatable(make())


def test_shuffled_loader_over_equal_examples() -> None:
    """Told by its sampler: what it reads first could be equal by chance."""
    data = TensorDataset(torch.zeros(N, 2), torch.zeros(N, dtype=torch.int64))
    with pytest.raises(NotRepeatableError):
        require_repeatable(DataLoader(data, batch_size=3, shuffle=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Examples(X, Y, transform=lambda x: x.flip(-1)),  # type: ignore[union-attr]
        lambda: DataLoader(Pairs(lambda x: 2 * x), batch_size=3),
        lambda: DataLoader(Pairs(), batch_size=3, sampler=range(N - 1, -1, -1)),
        lambda: TensorDataset((X - 3).log(), Y),  # of which other errors tell
    ],
    ids=["transform", "loader", "fixed order", "NaN"],
)
def test_deterministic_data_pass(make: Callable[[], Any]) -> None:
    require_repeatable(make())


# Heads


def test_head_mask() -> None:
    assert head_mask(None, 4) is None
    mask = head_mask((2, 0), 4)
    assert mask is not None
    assert mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ((), "at least one class; use head=None"),
        ((0, 4), "names classes 0 to 4, but the model has 4 outputs; grow"),
        ((-1, 2), "names classes -1 to 2"),
    ],
)
def test_bad_heads(head: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_mask(head, 4)


def test_the_given_head_comes_before_the_datas_own() -> None:
    data = Examples(X, Y, head=(0, 1, 2))
    assert head_of(data) == (0, 1, 2)
    assert head_of(data, [1, 2]) == (1, 2)
    assert head_of((X, Y)) is None


@given(st.lists(st.integers(-5, 20)), st.lists(st.integers(-5, 20), unique=True))
def test_among_is_membership(ids: list[int], known: list[int]) -> None:
    found = among(torch.tensor(ids, dtype=torch.int64), torch.tensor(sorted(known)).long())
    assert found.tolist() == [i in known for i in ids]
