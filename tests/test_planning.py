"""The cost model: bytes are those of real priors, and no cost falls as its cause grows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lifelong
from lifelong import Categorical, Examples, Learner, PathIntegral, Prior, planning
from lifelong.networks import NETWORKS, counted, measured, mlp
from lifelong.planning import DEVICES, GROWN, Network, Work
from lifelong.presets import PRESETS

DEVICE = DEVICES["h100"]
PHOTOS = Network("photos", 11_689_512, 3.6e9, 150_528, 1000, 2.6e6)
WORK = Work(tasks=10, examples=1.2e6, memory=20_000, head=100)
names = pytest.mark.parametrize("name", PRESETS)


def small(sizes: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return mlp(*sizes)


def after(
    name: str, model: nn.Module, work: Work, inputs: int, outputs: int, **wanted: Any
) -> Prior:
    """The preset's prior once it has learned the work's tasks."""
    prior = planning.preset(name, work, **wanted)
    g = torch.Generator().manual_seed(0)
    n = int(work.task_size)
    for task in range(work.tasks):
        x = torch.rand(n, inputs, generator=g)
        head = tuple(range(task * work.head, (task + 1) * work.head))
        y = torch.arange(n) % work.head + task * work.head
        data = Examples(x, y, head=head)
        path = None
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        if prior.recipe.structure == "path":
            path = PathIntegral(model, optimizer, prior, n)
        prior = prior.prepare(model, data).update(model, data, path=path, generator=g)
    assert prior.num_tasks == work.tasks
    return prior


@names
@settings(max_examples=4, deadline=None)
@given(
    inputs=st.integers(2, 9),
    width=st.integers(2, 12),
    head=st.integers(2, 3),
    tasks=st.integers(1, 3),
    each=st.integers(1, 3),
)
def test_the_bytes_are_those_of_the_prior(
    name: str, inputs: int, width: int, head: int, tasks: int, each: int
) -> None:
    outputs = head * tasks
    model = small((inputs, width, outputs))
    memory = each * head * tasks
    work = Work(tasks, 12 * head * tasks, memory, head)
    network = counted("small", lambda: small((inputs, width, outputs)), (inputs,), 4 * inputs)
    prior = after(name, model, work, inputs, outputs)
    fresh = planning.preset(name, work)
    assert planning.prior_bytes(fresh, network, work) == prior.num_bytes


@pytest.mark.parametrize("name", ["kprior", "gradient_reconstruction", "recommended"])
@pytest.mark.parametrize("top", [1, 3])
def test_the_bytes_of_top_outputs_are_those_of_the_prior(name: str, top: int) -> None:
    work = Work(tasks=2, examples=48, memory=8, head=4)
    network = counted("small", lambda: small((5, 6, 8)), (5,), 20)
    prior = after(name, small((5, 6, 8)), work, 5, 8, top_outputs=top)
    fresh = planning.preset(name, work, top_outputs=top)
    assert planning.prior_bytes(fresh, network, work) == prior.num_bytes
    passes = [
        planning.update_passes(planning.preset(name, work, top_outputs=k), network, work)[
            "gradient"
        ]
        for k in (top, None)
    ]
    assert passes[0] - passes[1] == 3 * work.memory  # of each remembered example, once
    assert planning.preset("ewc", work, top_outputs=top).recipe.top_outputs is None


@pytest.mark.parametrize(
    "name", ["recommended", "gradient_reconstruction", "experience_replay", "der"]
)
@pytest.mark.parametrize("total", [True, False, None])
def test_the_bytes_of_one_memory_for_all_are_those_of_the_prior(
    name: str, total: bool | None
) -> None:
    """The work's memory is that of all tasks, whether each has a part of its own or not."""
    work = Work(tasks=3, examples=72, memory=12, head=2)
    network = counted("small", lambda: small((5, 6, 6)), (5,), 20)
    prior = after(name, small((5, 6, 6)), work, 5, 6, total=total)
    assert prior.memory is not None
    assert len(prior.memory) == work.memory
    fresh = planning.preset(name, work, total=total)
    assert planning.prior_bytes(fresh, network, work) == prior.num_bytes


@pytest.mark.parametrize(("total", "held"), [(True, (10, 12, 12)), (False, (4, 8, 12))])
def test_one_memory_for_all_is_full_before_the_last_task(
    total: bool, held: tuple[int, ...]
) -> None:
    """Each update asks again for the soft labels of all that is remembered by then."""
    work = Work(tasks=3, examples=30, memory=12, head=2)
    network = counted("small", lambda: small((5, 6, 6)), (5,), 20)
    prior = planning.preset("recommended", work, total=total)
    asked = [planning.update_passes(prior, network, work, t + 1)["labels"] for t in range(3)]
    assert asked == pytest.approx(held)


def prior_has_factors(prior: Prior) -> bool:
    return prior.recipe.structure == "kronecker"


@names
def test_a_checkpoint_is_as_large_as_foretold(name: str, tmp_path: Path) -> None:
    """But for the header of the file, which holds names and settings, and random states."""
    work = Work(2, 48, 8, 2, optimizer="adam")
    network = counted("small", lambda: small((40, 150, 4)), (40,), 160)
    stream = lifelong.split_by_class(
        (torch.rand(48, 40), torch.arange(48) % 4),
        (torch.rand(8, 40), torch.arange(8) % 4),
        classes_per_task=2,
    )
    learner = Learner(small((40, 150, 4)), planning.preset(name, work), batch_size=24)
    learner.run(stream)
    content = learner.save(tmp_path / "x").read_bytes()
    numbers = len(content) - 8 - int.from_bytes(content[:8], "little")  # without the header
    optimizer = planning.OPTIMIZERS["adam"] * 4 * network.parameters  # gone when a task is over
    random = 2 * torch.get_rng_state().numel()  # torch's own and the learner's
    foretold = planning.checkpoint_bytes(learner.prior, network, work)
    shapes = 64 if prior_has_factors(learner.prior) else 0  # of the layers, beside their factors
    assert 0 <= numbers - (foretold - optimizer + random) <= shapes


costs: dict[str, Callable[[planning.Estimate], float]] = {
    "device": lambda e: sum(e.on_device.values()),
    "ram": lambda e: sum(e.in_ram.values()),
    "disk": lambda e: e.disk,
    "step": lambda e: sum(e.step.values()),
    "update": lambda e: sum(e.update.values()),
    "total": lambda e: e.total,
}


@names
@settings(max_examples=20, deadline=None)
@given(
    quantity=st.sampled_from(["tasks", "examples", "parameters"]),
    factor=st.integers(2, 20),
    tasks=st.integers(1, 20),
    devices=st.integers(1, 16),
)
def test_no_cost_falls_as_its_cause_grows(
    name: str, quantity: str, factor: int, tasks: int, devices: int
) -> None:
    work = replace(WORK, tasks=tasks, devices=devices)
    network, more = GROWN[quantity](PHOTOS, work, factor)
    before = planning.estimate(planning.preset(name, work), PHOTOS, work, DEVICE)
    later = planning.estimate(planning.preset(name, more), network, more, DEVICE)
    for cost in costs.values():
        assert cost(later) >= cost(before) * (1 - 1e-9)


@names
def test_more_devices_take_less_time_and_memory_more_bytes(name: str) -> None:
    def of(work: Work) -> planning.Estimate:
        return planning.estimate(planning.preset(name, work), PHOTOS, work, DEVICE)

    base, eight = of(WORK), of(replace(WORK, devices=8))
    assert eight.total < base.total
    assert eight.prior == base.prior
    assert base.step_traffic == base.task_traffic == 0 < eight.step_traffic
    assert of(replace(WORK, memory=40_000)).prior >= base.prior
    halves = of(replace(WORK, devices=2, sharded=True)).in_ram["memory"]
    assert 2 * halves == base.in_ram["memory"]


def test_a_prior_sends_no_more_in_a_step_than_the_model() -> None:
    work = replace(WORK, devices=4)
    sent = {planning.estimate(planning.preset(n, work), PHOTOS, work, DEVICE).step_traffic
            for n in PRESETS}  # fmt: skip
    assert sent == {planning.all_reduce(4 * PHOTOS.parameters, 4)}
    assert planning.all_reduce(100, 1) == 0
    assert planning.all_reduce(100, 4) == 150  # 3 pieces of 25, twice


def test_what_is_dear_is_told() -> None:
    ewc = planning.preset("ewc", WORK)
    exact = planning.update_passes(ewc, PHOTOS, WORK)
    assert exact["curvature"] == WORK.task_size * (1 + 2 * WORK.head)
    sampled = planning.update_passes(planning.preset("ewc", WORK, estimator="mc"), PHOTOS, WORK)
    assert sampled["curvature"] == 3 * WORK.task_size
    found = planning.estimate(ewc, PHOTOS, WORK, DEVICE)
    assert found.bottleneck == "update: curvature"
    grown = {g.quantity: g for g in planning.growth("fromp", PHOTOS, WORK, DEVICE)}
    assert grown["memory"].bottleneck == "update: kernels"
    assert not grown["memory"].fits
    assert grown["tasks"].time > 10
    joint = planning.num_steps(PRESETS["joint"](Categorical()).recipe, WORK)
    assert joint == 5.5 * planning.num_steps(ewc.recipe, WORK)


def test_the_steps_of_joint_training_are_the_learners() -> None:
    work = Work(3, 3 * 64, 6, 2, epochs=2, batch=16)
    steps = planning.num_steps(planning.preset("joint", work).recipe, work)
    assert steps == 2 * (64 + 128 + 192) / 16


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"no preset 'fromq'; did you mean 'fromp'"):
        planning.preset("fromq", WORK)
    dense = lifelong.online_laplace(Categorical(), structure="dense")
    with pytest.raises(ValueError, match="no formula for structure='dense'"):
        planning.estimate(dense, PHOTOS, WORK, DEVICE)


# Networks -----------------------------------------------------------------------------------------


def test_counted_is_what_the_layers_say() -> None:
    found = counted("mlp", lambda: small((6, 5, 4)), (6,))
    assert found.parameters == 6 * 5 + 5 + 5 * 4 + 4
    assert found.flops == 2 * (6 * 5 + 5 * 4)
    assert found.outputs == 4
    assert [(x.outputs, x.inputs, x.positions) for x in found.layers] == [(5, 7, 1), (4, 6, 1)]
    state = torch.get_rng_state()
    photos = counted("resnet18", lambda: NETWORKS["resnet18"][0](1000), (3, 224, 224))
    assert torch.equal(state, torch.get_rng_state())
    assert photos.parameters == 11_689_512  # as torchvision's documentation says, 1.81e9 products
    assert photos.flops == pytest.approx(2 * 1.814e9, rel=1e-3)


def test_a_network_known_by_its_size_has_square_layers() -> None:
    unknown = Network("x", 3 * 1024**2, 6e9, 10, 10)
    (layer,) = unknown.products
    assert layer.count * layer.outputs * layer.inputs == unknown.parameters
    assert 2 * layer.positions * unknown.parameters == unknown.flops


def test_measured_is_a_rate() -> None:
    rate, bandwidth = measured(small((6, 5, 4)), (6,), steps=1)
    assert rate > 0
    assert bandwidth > 0


# The command --------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    from lifelong.cli import main

    def run(*args: str) -> tuple[int, str, str]:
        code = main(["plan", *args])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_the_tables(command: Run) -> None:
    code, out, err = command("--devices", "8", "--price", "2.5", "--presets", "fromp", "ewc")
    assert (code, err) == (0, "")
    assert "resnet18: 11,689,512 parameters" in out
    assert "update: curvature" in out
    assert "price" in out
    assert "update: kernels !" in out


def test_as_json(command: Run) -> None:
    args = ("--model", "cifarnet", "--outputs", "60", "--examples", "3e4", "--memory", "1200")
    code, out, err = command(*args, "--measure", "--json")
    assert (code, err) == (0, "")
    content: dict[str, Any] = json.loads(out)
    assert set(content["presets"]) == set(PRESETS)
    assert content["network"]["parameters"] == 1_276_508
    for found in content["presets"].values():
        assert found["total"] > 0
        assert [g["quantity"] for g in found["grown"]] == list(GROWN)


def test_a_throughput_is_taken_as_it_is(command: Run) -> None:
    args = ("--throughput", "1000", "--presets", "finetune", "--json", "--epochs", "1")
    content = json.loads(command(*args)[1])
    seconds = content["presets"]["finetune"]["seconds"]["new examples"]
    assert seconds == pytest.approx(1.2e6 / 1000)
    other = command("--parameters", "1e7", "--flops", "1e9", "--presets", "recommended", "--json")
    assert json.loads(other[1])["network"]["name"] == "another"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnt18"], "there is no model 'resnt18'; did you mean 'resnet18'?"),
        (["--device", "h10"], "there is no device 'h10'; did you mean 'h100'?"),
        (["--presets", "ewk"], "there is no preset 'ewk'; did you mean 'ewc'?"),
        (["--tasks", "0"], "tasks must be at least 1, got 0"),
        (["--memory", "-1"], "memory must be a positive number, got -1"),
        (["--memory-batch-size", "0"], "memory_batch_size must be at least 1, got 0"),
        (["--efficiency", "2"], "efficiency must lie in (0, 1], got 2"),
        (["--price", "-1"], "price must not be negative, got -1"),
        (["--measure", "--throughput", "9"], "give --measure or --throughput, not both"),
        (["--flops", "1e9"], "another network needs both --parameters and --flops"),
        (["--parameters", "1e7", "--flops", "1e9", "--measure"], "--measure needs a model"),
    ],
)
def test_wrong_flags(command: Run, args: list[str], message: str) -> None:
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())
