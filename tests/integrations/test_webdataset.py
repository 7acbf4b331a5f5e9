"""Shards that WebDataset writes and reads, as the examples that they hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

webdataset = pytest.importorskip(
    "webdataset", reason="needs the extra webdataset", exc_type=ImportError
)

import lifelong  # noqa: E402
from lifelong import Categorical, Examples, Stream  # noqa: E402
from lifelong.streaming import Shards  # noqa: E402

# WebDataset leaves its files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

N, D, C = 60, 4, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    found = [str(tmp_path / f"{number}.tar") for number in range(3)]
    for number, path in enumerate(found):
        with webdataset.TarWriter(path) as writer:
            for i in range(number, N, 3):
                writer.write({"__key__": f"{i:03d}", "x.npy": X[i].numpy(), "cls": int(Y[i])})
    return found


ORDER = torch.cat([torch.arange(start, N, 3) for start in range(3)])


def example(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return torch.from_numpy(sample["x.npy"]), sample["cls"]


def opened(paths: list[str]) -> Any:
    return webdataset.WebDataset(paths, shardshuffle=False).decode()


def test_the_prior_is_that_of_the_examples(paths: list[str]) -> None:
    model = nn.Linear(D, C)
    found = []
    for data in (Stream(opened(paths), example, length=N), Examples(X[ORDER], Y[ORDER])):
        prior = lifelong.recommended(Categorical(), memory=6).prepare(model, data)
        prior = prior.update(model, data, generator=torch.Generator().manual_seed(1))
        assert prior.memory is not None
        found.append((prior.memory.inputs, prior(model).detach()))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_each_example_once(paths: list[str], workers: int) -> None:
    def function() -> Iterator[Any]:
        return iter(opened(paths))

    for data in (
        Stream(opened(paths), example, length=N),
        Stream(function, example, length=N, splits=True),
    ):
        loader = DataLoader(data, batch_size=7, num_workers=workers)
        read = torch.cat([x for x, _ in loader])
        assert torch.equal(read.sort(0).values, X.sort(0).values)


def test_a_function_that_opens_one_is_told_of(paths: list[str]) -> None:
    data = Stream(lambda: iter(opened(paths)), example, length=N)
    with pytest.raises(ValueError, match="splits=True"):
        list(DataLoader(data, batch_size=7, num_workers=2))


def test_its_shards_are_ours(paths: list[str]) -> None:
    keys = [sample["__key__"] for sample in Shards(paths)]
    assert keys == [f"{i:03d}" for i in ORDER.tolist()]
