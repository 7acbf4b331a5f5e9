"""Metrics: each against a value worked out by hand, and the laws between them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lifelong.data import Examples
from lifelong.errors import NonFiniteError
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from lifelong.metrics import (
    AccuracyMatrix,
    calibration_error,
    evaluate,
    mean_and_standard_error,
    prequential,
)

R = AccuracyMatrix(torch.tensor([[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.5, 0.85, 0.7]]))
FRACTION = st.floats(0, 1, width=64)


@st.composite
def matrices(draw: st.DrawFn) -> AccuracyMatrix:
    size = draw(st.integers(1, 5))
    row = st.lists(FRACTION, min_size=size, max_size=size)
    return AccuracyMatrix.from_list(draw(st.lists(row, min_size=size, max_size=size)))


class TestByHand:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("average_accuracy", (0.5 + 0.85 + 0.7) / 3),
            ("backward_transfer", ((0.5 - 0.9) + (0.85 - 0.8)) / 2),
            ("forgetting", ((0.9 - 0.5) + (0.8 - 0.85)) / 2),
            ("anytime_accuracy", (0.9 + (0.6 + 0.8) / 2 + (0.5 + 0.85 + 0.7) / 3) / 3),
            ("learning_accuracy", (0.9 + 0.8 + 0.7) / 3),
            ("worst_task", 0.5),
        ],
    )
    def test_property(self, name: str, value: float) -> None:
        assert getattr(R, name) == pytest.approx(value, abs=1e-7)

    @pytest.mark.parametrize(
        ("name", "reference", "value"),
        [
            ("zero_shot_transfer", [0.5, 0.1, 0.1], ((0.2 - 0.1) + (0.3 - 0.1)) / 2),
            ("learning_transfer", [0.0, 0.7, 0.8], ((0.8 - 0.7) + (0.7 - 0.8)) / 2),
            ("intransigence", [0.95, 0.9, 0.9], (0.05 + 0.1 + 0.2) / 3),
        ],
    )
    def test_against_a_reference(self, name: str, reference: list[float], value: float) -> None:
        assert getattr(R, name)(reference) == pytest.approx(value, abs=1e-7)

    def test_forgetting_takes_the_best_of_all_earlier_rows(self) -> None:
        matrix = AccuracyMatrix.from_list([[0.5, 0, 0], [0.9, 0.5, 0], [0.4, 0.5, 1]])
        assert matrix.forgetting == pytest.approx((0.9 - 0.4) / 2)
        assert matrix.backward_transfer == pytest.approx((0.4 - 0.5) / 2)

    def test_lower_triangle_is_enough(self) -> None:
        lower = AccuracyMatrix(torch.where(torch.ones(3, 3).tril().bool(), R.values, math.nan))
        assert lower.curve == pytest.approx((0.9, (0.6 + 0.8) / 2, (0.5 + 0.85 + 0.7) / 3))
        for name in ("average_accuracy", "forgetting", "anytime_accuracy", "worst_task"):
            assert getattr(lower, name) == pytest.approx(getattr(R, name))
        assert math.isnan(lower.zero_shot_transfer([0.1, 0.1, 0.1]))

    def test_unfinished_run_is_nan_and_its_past_is_not(self) -> None:
        part = AccuracyMatrix.empty(3).with_row(0, [0.9]).with_row(1, [0.6, 0.8])
        for name in ("average_accuracy", "backward_transfer", "forgetting", "worst_task"):
            assert math.isnan(getattr(part, name))
        assert part.after(1).average_accuracy == pytest.approx(0.7)

    def test_missing_diagonal_makes_forgetting_nan(self) -> None:
        matrix = AccuracyMatrix.from_list([[None, 0.5], [0.5, 0.5]])
        assert math.isnan(matrix.forgetting)

    def test_one_task(self) -> None:
        one = AccuracyMatrix.from_list([[0.75]])
        assert one.average_accuracy == one.anytime_accuracy == one.worst_task == 0.75
        assert one.backward_transfer == one.forgetting == 0.0
        assert one.zero_shot_transfer([0.5]) == one.learning_transfer([0.5]) == 0.0
        assert one.intransigence([1.0]) == 0.25


class TestLaws:
    @given(matrices())
    def test_forgetting_is_at_least_minus_bwt(self, matrix: AccuracyMatrix) -> None:
        assert matrix.forgetting >= -matrix.backward_transfer - 1e-12

    @given(matrices())
    def test_bwt_is_what_was_learned_and_lost(self, matrix: AccuracyMatrix) -> None:
        size = matrix.num_tasks
        lost = size * (matrix.average_accuracy - matrix.learning_accuracy)
        assert matrix.backward_transfer * max(size - 1, 1) == pytest.approx(lost, abs=1e-12)

    @given(matrices())
    def test_worst_is_below_average(self, matrix: AccuracyMatrix) -> None:
        assert matrix.worst_task <= matrix.average_accuracy + 1e-12

    @given(matrices())
    def test_list_round_trip_through_json(self, matrix: AccuracyMatrix) -> None:
        again = AccuracyMatrix.from_list(json.loads(json.dumps(matrix.to_list())))
        assert torch.equal(again.values, matrix.values)

    @given(matrices())
    def test_rows_one_by_one(self, matrix: AccuracyMatrix) -> None:
        built = AccuracyMatrix.empty(matrix.num_tasks)
        for t, row in enumerate(matrix.values):
            built = built.with_row(t, row)
        assert torch.equal(built.values, matrix.values)

    def test_nan_becomes_null(self) -> None:
        rows = AccuracyMatrix.empty(2).with_row(0, [0.5]).to_list()
        assert rows == [[0.5, None], [None, None]]
        assert "NaN" not in json.dumps(rows)

    def test_frozen_values(self) -> None:
        values = torch.rand(2, 2, dtype=torch.float64)
        matrix = AccuracyMatrix(values)
        before = matrix.values.clone()
        values.zero_()
        matrix.with_row(1, [0.0, 0.0])
        assert torch.equal(matrix.values, before)


class TestRefused:
    @pytest.mark.parametrize("bad", [[[1.5]], [[-0.1]], [[97.0]]])
    def test_values_outside_of_0_and_1(self, bad: list[list[float]]) -> None:
        with pytest.raises(ValueError, match="percentages"):
            AccuracyMatrix.from_list(bad)

    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"\(T, T\)"):
            AccuracyMatrix(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"\(T, T\)"):
            AccuracyMatrix(torch.zeros(0, 0))
        with pytest.raises(ValueError, match="lengths"):
            AccuracyMatrix.from_list([[0.5], [0.5, 0.5]])

    def test_rows(self) -> None:
        with pytest.raises(ValueError, match="t=3"):
            R.with_row(3, [0.5])
        with pytest.raises(ValueError, match="at most 3"):
            R.with_row(0, [0.5] * 4)
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            R.with_row(0, [50.0])
        with pytest.raises(ValueError, match="from 0 to 2"):
            R.after(3)

    def test_references(self) -> None:
        with pytest.raises(ValueError, match="joint"):
            R.intransigence([0.5, 0.5])
        with pytest.raises(ValueError, match="untrained"):
            R.zero_shot_transfer([10.0, 10.0, 10.0])


class Fixed(nn.Module):
    """Its outputs are its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def logits(n: int, c: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)


class TestEvaluate:
    @given(st.integers(1, 40), st.integers(1, 50))
    def test_batch_size_does_not_matter(self, n: int, batch_size: int) -> None:
        f = logits(n, 4, seed=n)
        data = Examples(f, f.flip(1).argmax(1))
        whole = evaluate(Fixed(), data, Categorical(), batch_size=1000)
        parts = evaluate(Fixed(), data, Categorical(), batch_size=batch_size)
        assert parts.num_examples == n
        for name in ("accuracy", "nll", "ece", "brier"):
            assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-12)

    def test_by_hand(self) -> None:
        p = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]], dtype=torch.float64)
        result = evaluate(Fixed(), (p.log(), torch.tensor([0, 1])), Categorical())
        assert result.accuracy == 0.5
        assert result.nll == pytest.approx(-(math.log(0.7) + math.log(0.25)) / 2)
        first, second = 0.3**2 + 0.2**2 + 0.1**2, 0.25**2 + 0.75**2 + 0.5**2
        assert result.brier == pytest.approx((first + second) / 2)
        assert result.ece == pytest.approx((0.3 + 0.5) / 2)  # one prediction in each of two bins
        assert math.isnan(result.rmse)

    def test_bernoulli(self) -> None:
        p = torch.tensor([[0.9], [0.4], [0.3]], dtype=torch.float64)
        result = evaluate(Fixed(), (p.logit(), torch.tensor([1, 1, 0])), Bernoulli())
        assert result.accuracy == pytest.approx(2 / 3)
        assert result.brier == pytest.approx((0.1**2 + 0.6**2 + 0.3**2) / 3)
        assert result.nll == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.7))) / 3)

    def test_regression(self) -> None:
        f = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        result = evaluate(Fixed(), (f, torch.zeros(2, 2)), Gaussian(0.5))
        assert result.rmse == pytest.approx(math.sqrt(30 / 4))
        assert math.isnan(result.accuracy)
        assert math.isnan(result.ece)
        counts = evaluate(Fixed(), (f.log(), f), Poisson())
        assert counts.rmse == pytest.approx(0, abs=1e-12)

    def test_head_makes_the_others_impossible(self) -> None:
        f = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64)
        data = Examples(f, torch.tensor([1]), head=(1, 2))
        assert evaluate(Fixed(), data, Categorical()).accuracy == 1.0
        assert evaluate(Fixed(), data, Categorical(), head=(0, 1, 2)).accuracy == 0.0
        expected = math.log1p(math.exp(-1.0))
        assert evaluate(Fixed(), data, Categorical()).nll == pytest.approx(expected)

    def test_soft_labels(self) -> None:
        p = torch.tensor([[0.6, 0.4]], dtype=torch.float64)
        result = evaluate(Fixed(), (p.log(), p), Categorical())
        assert result.accuracy == 1.0
        assert result.brier == pytest.approx(0, abs=1e-15)

    def test_mode_is_restored_and_dropout_is_off(self) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9), nn.BatchNorm1d(3))
        model[2].eval()  # each module's own mode, not only the outermost
        data = (torch.randn(20, 4), torch.zeros(20, dtype=torch.int64))
        first, again = (evaluate(model, data, Categorical()) for _ in range(2))
        assert first.nll == again.nll
        assert [m.training for m in model] == [True, True, False]
        with pytest.raises(ValueError, match="labels"):
            evaluate(model, (data[0], data[1] + 7), Categorical())
        assert model.training
        assert all(p.grad is None and p.requires_grad for p in model.parameters())

    def test_nan_is_refused(self) -> None:
        with pytest.raises(NonFiniteError, match="output"):
            evaluate(Fixed(), (torch.full((2, 2), math.nan), torch.tensor([0, 1])), Categorical())

    def test_nothing_to_evaluate(self) -> None:
        with pytest.raises(ValueError, match="no examples"):
            evaluate(Fixed(), Examples(torch.zeros(0, 2), torch.zeros(0).long()), Categorical())


class TestCalibration:
    def test_calibrated_predictions(self) -> None:
        # In each of the groups exactly the stated share is right.
        confidence = torch.tensor([0.55, 0.75, 0.95], dtype=torch.float64).repeat_interleave(100)
        right = torch.cat([torch.arange(100) < k for k in (55, 75, 95)])
        p = torch.stack([confidence, 1 - confidence], dim=1)
        assert calibration_error(p, (~right).long()) == pytest.approx(0, abs=1e-12)

    def test_overconfident_predictions(self) -> None:
        p = torch.tensor([[0.99, 0.01]], dtype=torch.float64).repeat(100, 1)
        labels = (torch.arange(100) >= 60).long()
        assert calibration_error(p, labels) == pytest.approx(0.99 - 0.6)

    def test_certainty_falls_into_the_last_bin(self) -> None:
        p = torch.eye(2, dtype=torch.float64)
        assert calibration_error(p, torch.tensor([0, 1])) == 0.0
        assert calibration_error(p, torch.tensor([1, 0])) == 1.0

    @given(st.integers(1, 30), st.integers(1, 20))
    def test_one_bin_is_the_gap_of_the_means_and_more_bins_see_more(self, n: int, k: int) -> None:
        p = logits(n, 3, seed=n).softmax(1)
        labels = torch.arange(n) % 3
        confidence, predicted = p.max(1)
        gap = abs(float((predicted == labels).double().mean() - confidence.mean()))
        assert calibration_error(p, labels, num_bins=1) == pytest.approx(gap)
        assert calibration_error(p, labels, num_bins=k) >= gap - 1e-12

    def test_binary(self) -> None:
        p = torch.tensor([0.2, 0.9], dtype=torch.float64)
        both = torch.stack([1 - p, p], dim=1)
        labels = torch.tensor([0, 0])
        assert calibration_error(p, labels) == calibration_error(both, labels)

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="softmax"):
            calibration_error(torch.tensor([[2.0, -1.0]]), torch.tensor([0]))
        with pytest.raises(ValueError, match="shape"):
            calibration_error(torch.rand(3, 2), torch.tensor([0]))


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_standard_error([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(math.sqrt((16 + 1 + 25) / 9 / 2 / 3))
    mean, error = mean_and_standard_error([0.5])
    assert mean == 0.5
    assert math.isnan(error)
    with pytest.raises(ValueError, match="at least one"):
        mean_and_standard_error([])


class Majority:
    """The share of label 1 so far, and a record of what it was asked."""

    def __init__(self) -> None:
        self.labels: list[int] = []
        self.calls: list[tuple[str, list[float]]] = []

    def predict(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(("predict", inputs.flatten().tolist()))
        share = sum(self.labels) / len(self.labels) if self.labels else 0.25
        return torch.full((len(inputs), 1), share)

    def learn(self, inputs: torch.Tensor, labels: torch.Tensor) -> Majority:
        self.calls.append(("learn", inputs.flatten().tolist()))
        self.labels += labels.tolist()
        return self


class TestPrequential:
    def test_by_hand(self) -> None:
        x, y = torch.arange(5.0).unsqueeze(1), torch.tensor([0, 1, 1, 1, 0])
        counts: list[int] = []
        said, learner = prequential(Majority(), x, y, on_row=counts.append)
        # 0.25, 0, 1/2, 2/3, 3/4; a tie is class 0
        assert said.right.tolist() == [True, False, False, True, False]
        nll = [-math.log(0.75), -math.log(1e-12), math.log(2), math.log(1.5), math.log(4)]
        torch.testing.assert_close(said.nll, torch.tensor(nll).double(), atol=1e-6, rtol=1e-6)
        assert learner.labels == y.tolist()
        assert counts == [1, 2, 3, 4, 5]
        assert said.accuracy() == pytest.approx(0.4)
        assert said.accuracy(3) == pytest.approx(0.5)
        assert said.accuracy(0, 1) == 1
        assert math.isnan(said.accuracy(5))
        assert said.curve(2).tolist() == [0.5, 0.5]

    @given(st.integers(1, 12), st.integers(1, 5))
    def test_no_label_is_seen_early_and_each_row_once(self, n: int, block: int) -> None:
        x, y = torch.arange(float(n)).unsqueeze(1), torch.arange(n) % 2
        _, learner = prequential(Majority(), x, y, block=block)
        blocks = [part.flatten().tolist() for part in x.split(block)]
        assert learner.calls == [(verb, b) for b in blocks for verb in ("predict", "learn")]

    def test_classes(self) -> None:
        class Sure(Majority):
            def predict(self, inputs: torch.Tensor) -> torch.Tensor:
                return torch.tensor([[0.1, 0.2, 0.7]]).expand(len(inputs), 3)

        y = torch.tensor([2, 0, 2])
        said, _ = prequential(Sure(), torch.zeros(3, 1), y, block=2)
        assert said.right.tolist() == [True, False, True]
        torch.testing.assert_close(said.nll.exp(), 1 / torch.tensor([0.7, 0.1, 0.7]).double())

    def test_errors(self) -> None:
        class Wrong(Majority):
            def predict(self, inputs: torch.Tensor) -> torch.Tensor:
                return torch.full((len(inputs), 1), 1.5)

        x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(ValueError, match="as many labels as rows"):
            prequential(Majority(), x, y[:2])
        with pytest.raises(ValueError, match="block of at least 1"):
            prequential(Majority(), x, y, block=0)
        with pytest.raises(ValueError, match="expected probabilities"):
            prequential(Wrong(), x, y)
        said, _ = prequential(Majority(), x, y)
        for window in (0, 4):
            with pytest.raises(ValueError, match="a window from 1 to 3"):
                said.curve(window)
