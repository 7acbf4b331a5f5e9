"""The path integral of Synaptic Intelligence, against the sum done by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lifelong
from lifelong import Categorical, Examples, PathIntegral, Regulariser

X = torch.randn(10, 2, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(10) % 3


def net() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(2, 3).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, prior=None, steps: int = 5) -> Tensor:
    """A few steps; omega of the weight by hand."""
    omega = torch.zeros(3, 2).double()
    weight = model.weight
    for _ in range(steps):
        optimizer.zero_grad()
        nll = F.cross_entropy(model(X), Y)
        (slope,) = torch.autograd.grad(nll, [weight], retain_graph=True)
        loss = nll if prior is None else nll + prior(model) / 10
        loss.backward()
        before = weight.detach().clone()
        optimizer.step()
        omega -= slope * (weight.detach() - before)
    return omega


@pytest.mark.parametrize("prior", [None, Regulariser(5.0)])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_omega_is_the_path_integral_of_the_slope_of_the_data_alone(make, prior):
    model = net()
    start = model.weight.detach().clone()
    optimizer = make(model.parameters(), lr=0.1)
    with PathIntegral(model, optimizer, prior, 10) as path:
        omega = train(model, optimizer, prior)
    assert torch.allclose(path.omega["weight"], omega, atol=1e-12)
    moved = (model.weight.detach() - start).square()
    expected = 20 * omega / (moved + 0.5)
    assert torch.allclose(path.curvature(0.5, clip=False).values["weight"], expected)
    assert torch.allclose(path.curvature(0.5).values["weight"], expected.clamp(min=0))


@pytest.mark.parametrize("prior", [None, Regulariser(5.0)])
def test_under_a_grad_scaler_it_is_that_of_the_loss_itself(prior):
    def omega(scaler: torch.amp.GradScaler) -> Tensor:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with PathIntegral(model, optimizer, prior, 10, scaler=scaler) as path:
            for _ in range(5):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(X), Y)
                loss = loss if prior is None else loss + prior(model) / 10
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                scaler.step(optimizer)
                scaler.update()  # the scale doubles after each second step
        return path.omega["weight"]

    scaled, plain = (
        omega(torch.amp.GradScaler("cpu", enabled=on, init_scale=2.0**20, growth_interval=2))
        for on in (True, False)
    )
    assert torch.allclose(scaled, plain, atol=1e-12)
    assert bool(plain.any())


def test_small_steps_add_up_to_the_fall_of_the_loss():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = F.cross_entropy(model(X), Y).item()
    with PathIntegral(model, optimizer) as path:
        train(model, optimizer, steps=50)
    fall = before - F.cross_entropy(model(X), Y).item()
    total = sum(float(omega.sum()) for omega in path.omega.values())
    assert fall > 0
    assert abs(total - fall) < 1e-2 * fall


def test_after_the_task_nothing_is_watched():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PathIntegral(model, optimizer) as path:
        train(model, optimizer, steps=1)
    omega = path.omega["weight"].clone()
    train(model, optimizer, steps=1)
    assert torch.equal(path.omega["weight"], omega)
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_half_way_it_can_be_saved():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = PathIntegral(model, optimizer)
    with whole:
        train(model, optimizer, steps=2)
    rest = PathIntegral(model, optimizer)
    rest.load_state_dict(whole.state_dict())
    with whole, rest:
        train(model, optimizer, steps=2)
    assert torch.equal(rest.curvature().values["weight"], whole.curvature().values["weight"])


def test_si_in_a_plain_loop_pulls_back_to_the_old_weights():
    model, prior = net(), lifelong.si(Categorical(), strength=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with PathIntegral(model, optimizer, prior, 10) as path:
        train(model, optimizer, prior)
    prior = prior.update(model, Examples(X, Y), path=path)
    assert float(prior(model).detach()) == 0
    values = path.curvature(0.1).values
    d = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p += d[n]
    expected = sum((values[n] * d[n].square()).sum() for n in d)  # 2 · ½ <d, G d>
    assert torch.allclose(prior(model), torch.as_tensor(expected))


@pytest.mark.parametrize("damping", [0.0, -1.0])
def test_the_damping_is_positive(damping):
    model = net()
    path = PathIntegral(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=f"path damping must be positive, got {damping}"):
        path.curvature(damping)
