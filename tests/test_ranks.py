"""Ranks share out the memory: what each draws, what each holds, and what goes wrong on one."""

from __future__ import annotations

import pickle
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import lifelong
from lifelong import Categorical, Examples, Learner, Prior, Task
from lifelong.data import shard, whole
from lifelong.distributed import Ranks
from lifelong.errors import NonFiniteError
from lifelong.learner import CHECKPOINT, adam
from lifelong.models import unwrapped
from lifelong.presets import PRESETS

CATEGORICAL = Categorical()
N, CLASSES = 30, 3
HELD: dict[str, dict[str, Any]] = {
    "kprior": {"memory": 7},
    "gradient_reconstruction": {"memory": 7, "replay": 0.4},
    "recommended": {"memory": 7},
    "experience_replay": {"memory": 9},
    "der": {"memory": 9},
    "derpp": {"memory": 9},
    "lwf": {},
}


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, CLASSES)]
    return nn.Sequential(*layers).double()


def task(number: int) -> Examples:
    g = torch.Generator().manual_seed(number)
    x = torch.randn(N, 4, generator=g, dtype=torch.float64)
    return Examples(x, torch.randint(CLASSES, (N,), generator=g))


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def preset(name: str) -> Prior:
    return PRESETS[name](CATEGORICAL, **HELD.get(name, {}))


def learned(prior: Prior, part: Any = lambda data: data) -> tuple[nn.Module, Prior]:
    """Two tasks; a model beside the anchor, and the prior."""
    model = network()
    for number in range(2):
        prior = prior.prepare(moved(model, number), part(task(number)))
        prior = prior.update(moved(model, number), part(task(number)), generator=seeded())
    return moved(model), prior.prepare(model, part(task(2)))


def value_and_slope(value: Tensor, model: nn.Module) -> Tensor:
    some = next(model.parameters())
    value = value + 0 * some.sum()  # a rank may have nothing to say
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    pairs = zip(grads, model.parameters(), strict=True)
    slopes = [torch.zeros_like(p) if g is None else g for g, p in pairs]
    return torch.cat([value.detach().reshape(1), *(g.flatten() for g in slopes)])


def close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-9)
    else:
        assert a == b


# ------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("size", [2, 3, 11])
@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("name", [*HELD, "fromp"])
def test_the_mean_over_ranks_of_the_parts_is_the_prior(name, batch_size, size):
    model, prior = learned(preset(name) if name in HELD else lifelong.fromp(CATEGORICAL, memory=6))
    x, y = task(4).inputs, task(4).labels

    def loss(ranks: Any) -> tuple[Tensor, Tensor]:
        how: dict[str, Any] = {"batch_size": batch_size, "ranks": ranks}
        alone = value_and_slope(prior(model, generator=seeded(), **how), model)
        fused = prior.loss(model, x, y, num_data=N, generator=seeded(), **how)  # type: ignore[arg-type]
        return alone, value_and_slope(fused, model)

    parts = [loss(SimpleNamespace(rank=rank, size=size)) for rank in range(size)]
    for found, expected in zip(zip(*parts, strict=True), loss(None), strict=True):
        close(torch.stack(found).mean(0), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
@pytest.mark.parametrize("name", HELD)
def test_a_memory_that_was_spread_can_be_joined(name, size, tmp_path):
    model, prior = learned(preset(name))
    parts = [prior.spread(SimpleNamespace(rank=r, size=size)) for r in range(size)]  # type: ignore[arg-type]
    sizes = [len(part.memory) for part in parts if part.memory is not None]
    assert sum(sizes) == len(prior.memory or ())
    assert max(sizes) - min(sizes) <= 1
    values = [value_and_slope(part(model), model) for part in parts]
    close(torch.stack(values).mean(0), value_and_slope(prior(model), model))
    files = [part.save(tmp_path / f"{rank}.safetensors") for rank, part in enumerate(parts)]
    close(Prior.joined([Prior.load(file) for file in files]).state_dict(), prior.state_dict())


def test_a_spread_prior_is_used_as_one():
    model, prior = learned(preset("kprior"))
    three = SimpleNamespace(rank=0, size=3)
    part = prior.spread(three)  # type: ignore[arg-type]
    for what, call in {
        "its data must say": lambda: part.update(model, task(3), generator=seeded()),
        "forget needs all": lambda: part.forget(model, task=0),
        "rebase needs all": lambda: part.rebase(model),
        "transfer needs all": lambda: part.grow(model),
        "cannot be spread: it is over 3": lambda: part.spread(three),
        "over 3 ranks, and there are 2": lambda: part(model, ranks=SimpleNamespace(rank=0, size=2)),
        "expected all parts of one prior, got 2": lambda: Prior.joined([part, part]),
        "expected all parts of one prior, got 0": lambda: Prior.joined([]),
        "cannot add a prior": lambda: prior + part,
    }.items():
        with pytest.raises(ValueError, match=what):
            call()  # type: ignore[no-untyped-call]
    assert prior.collected(three) is prior  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "why"), [("fromp", "all of its memory"), ("joint", "at once")])
def test_what_couples_items_is_not_spread(name, why):
    with pytest.raises(ValueError, match=why):
        PRESETS[name](CATEGORICAL).spread(SimpleNamespace(rank=0, size=2))  # type: ignore[arg-type]
    _, prior = learned(lifelong.fromp(CATEGORICAL, memory=6))
    with pytest.raises(ValueError, match="kernels couple"):
        prior.spread(SimpleNamespace(rank=0, size=2))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports
def test_wrappers_are_looked_into():
    model = network()
    compiled = torch.compile(model)  # which compiles nothing before it is called
    assert unwrapped(model) is model
    assert unwrapped(compiled) is model  # type: ignore[arg-type]
    assert unwrapped(nn.DataParallel(compiled)) is model  # type: ignore[arg-type]


def test_plain_data_are_whole():
    data = task(0)
    assert whole(data) is data


# ------------------------------------------------------------------------------- on two ranks


def parts_of(data: Examples, rank: int, cut: int = 19) -> Examples:
    return data[:cut] if rank == 0 else data[cut:]


def by_learner(prior: Prior, ranks: Ranks | None, **options: Any) -> Learner:
    learner = Learner(
        network(options.pop("dropout", 0.0)), prior, optimizer=adam(1e-2), batch_size=8, epochs=2,
        seed=3, ranks=ranks, memory_batch_size=options.pop("memory_batch_size", None),
    )  # fmt: skip
    if "loaded" in options:
        learner.load(options.pop("loaded"))
    learner.run([Task(i, str(i), task(i), task(10 + i)) for i in range(3)], **options)
    return learner


def found_of(learner: Learner, prior: Prior) -> dict[str, Any]:
    return {"model": dict(learner.model.state_dict()), "prior": prior.state_dict()}


def on_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=2),
    )
    try:
        found = {name: job(rank, Path(folder)) for name, job in JOBS.items()}
        Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def spread(rank: int, folder: Path) -> Any:
    ranks, found = Ranks(), {}
    for name in HELD:
        start = preset(name).spread(ranks)
        model, prior = learned(start, lambda data: shard(parts_of(data, rank)))
        held = 0 if prior.memory is None else len(prior.memory)
        value = value_and_slope(prior(model), model)
        found[name] = (held, value, prior.collected(ranks).state_dict())
    return found


def learners(rank: int, folder: Path) -> Any:
    ranks = Ranks()
    learner = by_learner(preset("recommended").spread(ranks), ranks, folder=folder / "learner")
    few = by_learner(preset("kprior").spread(ranks), ranks, memory_batch_size=5)
    return found_of(learner, learner.prior.collected(ranks)), few.generator.get_state()


def stopped(rank: int, folder: Path) -> Any:
    """A run with dropout, which draws on each rank, is stopped after an epoch and goes on."""
    ranks = Ranks()
    straight = by_learner(preset("kprior"), ranks, dropout=0.5)

    def stop(progress: Any) -> None:
        if progress.task == 1 and progress.epoch == 1:
            raise KeyboardInterrupt

    try:
        by_learner(preset("kprior"), ranks, dropout=0.5, folder=folder / "stopped", on_epoch=stop)
    except KeyboardInterrupt:
        torch.manual_seed(99)
    place = folder / "stopped" / CHECKPOINT
    resumed = by_learner(preset("kprior"), ranks, dropout=0.5, loaded=place)
    return found_of(straight, straight.prior), found_of(resumed, resumed.prior)


def not_finite(rank: int, folder: Path) -> Any:
    """In a batch that only one of the ranks reads."""
    data = task(0)
    data.inputs[17] = torch.nan  # type: ignore[index]
    learner = Learner(network(), preset("kprior"), batch_size=2, ranks=Ranks(), seed=rank * 0)
    before = {n: v.clone() for n, v in learner.model.state_dict().items()}
    try:
        learner.fit(Task(0, "0", data))
    except NonFiniteError as error:
        after = learner.model.state_dict()
        return str(error), all(torch.equal(before[n], after[n]) for n in before)
    return "nothing was raised", False


def forgetting(rank: int, folder: Path) -> Any:
    model, prior = learned(
        lifelong.gradient_reconstruction(CATEGORICAL, memory=7, gradient="stored")
    )
    gone = task(1)[torch.tensor([1, 5, 6, 20, 29])]
    mine = gone[:4] if rank == 0 else gone[4:]
    left = prior.forget(model, shard(mine, ids=mine.ids), task=1)
    nothing = gone[:0] if rank else gone
    again = prior.forget(model, shard(nothing, ids=nothing.ids), task=1)
    try:
        groups = torch.zeros(len(mine), dtype=torch.int64)
        prior.forget(model, shard(mine, ids=mine.ids), task=1, groups=groups)
    except ValueError as error:
        return left.state_dict(), again.state_dict(), str(error)
    return None


def wrapped(rank: int, folder: Path) -> Any:
    model = network()
    ddp = DistributedDataParallel(model)
    prior, grads = preset("recommended"), []
    for number in range(2):
        mine = parts_of(task(number), rank, N // 2)
        prior = prior.prepare(ddp, shard(mine))
        model.zero_grad()
        prior.loss(ddp, mine.inputs, mine.labels, num_data=N, ranks=Ranks()).backward()  # type: ignore[arg-type]
        grads.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
        prior = prior.update(ddp, shard(mine), generator=seeded())
    return grads, prior(moved(ddp)).detach(), prior.state_dict()


def nll(ddp: nn.Module, data: Examples) -> Tensor:
    return nn.functional.cross_entropy(ddp(data.inputs), data.labels)


def one_backward(ddp: Any, data: Examples, past: Any) -> None:
    (nll(ddp, data) + past()).backward()


def prior_before_forward(ddp: Any, data: Examples, past: Any) -> None:
    value = past()
    (nll(ddp, data) + value).backward()


def prior_first(ddp: Any, data: Examples, past: Any) -> None:
    past().backward()  # which the backward of the data averages too
    nll(ddp, data).backward()


def parts_of_a_batch(ddp: Any, data: Examples, past: Any) -> None:
    with ddp.no_sync():
        (nll(ddp, data[:5]) / 2).backward()
        (past() / 2).backward()
    (nll(ddp, data[5:10]) / 2 + past() / 2).backward()


def two_priors(ddp: Any, data: Examples, past: Any) -> None:
    (past() + nll(ddp, data) + past()).backward()


def prior_after(ddp: Any, data: Examples, past: Any) -> None:
    nll(ddp, data).backward()
    past().backward()


def data_after(ddp: Any, data: Examples, past: Any) -> None:
    loss, value = nll(ddp, data), past()
    value.backward()
    loss.backward()


def inner_module(ddp: Any, data: Examples, past: Any) -> None:
    (nll(ddp.module, data) + past()).backward()


RIGHT = (one_backward, prior_before_forward, prior_first, parts_of_a_batch, two_priors)
WRONG = (prior_after, data_after, inner_module)


def averages(rank: int, folder: Path) -> Any:
    """What each loop raises in three steps, and whether the ranks have one gradient then."""
    ranks, found = Ranks(), {}
    data = parts_of(task(3), rank, N // 2)
    for name in AVERAGED:
        prior = learned(AVERAGED[name]())[1]
        for loop in (*RIGHT, *WRONG):
            ddp = DistributedDataParallel(moved(network()))

            def past(ddp: Any = ddp, prior: Prior = prior) -> Tensor:
                return prior(ddp, batch_size=3, generator=seeded(rank)) / N

            told = None
            try:
                for _ in range(3):
                    ddp.zero_grad()
                    loop(ddp, data, past)
            except ValueError as error:
                told = str(error)
            grads = [None if p.grad is None else p.grad.tolist() for p in ddp.parameters()]
            by_rank = ranks.objects(grads)
            found[name, loop.__name__] = told, by_rank[0] == by_rank[1]
    return found


AVERAGED: dict[str, Any] = {
    name: lambda name=name: preset(name) for name in ("kprior", "recommended", "experience_replay")
}


JOBS = {
    job.__name__: job
    for job in (spread, learners, stopped, not_finite, forgetting, wrapped, averages)
}  # each on both ranks, in one pair of processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_rank, (2, str(folder)), nprocs=2)  # type: ignore[attr-defined]
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)], folder


@pytest.mark.parametrize("name", HELD)
def test_each_rank_holds_a_part_of_the_memory_of_one_process(name, found):
    model, prior = learned(preset(name))
    both = [by_rank["spread"][name] for by_rank in found[0]]
    assert sum(held for held, _, _ in both) == len(prior.memory or ())
    assert abs(both[0][0] - both[1][0]) <= 1
    close((both[0][1] + both[1][1]) / 2, value_and_slope(prior(model), model))
    for _, _, state in both:
        close(state, prior.state_dict())


def test_a_learner_whose_memory_is_spread_ends_where_one_process_ends(found):
    alone = by_learner(preset("recommended"), None)
    for by_rank in found[0]:
        close(by_rank["learners"][0], found_of(alone, alone.prior))
    loaded = Learner(network(), preset("recommended")).load(found[1] / "learner" / CHECKPOINT)
    close(found_of(loaded, loaded.prior), found_of(alone, alone.prior))
    drawn = [by_rank["learners"][1] for by_rank in found[0]]
    assert torch.equal(*drawn)  # whatever each has drawn from its own part


def test_a_run_with_dropout_goes_on_bit_for_bit(found):
    for by_rank in found[0]:
        straight, resumed = (pickle.dumps(_lists(value)) for value in by_rank["stopped"])
        assert straight == resumed


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(v) for v in value]
    return value.tolist() if isinstance(value, Tensor) else value


def test_all_ranks_stop_where_one_has_no_finite_loss(found):
    for by_rank in found[0]:
        told, as_it_was = by_rank["not_finite"]
        assert "the loss became nan" in told
        assert as_it_was


def test_examples_on_several_ranks_are_forgotten_on_all(found):
    model, prior = learned(
        lifelong.gradient_reconstruction(CATEGORICAL, memory=7, gradient="stored")
    )
    gone = task(1)[torch.tensor([1, 5, 6, 20, 29])]
    expected = prior.forget(model, gone, task=1).state_dict()
    for by_rank in found[0]:
        left, again, told = by_rank["forgetting"]
        close(left, expected)
        close(again, expected)
        assert told.startswith("groups are of one process's data")


@pytest.mark.parametrize("loop", RIGHT)
@pytest.mark.parametrize("name", AVERAGED)
def test_nothing_is_said_of_a_loop_whose_gradients_are_averaged(name, loop, found):
    for by_rank in found[0]:
        assert by_rank["averages"][name, loop.__name__] == (None, True)


@pytest.mark.parametrize("loop", WRONG)
@pytest.mark.parametrize("name", AVERAGED)
def test_gradients_that_would_stay_on_their_rank_are_told(name, loop, found):
    through = loop is not inner_module
    expected = "came in two" if through else "nothing went through"
    for by_rank in found[0]:
        told, _ = by_rank["averages"][name, loop.__name__]
        assert told is not None
        assert expected in told


def test_a_prior_may_be_given_the_wrapped_model(found):
    model, prior, expected = network(), preset("recommended"), []
    for number in range(2):
        data = task(number)
        prior = prior.prepare(model, data)
        model.zero_grad()
        prior.loss(model, data.inputs, data.labels, num_data=N).backward()  # type: ignore[arg-type]
        expected.append([p.grad.clone() for p in model.parameters()])  # type: ignore[union-attr]
        prior = prior.update(model, data, generator=seeded())
    for by_rank in found[0]:
        grads, value, state = by_rank["wrapped"]
        close(grads, expected)
        close(state, prior.state_dict())
        close(value, prior(moved(network())).detach())
