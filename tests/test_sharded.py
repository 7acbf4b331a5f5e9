"""Models that FSDP2 has sharded: the prior of each rank's part is the prior of the whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lifelong
from lifelong import Categorical, Prior
from lifelong.data import shard
from lifelong.distributed import Ranks
from lifelong.errors import StaleAnchorError
from lifelong.presets import PRESETS
from lifelong.sharded import load_whole

N, CLASSES = 24, 3
HELD: dict[str, dict[str, Any]] = {
    "ewc": {},
    "online_laplace": {"precision": 0.3},
    "online_ewc": {},
    "kprior": {"memory": 7, "precision": 0.3},
    "gradient_reconstruction": {"memory": 7, "precision": 0.3, "gradient": "stored"},
    "recommended": {"memory": 7, "structure": "diagonal"},
    "experience_replay": {"memory": 9},
    "derpp": {"memory": 9},
    "fromp": {"memory": 5},
    "weight_decay": {"precision": 0.3},
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)  # 5 rows on 2 ranks: parts of 3 and 2
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    return nn.Sequential(layers, nn.Linear(5, CLASSES)).double()


def task(number: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(number)
    x = torch.randn(N, 4, generator=g, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (N,), generator=g)


def part(data: tuple[Tensor, Tensor], rank: int, size: int) -> tuple[Tensor, Tensor]:
    rows = slice(rank * N // size, (rank + 1) * N // size)
    return data[0][rows], data[1][rows]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh)  # type: ignore[index]
    fully_shard(model, mesh=mesh)
    return model


def learned(name: str) -> Prior:
    model = network()
    prior = PRESETS[name](Categorical(), **HELD[name])
    prior = prior.prepare(model, task(0)).update(model, task(0), generator=seeded())
    return prior


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(
    prior: Prior,
    model: nn.Module,
    data: Any,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    optimizer = optimizer or sgd(model)
    optimizer.zero_grad()
    loss = prior.loss(model, *data, num_data=N, generator=seeded(), **options)
    loss.backward()
    optimizer.step()
    return loss.detach(), [p.detach() for p in model.parameters()]


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
        found = {name: one(name, rank, size) for name in HELD}
        found |= {"life": life(rank, size), "loop": loop(rank, size)}
        found["saved"] = saved(rank, size, Path(folder))
        with pytest.raises(ValueError, match=r"not sharded alike \(0.0.weight: \(5, 4\)"):
            learned("ewc")(sharded(network(1)))
        Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def one(name: str, rank: int, size: int) -> Any:
    """A step beside the anchor: its loss, the weights after it, and what this rank holds."""
    model = sharded(network(1))
    prior = learned(name).sharded_like(model)
    weight_space = prior.weight_space(model).detach()
    loss, after = step(prior, model, part(task(1), rank, size), batch_size=4, ranks=Ranks())
    whole = [p.full_tensor() for p in after]  # type: ignore[attr-defined]
    return weight_space, loss, whole, prior.num_bytes, prior.whole()(network(2)).detach()


def life(rank: int, size: int) -> Any:
    """Two tasks: shard, train, gather into a replica, update, shard again."""
    model, replica = sharded(network(1)), network(1)
    prior: Prior = PRESETS["recommended"](Categorical(), **HELD["recommended"])
    for number in range(2):
        mine = part(task(number), rank, size)
        placed = prior.sharded_like(model)
        step(placed, model, mine, batch_size=4, ranks=Ranks())
        load_whole(replica, model)
        prior = prior.prepare(replica, shard(mine)).update(replica, shard(mine), generator=seeded())
    return [p.detach() for p in replica.parameters()], prior(network(2)).detach()


def loop(rank: int, size: int) -> Any:
    """Two forward passes and one backward, as in a loop of one's own: the prior is asked first."""
    model = sharded(network(1))
    prior = learned("recommended").sharded_like(model)
    x, y = part(task(1), rank, size)
    past = prior(model, batch_size=4, generator=seeded(), ranks=Ranks())
    (past / N + nn.functional.cross_entropy(model(x), y)).backward()
    return [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]


def saved(rank: int, size: int, folder: Path) -> Any:
    """Sharded files of weights and optimiser, and the prior's own; then one step more."""
    model = sharded(network(1))
    optimizer, prior = sgd(model), learned("recommended")
    placed = prior.sharded_like(model)
    step(placed, model, part(task(1), rank, size), optimizer, batch_size=4, ranks=Ranks())
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    kept = placed.whole()
    if rank == 0:
        kept.save(folder / "prior.safetensors")
    after = step(placed, model, part(task(1), rank, size), optimizer, batch_size=4, ranks=Ranks())
    return [p.full_tensor() for p in after[1]]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("sharded")
    mp.spawn(on_rank, (2, str(folder)), nprocs=2)  # type: ignore[attr-defined]
    return folder, [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.fixture
def found(both: tuple[Path, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return both[1]


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", HELD)
def test_a_step_of_two_ranks_is_that_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    model, prior = network(1), learned(name)
    weight_space = prior.weight_space(model).detach()
    loss, after = step(prior, model, task(1), batch_size=4)
    ranks = [by_rank[name] for by_rank in found]
    for theirs in ranks:
        close(theirs[0], weight_space)  # the value is the whole one on every rank
        close(theirs[2], after)
        close(theirs[4], prior(network(2)).detach())
    close((ranks[0][1] + ranks[1][1]) / 2, loss)
    if prior.curvature is not None and prior.memory is None:
        sizes = [theirs[3] for theirs in ranks]
        assert sum(sizes) == prior.num_bytes
        assert max(sizes) < 0.7 * prior.num_bytes


def test_two_tasks_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    model = network(1)
    prior: Prior = PRESETS["recommended"](Categorical(), **HELD["recommended"])
    for number in range(2):
        step(prior, model, task(number), batch_size=4)
        prior = prior.prepare(model, task(number)).update(model, task(number), generator=seeded())
    for by_rank in found:
        weights, value = by_rank["life"]
        close(weights, [p.detach() for p in model.parameters()])
        close(value, prior(network(2)).detach())


def test_a_loop_that_asks_the_prior_first(found: list[dict[str, Any]]) -> None:
    model, prior = network(1), learned("recommended")
    x, y = task(1)
    past = prior(model, batch_size=4, generator=seeded())
    (past / N + nn.functional.cross_entropy(model(x), y)).backward()
    for by_rank in found:
        close(by_rank["loop"], [p.grad for p in model.parameters()])


# That there is no group is what this is about.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_ranks_files_go_on_in_one_process(both: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, found = both
    model = network(2)
    optimizer = sgd(model)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder / "checkpoint", no_dist=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],  # type: ignore[arg-type]
    )
    prior = Prior.load(folder / "prior.safetensors")
    _, after = step(prior, model, task(1), optimizer, batch_size=4)
    for by_rank in found:
        close(by_rank["saved"], after)


# ------------------------------------------------------------------------- in a group of one


@contextmanager
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_wrong_use_is_told(tmp_path: Path) -> None:
    with group():
        model = sharded(network(1))
        plain = learned("ewc")
        prior = plain.sharded_like(model)
        close(prior(model).detach(), plain(network(1)).detach())
        close(prior.whole()(network(1)).detach(), plain(network(1)).detach())
        with pytest.raises(ValueError, match="all sharded, by fully_shard"):
            plain.sharded_like(network(1))
        kronecker = lifelong.recommended(Categorical(), memory=7)
        kronecker = kronecker.update(network(), task(0), generator=seeded())
        with pytest.raises(ValueError, match="cannot be sharded"):
            kronecker.sharded_like(model)
        with pytest.raises(ValueError, match='structure="diagonal"'):
            kronecker(model)
        with pytest.raises(TypeError, match="sharded ones"):
            prior.update(model, task(1))
        with pytest.raises(ValueError, match=r"prior.whole\(\) on every rank"):
            prior.save(tmp_path / "prior")
        assert not (tmp_path / "prior").exists()
        partly = network(1)
        fully_shard(partly[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"plain ones among them: \['1.weight'"):
            plain(partly)
        other = nn.Sequential(nn.Linear(4, 5)).double()
        fully_shard(other, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(StaleAnchorError, match="missing from the model"):
            plain.sharded_like(other)
        replica = network(3)
        before = copy.deepcopy(replica.state_dict())
        with pytest.raises(StaleAnchorError, match="the replica is another network"):
            load_whole(replica, other)
        close(replica.state_dict(), before)
        load_whole(replica, model)
        close(dict(replica.state_dict()), dict(network(1).state_dict()))
