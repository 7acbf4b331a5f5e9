"""The Lightning callback: gradients and weights of a loop written by hand, files, processes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that it imports
    from lightning.fabric import Fabric
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.plugins.precision import MixedPrecision

import lifelong
import test_sharded as sharded
from lifelong.integrations.lightning import LifelongCallback, add_gradient

CATEGORICAL = lifelong.Categorical()
ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*does not have many workers",
        ".*number of training batches",
        ".*LeafSpec",
        ".*tensorboardX",
        ".*Checkpoint directory",
        "isinstance.*treespec",
    )
]


class Module(LightningModule):
    """A small network; ``lr`` of plain SGD, or Adam where it is None."""

    def __init__(self, lr: float | None = None, *, fused: bool = False) -> None:
        super().__init__()
        self.net = network()
        self.lr, self.fused = lr, fused
        self.before: list[Tensor] = []  # gradients after the callback, before clipping

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.before.append(flat(p.grad for p in self.parameters()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.lr is None:
            return torch.optim.Adam(self.parameters(), lr=1e-2, fused=self.fused)
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().flatten().clone() for part in parts])


def task(seed: int, n: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    return TensorDataset(torch.randn(n, 3, generator=generator) + seed * F.one_hot(y, 4)[:, :3], y)


def learned(module: nn.Module, prior: lifelong.Prior | None = None) -> lifelong.Prior:
    """A prior that has something to say: of another task, seen from other weights."""
    prior = lifelong.gradient_reconstruction(CATEGORICAL, memory=8) if prior is None else prior
    prior = prior.update(module, task(3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    return prior


def trainer(folder: Path, callback: LifelongCallback, epochs: int = 1, **options: Any) -> Trainer:
    options = {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False} | options
    return Trainer(
        default_root_dir=folder,
        callbacks=[callback],
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def by_hand(
    module: Module,
    prior: lifelong.Prior,
    data: TensorDataset,
    *,
    epochs: int = 1,
    clip: float | None = None,
    accumulate: int = 1,
    dtype: torch.dtype | None = None,
    scaled: bool = False,
    clip_first: bool = False,
) -> list[Tensor]:
    """The loop that the Trainer is to be: gradients before clipping, one for each step."""
    optimizer = module.configure_optimizers()
    params = list(module.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    found = []
    for _ in range(epochs):
        loader = list(DataLoader(data, batch_size=8))
        for start in range(0, len(loader), accumulate):
            optimizer.zero_grad()
            for x, y in loader[start : start + accumulate]:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = F.cross_entropy(module(x), y) / accumulate
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if clip is not None and clip_first:
                nn.utils.clip_grad_norm_(params, clip)
            add_gradient(prior, module, len(data))
            found.append(flat(p.grad for p in params))
            if clip is not None and not clip_first:
                nn.utils.clip_grad_norm_(params, clip)
            scaler.step(optimizer)
            scaler.update()
    return found


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clip": ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "accumulate": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "both": (
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"clip": 0.1, "accumulate": 2},
    ),
    "bf16": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
    "bf16, clip": (
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
        {"dtype": torch.bfloat16, "clip": 0.1},
    ),
    "fp16 with a scaler": ({"fp16": True}, {"dtype": torch.float16, "scaled": True}),
    "fp16 with a scaler, clip, accumulate": (
        {"fp16": True, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
        {"dtype": torch.float16, "scaled": True, "clip": 0.1, "accumulate": 2},
    ),
}


def options_of(setting: dict[str, Any]) -> dict[str, Any]:
    setting = dict(setting)
    if setting.pop("fp16", False):
        scaler = torch.amp.GradScaler("cpu")
        setting["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    return setting


@pytest.mark.parametrize("name", SETTINGS)
def test_the_gradients_are_those_of_the_plain_loop(tmp_path: Path, name: str) -> None:
    theirs, ours = SETTINGS[name]
    module, plain = Module(lr=0.5), Module(lr=0.5)
    prior = learned(module)
    learned(plain)
    expected = by_hand(plain, prior, task(1), epochs=2, **ours)
    callback = LifelongCallback(prior, update=False)
    trainer(tmp_path, callback, 2, **options_of(theirs)).fit(module, DataLoader(task(1), 8))
    assert len(module.before) == len(expected) == (4 if "accumulate" in ours else 8)
    for a, b in zip(module.before, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(flat(module.parameters()), flat(plain.parameters()))


def test_the_order_shows(tmp_path: Path) -> None:
    """Clipping before the prior is added would be seen by the test above."""
    module, plain = Module(lr=0.5), Module(lr=0.5)
    prior = learned(module)
    learned(plain)
    by_hand(module, prior, task(1), clip=0.1)
    by_hand(plain, prior, task(1), clip=0.1, clip_first=True)
    assert not torch.allclose(flat(module.parameters()), flat(plain.parameters()), atol=1e-2)


@pytest.mark.parametrize("preset", ["ewc", "kprior", "fromp", "recommended", "lwf", "derpp"])
def test_tasks_in_a_row_are_those_of_the_plain_loop(tmp_path: Path, preset: str) -> None:
    make = getattr(lifelong, preset)
    fresh = make(CATEGORICAL, **({} if preset in ("ewc", "lwf") else {"memory": 8}))
    module, plain, prior = Module(), Module(), fresh
    callback, generator = LifelongCallback(fresh, seed=5), torch.Generator().manual_seed(5)
    for seed in (1, 2, 3):
        trainer(tmp_path, callback, 3).fit(module, DataLoader(task(seed), 8))
        prior = prior.prepare(plain, task(seed))
        by_hand(plain, prior, task(seed), epochs=3)
        prior = prior.update(plain, task(seed), generator=generator)
    assert callback.prior.num_tasks == 3
    assert torch.equal(flat(module.parameters()), flat(plain.parameters()))


def test_drawn_memories_and_submodules(tmp_path: Path) -> None:
    """Of a prior of the submodule, and of some remembered examples a step: as by hand."""
    module = Module(lr=0.5)
    prior = learned(module.net)
    callback = LifelongCallback(
        prior, module="net", memory_batch_size=3, num_data=100, data=task(1), seed=2
    )
    plain = network()
    learned(plain)
    trainer(tmp_path, callback, limit_train_batches=1).fit(module, DataLoader(task(1), 8))
    x, y = next(iter(DataLoader(task(1), 8)))
    generator = torch.Generator().manual_seed(2)
    loss = F.cross_entropy(plain(x), y) + prior(plain, batch_size=3, generator=generator) / 100
    loss.backward()
    torch.testing.assert_close(module.before[0], flat(p.grad for p in plain.parameters()))


def test_a_checkpoint_brings_the_prior_back(tmp_path: Path) -> None:
    """Stopped within the second task, and resumed in fresh objects: the same weights."""

    def second(folder: Path, callback: LifelongCallback, module: Module, epochs: int, **o: Any):
        run = trainer(folder, callback, epochs, **o)
        run.fit(module, DataLoader(task(2), 8), ckpt_path=o_path.pop() if o_path else None)
        return run

    o_path: list[str] = []
    fresh = lifelong.recommended(CATEGORICAL, memory=8)
    module, callback = Module(), LifelongCallback(fresh, memory_batch_size=4)
    trainer(tmp_path, callback).fit(module, DataLoader(task(1, 24), 8))
    state, prior, drawn = module.state_dict(), callback.prior, callback.generator.get_state()
    state = {n: v.clone() for n, v in state.items()}

    whole = LifelongCallback(prior, memory_batch_size=4)
    whole.generator.set_state(drawn)
    second(tmp_path, whole, module, 4)

    half, model = LifelongCallback(prior, memory_batch_size=4, update=False), Module()
    half.generator.set_state(drawn)
    model.load_state_dict(state)
    second(tmp_path, half, model, 2).save_checkpoint(tmp_path / "half.ckpt")

    o_path.append(str(tmp_path / "half.ckpt"))
    resumed, again = LifelongCallback(fresh, memory_batch_size=4), Module()
    second(tmp_path, resumed, again, 4)
    assert torch.equal(flat(again.parameters()), flat(module.parameters()))
    assert resumed.prior.num_tasks == whole.prior.num_tasks == 2
    assert torch.equal(resumed.prior(again), whole.prior(module))


# -------------------------------------------------------------------- Fabric


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_needs_three_lines(precision: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net, plain = network(), network()
    prior = learned(net)
    learned(plain)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    twin = torch.optim.Adam(plain.parameters(), lr=1e-2)
    dtype = torch.bfloat16 if "bf16" in precision else None
    for x, y in DataLoader(task(1), 8):
        past = prior(model) / len(task(1))
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(model(x), y) + past)
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            f = plain(x)
        twin.zero_grad()
        (F.cross_entropy(f.float(), y) + prior(plain) / len(task(1))).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        twin.step()
    torch.testing.assert_close(flat(net.parameters()), flat(plain.parameters()))
    assert torch.equal(prior(model), prior(net))  # in its wrapper, too
    assert prior.update(model, task(1)).num_tasks == 2


# -------------------------------------------------------------------- processes


DDP = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
sys.path[:0] = [{tests!r}, {above!r}, {source!r}]
torch.set_num_threads(1)
import conftest  # as pytest would
from torch.utils.data import DistributedSampler
from test_lightning import *
module = Module(lr=0.5)
callback = LifelongCallback(learned(module), memory_batch_size=4)
options = {{"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}}
run = trainer({folder!r}, callback, 2, **options)
rank = int(os.environ.get("LOCAL_RANK", 0))
sampler = DistributedSampler(task(1), num_replicas=2, rank=rank, shuffle=False)
run.fit(module, DataLoader(task(1), 4, sampler=sampler))
value = callback.prior(module).detach()
torch.save([flat(module.parameters()), value], {folder!r} + f"/rank{{run.global_rank}}.pt")
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    source = str(Path(lifelong.__file__).parent.parent)
    paths = {"tests": str(ROOT / "tests/integrations"), "above": str(ROOT / "tests")}
    script.write_text(DDP.format(**paths, source=source, folder=str(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
        capture_output=True,
    )
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1)]
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert torch.equal(ranks[0][1], ranks[1][1])
    # The sampler deals out examples in turn: a global batch is the same eight in another order.
    module = Module(lr=0.5)
    callback = LifelongCallback(learned(module), memory_batch_size=4)
    trainer(tmp_path, callback, 2).fit(module, DataLoader(task(1), 8))
    torch.testing.assert_close(ranks[0][0], flat(module.parameters()))


SHARDED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
sys.path[:0] = [{tests!r}, {above!r}, {source!r}]
torch.set_num_threads(1)
import conftest  # as pytest would
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from lifelong import Categorical, recommended
from lifelong.data import shard
from lifelong.distributed import Ranks
from lifelong.sharded import load_whole
from test_sharded import HELD, N, network, part, seeded, sgd, task

def parallelize(model, mesh):
    for module in (model[0], model):
        fully_shard(module, mesh=mesh["data_parallel"])
    return model

strategy = ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
fabric.launch()
model, replica = fabric.setup(network(1)), network(1)
optimizer = fabric.setup_optimizers(sgd(model))
prior = recommended(Categorical(), **HELD["recommended"])
for number in range(2):
    mine = part(task(number), fabric.global_rank, 2)
    placed = prior.sharded_like(model)
    for _ in range(2):
        optimizer.zero_grad()
        how = {{"batch_size": 4, "generator": seeded(), "ranks": Ranks()}}
        fabric.backward(placed.loss(model, *mine, num_data=N, **how))
        optimizer.step()
    load_whole(replica, model)
    prior = prior.prepare(replica, shard(mine)).update(replica, shard(mine), generator=seeded())
weights = [p.detach() for p in replica.parameters()]
torch.save([weights, prior(network(2)).detach()], {folder!r} + f"/rank{{fabric.global_rank}}.pt")
"""


def test_weights_that_fabric_shards_are_those_of_one_process(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    source = str(Path(lifelong.__file__).parent.parent)
    paths = {"tests": str(ROOT / "tests/integrations"), "above": str(ROOT / "tests")}
    script.write_text(SHARDED.format(**paths, source=source, folder=str(tmp_path)))
    subprocess.run(
        [sys.executable, str(script)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        timeout=120,
        capture_output=True,
    )
    one = sharded.network(1)
    optimizer = sharded.sgd(one)
    prior = lifelong.recommended(CATEGORICAL, **sharded.HELD["recommended"])
    for number in range(2):
        data = sharded.task(number)
        for _ in range(2):
            sharded.step(prior, one, data, optimizer, batch_size=4)
        prior = prior.prepare(one, data).update(one, data, generator=sharded.seeded())
    value = prior(sharded.network(2)).detach()
    for rank in range(2):
        weights, found = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(
            weights, [p.detach() for p in one.parameters()], rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------- wrong use


class Random(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + torch.randn(3), y


def test_wrong_use_is_told(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a prior"):
        LifelongCallback(CATEGORICAL)  # type: ignore[arg-type]

    def fit(prior: lifelong.Prior, module: Module | None = None, data: Any = None, **o: Any) -> Any:
        loader = DataLoader(task(1) if data is None else data, 8)
        return trainer(tmp_path, LifelongCallback(prior), **o).fit(module or Module(), loader)

    with pytest.raises(ValueError, match="use lifelong.Learner"):
        fit(lifelong.si(CATEGORICAL))
    with pytest.raises(ValueError, match="use lifelong.Learner"):
        fit(lifelong.joint(CATEGORICAL))
    with pytest.raises(lifelong.NotRepeatableError):
        fit(lifelong.ewc(CATEGORICAL), data=Random(*task(1).tensors))
    with pytest.raises(lifelong.StaleAnchorError):
        fit(learned(network()))
    with pytest.raises(ValueError, match="fused=False"):
        fit(lifelong.ewc(CATEGORICAL), Module(fused=True), **options_of({"fp16": True}))
    callback = LifelongCallback(lifelong.ewc(CATEGORICAL))
    with pytest.raises(ValueError, match="pass data="):
        trainer(tmp_path, callback).fit(Module(), list(DataLoader(task(1), 8)))
    before = callback.prior
    with pytest.raises(lifelong.CheckpointError, match="cannot be read"):
        callback.load_state_dict({"prior": {}})
    assert callback.prior is before


def test_strategies_that_split_parameters_are_told() -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    class Stub:
        strategy = FSDPStrategy.__new__(FSDPStrategy)

    callback = LifelongCallback(lifelong.ewc(CATEGORICAL))
    with pytest.raises(ValueError, match="strategy='ddp'"):
        callback.on_train_start(Stub(), Module())


def test_the_example_runs(tmp_path: Path) -> None:
    path = ROOT / "examples" / "integrations" / "lightning_tasks.py"
    assert len(path.read_text().splitlines()) < 120
    accuracy = runpy.run_path(str(path))["main"](num_tasks=2, epochs=10, folder=tmp_path)
    assert min(accuracy) > 0.7


def test_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "integrations" / "lightning.md").read_text()
    names = {"lifelong": lifelong, "torch": torch, "Trainer": Trainer, "Fabric": Fabric}
    names |= {"DataLoader": DataLoader, "tasks": [task(1), task(2)], "folder": tmp_path}
    names |= {"module": Module(), "network": network()}
    options: dict[str, Any] = {"max_epochs": 1, "logger": False, "accelerator": "cpu"}
    options |= {"enable_progress_bar": False, "enable_checkpointing": False}
    names["options"] = {**options, "default_root_dir": tmp_path}
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(code, names)
    assert names["callback"].prior.num_tasks == 2
    assert names["prior"].num_tasks == 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "LifelongCallback" in saved["callbacks"]
