"""Models: modes, names, inputs and outputs of any kind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lifelong.errors import NonFiniteError, StaleAnchorError
from lifelong.models import (
    concat,
    evaluating,
    forward,
    match,
    move,
    nbytes,
    parameters,
    require_finite,
    rows,
    snapshot,
    take,
    unwrapped,
    widen,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


# Modes


def mixed_modes() -> nn.Sequential:
    """In training, with a frozen BatchNorm: the mix that model.train() would destroy."""
    model = net().train()
    model[1].eval()
    return model


def test_evaluating_restores_mixed_modes() -> None:
    model = mixed_modes()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before


def test_evaluating_restores_after_an_error() -> None:
    model = mixed_modes()
    before = modes(model)
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert modes(model) == before


def test_evaluating_nests() -> None:
    model = mixed_modes()
    before = modes(model)
    with evaluating(model):
        with evaluating(model):
            pass
        assert not any(modes(model))
    assert modes(model) == before


def test_evaluating_leaves_running_statistics() -> None:
    model = net().train()
    before = snapshot(dict(model.named_buffers()))
    with evaluating(model):
        forward(model, torch.randn(5, 3))
    after = dict(model.named_buffers())
    assert all(torch.equal(before[name], after[name]) for name in before)


# Parameters by name


def test_parameters_are_the_trainable_ones() -> None:
    model = net()
    model[0].requires_grad_(False)
    assert list(parameters(model)) == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert list(parameters(model, lambda name, p: p.ndim == 2)) == ["3.weight"]
    assert parameters(model)["3.weight"] is model[3].weight


def test_snapshot_is_a_copy() -> None:
    model = net()
    anchor = snapshot(parameters(model))
    before = anchor["0.weight"].clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert torch.equal(anchor["0.weight"], before)
    assert not any(p.requires_grad for p in anchor.values())


def test_match_keeps_the_anchors_order() -> None:
    model = net()
    anchor = dict(reversed(snapshot(parameters(model)).items()))
    found = match(model, anchor)
    assert list(found) == list(anchor)
    assert all(found[name] is p for name, p in model.named_parameters())


def test_match_names_what_is_missing() -> None:
    anchor = snapshot(parameters(nn.ModuleDict({"old": nn.Linear(2, 2)})))
    with pytest.raises(
        StaleAnchorError, match=r"missing from .*'old\.weight'.*new in it: \['new\."
    ):
        match(nn.ModuleDict({"new": nn.Linear(2, 2)}), anchor)


def test_match_names_what_was_resized() -> None:
    anchor = snapshot(parameters(nn.Linear(3, 2)))
    with pytest.raises(StaleAnchorError, match=r"weight: \(2, 3\) -> \(5, 3\).*prior\.grow"):
        match(nn.Linear(3, 5), anchor)


def test_match_lets_the_model_hold_more() -> None:
    model = net()
    anchor = {"3.bias": torch.zeros(2)}
    assert list(match(model, anchor)) == ["3.bias"]


# Outputs and inputs


class Wrapped(nn.Module):
    """Returns what ``wrap`` makes of a linear layer's output on ``x + y``."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.wrap(self.linear(x + y))


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, lambda f: SimpleNamespace(logits=f, loss=None), lambda f: {"logits": f}],
    ids=["tensor", "attribute", "mapping"],
)
def test_dict_inputs_and_wrapped_outputs(wrap: Any) -> None:
    model, x, y = Wrapped(wrap), torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(forward(model, {"y": y, "x": x}), model.linear(x + y))


def test_tensor_inputs_are_passed_as_they_are() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    assert torch.equal(forward(model, x), model(x))


@pytest.mark.parametrize(
    "wrap", [lambda f: (f,), lambda f: None, lambda f: {"scores": f}], ids=["tuple", "None", "dict"]
)
def test_outputs_without_logits(wrap: Any) -> None:
    inputs = {"x": torch.zeros(5, 3), "y": torch.zeros(5, 3)}
    with pytest.raises(TypeError, match="must return a tensor"):
        forward(Wrapped(wrap), inputs)


def test_flat_outputs() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"returned shape \(5,\); expected \(B, C\)"):
        forward(model, torch.zeros(5, 3))
    mended = nn.Sequential(model, nn.Unflatten(-1, (-1, 1)))  # what the message advises
    assert forward(mended, torch.zeros(5, 3)).shape == (5, 1)


# Rows of tensors and of dicts


def test_take_and_concat_are_inverse() -> None:
    x = torch.randn(6, 2, dtype=torch.float64)
    inputs = {"x": x, "mask": x[:, 0] > 0}
    for value in (x, inputs):
        again = concat([take(value, slice(0, 2)), take(value, torch.arange(2, 6))])
        torch.testing.assert_close(again, value, rtol=0, atol=0)
        assert rows(again) == 6
    assert torch.equal(take(x, torch.tensor([4, 0, 4])), x[[4, 0, 4]])  # type: ignore[arg-type]
    assert torch.equal(take(x, inputs["mask"]), x[inputs["mask"]])  # type: ignore[arg-type]


def test_nbytes() -> None:
    assert nbytes(None) == 0
    assert nbytes(torch.zeros(3, 2)) == 24
    assert nbytes({"a": torch.zeros(3, dtype=torch.int64), "b": {"c": torch.zeros(1)}}) == 28


def test_move_casts_floating_tensors_only() -> None:
    value = {"x": torch.zeros(2), "ids": torch.arange(2), "mask": torch.ones(2).bool()}
    moved = move(value, "cpu", torch.float64)
    assert {k: v.dtype for k, v in moved.items()} == {
        "x": torch.float64,
        "ids": torch.int64,
        "mask": torch.bool,
    }
    assert move(value["x"]) is value["x"]


# A head that grows


@pytest.mark.parametrize("bias", [True, False])
def test_widen_keeps_the_old_outputs(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=bias)).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    before = model(x)
    widen(model, "1", 5)
    after = model(x)
    assert after.shape == (5, 5)
    torch.testing.assert_close(after[:, :2], before)
    assert after.dtype == torch.float64
    assert not any(modes(model))


def test_widen_raises_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    layer = model[0]
    with pytest.raises(ValueError, match="it can grow, not shrink to 2"):
        widen(model, "0", 2)
    with pytest.raises(TypeError, match=r"to be nn\.Linear, got ReLU"):
        widen(model, "1", 5)
    assert model[0] is layer


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_require_finite(bad: float) -> None:
    require_finite(torch.zeros(2), "the loss")
    with pytest.raises(NonFiniteError, match="the loss is NaN or infinite; lower the learning"):
        require_finite(torch.tensor([0.0, bad]), "the loss")


def test_a_model_that_fabric_has_set_up_is_the_one_inside() -> None:
    """A stand-in for its wrapper; tests/integrations have the real one."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = nn.Linear(2, 2)
    assert unwrapped(Wrapper(plain)) is not plain  # anybody's module may be called so
    Wrapper.__module__ = "lightning.fabric.wrappers"
    assert unwrapped(Wrapper(plain)) is plain
