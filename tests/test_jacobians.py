"""Jacobian products against plain autograd loops in float64, on models of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch._dynamo  # sets an environment variable; torch.func imports it in places
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lifelong import hooks, jacobians
from lifelong.data import Examples
from lifelong.errors import NonFiniteError, NotRepeatableError, StaleAnchorError
from lifelong.hooks import Engine
from lifelong.jacobians import choose, gradient, kernel, leverage, per_example_jacobian
from lifelong.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from lifelong.models import Inputs, forward
from lifelong.testing import reference

N, C = 9, 3


class Twice(nn.Module):
    """One layer used twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Tied(nn.Module):
    """Two layers with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, C)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Functional(nn.Module):
    """A weight used by its layer and by a functional call, which no hook sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(5, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x)) + F.linear(x, self.a.weight))


class TwiceConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(2, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(torch.tanh(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x if self.batch_first else x.transpose(0, 1))
        return self.head(self.attention(x, x, x)[0].mean(1 if self.batch_first else 0))


class Apart(nn.Module):
    """Attention whose keys and values have sizes of their own: not packed, so not taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=2, vdim=3, batch_first=True)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x[..., :2], x[..., 1:])[0].mean(1))


class Blocks(nn.Module):
    """A transformer's encoder under a causal mask and a padding mask."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first, norm_first=True)
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, C)

    def forward(self, ids: Tensor) -> Tensor:
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = self.embed(ids if self.batch_first else ids.T)
        x = self.encoder(x, mask=causal, src_key_padding_mask=ids == 0)
        return self.head(x.mean(1 if self.batch_first else 0))


class Cross(nn.Module):
    """Queries, keys and values from three tensors of two lengths; learned and zero positions."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(
            4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=batch_first
        )
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        query, key = x[:, :2], torch.tanh(x[:, 2:])
        b, heads, mask = len(x), 2, x[:, 2:, 0] > 1
        scores = x.new_zeros(b * heads, 2, 3)
        scores += torch.arange(3) * x[:, :1, :1].repeat_interleave(heads, 0)
        if not self.batch_first:
            query, key = query.transpose(0, 1), key.transpose(0, 1)
        out, weights = self.attention(
            query, key, key.flip(-1), key_padding_mask=mask.to(x.dtype), attn_mask=scores,
            average_attn_weights=False,
        )  # fmt: skip
        return (
            self.head(out.mean(1 if self.batch_first else 0))
            + weights.square().sum((1, 2, 3))[:, None]
        )


class Words(nn.Module):
    """An embedding whose weight is also the output layer's, on the mean or on each position."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each, self.embed, self.head = each, nn.Embedding(C, 4), nn.Linear(4, C)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embed(ids)) * torch.arange(1, 4).unsqueeze(1)
        return torch.tanh(self.head(x)).sum(1) if self.each else self.head(x.sum(1))


class Bag(nn.Module):
    """One embedding used twice with different padding, and a bag of words."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(C, 4, padding_idx=1), nn.Embedding(C, 4)
        self.b.weight = self.a.weight
        self.bag, self.head = nn.EmbeddingBag(C, 4), nn.Linear(4, C)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.a(ids)) * self.b(ids[:, :1])
        return self.head(x.sum(1) * self.bag(ids))


class LoRA(nn.Module):
    """A frozen linear layer and a trained product of rank 2 beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class Text(nn.Module):
    """Called by keyword; embedding, normalisation, and an output inside an object."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, C)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids) * mask.unsqueeze(-1)
        return {"logits": self.head(self.norm(x.mean(1)))}


class Windows(nn.Module):
    """Folds positions into the batch before a layer, as windowed vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.conv = nn.Linear(4, 4), nn.Conv1d(1, 2, 2)
        self.head = nn.Linear(6, C)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        x = torch.tanh(self.a(x.reshape(b * t, d)))
        x = torch.tanh(self.conv(x.unsqueeze(1))).reshape(b, t, -1)
        return self.head(x.mean(1))


class Routed(nn.Module):
    """Which head runs depends on the batch; the other takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, C), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if float(x[0, 0]) > 0 else self.right(x)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def normed() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, C)
    )
    model[1].running_mean.normal_()
    return model.eval()


def norms() -> nn.Module:
    model = nn.Sequential(
        nn.GroupNorm(2, 4),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.LayerNorm((3, 2)),
        nn.Flatten(2),
        nn.Linear(6, 5),
        nn.LayerNorm(5, bias=False),
        nn.Flatten(),
        nn.Linear(20, C),
    )
    for p in model.parameters():
        nn.init.normal_(p)
    return model.eval()


class Scaled(nn.Module):
    """A parameter of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.rand(5)), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.scale * x))


def text_inputs() -> Inputs:
    return {"ids": torch.randint(0, 7, (N, 4)), "mask": torch.rand(N, 4, dtype=torch.float64)}


def conv2d() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, (1, 2), dilation=2, padding="same", bias=False),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, C),
    )


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=2, padding_mode="circular", groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, C),
    )


def token_ids() -> Tensor:
    ids = torch.randint(1, C, (N, 3))
    ids[0] = 1
    return ids


def padded_ids() -> Tensor:
    ids = torch.randint(1, 7, (N, 4))
    ids[:4, 3] = 0
    return ids


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


# name -> model, inputs, and the parameters that hooks cannot handle
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], set[str]]] = {
    "linear": (lambda: nn.Linear(5, C), floats(5), set()),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, C)
        ),
        floats(5),
        set(),
    ),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)),
        floats(3, 5),
        set(),
    ),
    "conv2d": (conv2d, floats(2, 9, 7), set()),
    "conv1d": (conv1d, floats(2, 6), set()),
    "pointwise": (
        lambda: nn.Sequential(nn.Conv2d(2, C, 1, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        floats(2, 1, 1),
        set(),
    ),
    "twice": (Twice, floats(5), set()),
    "twice conv": (TwiceConv, floats(2, 4, 4), set()),
    "tied": (Tied, floats(5), set()),
    "windows": (Windows, floats(3, 4), set()),
    "frozen": (frozen, floats(5), set()),
    "batch norm": (normed, floats(5), set()),
    "norms": (norms, floats(4, 3, 2), set()),
    "scaled": (Scaled, floats(5), {"scale"}),
    "functional": (Functional, floats(5), {"a.weight"}),
    "attention": (lambda: Attention(batch_first=True), floats(3, 4), set()),
    "sequence first": (
        lambda: Attention(batch_first=False),
        floats(5, 4),
        set(),
    ),
    "positions like examples": (
        lambda: Attention(batch_first=False),
        floats(N, 4),
        set(),
    ),
    "cross attention": (
        lambda: Cross(batch_first=True),
        floats(5, 4),
        {"attention.bias_k", "attention.bias_v"},
    ),
    "cross attention, sequence first": (
        lambda: Cross(batch_first=False),
        floats(5, 4),
        {"attention.bias_k", "attention.bias_v"},
    ),
    "separate projections": (
        Apart,
        floats(3, 4),
        {f"attention.{n}_proj_weight" for n in "qkv"}
        | {"attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"},
    ),
    "transformer": (lambda: Blocks(batch_first=True).eval(), padded_ids, set()),
    "transformer, sequence first": (
        lambda: Blocks(batch_first=False).eval(),
        padded_ids,
        set(),
    ),
    "text": (Text, text_inputs, set()),
    "tied embedding": (lambda: Words(each=False), token_ids, set()),
    "tied embedding, each position": (lambda: Words(each=True), token_ids, set()),
    "bag": (Bag, token_ids, {"bag.weight"}),
    "lora": (
        lambda: nn.Sequential(LoRA(nn.Linear(5, 4)), nn.Tanh(), LoRA(nn.Linear(4, C))),
        floats(5),
        set(),
    ),
    "lora, positions": (
        lambda: nn.Sequential(LoRA(nn.Linear(5, 4)), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)),
        floats(3, 5),
        set(),
    ),
    "lstm": (
        lambda: Recurrent(nn.LSTM),
        floats(3, 3),
        {f"rnn.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
    "gru": (
        lambda: Recurrent(nn.GRU),
        floats(3, 3),
        {f"rnn.{n}_l0" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")},
    ),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, C)),
        floats(5),
        {f"parametrizations.weight.original{i}" for i in (0, 1)},
    ),
}  # fmt: skip


# One model of each kind of layer, for what is tried with every likelihood.
KINDS = ("mlp", "conv2d", "text", "transformer", "tied embedding", "lora, positions")


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Inputs]:
    make, inputs, _ = MODELS[request.param]
    return make().double(), inputs()


def close(x: Tensor, y: Tensor, tolerance: float = 1e-12) -> None:
    assert x.shape == y.shape
    gap = (x - y).detach().abs().max()
    assert gap <= tolerance * (1 + y.detach().abs().max()), float(gap)


def flat(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in params.values()])


def variance_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand_like(p.detach()) for name, p in choose(model).items()}


@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_takes_the_way_it_should(name: str) -> None:
    make, inputs, slow = MODELS[name]
    model = make().double()
    plan = Engine(model, choose(model)).trace(inputs()).plan
    assert plan.functional | plan.looped == slow
    assert plan.hooked == set(choose(model)) - slow


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("length", [4, 8, 16])
def test_positions_are_told_from_examples(batch_first: bool, length: int) -> None:
    """As many positions as examples, or multiples: a layer's input may be read either way."""
    model = Attention(batch_first=batch_first).double()
    plan = Engine(model, choose(model)).trace(torch.randn(8, length, 4, dtype=torch.float64)).plan
    assert plan.hooked == set(choose(model))


def test_per_example_jacobian(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    ours, truth = per_example_jacobian(model, inputs), reference.jacobian(model, inputs)
    assert list(ours) == list(truth)
    for name in truth:
        close(ours[name], truth[name])


def test_per_example_jacobian_in_pieces(
    case: tuple[nn.Module, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = case
    whole = per_example_jacobian(model, inputs)
    monkeypatch.setattr(hooks, "WORKING_SET", 1)
    monkeypatch.setattr(hooks, "_CHUNK", 1)
    for name, value in per_example_jacobian(model, inputs).items():
        close(value, whole[name])


def test_the_loop_is_right(case: tuple[nn.Module, Inputs], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = case
    monkeypatch.setattr(hooks, "_HOOKED", {})

    def refuse(*_: object) -> dict[str, Tensor]:
        raise RuntimeError("this model is beyond torch.func")

    monkeypatch.setattr(Engine, "functional_rows", refuse)
    assert Engine(model, choose(model)).trace(inputs).plan.looped == set(choose(model))
    for name, value in reference.jacobian(model, inputs).items():
        close(per_example_jacobian(model, inputs)[name], value)


def test_wrong_functional_values_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    make, inputs, _ = MODELS["scaled"]
    model, x = make().double(), inputs()
    right = Engine.functional_rows
    monkeypatch.setattr(
        Engine,
        "functional_rows",
        lambda *args: {k: 1.01 * v for k, v in right(*args).items()},
    )
    assert Engine(model, choose(model)).trace(x).plan.looped == {"scale"}


def test_a_layout_not_met_before_is_probed_again() -> None:
    model = Attention(batch_first=False).double()
    engine = Engine(model, choose(model))
    for b, t in ((4, 3), (3, 3), (1, 3), (5, 2), (4, 3)):
        x = torch.randn(b, t, 4, dtype=torch.float64)
        v = torch.randn(2, b, C, dtype=torch.float64)
        truth = reference.jacobian(model, x)
        for name, value in engine.trace(x).rows(v).items():
            close(value, torch.einsum("kbc,bc...->kb...", v, truth[name]))


def test_layers_that_take_no_part_have_zeros() -> None:
    model = Routed().double()
    engine = Engine(model, choose(model))
    for sign, absent in ((1, "right"), (-1, "left")):
        x = sign * torch.rand(4, 5, dtype=torch.float64)
        trace = engine.trace(x)
        assert trace.plan.absent == {f"{absent}.weight", f"{absent}.bias"}
        assert not trace.plan.functional | trace.plan.looped
        truth = reference.jacobian(model, x)
        for name, value in trace.rows(jacobians._basis(trace.f)).items():
            close(value.transpose(0, 1), truth[name])


def test_a_use_that_comes_later_is_noticed() -> None:
    class Later(nn.Module):
        """Uses its weight a second time, without a call of the layer, where the batch says so."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(5, 5), nn.Linear(5, C)

        def forward(self, x: Tensor) -> Tensor:
            z = torch.tanh(self.a(x))
            return self.head(z if float(x[0, 0]) > 0 else z + F.linear(x, self.a.weight))

    model = Later().double()
    engine = Engine(model, choose(model))
    for sign, slow in ((1, set()), (-1, {"a.weight"}), (1, set())):
        x = sign * torch.rand(4, 5, dtype=torch.float64)
        trace = engine.trace(x)
        assert trace.plan.functional | trace.plan.looped == slow
        truth = reference.jacobian(model, sign * x.abs())
        for name, value in trace.rows(jacobians._basis(trace.f)).items():
            close(value.transpose(0, 1), truth[name])


@pytest.mark.parametrize("mask", [None, (True, False, True)])
def test_leverage(case: tuple[nn.Module, Inputs], mask: tuple[bool, ...] | None) -> None:
    model, inputs = case
    variance = variance_of(model)
    j = reference.flatten(reference.jacobian(model, inputs))
    truth = torch.einsum("ncp,p->nc", j.square(), flat(variance))
    m = None if mask is None else torch.tensor(mask)
    if m is not None:
        truth = truth * m
    close(leverage(model, inputs, Categorical(), variance, mask=m), truth)


@pytest.mark.parametrize("likelihood", [None, Categorical(), Bernoulli(), Gaussian(2.0), Poisson()])
@pytest.mark.parametrize("name", [*KINDS, "tied embedding, each position"])
def test_kernel(name: str, likelihood: Likelihood | None) -> None:
    make, draw, _ = MODELS[name]
    model, inputs = make().double(), draw()
    variance = variance_of(model)
    j = reference.flatten(reference.jacobian(model, inputs))
    if likelihood is not None:
        f = forward(model, inputs).detach()
        h = torch.func.vmap(torch.func.jacrev(likelihood.mean))(f)
        j = torch.einsum("ncd,ndp->ncp", h, j)
    truth = torch.einsum("ncp,p,mcp->cnm", j, flat(variance), j)
    close(kernel(model, inputs, variance, likelihood=likelihood), truth)


def test_kernel_of_the_head(
    case: tuple[nn.Module, Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = case
    variance, mask = variance_of(model), torch.tensor([True, False, True])
    j = reference.flatten(reference.jacobian(model, inputs))
    p = Categorical().mean(Categorical().mask(forward(model, inputs).detach(), mask))
    a = torch.einsum("ncd,ndp->ncp", torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1), j)
    truth = torch.einsum("ncp,p,mcp->cnm", a, flat(variance), a)
    ours = kernel(model, inputs, variance, likelihood=Categorical(), mask=mask)
    close(ours, truth)
    assert not ours[1].any()
    close(ours, ours.mT, 1e-15)
    close(ours[0], ours[2])  # two classes: one probability, twice
    monkeypatch.setattr(hooks, "WORKING_SET", 1)
    monkeypatch.setattr(hooks, "_CHUNK", 1)
    close(kernel(model, inputs, variance, likelihood=Categorical(), mask=mask), truth)


def test_kernel_blocks() -> None:
    make, inputs, _ = MODELS["mlp"]
    model, x = make().double(), inputs()
    variance, blocks = variance_of(model), torch.arange(N) % 2
    full = kernel(model, x, variance)
    same = blocks.unsqueeze(0) == blocks.unsqueeze(1)
    close(kernel(model, x, variance, blocks=blocks), full * same)
    assert full[:, ~same].any()
    with pytest.raises(ValueError, match="block label"):
        kernel(model, x, variance, blocks=blocks[:-1])


def test_leverage_is_the_diagonal_of_the_kernel(case: tuple[nn.Module, Inputs]) -> None:
    model, inputs = case
    variance = variance_of(model)
    diagonal = kernel(model, inputs, variance).diagonal(dim1=1, dim2=2).T
    close(leverage(model, inputs, Categorical(), variance), diagonal)


LABELS: dict[str, tuple[Likelihood, Callable[[], Tensor]]] = {
    "categorical": (Categorical(), lambda: torch.randint(0, C, (N,))),
    "soft": (Categorical(), lambda: torch.rand(N, C, dtype=torch.float64).softmax(-1)),
    "bernoulli": (Bernoulli(), lambda: torch.rand(N, C, dtype=torch.float64)),
    "gaussian": (Gaussian(0.5), lambda: torch.randn(N, C, dtype=torch.float64)),
    "poisson": (Poisson(), lambda: torch.randint(0, 5, (N, C))),
}


# Every model, and every likelihood: their product would only take longer.
PAIRS = [(name, "categorical") for name in MODELS] + [
    (name, kind) for name in KINDS for kind in LABELS if kind != "categorical"
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_gradient(name: str, kind: str) -> None:
    make, draw, _ = MODELS[name]
    model, inputs = make().double(), draw()
    likelihood, labels = LABELS[kind]
    data = Examples(inputs, labels())
    ours = gradient(model, data, likelihood, batch_size=4)
    assert list(ours) == list(choose(model))
    close(flat(ours), reference.gradient(model, data, likelihood))


def test_gradient_is_that_of_the_nll_under_the_head() -> None:
    make, inputs, _ = MODELS["mlp"]
    model = make().double()
    data = Examples(inputs(), 2 * torch.randint(0, 2, (N,)), head=(0, 2))
    w = torch.rand(N, dtype=torch.float64) - 0.5
    mask = torch.tensor([True, False, True])
    loss = w @ Categorical().nll(Categorical().mask(forward(model, data.inputs), mask), data.labels)
    truth = torch.autograd.grad(loss, list(model.parameters()))
    ours = gradient(model, data, Categorical(), weights=w, batch_size=2)
    close(flat(ours), torch.cat([g.flatten() for g in truth]))
    assert not ours["4.weight"][1].any()
    assert ours["4.weight"][0].any()


def test_gradient_excludes_by_id_and_is_a_sum() -> None:
    make, inputs, _ = MODELS["mlp"]
    model = make().double()
    data = Examples(inputs(), torch.randint(0, C, (N,)), ids=torch.arange(N) + 100)
    out = torch.tensor([101, 105])
    rest = gradient(model, data, Categorical(), exclude=out, batch_size=2)
    both = flat(rest) + flat(gradient(model, data[out - 100], Categorical()))
    close(both, flat(gradient(model, data, Categorical())))
    nothing = gradient(model, data, Categorical(), exclude=data.ids)
    assert not flat(nothing).any()


def test_gradient_of_bfloat16_is_summed_in_float32() -> None:
    model = nn.Linear(4, C, bias=False).bfloat16()
    x = torch.rand(600, 4).bfloat16()
    data = Examples(x, torch.zeros(600, dtype=torch.int64))
    ours = gradient(model, data, Categorical(), batch_size=1)["weight"]
    assert ours.dtype == torch.float32
    truth = reference.gradient(model, data, Categorical()).reshape(C, 4)
    assert (ours - truth).norm() <= 1e-2 * truth.norm()


def test_params_choose() -> None:
    make, inputs, _ = MODELS["mlp"]
    model, x = make().double(), inputs()
    data = Examples(x, torch.randint(0, C, (N,)))
    whole = gradient(model, data, Categorical())
    for params in (["4.bias", "0.weight"], lambda name, _: name in ("4.bias", "0.weight")):
        part = gradient(model, data, Categorical(), params=params)
        assert list(part) == ["0.weight", "4.bias"]
        assert list(per_example_jacobian(model, x, params=params)) == ["0.weight", "4.bias"]
        for name, value in part.items():
            close(value, whole[name])
    with pytest.raises(ValueError, match="no trainable parameters of these names"):
        gradient(model, data, Categorical(), params=["nope"])
    with pytest.raises(ValueError, match="no trainable parameter is left"):
        gradient(model, data, Categorical(), params=lambda *_: False)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters of these names"):
        gradient(model, data, Categorical(), params=["0.weight"])


def test_sharded_parameters_are_refused() -> None:
    """In a group of one process: even there the forward runs on tensors that are no parameters."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(5, C)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        x, y = torch.randn(N, 5), torch.randint(0, C, (N,))
        variance = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
        for call in (
            lambda: gradient(model, (x, y), Categorical()),
            lambda: per_example_jacobian(model, x),
            lambda: leverage(model, x, Categorical(), variance),
            lambda: kernel(model, x, variance),
        ):
            with pytest.raises(TypeError, match=r"sharded ones \(DTensor\).*'weight', 'bias'"):
                call()
    finally:
        dist.destroy_process_group()


def calls(model: nn.Module, x: Inputs, y: Tensor) -> list[Callable[[], object]]:
    variance = variance_of(model)
    return [
        lambda: gradient(model, (x, y), Categorical()),
        lambda: per_example_jacobian(model, x),
        lambda: leverage(model, x, Categorical(), variance),
        lambda: kernel(model, x, variance, likelihood=Categorical()),
    ]


def test_nothing_is_touched(case: tuple[nn.Module, Inputs]) -> None:
    model, x = case
    y = torch.randint(0, C, (N,))
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    todo = calls(model, x, y)
    rng = torch.get_rng_state()
    for call in todo:
        with torch.no_grad():
            call()
        with torch.inference_mode():
            call()
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_are_removed_on_errors() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.calls = nn.Linear(5, C), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 6:  # past the guards, inside of a recorded forward
                raise KeyError("broken")
            return self.a(x)

    model, x = Breaks().double(), torch.randn(4, 5, dtype=torch.float64)
    rng = torch.get_rng_state()
    with pytest.raises(KeyError, match="broken"):
        per_example_jacobian(model, x)
    assert model.calls == 6
    assert not model.a._forward_hooks
    assert torch.is_grad_enabled()
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("which", [1, 2, 3])
def test_random_or_coupled_models_are_refused(which: int) -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.randn_like(x))

    x, y = torch.randn(N, 5), torch.randint(0, C, (N,))
    for model, message in (
        (nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, C)), "Dropout.*eval"),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, C)), "BatchNorm1d.*eval"),
        (Noisy(5, C), "random"),
        (Centred(5, C), "depends on the other examples"),
    ):
        with pytest.raises(NotRepeatableError, match=message):
            calls(model, x, y)[which]()


def test_bad_input_is_named() -> None:
    model = nn.Linear(5, C)
    x, y = torch.randn(N, 5), torch.randint(0, C, (N,))
    variance = variance_of(model)
    with pytest.raises(NonFiniteError, match="batch 1"):
        gradient(model, (torch.cat([x, x.log()]), torch.cat([y, y])), Categorical(), batch_size=N)
    with pytest.raises(NonFiniteError, match="output"):
        kernel(model, x.log(), variance)
    with pytest.raises(ValueError, match="labels run from"):
        gradient(model, (x, y + C), Categorical())
    with pytest.raises(ValueError, match="one weight for each example"):
        gradient(model, (x, y), Categorical(), weights=torch.ones(N - 1))
    with pytest.raises(ValueError, match="expected 9 weights"):
        gradient(model, (x, y), Categorical(), weights=torch.ones(N + 1))
    with pytest.raises(ValueError, match="finite weights"):
        gradient(model, (x, y), Categorical(), weights=torch.full((N,), torch.nan))
    with pytest.raises(ValueError, match=r"expected outputs of shape \(B, C\)"):
        gradient(nn.Conv1d(2, 2, 1), (torch.randn(3, 2, 4), torch.zeros(3).long()), Categorical())
    with pytest.raises(ValueError, match=r"expected outputs of shape \(B, C\)"):
        per_example_jacobian(nn.Conv1d(2, 2, 1), torch.randn(3, 2, 4))
    resized = {"weight": variance["weight"][:1], "bias": variance["bias"]}
    renamed = {"old": variance["weight"]}
    for wrong, message in ((resized, "resized"), (renamed, "missing")):
        with pytest.raises(StaleAnchorError, match=message):
            leverage(model, x, Categorical(), wrong)
        with pytest.raises(StaleAnchorError, match=message):
            kernel(model, x, wrong)
    with pytest.raises(ValueError, match="mask of shape"):
        kernel(model, x, variance, mask=torch.tensor([True]))
    with pytest.raises(ValueError, match="no classes"):
        leverage(model, x, Bernoulli(), variance, mask=torch.tensor([True, True, False]))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # A view or an expanded tensor holds no memory of its own.
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_no_jacobian_of_a_large_model_is_held() -> None:
    model = nn.Sequential(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 2))  # half a million
    x, y = torch.randn(64, 700), torch.randint(0, 2, (64,))
    variance = variance_of(model)
    count = sum(p.numel() for p in model.parameters())
    for call in (
        lambda: leverage(model, x, Categorical(), variance),
        lambda: kernel(model, x, variance, likelihood=Categorical()),
        lambda: gradient(model, (x, y), Categorical()),
    ):
        with Largest() as largest:
            call()
        assert count <= 10 * largest.numel  # the mode has seen the large tensors
        assert largest.numel <= max(count, hooks._CHUNK)


def test_autocast_squares_in_float32() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, C))
    x, variance = torch.randn(N, 5), variance_of(model)
    exact = leverage(model, x, Categorical(), variance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = leverage(model, x, Categorical(), variance)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() <= 2e-2 * exact.norm()
