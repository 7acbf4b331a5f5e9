"""Streams: what is read from front to back gives what the same data in RAM give, held nowhere."""

from __future__ import annotations

import gc
import io
import tarfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

import lifelong
from lifelong import Categorical, Examples, Stream
from lifelong.curvature import estimate
from lifelong.data import batches, every_label, num_examples, num_known
from lifelong.errors import NotRepeatableError
from lifelong.streaming import Shards

N, D, C = 40, 4, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % C


class Plain(IterableDataset):
    """torch's own kind, which knows no length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter((x, int(y)) for x, y in zip(X, Y, strict=True))


class Table:
    """As the tables of Hugging Face's ``datasets``: single examples as dicts, streamed or not."""

    column_names = ("x", "labels")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter({"input": x, "labels": int(y)} for x, y in zip(X, Y, strict=True))

    def with_format(self, kind: str) -> Table:
        return self


class MapTable(Table):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": X[index], "labels": int(Y[index])}


class Counted(Dataset):
    """Map-style; how many of its examples are alive at once."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = X[index].clone()
        self.alive.add(x)
        self.most = max(self.most, len(self.alive))
        return x, Y[index]


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    return iter(zip(X, Y, strict=True))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, C)).eval()


class Named(nn.Module):
    """Takes its inputs by keyword."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input: Tensor) -> Tensor:
        return self.inner(input)


KINDS: dict[str, Callable[[], Any]] = {
    "IterableDataset": Plain,
    "Stream of a function": lambda: Stream(pairs),
    "Stream with a length": lambda: Stream(list(pairs())),
    "DataLoader of a stream": lambda: DataLoader(Plain(), batch_size=7),
    "map-style": Counted,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_reads_a_stream(kind: str, model: nn.Module) -> None:
    data, known, likelihood = KINDS[kind](), Examples(X, Y), Categorical()
    read = list(batches(data, 7))
    assert torch.equal(torch.cat([b.inputs for b in read]), X)  # type: ignore[misc]
    assert torch.equal(torch.cat([b.ids for b in read]), torch.arange(N))
    assert torch.equal(every_label(data), Y)
    a, b = (lifelong.identify(model, d, likelihood, batch_size=7) for d in (data, known))
    assert torch.equal(a, b)
    for structure in ("diagonal", "kronecker"):
        a, b = (
            estimate(model, d, likelihood, structure=structure, batch_size=7).diagonal()
            for d in (data, known)
        )
        for name in a:
            torch.testing.assert_close(a[name], b[name])
    for score in ("lambda", "random"):
        a, b = (
            lifelong.memorise(
                model,
                d,
                likelihood,
                budget=9,
                score=score,
                generator=torch.Generator().manual_seed(1),
                batch_size=7,
            )
            for d in (data, known)
        )
        assert torch.equal(a.origin, b.origin)
        assert torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]


def test_tables_of_columns(model: nn.Module) -> None:
    named = Named(model)
    for table in (Table(), MapTable()):
        g = lifelong.diagonal_curvature(named, table, Categorical(), batch_size=7)
        expected = lifelong.diagonal_curvature(model, (X, Y), Categorical(), batch_size=7)
        for name, value in expected.values.items():
            torch.testing.assert_close(g.values["inner." + name], value)
    assert num_known(MapTable()) == N
    assert num_known(Table()) is None
    with pytest.raises(TypeError, match="Table does not tell; pass lifelong.Stream"):
        num_examples(Table())


def test_an_update_from_a_stream(model: nn.Module) -> None:
    """The prior of the stream is that of the arrays."""
    made = [
        lifelong.recommended(Categorical(), memory=9).update(
            model, data, generator=torch.Generator().manual_seed(1), batch_size=7
        )
        for data in (Stream(pairs, length=N), Examples(X, Y))
    ]
    assert made[0].num_data == N
    torch.testing.assert_close(made[0](model), made[1](model))
    with torch.no_grad():
        next(model.parameters()).add_(0.1)
    torch.testing.assert_close(made[0](model), made[1](model))


def test_a_length_is_asked_for_where_it_is_needed(model: nn.Module) -> None:
    """And nothing is changed."""
    prior, g = lifelong.kprior(Categorical(), memory=9), torch.Generator().manual_seed(1)
    state = g.get_state()
    for data in (Plain(), Stream(pairs)):
        assert num_known(data) is None
        with pytest.raises(TypeError, match=r"pass lifelong.Stream\(data, length=N\)"):
            prior.update(model, data, generator=g)
    assert torch.equal(g.get_state(), state)
    assert prior.num_tasks == 0
    assert prior.update(model, Stream(Plain(), length=N), generator=g).num_data == N


@pytest.mark.parametrize("length", [N - 1, N + 1])
def test_a_wrong_length_is_told(length: int, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"says that it has {length} examples, and gave {N}"):
        lifelong.diagonal_curvature(model, Stream(pairs, length=length), Categorical())


def test_bad_streams(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="got an iterator"):
        Stream(pairs())
    with pytest.raises(ValueError, match="length must be"):
        Stream(pairs, length=0)
    with pytest.raises(TypeError):
        len(Stream(pairs))
    with pytest.raises(ValueError, match="a memory of 50 examples was asked for, but the task has"):
        lifelong.memorise(model, Stream(pairs), Categorical(), budget=50)
    with pytest.raises(TypeError, match=r"got a dict of \['jpg'\]; pass lifelong.Stream"):
        list(batches(Stream([{"jpg": b""}])))
    with pytest.raises(ValueError, match="no examples"):
        list(batches(Stream([])))
    noisy = Stream(pairs, lambda pair: (pair[0] + torch.rand(D), pair[1]))
    with pytest.raises(NotRepeatableError):
        lifelong.identify(model, noisy, Categorical())


def test_a_pass_holds_one_batch(model: nn.Module) -> None:
    data = Counted()
    lifelong.diagonal_curvature(model, data, Categorical(), batch_size=5)
    lifelong.memorise(model, data, Categorical(), budget=3, batch_size=5)
    assert data.most <= 8  # require_repeatable reads so many; 40 would be all


def test_workers_share_a_stream() -> None:
    loader = DataLoader(Stream(pairs, length=N), batch_size=5, num_workers=2)
    read = torch.cat([b.inputs for b in batches(loader)])  # type: ignore[misc]
    assert num_known(loader) == N
    assert torch.equal(read.sort(0).values, X.sort(0).values)
    again = torch.cat([b.inputs for b in batches(loader)])  # type: ignore[misc]
    assert torch.equal(read, again)


class Split(Plain):
    """As WebDataset and Hugging Face: each worker gets a part from the source itself."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        mine = slice(None) if worker is None else slice(worker.id, None, worker.num_workers)
        return iter(list(super().__iter__())[mine])


class OneShard(Plain):
    """As they do with fewer shards than workers: the first one gets all."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        return super().__iter__() if worker is None or worker.id == 0 else iter(())


def read(data: Stream, workers: int) -> Tensor:
    """All inputs that a loader gives, in one order."""
    loader = DataLoader(data, batch_size=5, num_workers=workers)
    return torch.cat([x for x, _ in loader]).sort(0).values


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("length", [N, None])
def test_every_example_is_read_once_whoever_splits_them(workers: int, length: int | None) -> None:
    for data in (
        Stream(Split(), length=length),
        Stream(OneShard(), length=length),
        Stream(lambda: iter(Split()), length=length, splits=True),
        Stream(Plain(), length=length, splits=False),
        Stream(pairs, length=length),
    ):
        assert torch.equal(read(data, workers), X.sort(0).values)


def test_examples_that_would_be_lost_or_doubled_are_told() -> None:
    with pytest.raises(ValueError, match="20 of 40 examples.*not split.*splits=True"):
        read(Stream(lambda: iter(Split()), length=N), 2)
    with pytest.raises(ValueError, match="40 of 40 examples.*to split.*splits=False"):
        read(Stream(Plain(), length=N), 2)


# Shards


def write_shard(path: Path, samples: list[dict[str, bytes]], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as tar:
        folder = tarfile.TarInfo("photos")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for sample in samples:
            for extension, data in sample.items():
                if extension == "__key__":
                    continue
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def example(sample: dict[str, Any]) -> tuple[Tensor, int]:
    return torch.frombuffer(bytearray(sample["x.bin"]), dtype=torch.float32), int(sample["cls"])


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    samples: list[dict[str, Any]] = [
        {"__key__": f"photos/{i:03d}", "x.BIN": X[i].numpy().tobytes(), "cls": b"%d" % Y[i]}
        for i in range(N)
    ]
    paths = [tmp_path / "a.tar", tmp_path / "b.tar.gz"]
    write_shard(paths[0], samples[:25])
    write_shard(paths[1], samples[25:], "w:gz")
    return paths


def test_shards_are_the_examples(shards: list[Path], model: nn.Module) -> None:
    found = list(Shards(shards))
    assert [s["__key__"] for s in found] == [f"photos/{i:03d}" for i in range(N)]
    data = Stream(Shards(shards), example, length=N)
    read = torch.cat([b.inputs for b in batches(data, 7)])  # type: ignore[misc]
    assert torch.equal(read, X)
    a, b = (lifelong.identify(model, d, Categorical()) for d in (data, (X, Y)))
    assert torch.equal(a, b)
    assert len(list(Shards(shards[0]))) == 25


def test_files_that_webdataset_reads_past_are_in_no_sample(tmp_path: Path) -> None:
    """Its pattern: ((?:.*/|)[^.]+)[.]([^/]*)."""
    names = ["README", "a/._0.jpg", "a/0.jpg", "a/._0.cls", "a/0.cls", ".hidden", "b.c/1.x.jpg"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    assert list(Shards(tmp_path / "x.tar")) == [
        {"__key__": "a/0", "jpg": b"", "cls": b""},
        {"__key__": "b.c/1", "x.jpg": b""},
    ]
    with tarfile.open(tmp_path / "y.tar", "w") as tar:
        for name in ("0.jpg", "0.cls", "0.JPG"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ValueError, match=r"y.tar: the sample '0' has 'jpg' twice"):
        list(Shards(tmp_path / "y.tar"))


def test_bad_shards(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no shards"):
        Shards([])
    with pytest.raises(FileNotFoundError):
        list(Shards(tmp_path / "none.tar"))
    shards[0].write_bytes(shards[0].read_bytes()[:3079])  # within the bytes of a file
    with pytest.raises(ValueError, match="damaged"):
        list(Shards(shards))
    shards[0].write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="no tar file"):
        list(Shards(shards))


def test_a_shard_of_many_files_leaves_no_record_of_those_it_passed(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n:04}".encode(), "txt": b"x"} for n in range(300)]
    write_shard(tmp_path / "many.tar", samples)
    most = 0
    for n, _ in enumerate(Shards(tmp_path / "many.tar")):
        if n % 100 == 99:
            most = max(most, sum(type(o) is tarfile.TarInfo for o in gc.get_objects()))
    assert 0 < most < 10
