"""What large trainings do to a network leaves its prior alone: activation checkpointing,
``torch.compile``, a gradient scaler. The references are the same network without them.

The compiler's backend is "eager": capturing the graph is what could go wrong here, and
generating code for it takes minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lifelong
from lifelong import Categorical, Prior
from lifelong.models import at
from lifelong.presets import PRESETS
from lifelong.sensitivity import output_shift

N, CLASSES = 40, 3


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)
        return self.head(h)


def fresh(checkpointed: bool = False, like: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    net = Net(checkpointed).double()
    if like is not None:
        net.load_state_dict(like.state_dict())
    return net


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "checkpointed": lambda plain: fresh(True, plain),
    "compiled": lambda plain: torch.compile(fresh(False, plain), backend="eager"),
    "both": lambda plain: torch.compile(fresh(True, plain), backend="eager"),
}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 5, generator=g, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (N,), generator=g)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def moved(net: Net) -> Net:
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    return other


def slopes(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]


def same(prior: Prior, kind: str) -> None:
    """After two tasks: what is remembered, and the gradient of new and old."""
    plain = fresh()
    theirs, ours = prior, prior
    for number in range(2):
        model = moved(plain) if number else plain
        other = KINDS[kind](model)
        theirs = theirs.prepare(model, data(number)).update(model, data(number), generator=seeded())
        ours = ours.prepare(other, data(number)).update(other, data(number), generator=seeded())
    if theirs.memory is not None and ours.memory is not None:
        assert torch.equal(ours.memory.inputs, theirs.memory.inputs)  # type: ignore[arg-type]
    assert ours.strengths == pytest.approx(theirs.strengths, rel=1e-12)
    model = moved(moved(plain))
    other = KINDS[kind](model)
    x, y = data(5)
    for prior_, net in ((theirs, model), (ours, other)):
        prior_.loss(net, x, y, num_data=N, batch_size=4, generator=seeded()).backward()
    torch.testing.assert_close(slopes(other), slopes(model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ewc", "fromp", "recommended", "derpp", "kprior"])
def test_presets(name: str, kind: str) -> None:
    settings: dict[str, Any] = {} if name == "ewc" else {"memory": 10}
    same(PRESETS[name](Categorical(), **settings), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "kronecker", "low_rank"])
def test_curvatures(structure: Any, estimator: Any, kind: str) -> None:
    options: dict[str, Any] = {"structure": structure, "estimator": estimator}
    prior = lifelong.gradient_reconstruction(Categorical(), memory=10, strength=2.0, **options)
    same(prior, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_shift_of_the_outputs(kind: str) -> None:
    plain = fresh()
    step = {n: torch.ones_like(p) for n, p in plain.named_parameters()}
    shift = output_shift(plain, data()[0], step)
    assert shift.abs().min() > 0
    # torch.compile's own names have a prefix, which the step then has too
    named = {n: torch.ones_like(p) for n, p in KINDS[kind](plain).named_parameters()}
    found = output_shift(KINDS[kind](plain), data()[0], named)
    torch.testing.assert_close(found, shift, rtol=1e-12, atol=1e-12)


def test_gradients_at_other_weights_are_of_those() -> None:
    """Also where the backward pass computes a part of the forward pass again."""
    own, other = fresh(True), moved(fresh())
    weights = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    before = copy.deepcopy(own.state_dict())
    x, y = data()

    def work(model: nn.Module) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    loss = at(own, weights, work)
    torch.testing.assert_close(loss, work(other), rtol=0.0, atol=0.0)
    for name, p in other.named_parameters():
        torch.testing.assert_close(weights[name].grad, p.grad, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in own.parameters())
    torch.testing.assert_close(own.state_dict(), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_scaler_accumulation_and_clipping(checkpointed: bool) -> None:
    """Two parts of a batch under a scale, unscaled before the clip: the whole batch's gradient."""
    start = fresh()
    prior = lifelong.recommended(Categorical(), memory=10).update(start, data(), generator=seeded())
    x, y = data(1)
    whole, model = moved(start), fresh(checkpointed, moved(start))
    prior.loss(whole, x, y, num_data=N).backward()
    wanted = nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for half in (slice(0, N // 2), slice(N // 2, N)):
        scaler.scale(prior.loss(model, x[half], y[half], num_data=N) / 2).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(norm, wanted, rtol=1e-10, atol=0.0)
    torch.testing.assert_close(slopes(model), slopes(whole), rtol=1e-10, atol=1e-12)
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    torch.testing.assert_close(
        model.state_dict()["head.weight"],
        before["head.weight"] - 0.1 * whole.head.weight.grad,
        rtol=1e-10,
        atol=1e-12,
    )


def test_an_overflow_under_a_scaler_changes_nothing() -> None:
    model = fresh()
    prior = lifelong.recommended(Categorical(), memory=10).update(model, data(), generator=seeded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    x, y = data(1)
    scaler.scale(prior.loss(model, x, y, num_data=N) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    torch.testing.assert_close(model.state_dict(), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    """bfloat16 within, on both sides: the same rounding."""
    plain = fresh().float()
    x, y = data()
    old = (x.float(), y)
    prior = lifelong.recommended(Categorical(), memory=10).update(plain, old, generator=seeded())
    model = moved(plain)
    other = KINDS[kind](model.double()).float()
    model = model.float()
    new = data(1)[0].float(), data(1)[1]
    for net in (model, other):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = prior.loss(net, *new, num_data=N)
        loss.backward()
    torch.testing.assert_close(slopes(other), slopes(model), rtol=0.0, atol=0.0)
