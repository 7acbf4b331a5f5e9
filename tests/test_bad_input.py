"""Bad input: what was expected, what came, what to do; and nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lifelong
from lifelong import (
    Categorical,
    Examples,
    NonFiniteError,
    NotRepeatableError,
    Prior,
    Recipe,
    Regulariser,
    StaleAnchorError,
    Task,
    diagonal_curvature,
)
from lifelong.presets import PRESETS
from lifelong.terms import _inverse


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 5), *extra, nn.Tanh(), nn.Linear(5, 4))


X, Y = torch.randn(12, 2, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
DATA = Examples(X, Y)
READING = {  # those that read the data when they are updated
    "ewc": lifelong.ewc(Categorical()),
    "kprior": lifelong.kprior(Categorical(), memory=4, precision=0.1),
    "fromp": lifelong.fromp(Categorical(), memory=4),
    "gradient_reconstruction": lifelong.gradient_reconstruction(
        Categorical(), memory=4, gradient="stored"
    ),
    "derpp": lifelong.derpp(Categorical(), memory=4),
    "joint": lifelong.joint(Categorical()),
}
EVERY = {
    **READING,
    "finetune": lifelong.finetune(Categorical()),
    "lwf": lifelong.lwf(Categorical()),
}


@contextmanager
def nothing_changes(model: nn.Module, prior: Prior) -> Iterator[None]:
    def state() -> tuple[list[Tensor], list[bool], list[Any], Tensor]:
        values = [v.clone() for v in model.state_dict().values()]
        grads = [p.grad for p in model.parameters()]
        return values, [m.training for m in model.modules()], grads, torch.get_rng_state()

    terms, before = prior.terms, state()
    yield
    after = state()
    assert all(map(torch.equal, before[0], after[0]))
    assert after[1:3] == before[1:3]
    assert torch.equal(after[3], before[3])
    assert prior.terms is terms


def refused(
    prior: Prior, model: nn.Module, data: Any, error: type[Exception], message: str, **options: Any
) -> None:
    model.train()
    model[1].eval()  # type: ignore[index]
    with nothing_changes(model, prior), pytest.raises(error, match=message):
        prior.update(model, data, **options)


def after_one_task(prior: Prior, model: nn.Module) -> Prior:
    return prior.update(model, DATA, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ update


def nan_at(inputs: Tensor, value: float = math.nan) -> Tensor:
    inputs = inputs.clone()
    inputs[7, 0] = value
    return inputs


@pytest.mark.parametrize("name", READING)
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            Examples(nan_at(X), Y),
            NonFiniteError,
            "output.* is NaN or infinite; .*Nothing was chang",
        ),
        (Examples(X, Y + 1), ValueError, "labels run from 1 to 4, but the model has 4 outputs"),
        (Examples(X, Y - 1), ValueError, "labels run from -1 to 2, but the model has 4 outputs"),
        (Examples(X, Y, head=(0, 1)), ValueError, r"labels \[2, 3\] lie outside of the head"),
        (Examples(X, Y % 2, head=(0, 4)), ValueError, "names classes 0 to 4, .* grow the model's"),
        (Examples(X, Y.int()), TypeError, r"must be int64, got torch.int32; .* y.long\(\)"),
        (Examples(X, Y.float()), TypeError, "must be int64, got torch.float32"),
        (
            Examples(X, torch.rand(12, 3)),
            ValueError,
            r"soft labels must be .*\(12, 4\), got .*\(12, 3",
        ),
    ],
    ids=["nan", "too large", "negative", "outside the head", "head", "int32", "float", "shape"],
)
def test_examples_that_cannot_be_learned(name, data, error, message):
    model = mlp()
    refused(after_one_task(READING[name], model), model, data, error, message)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Examples(X[:0], Y[:0]), ValueError, "hold no examples; pass a task with at least one"),
        (iter([(X, Y)]), TypeError, "read more than once, got an iterator; pass the dataset"),
        (7, TypeError, "cannot read int: expected Examples, a pair"),
        ([X, Y], (TypeError, ValueError), "expected|cannot|labels"),
    ],
    ids=["empty", "iterator", "number", "list"],
)
def test_data_that_cannot_be_read(name, data, error, message):
    model = mlp()
    refused(after_one_task(EVERY[name], model), model, data, error, message)


@pytest.mark.parametrize("name", EVERY)
def test_weights_that_are_no_numbers(name):
    model = mlp()
    prior = after_one_task(EVERY[name], model)
    model[0].weight.data[0, 0] = math.inf
    refused(prior, model, DATA, NonFiniteError, "NaN or infinite")


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + torch.randn(2), Y[index]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
    "shuffled by a sampler": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=5, sampler=torch.utils.data.SubsetRandomSampler(range(12))
    ),
    "augmented": lambda: DataLoader(Noisy(), batch_size=5),
    "augmented data set": Noisy,
    "augmented examples": lambda: Examples(X, Y, transform=lambda x: x + torch.randn_like(x)),
    "the task's loader": lambda: Task(0, "t", DATA).loader(batch_size=5),
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("loader", LOADERS)
def test_data_that_do_not_repeat(name, loader):
    model = mlp()
    message = "two passes over the data differ: .*pass the dataset itself, or DataLoader"
    refused(
        after_one_task(EVERY[name], model), model, LOADERS[loader](), NotRepeatableError, message
    )


def test_a_loader_that_repeats_is_read_and_the_random_state_left_alone():
    model, before = mlp(), torch.get_rng_state()
    loader = DataLoader(TensorDataset(X, Y), batch_size=5)
    prior = READING["ewc"].update(model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    expected = READING["ewc"].update(model, DATA)
    with torch.no_grad():
        model[0].weight += 1
    assert torch.allclose(prior(model), expected(model))
    assert prior.num_data == 12


def test_what_a_loader_drops_is_not_counted():
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, drop_last=True)
    assert READING["kprior"].update(mlp(), loader).num_data == 10
    some = DataLoader(TensorDataset(X, Y), batch_size=5, sampler=[3, 1, 7, 2])
    assert READING["kprior"].update(mlp(), some).num_data == 4


@pytest.mark.parametrize("name", ["kprior", "fromp", "gradient_reconstruction"])
def test_a_memory_larger_than_the_task(name):
    prior = PRESETS[name](Categorical(), memory=13)
    message = "a memory of 13 examples was asked for, but the task has 12; pass memory=12 or less"
    refused(prior, mlp(), DATA, ValueError, message)


def test_a_path_integral_that_nobody_watched():
    message = r"watch it with `with PathIntegral\(model, optimizer, prior, num_data\) as path:`"
    refused(lifelong.si(Categorical()), mlp(), DATA, ValueError, message)


@pytest.mark.parametrize(
    "likelihood", [lifelong.Bernoulli(), lifelong.Poisson(), lifelong.Gaussian()]
)
def test_labels_of_other_likelihoods(likelihood):
    prior = lifelong.kprior(likelihood, memory=4)
    for labels, message in (
        (torch.rand(12, 3), r"shape \(12, 3\) do not fit outputs of shape \(12, 4\)"),
        (torch.full((12, 4), math.nan), "labels hold NaN or infinite values"),
    ):
        refused(prior, mlp(), Examples(X, labels), ValueError, message)
    refused(prior, mlp(), Examples(X, Y, head=(0,)), ValueError, "no classes to choose|do not fit")


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize(
    ("labels", "head", "error", "message"),
    [
        (Y, (0, 1), ValueError, r"labels \[2, 3\] lie outside of the head"),
        (Y + 9, None, ValueError, "labels run from 9 to 12, but the model has 4 outputs"),
        (Y, (9,), ValueError, "the head names classes 9 to 9, but the model has 4 outputs"),
        (Y.int(), None, TypeError, "must be int64, got torch.int32"),
        (Y[:5], None, ValueError, "one label for each of the 12 examples"),
    ],
)
def test_a_batch_that_cannot_be_learned(labels, head, error, message):
    model = mlp()
    prior = after_one_task(READING["kprior"], model)
    with nothing_changes(model, prior), pytest.raises(error, match=message):
        prior.loss(model, X, labels, num_data=12, head=head)


def test_a_batch_without_examples_has_no_mean():
    model = mlp()
    prior = after_one_task(READING["kprior"], model)
    with nothing_changes(model, prior), pytest.raises(ValueError, match="batch holds no examples"):
        prior.loss(model, X[:0], Y[:0], num_data=12)


# ------------------------------------------------------------------ another model


def renamed() -> nn.Module:
    model = mlp()
    return nn.Sequential(model, nn.Identity())


def resized() -> nn.Module:
    model = mlp()
    model[0], model[2] = nn.Linear(2, 6), nn.Linear(6, 4)
    return model


@pytest.mark.parametrize("name", ["ewc", "kprior", "gradient_reconstruction"])
@pytest.mark.parametrize(
    ("other", "message"),
    [(renamed, "missing.*0.weight"), (resized, r"0\.weight: \(5, 2\) -> \(6, 2\)")],
)
def test_a_parameter_that_was_renamed_or_resized(name, other, message):
    prior, model = after_one_task(READING[name], mlp()), other()
    message += r".*give the model back its names and shapes, or start from a fresh prior"
    with nothing_changes(model, prior), pytest.raises(StaleAnchorError, match=message):
        prior(model)
    refused(prior, model, DATA, StaleAnchorError, message)


def test_a_parameter_that_is_newly_trained_or_frozen():
    model = mlp()
    model[0].bias.requires_grad_(False)
    prior = after_one_task(READING["ewc"], model)
    model[0].bias.requires_grad_(True)
    message = r"does not know: \['0.bias'\]; freeze them, or call prior.grow\(model\)"
    refused(prior, model, DATA, StaleAnchorError, message)
    model[0].bias.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    refused(prior, model, DATA, StaleAnchorError, r"frozen now: \['2.bias'\]; set their requires_g")


@pytest.mark.parametrize("name", ["fromp", "derpp", "kprior"])
def test_a_head_that_grew_without_the_prior(name):
    """Also of priors that have no anchor by which they would know."""
    model = mlp()
    prior = after_one_task(READING[name], model)
    lifelong.widen(model, "2", 6)
    with nothing_changes(model, prior), pytest.raises(StaleAnchorError, match="prior.grow"):
        prior(model)
    refused(prior, model, Examples(X, Y + 2), StaleAnchorError, r"call prior.grow\(model\)")
    prior.grow(model, new_classes="mask").update(model, Examples(X, Y + 2))


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.BatchNorm1d(5)])
def test_curvature_of_a_model_in_training_mode(module):
    model = mlp(module).train()
    with pytest.raises(NotRepeatableError, match=r"in training mode, .*Call model.eval\(\) first"):
        diagonal_curvature(model, DATA, Categorical())
    assert model.training
    diagonal_curvature(model.eval(), DATA, Categorical())


# ------------------------------------------------------------------ forget


def test_what_cannot_be_forgotten():
    model = mlp()
    kprior, fromp = (after_one_task(READING[n], model) for n in ("kprior", "fromp"))
    several = after_one_task(kprior, model)
    origin = kprior.memory.origin if kprior.memory else Y
    for prior, arguments, message in (
        (kprior, {}, "say which examples to forget: pass data, ids, where, task or groups"),
        (kprior, {"task": 5}, r"pass prior.forget\(model, data\) with the examples to forget"),
        (kprior, {"ids": torch.tensor([int(origin[0]), 99])}, r"ids \[99\] are neither in memory"),
        (several, {"ids": origin[:1]}, "ids of several tasks; say which by task="),
        (fromp, {"ids": origin[:1]}, "fromp prior cannot forget .* such as gradient_reconstruc"),
        (kprior + kprior, {"task": 0}, "forget from each prior before adding them"),
    ):
        with nothing_changes(model, prior), pytest.raises(ValueError, match=message):
            prior.forget(model, **arguments)
    ewc = after_one_task(READING["ewc"], model)
    once = ewc.forget(model, DATA[:6])
    with nothing_changes(model, once), pytest.raises(ValueError, match="would be indefinite in"):
        once.forget(model, DATA[:6])


def test_ids_choose_among_the_data():
    model = mlp()
    prior = after_one_task(READING["ewc"], model)
    some, direct = (
        prior.forget(model, DATA, ids=torch.tensor([2, 3])),
        prior.forget(model, DATA[2:4]),
    )
    with torch.no_grad():
        model[0].weight += 0.3
    assert torch.allclose(some(model), direct(model))
    assert some.num_data == direct.num_data == 10


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name, arguments in {
            "ewc": ["strength", "precision"], "online_ewc": ["strength"], "si": ["strength"],
            "online_laplace": ["strength", "precision"], "weight_decay": ["precision"],
            "kprior": ["strength", "precision"], "fromp": ["strength", "jitter"],
            "gradient_reconstruction": ["strength", "precision"], "lwf": ["strength"],
            "experience_replay": ["strength"], "der": ["alpha"], "derpp": ["alpha", "beta"],
        }.items()
        for argument in arguments
    ],
)  # fmt: skip
def test_a_strength_is_finite_and_not_negative(name, argument, value):
    message = f"{argument} must be finite and not negative, got {value}"
    with pytest.raises(ValueError, match=message):
        PRESETS[name](Categorical(), **{argument: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lifelong.kprior(Categorical(), memory=-1), "memory must not be negative, got -1"),
        (lambda: lifelong.kprior(Categorical(), score="lamda"), "score must be one of .*'lamda'"),
        (lambda: Recipe(structure="kfac"), r"structure must be one of \('diagonal', 'dense'"),  # type: ignore[arg-type]
        (lambda: Recipe(estimator="exakt"), "estimator must be one of .*got 'exakt'"),  # type: ignore[arg-type]
        (lambda: Recipe(gradient="old"), "gradient must be one of .*got 'old'"),  # type: ignore[arg-type]
        (lambda: Recipe(kernel="rbf"), "kernel must be one of .*got 'rbf'"),  # type: ignore[arg-type]
        (lambda: Recipe(reference="all"), "reference must be one of .*got 'all'"),  # type: ignore[arg-type]
        (lambda: Recipe(total=True, score="k_centre"), "use random, lambda or residual"),
        (lambda: Recipe(replay_fraction=1.5), r"replay_fraction must lie in \[0, 1\], got 1.5"),
        (
            lambda: lifelong.si(Categorical(), damping=0.0),
            "path_damping must be finite and positive",
        ),
        (
            lambda: lifelong.fromp(Categorical(), prior_precision=0.0),
            "kernel_precision must be finite and positive, got 0.0",
        ),
        (lambda: lifelong.ewc(Categorical(), discount=0.5), "pass online=True or leave it at 1"),
        (
            lambda: lifelong.online_ewc(Categorical(), discount=2.0),
            r"discount must lie in \[0, 1\]",
        ),
        (
            lambda: lifelong.gradient_reconstruction(Categorical(), blend=2.0),
            r"blend must lie in \[0, 1\], got 2.0",
        ),
        (
            lambda: lifelong.gradient_reconstruction(Categorical(), blend=0.5, replay=0.5),
            "replay splits the memory and blend mixes labels; give one of them",
        ),
        (lambda: lifelong.KL(0.0), "temperature must be positive.*got 0.0"),
        (lambda: Regulariser(1.0) * -1.0, "precision must be finite and not negative"),
        (lambda: Prior(Categorical()) * -1.0, "finite number of at least 0, got -1.0"),
        (lambda: Prior(Categorical()) * math.nan, "finite number of at least 0, got nan"),
        (lambda: Prior(Categorical()).discount(1.5), r"discount must lie in \[0, 1\], got 1.5"),
        (lambda: Prior(Categorical()) + Prior(lifelong.Poisson()), "the same outputs must mean"),
    ],
)
def test_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_memory_batch_of_nothing():
    model = mlp()
    prior = after_one_task(READING["kprior"], model)
    with nothing_changes(model, prior), pytest.raises(ValueError, match="got batch_size=0"):
        prior(model, batch_size=0)


def test_a_kernel_of_copies_needs_no_jitter():
    model, copies = mlp(), Examples(X[:1].expand(12, 2), torch.zeros(12, dtype=torch.int64))
    prior = lifelong.fromp(Categorical(), memory=12, jitter=0.0).update(model, copies)
    assert float(prior(model).detach()) == 0  # the jitter is never below the rounding error


def test_a_kernel_that_is_not_positive_says_which_jitter_would_do():
    kernel = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    message = "not positive definite with jitter=0.5; its smallest eigenvalue is -1, so jitter=2 wo"
    with pytest.raises(ValueError, match=message):
        _inverse(kernel, 0.5)


@pytest.mark.parametrize("given", [Categorical, "categorical", None])
@pytest.mark.parametrize(
    "use",
    [
        lambda given: lifelong.kprior(given),
        lambda given: diagonal_curvature(mlp(), DATA, given),
        lambda given: lifelong.kronecker_curvature(mlp(), DATA, given),
        lambda given: lifelong.identify(mlp(), DATA, given),
        lambda given: lifelong.Posterior.laplace(mlp(), DATA, given, prior_precision=1.0),
    ],
    ids=["prior", "diagonal", "kronecker", "identify", "posterior"],
)
def test_what_is_no_likelihood(use, given):
    hint = "; add the parentheses" if given is Categorical else ""
    with pytest.raises(
        TypeError, match=r"expected a likelihood such as Categorical\(\), got .*" + hint
    ):
        use(given)


def test_a_repr_tells_what_it_is_and_not_all_of_its_numbers():
    prior = lifelong.kprior(Categorical(), memory=4).update(mlp(), DATA)
    assert repr(prior).startswith("Prior(kprior, Categorical(), 12 examples in 1 tasks, 4 remem")
    assert repr(prior.memory) == f"Memory(4 examples, {prior.memory.num_bytes:,} bytes)"
    posterior = lifelong.Posterior.laplace(mlp(), DATA, Categorical(), prior_precision=0.5)
    assert repr(posterior.curvature) == "Diagonal(39 parameters, 156 bytes)"
    assert repr(posterior) == "Posterior(Diagonal(39 parameters, 156 bytes), prior_precision=0.5)"
