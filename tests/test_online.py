"""Learning row by row: closed forms, the library's own slow way, and what must stay constant."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lifelong.errors import NonFiniteError
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from lifelong.online import LaplaceFilter, RunningScale, _update
from lifelong.prior import Prior
from lifelong.recipe import Recipe
from lifelong.refit import refit
from lifelong.terms import Regulariser

LIKELIHOODS = (Gaussian(0.7), Bernoulli(), Categorical(), Poisson())


def linear(num_inputs: int = 3, num_outputs: int = 1, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(num_inputs, num_outputs, dtype=torch.float64)


def network(num_outputs: int = 1, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, num_outputs))


def data(n: int, likelihood: Likelihood, num_outputs: int = 1, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    f = x @ torch.randn(3, num_outputs, generator=generator, dtype=torch.float64)
    return x, likelihood.sample(f, generator)


def flat(params: dict[str, Tensor] | nn.Module) -> Tensor:
    values = dict(params.named_parameters()) if isinstance(params, nn.Module) else params
    return torch.cat([v.detach().double().flatten() for v in values.values()])


def with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


class TestAgainstClosedForms:
    @pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
    def test_linear_gaussian_is_a_gaussian_process(self, gamma: float) -> None:
        """Of kernel gamma^(|s - t| / 2) (x_s x_t + 1) / delta over rows and their times."""
        likelihood, model, delta = Gaussian(0.7), linear(), 0.5
        x, y = data(25, likelihood)
        learner = LaplaceFilter.of(model, likelihood, discounts=[gamma], precision=delta)
        learner = learner.learn(x[:-1], y[:-1])
        X, t = with_bias(x), torch.arange(25.0).double()
        K = gamma ** (0.5 * (t - t.unsqueeze(1)).abs()) * (X @ X.T) / delta
        past = K[:-1, :-1] + 0.49 * torch.eye(24)
        at_start = X @ flat(model)
        gap = y[:-1].squeeze(1) - at_start[:-1]
        exact = at_start[-1] + K[-1, :-1] @ torch.linalg.solve(past, gap)
        torch.testing.assert_close(learner.predict(x[-1:]).squeeze(), exact)
        variance = K[-1, -1] - K[-1, :-1] @ torch.linalg.solve(past, K[:-1, -1])
        torch.testing.assert_close(learner._outputs(x[-1:]).V.squeeze(), variance)

    def test_without_drift_it_is_ridge_regression(self) -> None:
        likelihood, model = Gaussian(0.7), linear()
        x, y = data(3000, likelihood)
        after = LaplaceFilter.of(model, likelihood, discounts=[1], precision=0.5).learn(x, y)
        X = with_bias(x)
        P = 0.5 * torch.eye(4, dtype=torch.float64) + X.T @ X / 0.49
        start = flat(model)
        exact = start + torch.linalg.solve(P, X.T @ (y.squeeze(1) - X @ start) / 0.49)
        torch.testing.assert_close(after.mean[0], exact, rtol=1e-10, atol=1e-10)
        inverse = torch.linalg.inv(P)
        torch.testing.assert_close(after.covariance[0], inverse, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("gamma", [1.0, 0.8])
    def test_weights_are_the_posterior_over_members(self, gamma: float) -> None:
        """Without switching, by the evidence of all rows, which is that of the process."""
        likelihood = Gaussian(0.7)
        x, y = data(12, likelihood)
        models = [linear(seed=s) for s in range(3)]
        after = LaplaceFilter.of(models, likelihood, discounts=[gamma], switch=0).learn(x, y)
        X, t = with_bias(x), torch.arange(12.0).double()
        cov = gamma ** (0.5 * (t - t.unsqueeze(1)).abs()) * (X @ X.T) + 0.49 * torch.eye(12)
        # Each beginning is a mean that all rows share.
        evidence = torch.stack(
            [
                torch.distributions.MultivariateNormal(X @ flat(m), cov).log_prob(y.squeeze(1))
                for m in models
            ]
        )
        torch.testing.assert_close(after.weights, evidence.softmax(0))

    @pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=repr)
    def test_each_row_is_a_minimum(self, likelihood: Likelihood) -> None:
        """Of a linear model: S⁻¹ (m' - m) + Jᵀ r(f') = 0 and S'⁻¹ = S⁻¹ + Jᵀ H(f') J."""
        outputs = 3 if isinstance(likelihood, Categorical) else 2
        x, y = data(9, likelihood, outputs)
        before = LaplaceFilter.of(linear(3, outputs), likelihood, discounts=[1]).learn(x[:8], y[:8])
        after = before.learn(x[8:], y[8:])
        J = torch.autograd.functional.jacobian(
            lambda w: x[8] @ w[: 3 * outputs].view(outputs, 3).T + w[3 * outputs :],
            before.mean[0],
        )
        f = (J @ after.mean[0]).unsqueeze(0)
        P, now = torch.linalg.inv(before.covariance[0]), torch.linalg.inv(after.covariance[0])
        slope = P @ (after.mean[0] - before.mean[0]) + J.T @ likelihood.residual(f, y[8:])[0]
        torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-7, rtol=0)
        H = likelihood.hessian(f)[0]
        torch.testing.assert_close(now, P + J.T @ H @ J)
        torch.testing.assert_close(after.covariance, after.covariance.mT)

    @pytest.mark.parametrize("y", [0, 1])
    @pytest.mark.parametrize("f", [-40.0, -3.0, 0.0, 25.0])
    @pytest.mark.parametrize("v", [0.0, 1e-3, 1.0, 300.0])
    def test_update_finds_the_mode(self, y: int, f: float, v: float) -> None:
        """Also where a full Newton step would overshoot for ever."""
        likelihood, label = Bernoulli(), torch.tensor([y])
        at, V = torch.tensor([[f]]).double(), torch.tensor([[[v]]]).double()
        r, H, _ = _update(at, V, label, likelihood)
        inside = at - V[:, 0] * r
        torch.testing.assert_close(r, likelihood.residual(inside, label), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(H, likelihood.hessian(inside))

    def test_evidence_of_gaussian_labels(self) -> None:
        f = torch.tensor([[0.3, -1.0]]).double()
        V = torch.tensor([[[2.0, 0.4], [0.4, 0.5]]]).double()
        y = torch.tensor([[1.0, 2.0]]).double()
        law = torch.distributions.MultivariateNormal(f, V + 0.49 * torch.eye(2))
        torch.testing.assert_close(_update(f, V, y, Gaussian(0.7))[2], law.log_prob(y))

    @pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical()], ids=repr)
    def test_of_classes_the_probability_that_was_given_counts(self, likelihood: Likelihood) -> None:
        outputs = 3 if isinstance(likelihood, Categorical) else 1
        x, y = data(20, likelihood, outputs)
        y = y.reshape(20, -1).squeeze(1) if outputs == 1 else y
        learner = LaplaceFilter.of(network(outputs), likelihood, switch=0).learn(x[:-1], y[:-1])
        said = learner.predict_each(x[-1:])[:, 0]
        if outputs == 1:
            said = torch.cat([1 - said, said], dim=1)
        by_bayes = learner.weights * said[:, int(y[-1])]
        after = learner.learn(x[-1:], y[-1:])
        torch.testing.assert_close(after.weights, by_bayes / by_bayes.sum())


class TestAgainstThePrior:
    @pytest.mark.parametrize("likelihood", [Gaussian(0.7), Bernoulli()], ids=repr)
    def test_a_chain_of_priors(self, likelihood: Likelihood) -> None:
        """refit, update: each row a task, with the library's other parts."""
        x, y = data(6, likelihood)
        model, delta = linear(), 0.6
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        learner = LaplaceFilter.of(model, likelihood, discounts=[1], precision=delta)
        recipe = Recipe(structure="dense", gradient="stationary")
        prior = Prior(likelihood, recipe, terms=(Regulariser(delta, start),))
        for i in range(len(x)):
            row = (x[i : i + 1], y[i : i + 1])
            refit(model, prior, row, tolerance=1e-12)
            prior = prior.update(model, row)
            learner = learner.learn(*row)
        torch.testing.assert_close(learner.mean[0], flat(model), atol=1e-6, rtol=1e-6)
        own = learner.prior()
        assert own.weight is not None
        assert prior.weight is not None
        torch.testing.assert_close(
            own.weight.curvature.matrix,  # type: ignore[union-attr]
            prior.weight.curvature.matrix,  # type: ignore[union-attr]
            atol=1e-6,
            rtol=1e-6,
        )
        gap = own(model) - prior(model)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3
        torch.testing.assert_close(own(model) - prior(model), gap, atol=1e-5, rtol=1e-5)

    def test_a_prior_that_goes_on(self) -> None:
        x, y = data(30, Bernoulli())
        models = [network(seed=s).double() for s in range(2)]
        learner = LaplaceFilter.of(models, Bernoulli()).learn(x, y)
        model, prior = models[0], learner.prior(3)
        refit(model, prior, tolerance=1e-12)
        torch.testing.assert_close(flat(model), learner.mean[3], atol=1e-7, rtol=1e-7)
        assert prior.update(model, (x, y.long().double())).num_data == 60
        with pytest.raises(IndexError):
            learner.prior(12)


def test_what_was_predicted_is_of_the_numbers_not_of_the_tensor() -> None:
    """A buffer that NumPy fills again holds another row."""
    learner = LaplaceFilter.of(network(), Gaussian(), discounts=[1.0])
    buffer = torch.zeros(1, 3, dtype=torch.float64).numpy()
    row, y = torch.from_numpy(buffer), torch.ones(1, 1)
    for value in (0.0, 2.0):
        buffer[:] = value
        fresh = LaplaceFilter.of(network(), Gaussian(), discounts=[1.0])
        torch.testing.assert_close(learner.predict(row), fresh.predict(row.clone()))
    buffer[:] = -1.0
    found, truth = learner.learn(row, y), fresh.learn(row.clone(), y)
    torch.testing.assert_close(found.mean, truth.mean)


def test_predicts_and_learns_in_inference_mode() -> None:
    x, y = data(4, Bernoulli())
    learner = LaplaceFilter.of(network(), Bernoulli(), standardise=3)
    expected = learner.learn(x, y).predict(x)
    with torch.inference_mode():
        rows = x.clone()
        learned = learner.learn(rows, y)
        assert torch.equal(learned.predict(rows), expected)
    assert torch.equal(learned.learn(x, y).predict(x), learner.learn(x, y).learn(x, y).predict(x))


class TestWhatStaysConstant:
    def test_bytes_and_work_of_a_row(self) -> None:
        """The same at any time. (Of labels that are not Gaussian, Newton's method takes a step
        more or less.)"""
        x, y = data(40, Gaussian())
        learner = LaplaceFilter.of(network(), Gaussian(), standardise=3)
        flops, sizes = set(), set()
        for i in range(len(x)):
            row = (x[i : i + 1], y[i : i + 1])
            with FlopCounterMode(display=False) as counter:
                learner.predict(row[0])
                learner = learner.learn(*row)
            flops.add(counter.get_total_flops())
            sizes.add(learner.num_bytes)
        assert len(flops) == len(sizes) == 1
        assert min(flops) > 0
        plain = LaplaceFilter.of(network(), Gaussian())
        assert learner.num_bytes == plain.num_bytes + 2 * 3 * 8  # mean and squares

    @pytest.mark.parametrize("likelihood", [Gaussian(0.1), Bernoulli()], ids=repr)
    def test_what_is_believed_is_bounded(self, likelihood: Likelihood) -> None:
        """0 < S <= I / delta, and with a drift S never falls to 0."""
        x, y = data(300, likelihood)
        learner = LaplaceFilter.of(network(), likelihood, discounts=[1, 0.99, 0.5], precision=2.0)
        learner = learner.learn(x, y)
        values = torch.linalg.eigvalsh(learner.covariance)
        assert bool((values <= 0.5 + 1e-12).all())
        assert bool((values[0] > 0).all())
        assert bool((values[1] >= 0.01 / 2 - 1e-12).all())
        assert bool((values[2] >= 0.5 / 2 - 1e-12).all())

    def test_without_news_all_is_forgotten(self) -> None:
        """Rows of a model that they can't move: m goes to theta_0 and S to I / delta."""
        x, y = data(20, Bernoulli())
        model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        learner = LaplaceFilter.of(model, Bernoulli(), discounts=[0.7]).learn(x, y)
        learner = learner.learn(torch.zeros(200, 3), torch.zeros(200))
        torch.testing.assert_close(learner.mean, learner.start)
        torch.testing.assert_close(learner.covariance[0], torch.eye(3).double())

    def test_weights(self) -> None:
        x, y = data(40, Bernoulli())
        learner = LaplaceFilter.of(network(), Bernoulli(), switch=0.1).learn(x, y)
        assert float(learner.weights.sum()) == pytest.approx(1)
        assert bool((learner.weights >= 0.1 / 6 - 1e-12).all())

    def test_values_are_frozen_and_the_model_is_left_alone(self) -> None:
        x, y = data(8, Bernoulli())
        model = network().train()
        before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        first = LaplaceFilter.of(model, Bernoulli(), standardise=3)
        told, state = first.predict(x), {k: copy.deepcopy(v) for k, v in vars(first).items()}
        first.learn(x, y)
        torch.testing.assert_close(first.predict(x), told, rtol=0, atol=0)
        for name in ("mean", "covariance", "weights"):
            torch.testing.assert_close(getattr(first, name), state[name], rtol=0, atol=0)
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert torch.equal(torch.get_rng_state(), random)

    def test_rows_one_by_one_or_together(self) -> None:
        x, y = data(23, Categorical(), 3)
        first = LaplaceFilter.of(network(3), Categorical(), standardise=3)
        one_by_one = first
        for i in range(len(x)):
            one_by_one.predict(x[i : i + 1])
            one_by_one = one_by_one.learn(x[i : i + 1], y[i : i + 1])
        together = first.learn(x, y)
        torch.testing.assert_close(together.mean, one_by_one.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(together.weights, one_by_one.weights, rtol=1e-12, atol=1e-12)


class TestUse:
    def test_classes(self) -> None:
        x, y = data(50, Categorical(), 3)
        learner = LaplaceFilter.of(network(3), Categorical()).learn(x, y)
        p = learner.predict(x)
        assert p.shape == (50, 3)
        torch.testing.assert_close(p.sum(1), torch.ones(50).double())
        torch.testing.assert_close(
            p, torch.einsum("m,mbc->bc", learner.weights, learner.predict_each(x))
        )
        assert "6 members of 31 weights, 50 rows" in repr(learner)

    def test_after_a_change_the_forgetful_are_believed(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(600, 3, generator=generator)
        y = (x[:, 0] > 0).long()
        y[300:] = 1 - y[300:]
        learner = LaplaceFilter.of(linear(), Bernoulli(), discounts=[1, 0.99])
        learner = learner.learn(x[:300], y[:300])
        assert float(learner.weights[0]) > 0.5
        learner = learner.learn(x[300:400], y[300:400])
        assert float(learner.weights[1]) > 0.5
        said = learner.predict(x[400:500]).squeeze(1) > 0.5
        assert float((said == y[400:500]).double().mean()) > 0.9

    def test_frozen_parts_and_mappings(self) -> None:
        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Linear(3, 4).requires_grad_(False)
                self.head = nn.Linear(4, 1)

            def forward(self, left: Tensor) -> Tensor:
                return self.head(torch.tanh(self.body(left)))

        torch.manual_seed(0)
        model = Named()
        x, y = data(12, Bernoulli())
        learner = LaplaceFilter.of([model, Named()], Bernoulli()).learn({"left": x}, y)
        assert learner.mean.shape == (12, 5)
        features = torch.tanh(x @ model.body.weight.double().T + model.body.bias.double())
        alone = LaplaceFilter.of(model.head, Bernoulli()).learn(features, y)
        torch.testing.assert_close(alone.mean, learner.mean[:6])

    def test_a_row_that_was_overwritten_is_read_again(self) -> None:
        x, y = data(2, Bernoulli())
        first = LaplaceFilter.of(network(), Bernoulli())
        row = x[:1].clone()
        first.predict(row)
        row.copy_(x[1:])
        torch.testing.assert_close(first.learn(row, y[:1]).mean, first.learn(x[1:], y[:1]).mean)


class TestScale:
    @given(
        st.lists(st.floats(-100, 100), min_size=3, max_size=20),
        st.integers(1, 2),
    )
    def test_as_of_all_rows_together(self, values: list[float], cut: int) -> None:
        x = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
        scale = RunningScale.zeros(1).add(x[:cut]).add(x[cut:])
        torch.testing.assert_close(scale.mean, x.mean(0))
        torch.testing.assert_close(
            scale.squares, (x - x.mean(0)).square().sum(0), atol=1e-7, rtol=1e-7
        )

    def test_limits(self) -> None:
        rows = torch.zeros(1000, 2).double()
        scale = RunningScale.zeros(2).add(rows)
        assert torch.equal(scale(rows[:1]), rows[:1])
        rows[0, 0] = 1.0
        scale = scale.add(rows[:1])
        assert scale(rows[:1]).tolist() == [[4.0, 0.0]]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"discounts": []}, "one discount"),
            ({"discounts": [0.0]}, "above 0 and at most 1"),
            ({"discounts": [1.1]}, "above 0 and at most 1"),
            ({"precision": 0.0}, "precision > 0"),
            ({"switch": 1.5}, "switch from 0 to 1"),
        ],
    )
    def test_settings(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match="expected.*" + message):
            LaplaceFilter.of(network(), Bernoulli(), **options)

    def test_models(self) -> None:
        with pytest.raises(ValueError, match="at least one model"):
            LaplaceFilter.of([], Bernoulli())
        with pytest.raises(ValueError, match="none that is trainable"):
            LaplaceFilter.of(network().requires_grad_(False), Bernoulli())
        with pytest.raises(ValueError, match="2 kinds"):
            LaplaceFilter.of([network(), linear()], Bernoulli())
        with pytest.raises(TypeError, match="add the parentheses"):
            LaplaceFilter.of(network(), Bernoulli)  # type: ignore[arg-type]

    def test_rows(self) -> None:
        x, y = data(4, Bernoulli())
        learner = LaplaceFilter.of(network(), Bernoulli(), standardise=3)
        with pytest.raises(ValueError, match="a label for each row"):
            learner.learn(x, y[:2])
        with pytest.raises(ValueError, match="Bernoulli labels must lie"):
            learner.learn(x, y + 2)
        with pytest.raises(ValueError, match="rows of 3 numbers.*shape"):
            learner.predict(x[:, :2])
        with pytest.raises(ValueError, match="rows of 3 numbers.*a mapping"):
            learner.predict({"input": x})
        with pytest.raises(NonFiniteError, match="output"):
            LaplaceFilter.of(network(), Bernoulli()).predict(x * torch.nan)
