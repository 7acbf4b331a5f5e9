"""Data spread over processes: the prior of one process, for every preset, on 2 and on 4 ranks."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import lifelong
from lifelong import (
    Bernoulli,
    Categorical,
    Examples,
    Gaussian,
    Learner,
    PathIntegral,
    Prior,
    Task,
)
from lifelong.bench.lock import held
from lifelong.data import shard
from lifelong.distributed import Ranks
from lifelong.learner import CHECKPOINT, adam
from lifelong.presets import PRESETS
from lifelong.recipe import Recipe
from lifelong.terms import Regulariser

N, CLASSES = 30, 3
SMALL: dict[str, dict[str, Any]] = {
    "kprior": {"memory": 5},
    "fromp": {"memory": 5},
    "gradient_reconstruction": {"memory": 5, "replay": 0.4},
    "recommended": {"memory": 5},
    "experience_replay": {"memory": 6},
    "der": {"memory": 6},
    "derpp": {"memory": 6},
    "ewc": {"strength": "auto"},
}
SPLITS = {2: ([19, 11], [30, 0]), 4: ([9, 0, 16, 5],)}


def _recipe(**fields: Any) -> Callable[[], Prior]:
    recipe = Recipe("of a test", **fields)
    return lambda: Prior(Categorical(), recipe, (Regulariser(0.5),))


CASES: dict[str, Callable[[], Prior]] = {
    **{n: lambda n=n: PRESETS[n](Categorical(), **SMALL.get(n, {})) for n in PRESETS},
    **{
        f"structure {s}": _recipe(structure=s, gradient="stored")
        for s in ("dense", "block", "isotropic", "kronecker", "eigen_kronecker", "low_rank")
    },
    **{
        f"score {s}": _recipe(score=s, memory=5, per_class=s != "residual")
        for s in ("lambda", "leverage", "residual", "sensitivity")
    },
    "all kept": _recipe(memory=None, gradient="stored"),
    "bytes": _recipe(memory="700B", score="random"),
    "k_centre": _recipe(memory=5, score="k_centre"),
    "lowest": _recipe(memory=4, descending=False),
    "a sample": _recipe(structure="diagonal", curvature_examples=7, memory=3, score="random"),
    "top outputs": _recipe(structure="diagonal", memory=4, top_outputs=2),
    "empirical": _recipe(structure="diagonal", estimator="empirical"),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def task(number: int) -> Examples:
    g = torch.Generator().manual_seed(number)
    x = torch.randn(N, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(CLASSES, (N,), generator=g)
    return Examples(x, labels)


def learned(prior: Prior, part: Callable[[Examples], Any]) -> list[dict[str, Any]]:
    """Two tasks, the same steps on every rank; the prior after each, as its file holds it."""
    model, found = network(), []
    for number in range(2):
        data = task(number)
        prior = prior.prepare(model, part(data))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = None
        if prior.recipe.structure == "path":
            path = PathIntegral(model, optimizer, prior, N)
            path.__enter__()
        for _ in range(3):
            optimizer.zero_grad()
            loss = prior.loss(model, data.inputs, data.labels, num_data=N)  # type: ignore[arg-type]
            loss.backward()
            optimizer.step()
        generator = torch.Generator().manual_seed(7)
        prior = prior.update(model, part(data), path=path, generator=generator)
        if path is not None:
            path.__exit__(None, None, None)
        state = {**prior.state_dict(), "value": prior(moved(model)).detach()}
        found.append({**state, "drawn": generator.get_state()})
    return found


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return other


def parts_of(data: Examples, sizes: list[int], rank: int) -> Examples:
    start = sum(sizes[:rank])
    return data[start : start + sizes[rank]]


# ------------------------------------------------------------------------------- on each rank


def on_rank(rank: int, size: int, out: str) -> None:
    torch.set_num_threads(1)
    # By a file: a port that is free now may not be a moment later. Nobody waits for long.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(minutes=2),
    )
    try:
        found = {name: job(rank, size, Path(out)) for name, job in JOBS[size].items()}
        Path(out, f"{rank}.pkl").write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def every_case(rank: int, size: int, out: Path) -> Any:
    return {
        (name, i): learned(case(), lambda data, s=sizes: shard(parts_of(data, s, rank)))
        for name, case in CASES.items()
        if size == 2 or name in PRESETS
        for i, sizes in enumerate(SPLITS[size])
    }


DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64, torch.bfloat16,
    torch.float16, torch.float64, torch.complex64,
]  # fmt: skip


def of_dtype(dtype: torch.dtype, rank: int) -> Tensor:
    """Rows of several bytes each; rank 1 has none."""
    return (torch.arange(6).view(3, 2) * (200 if dtype.itemsize > 1 else 40) + 1).to(dtype)[
        3 * rank :
    ]


def dtypes(rank: int, size: int, out: Path) -> Any:
    ranks = Ranks()
    gathered = [ranks.gather(of_dtype(dtype, rank)) for dtype in DTYPES]
    summed = ranks.sum([torch.full((2,), 1 + rank).to(dtype) for dtype in DTYPES])
    return [[(x.dtype, x.tolist()) for x in found] for found in (gathered, summed)]


LIKELIHOODS = [Categorical(), Bernoulli(), Gaussian()]


def evaluated(likelihood: Any, data: Examples, part: Callable[[Examples], Any]) -> dict[str, Any]:
    if not isinstance(likelihood, Categorical):
        data = replace(data, labels=nn.functional.one_hot(data.labels, CLASSES).double())
    return asdict(lifelong.evaluate(network(), part(data), likelihood, batch_size=7))


def evaluations(rank: int, size: int, out: Path) -> Any:
    return [
        evaluated(likelihood, task(0), lambda data, s=sizes: shard(parts_of(data, s, rank)))
        for likelihood in LIKELIHOODS
        for sizes in SPLITS[size]
    ]


def mistakes(rank: int, size: int, out: Path) -> Any:
    ranks, model = Ranks(), network()
    data = parts_of(task(0), [15, 15], rank)
    mine = shard(data)
    kprior = lifelong.kprior(Categorical(), memory=4)
    told: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            told[name] = "nothing was raised"
        except (ValueError, TypeError, RuntimeError) as error:
            told[name] = f"{type(error).__name__}: {error}"

    other = moved(model) if rank else model
    attempt("weights", lambda: kprior.update(other, mine))
    another = kprior if rank else 0.5 * lifelong.kprior(Categorical(), memory=5)
    attempt("prior", lambda: another.update(model, mine))
    attempt("too many", lambda: lifelong.kprior(Categorical(), memory=31).update(model, mine))
    fidelity = lifelong.kprior(Categorical(), memory=lifelong.Fidelity(0.9))
    attempt("fidelity", lambda: fidelity.update(model, mine))
    twice = shard(data, ids=torch.arange(15))
    attempt("ids", lambda: kprior.update(model, twice))
    attempt("head", lambda: shard(replace(data, head=(0, 1, 2) if rank else None)))
    nobody = shard(data[:0])
    attempt("nobody", lambda: kprior.update(model, nobody))
    own = torch.Generator().manual_seed(rank)
    attempt("generator", lambda: kprior.update(model, mine, generator=own))
    pairs = TensorDataset(data.inputs, data.labels)  # type: ignore[arg-type]
    attempt("ids of what is no Examples", lambda: shard(pairs, ids=torch.arange(15)))
    groups = torch.zeros(15, dtype=torch.int64)
    attempt("groups", lambda: kprior.update(model, mine, groups=groups))
    attempt("rows", lambda: ranks.gather(torch.zeros(2, 3 + rank)))
    attempt("labels", lambda: kprior.update(model, shard(replace(data, labels=data.labels + 9))))
    alone = kprior.update(model, data) if rank == 0 else None  # which waits for nobody
    return told, None if alone is None else alone.num_data


def user_loop(rank: int, size: int, out: Path) -> Any:
    """Three lines in a loop of one's own: gradients of one process on the whole batch."""
    model = network()
    ddp = DistributedDataParallel(model)
    prior = lifelong.recommended(Categorical(), memory=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = []
    for number in range(2):
        data = task(number)
        mine = parts_of(data, [N // size] * size, rank)
        prior = prior.prepare(model, shard(mine))
        for _ in range(3):
            optimizer.zero_grad()
            nll = nn.functional.cross_entropy(ddp(mine.inputs), mine.labels)
            (nll + prior(model) / N).backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]
            optimizer.step()
        generator = torch.Generator().manual_seed(7)
        prior = prior.update(model, shard(mine), generator=generator)
    return grads


def by_learner(name: str, ranks: Ranks | None, **options: Any) -> dict[str, Any]:
    """Three tasks of 29, 30 and 31 examples in batches of 8; everything that it ends with."""
    torch.manual_seed(0)
    learner = Learner(
        network(),
        CASES[name](),
        optimizer=adam(1e-2),
        epochs=2,
        batch_size=8,
        memory_batch_size=None if name in ("fromp", "lwf") else 4,
        clip=1.0,
        seed=3,
        ranks=ranks,
    )
    stream = [
        Task(i, str(i), task(i)[: 29 + i] if i < 2 else task(i), task(10 + i)) for i in range(3)
    ]
    told: list[float] = []
    learner.run(stream, on_epoch=lambda progress: told.append(progress.loss), **options)
    model = learner.model.state_dict()
    return {"model": model, "accuracy": learner.accuracy, "prior": learner.prior.state_dict(),
            "losses": told, "drawn": learner.generator.get_state()}  # fmt: skip


def learners(rank: int, size: int, out: Path) -> Any:
    return {name: by_learner(name, Ranks()) for name in PRESETS}


def saved(rank: int, size: int, out: Path) -> Any:
    """Rank 0 writes; a learner on any number of ranks goes on from there."""
    folder = out / "run"
    by_learner("recommended", Ranks(), folder=folder)
    return sorted(p.name for p in folder.iterdir())


JOBS: dict[int, dict[str, Callable[[int, int, Path], Any]]] = {
    2: {
        "cases": every_case,
        "learners": learners,
        "mistakes": mistakes,
        "dtypes": dtypes,
        "evaluations": evaluations,
        "loop": user_loop,
        "saved": saved,
    },
    4: {"cases": every_case, "learners": learners},
}


# ------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, list[Any]]]:
    """All jobs of a number of ranks, done once, also for several test processes, since a process
    takes seconds to start: the folder that they wrote to, and what each rank has found."""
    mine = tmp_path_factory.getbasetemp()
    shared = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine

    @cache
    def run(size: int) -> tuple[Path, list[Any]]:
        place = shared / f"ranks-{size}"  # where the folder's name is
        with held(shared / f"ranks-{size}.lock"):
            if not place.is_file():
                folder = tmp_path_factory.mktemp("ranks")
                mp.spawn(on_rank, (size, str(folder)), nprocs=size)  # type: ignore[attr-defined]
                place.write_text(str(folder))
        out = Path(place.read_text())
        return out, [pickle.loads((out / f"{rank}.pkl").read_bytes()) for rank in range(size)]

    return run


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, on_ranks: Any) -> tuple[int, list[Any]]:
    return request.param, on_ranks(request.param)[1]


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in value:
            yield from flat(value[key], f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flat(item, f"{place}.{i}")
    else:
        yield place, value


def require_close(a: Any, b: Any) -> None:
    ours, theirs = dict(flat(a)), dict(flat(b))
    assert ours.keys() == theirs.keys()
    for place, x in ours.items():
        y = theirs[place]
        if isinstance(x, Tensor) and x.is_floating_point():
            torch.testing.assert_close(
                x, y, rtol=1e-9, atol=1e-10, msg=lambda m, p=place: f"{p}: {m}"
            )
        elif isinstance(x, Tensor):
            assert torch.equal(x, y), place
        elif isinstance(x, float):
            assert x == pytest.approx(y, rel=1e-9), place
        else:
            assert x == y, place


@pytest.mark.parametrize("name", CASES)
def test_shards_give_the_prior_of_one_process(name: str, found: Any) -> None:
    """Weights, g, G, memory in the same order, strengths, value and what was drawn: equal to
    rounding on all ranks, also where one holds nothing."""
    size, ranks = found
    if size > 2 and name not in PRESETS:
        pytest.skip("what is no preset is compared on two ranks")
    expected = learned(CASES[name](), lambda data: data)
    for by_rank in ranks:
        for i in range(len(SPLITS[size])):
            require_close(by_rank["cases"][name, i], expected)


def test_a_loop_of_ones_own_has_the_gradients_of_one_process(on_ranks: Any) -> None:
    model = network()
    prior = lifelong.recommended(Categorical(), memory=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for number in range(2):
        data = task(number)
        prior = prior.prepare(model, data)
        for _ in range(3):
            optimizer.zero_grad()
            nll = nn.functional.cross_entropy(model(data.inputs), data.labels)
            (nll + prior(model) / N).backward()
            expected.append({n: p.grad.clone() for n, p in model.named_parameters()})  # type: ignore[union-attr]
            optimizer.step()
        prior = prior.update(model, data, generator=torch.Generator().manual_seed(7))
    for by_rank in on_ranks(2)[1]:
        require_close(by_rank["loop"], expected)


@pytest.mark.parametrize("name", PRESETS)
def test_a_learner_on_ranks_ends_where_one_process_ends(name: str, found: Any) -> None:
    """Weights, prior, accuracies, losses of each epoch and all draws, with batches that do not
    divide evenly."""
    expected = by_learner(name, None)
    for by_rank in found[1]:
        require_close(by_rank["learners"][name], expected)


def test_rank_0_writes_what_any_number_of_ranks_reads(on_ranks: Any) -> None:
    out, ranks = on_ranks(2)
    folder = out / "run"
    assert [by_rank["saved"] for by_rank in ranks] == [[CHECKPOINT], [CHECKPOINT]]
    alone = Learner(network(), CASES["recommended"]()).load(folder / CHECKPOINT)
    expected = by_learner("recommended", None)
    require_close(alone.model.state_dict(), expected["model"])
    require_close(alone.prior.state_dict(), expected["prior"])


def test_mistakes_are_told_on_every_rank(on_ranks: Any) -> None:
    for rank, by_rank in enumerate(on_ranks(2)[1]):
        told, alone = by_rank["mistakes"]
        for name, message in {
            "weights": "ValueError: expected the same weights of the model",
            "prior": "ValueError: expected the same prior on all ranks",
            "too many": "ValueError: a memory of 31 examples was asked for, but the task has 30",
            "fidelity": "ValueError: over several ranks a memory is a number of examples",
            "ids": "ValueError: two examples on some ranks have one id",
            "head": "ValueError: expected the same head on all ranks",
            "nobody": "ValueError: no rank holds an example",
            "groups": "ValueError: groups are of one process's data",
            "ids of what is no Examples": "TypeError: ids are for Examples",
            "generator": "ValueError: expected the same state of the generator",
            "rows": "ValueError: expected rows of one shape and dtype on all ranks",
            "labels": "ValueError",
        }.items():
            assert told[name].startswith(message), (rank, name, told[name])
        assert alone == (15 if rank == 0 else None)


def test_an_evaluation_of_shards_is_of_all_examples(on_ranks: Any) -> None:
    """Also where a rank has none."""
    expected = [
        evaluated(one, task(0), lambda data: data) for one in LIKELIHOODS for _ in SPLITS[2]
    ]
    for by_rank in on_ranks(2)[1]:
        for found, whole in zip(by_rank["evaluations"], expected, strict=True):
            assert found == pytest.approx(whole, rel=1e-12, nan_ok=True)


def test_rows_and_sums_of_any_dtype(on_ranks: Any) -> None:
    for by_rank in on_ranks(2)[1]:
        for dtype, rows, total in zip(DTYPES, *by_rank["dtypes"], strict=True):
            assert rows == (dtype, of_dtype(dtype, 0).tolist())
            assert total == (dtype, torch.full((2,), 3).to(dtype).tolist())


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:16290", ConnectionError),
        ("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms", ConnectionError),
        ("Application timeout caused pair closure", ConnectionError),
        ("Tensors must be contiguous", RuntimeError),
        ("CUDA error: out of memory", RuntimeError),
    ],
)
def test_only_a_broken_connection_is_blamed_on_another_rank(
    message: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(kind) as caught:
        Ranks().sum([torch.zeros(2)])
    assert ("another rank has ended" in str(caught.value)) == (kind is ConnectionError)


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(ValueError, match="start the program with torchrun"):
        Ranks()
