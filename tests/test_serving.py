"""A memory on disk is the memory in RAM: same draws, values and gradients, and nothing stale."""

from __future__ import annotations

import copy
import os
import pickle
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Memory, Prior
from lifelong.errors import StoreDamagedError
from lifelong.models import concat, forward, move, nbytes, read
from lifelong.recipe import Recipe
from lifelong.serving import Reading, Served
from lifelong.store import MemoryStore, Where, open_store
from lifelong.terms import MemoryTerm

M, D, C = 24, 5, 3


@pytest.fixture(params=["store", "store.lance"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[MemoryStore]:
    with open_store(tmp_path / request.param) as opened:
        yield opened


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(D, C).double()


def memory_of(n: int = M, inputs: Any = None) -> Memory:
    g = torch.Generator().manual_seed(n)
    return Memory(
        inputs=torch.randn(n, D, generator=g, dtype=torch.float64) if inputs is None else inputs,
        labels=torch.arange(n) % C,
        reference=torch.randn(n, C, generator=g, dtype=torch.float64),
        soft_weight=torch.rand(n, generator=g, dtype=torch.float64),
        hard_weight=torch.rand(n, generator=g, dtype=torch.float64),
        task=torch.arange(n) // 8,
        origin=torch.arange(n),
        head=torch.arange(n) % 2,
        heads=(None, (0, 2)),
    )


def prior_of(memory: Memory) -> Prior:
    return Prior(Categorical(), Recipe(memory=len(memory)), terms=(MemoryTerm(memory),))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a.dtype == b.dtype and torch.equal(a, b)


def steps(prior: Prior, model: nn.Module, count: int, **options: Any) -> list[Tensor]:
    """Losses and gradients of some steps, with draws of new data in between."""
    generator, found = torch.Generator().manual_seed(3), []
    params = list(model.parameters())
    for step in range(count):
        if step % 5 == 4:  # an epoch ends: the loop shuffles with the same generator
            torch.randperm(7, generator=generator)
        x = torch.ones(4, D, dtype=torch.float64)
        loss = prior.loss(model, x, torch.arange(4) % C, num_data=9, generator=generator, **options)
        found += [loss.detach(), *torch.autograd.grad(loss, params)]
    return found


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_a_served_memory_is_the_memory(store: MemoryStore, kind: str) -> None:
    memory = memory_of()
    if kind == "dict":
        x = memory.inputs
        memory = replace(memory, inputs={"x": x, "n": torch.arange(M, dtype=torch.int32)})
    store.append(memory)
    served = store.serve()
    assert isinstance(served.inputs, Served)
    assert served.num_bytes == memory.num_bytes
    state, expected = served.state_dict(), store.memory().state_dict()
    for name in expected:
        assert (
            state[name] == expected[name] if name == "heads" else equal(state[name], expected[name])
        )
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(4):
        a, b = served.sample(6, g), store.memory().sample(6, h)
        assert equal(a.inputs, b.inputs)
        assert torch.equal(a.soft_weight, b.soft_weight)
    assert served.inputs.hits == 3  # all but the first were read before
    a, b = served.draw(6, g), store.memory().draw(6, h)
    assert equal(a.inputs, b.inputs)


def test_steps_are_the_same_bit_for_bit(store: MemoryStore, model: nn.Module) -> None:
    store.append(memory_of())
    ram, disk = prior_of(store.memory()), prior_of(store.serve(workers=2))
    for options in ({"batch_size": 6}, {"batch_size": None}, {"batch_size": 2}):
        for a, b in zip(steps(ram, model, 11, **options), steps(disk, model, 11, **options)):
            assert torch.equal(a, b)


def test_what_is_foreseen_is_used(store: MemoryStore, model: nn.Module) -> None:
    store.append(memory_of())
    prior = prior_of(store.serve(ahead=3))
    steps(prior, model, 11, batch_size=6)
    assert prior.memory is not None
    assert prior.memory.inputs.hits == 8  # but the first, and the two after a shuffle


def test_each_rank_reads_its_part_ahead(store: MemoryStore, model: nn.Module) -> None:
    store.append(memory_of())

    ram, disk = prior_of(store.memory()), prior_of(store.serve())
    ranks: Any = type("Second", (), {"rank": 1, "size": 2})()
    for a, b in zip(*(steps(p, model, 4, batch_size=6, ranks=ranks) for p in (ram, disk))):
        assert torch.equal(a, b)
    assert disk.memory is not None
    assert disk.memory.inputs.hits == 3


def test_draws_that_nobody_foresees_are_given_up(store: MemoryStore) -> None:
    store.append(memory_of())
    served = store.serve()
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    for _ in range(40):
        torch.rand(1, generator=g), torch.rand(1, generator=h)
        assert equal(served.sample(4, g).inputs, store.memory().sample(4, h).inputs)
    assert served.inputs.hits == 0
    for _ in range(40):  # from here on by itself: found out at the next trial
        _ = served.sample(4, g).inputs
    assert served.inputs.hits > 10


def test_an_item_that_left_is_not_used(store: MemoryStore) -> None:
    store.append(memory_of())
    served = store.serve()
    g = torch.Generator().manual_seed(1)
    _ = served.sample(12, g).inputs
    following = served._drawn(12, g.clone_state())
    assert following is not None
    gone = int(following[0])
    store.drop([int(served.inputs.place[gone])])  # read ahead already, or not: both must tell
    with pytest.raises(ValueError, match="dropped or forgotten"):
        _ = served.sample(12, g).inputs
    marked = torch.zeros(M, dtype=torch.bool)
    marked[gone] = True
    rest = served.drop(marked)
    assert len(rest) == M - 1
    assert equal(read(rest.inputs), store.memory().inputs)
    for _ in range(5):
        assert gone not in rest.sample(12, g).memory.origin[rest._drawn(12, g.clone_state())]
    store.forget([int(served.inputs.place[0])])
    with pytest.raises(ValueError, match="dropped or forgotten"):
        _ = served.sample(M - 1, g).memory.inputs[torch.arange(3)]


def test_forgetting_in_a_prior(store: MemoryStore, model: nn.Module) -> None:
    store.append(memory_of())
    ram, disk = prior_of(store.memory()), prior_of(store.serve())
    steps(disk, model, 2, batch_size=6)
    ids = torch.tensor([1, 4, 5])
    ram, disk = (p.forget(model, where=lambda m: torch.isin(m.origin, ids)) for p in (ram, disk))
    assert disk.memory is not None
    assert len(disk.memory) == M - 3
    store.forget([f"{int(i) // 8}:{i}" for i in ids])
    for a, b in zip(*(steps(p, model, 4, batch_size=6) for p in (ram, disk))):
        assert torch.equal(a, b)


def test_a_prior_goes_on_from_disk(store: MemoryStore, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C))
    tasks = [lifelong.Examples(torch.randn(20, D), torch.arange(20) % C) for _ in range(2)]
    first = lifelong.kprior(Categorical(), memory=8).update(model, tasks[0])
    store.save_prior(first)
    ram, disk = store.load_prior(), store.load_prior(serve=True)
    assert disk.memory is not None
    assert isinstance(disk.memory.inputs, Served)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    ram, disk = (p.update(model, tasks[1]) for p in (ram, disk))
    assert disk.memory is not None
    assert len(disk.memory) == 16
    assert len(disk.memory.inputs.sources) == 2  # the store, and the new items in RAM
    options: dict[str, Any] = {"batch_size": 5}
    for _ in range(3):
        a, b = (
            p(model, generator=torch.Generator().manual_seed(2), **options) for p in (ram, disk)
        )
        assert torch.equal(a, b)
    disk.save(tmp_path / "prior.safetensors")
    again = Prior.load(tmp_path / "prior.safetensors")
    assert torch.equal(again(model), ram(model))
    store.save_prior(disk)
    assert torch.equal(store.load_prior(serve=True)(model), ram(model))
    with pytest.raises(ValueError, match="not today's"):
        store.load_prior(1, serve=True)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_rows_are_rows(index: list[int], cut: int) -> None:
    """Selecting, joining and reading commute, over sources in RAM and elsewhere."""
    x = torch.arange(10.0).unsqueeze(1)
    some = Served((Plain(x),), torch.zeros(10).long(), torch.arange(10), x[:0])
    at = torch.tensor(index, dtype=torch.int64)
    assert torch.equal(some[at], x[at])
    assert torch.equal(some.select(at)[:], x[at])
    both: Any = concat([some.select(slice(cut)), x[cut:], some])  # type: ignore[list-item]
    assert torch.equal(both[at], x[at])
    assert torch.equal(read(both), torch.cat([x, x]))
    assert len(both.sources) == 2
    assert nbytes(both) == 80
    assert torch.equal(both[both.place < 3], torch.cat([x, x])[both.place < 3])
    halved = move(some, dtype=torch.float16)
    assert halved[at].dtype == torch.float16
    assert repr(some) == "Served(10 rows of 1 sources)"


class Plain:
    """A source that reads at once."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def submit(self, places: Any, *, urgent: bool) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self.x[torch.as_tensor(places, dtype=torch.int64)])
        return future

    def version(self) -> int:
        return 0


def test_a_model_reads_what_it_is_given(store: MemoryStore, model: nn.Module) -> None:
    memory = memory_of()
    store.append(memory)
    served = store.serve()
    assert torch.equal(forward(model, served.inputs), model(memory.inputs))
    data = lifelong.Examples(served.inputs, served.labels)
    assert isinstance(data[2:4].inputs, Served)
    g = lifelong.diagonal_curvature(model, data, Categorical(), batch_size=5)
    expected = lifelong.diagonal_curvature(
        model, (memory.inputs, memory.labels), Categorical(), batch_size=5
    )
    for name in g.values:
        assert torch.equal(g.values[name], expected.values[name])
    assert torch.equal(served.refresh(model, 5).reference, memory.refresh(model, 5).reference)


def test_serving_some(store: MemoryStore) -> None:
    store.append(memory_of())
    assert len(store.serve(Where(task=1))) == 8
    assert store.serve([3, 1]).origin.tolist() == store.memory([3, 1]).origin.tolist()
    assert torch.equal(store.inputs([3, 1, 3]), store.memory([3, 1, 3]).inputs)
    with pytest.raises(ValueError, match="ahead"):
        store.serve(ahead=-1)
    with pytest.raises(ValueError, match="worker"):
        store.serve(workers=0)
    with pytest.raises(ValueError, match="no such items"):
        store.serve(Where(task=7))
    with pytest.raises(ValueError, match="no items"):
        store.serve([99])
    store.append(memory_of(3, torch.zeros(3, D + 1)))
    with pytest.raises(ValueError, match="differ in type or shape"):
        store.serve()


def test_copies_read_for_themselves(store: MemoryStore) -> None:
    store.append(memory_of())
    served = store.serve()
    for again in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert equal(read(again.inputs), read(served.inputs))


def test_damage_is_told(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.append(memory_of())
        served = store.serve()
        con = sqlite3.connect(tmp_path / "s" / "memory.sqlite")
        con.execute("UPDATE content SET input = zeroblob(length(input)) WHERE id = 3")
        con.commit()
        con.close()
        with pytest.raises(StoreDamagedError):
            read(served.inputs)


def test_reading_threads_end() -> None:
    closed = threading.Event()

    class Opened:
        def close(self) -> None:
            closed.set()

    reading = Reading(Opened)
    assert reading.submit(lambda opened: type(opened)).result() is Opened
    with pytest.raises(ZeroDivisionError):
        reading.submit(lambda _: 1 / 0).result()
    assert reading.submit(lambda _: 5).result() == 5
    del reading
    assert closed.wait(5)


def test_urgent_reading_comes_first() -> None:
    go, order = threading.Event(), []
    reading = Reading(lambda: None)
    first = reading.submit(lambda _: go.wait(5))
    later = [reading.submit(lambda _, i=i: order.append(i)) for i in range(2)]
    urgent = reading.submit(lambda _: order.append("urgent"), urgent=True)
    later[0].cancel()
    go.set()
    for job in (first, later[1], urgent):
        job.result()
    assert order == ["urgent", 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_new_threads_read(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.append(memory_of())
        served = store.serve()
        expected = read(served.inputs)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if equal(read(served.inputs), expected) else 1)
        assert os.waitpid(pid, 0)[1] == 0
