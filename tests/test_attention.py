"""Attention taken apart against ``nn.MultiheadAttention`` itself, with every kind of mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lifelong.attention import GroupedLinear, InProjection, attend, can_attend
from lifelong.hooks import Engine
from lifelong.jacobians import choose, per_example_jacobian
from lifelong.testing import reference
from test_jacobians import Attention, C, close

B, H, E, T, S = 4, 2, 6, 3, 5  # batch, heads, width, targets, sources

MASKS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(2)},
    "float": lambda: {"attn_mask": torch.randn(T, S, dtype=torch.float64)},
    "for each head": lambda: {"attn_mask": torch.randn(B * H, T, S, dtype=torch.float64)},
    "padding": lambda: {"key_padding_mask": _padding()},
    "both": lambda: {
        "attn_mask": torch.ones(B * H, T, S, dtype=torch.bool).triu(3),
        "key_padding_mask": _padding(),
    },
    "both float": lambda: {
        "attn_mask": torch.randn(T, S, dtype=torch.float64),
        "key_padding_mask": torch.randn(B, S, dtype=torch.float64),
    },
}


def _padding() -> Tensor:
    return torch.arange(S) >= torch.tensor([5, 3, 2, 4]).unsqueeze(1)


def inputs(batch_first: bool) -> list[Tensor]:
    shapes = [(B, T, E), (B, S, E), (B, S, E)]
    x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return x if batch_first else [part.transpose(0, 1) for part in x]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
def test_it_is_the_modules_own_forward(
    options: dict, mask: str, batch_first: bool, need_weights: bool
) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=batch_first, **options).double()
    arguments = {**MASKS[mask](), "need_weights": need_weights, "average_attn_weights": False}
    x = inputs(batch_first)
    ours, weights = attend(module, InProjection(module), *x, **arguments)
    truth, expected = module(*x, **arguments)
    close(ours, truth, 1e-14)
    if need_weights:
        close(weights, expected, 1e-14)
    else:
        assert weights is None
    grads = [
        torch.autograd.grad(out.square().sum(), list(module.parameters())) for out in (ours, truth)
    ]
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-13)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_is_one_product(batch_first: bool) -> None:
    module = nn.MultiheadAttention(E, H, batch_first=batch_first).double()
    project = InProjection(module)
    calls = []
    project.joint.register_forward_hook(lambda *_: calls.append("joint"))
    project.apart.register_forward_hook(lambda *_: calls.append("apart"))
    x = inputs(batch_first)[1]
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    for key in (x, x.clone()):
        arguments = {"attn_mask": causal, "is_causal": True}
        close(
            attend(module, project, x, key, key, **arguments)[0],
            module(x, key, key, **arguments)[0],
        )
    assert calls == ["joint", "apart"]


def test_one_sequence_without_a_batch_is_left_to_the_module() -> None:
    module = nn.MultiheadAttention(E, H).double()
    x = torch.randn(S, E, dtype=torch.float64)
    ours, truth = attend(module, InProjection(module), x, x, x), module(x, x, x)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_grouped_linear() -> None:
    """Its groups are linear layers on rows of the weight."""
    weight, bias = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6))
    x = torch.randn(B, 2, T, 3)
    z = GroupedLinear(weight, bias, 2)(x)
    for g in range(2):
        rows = slice(3 * g, 3 * g + 3)
        close(z[:, g], nn.functional.linear(x[:, g], weight[rows], bias[rows]), 1e-6)


def test_which_attention_can_be_taken_apart() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return super().forward(*args, **kwargs)

    assert can_attend(nn.MultiheadAttention(E, H))
    assert not can_attend(nn.Linear(E, H))
    assert not can_attend(Own(E, H))
    assert not can_attend(nn.MultiheadAttention(E, H, kdim=2))
    random = nn.MultiheadAttention(E, H, dropout=0.5)
    assert not can_attend(random)
    assert can_attend(random.eval())
    patched = nn.MultiheadAttention(E, H)
    patched.forward = patched.forward
    assert not can_attend(patched)


def test_where_the_outputs_differ_the_module_runs_as_it_is() -> None:
    """A hook on ``out_proj`` that the module never calls, but its parts do."""
    model = Attention(batch_first=True).double()
    model.attention.out_proj.register_forward_hook(lambda _m, _a, out: 2 * out)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    engine = Engine(model, choose(model))
    plan = engine.trace(x).plan
    assert engine.whole
    assert {n for n in plan.functional if n.startswith("attention")} == {
        f"attention.{n}"
        for n in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    truth = reference.jacobian(model, x)
    for name, value in per_example_jacobian(model, x).items():
        close(value, truth[name])


def test_the_forward_comes_back_after_errors() -> None:
    class Breaks(Attention):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if "forward" in vars(self.attention):
                raise KeyError("inside of a recorded forward")
            return out

    model = Breaks(batch_first=True).double()
    with pytest.raises(KeyError, match="inside"):
        per_example_jacobian(model, torch.randn(5, 3, 4, dtype=torch.float64))
    assert "forward" not in vars(model.attention)
    assert not model.attention.out_proj._forward_hooks


@pytest.mark.parametrize("part", ["in_proj_weight", "out_proj.bias"])
def test_some_of_its_parameters(part: str) -> None:
    model = Attention(batch_first=True).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    name = f"attention.{part}"
    assert Engine(model, choose(model, [name])).trace(x).plan.hooked == {name}
    found = per_example_jacobian(model, x, params=[name])
    close(found[name], reference.jacobian(model, x)[name])
    assert found[name].shape[:2] == (5, C)
