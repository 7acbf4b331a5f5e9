"""The loop: that it learns, that it resumes to the bit, and that a failed fit never happened."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lifelong
from lifelong import (
    Categorical,
    CheckpointError,
    Examples,
    Learner,
    Prior,
    Recipe,
    Regulariser,
    TaskStream,
    split_by_class,
)
from lifelong.learner import CHECKPOINT, Progress, adam
from lifelong.memory import _ROWS as MEMORY_ROWS
from lifelong.streams import Task
from lifelong.terms import MemoryTerm
from lifelong.testing import laws
from lifelong.testing.cases import Case


def clouds(n: int = 12, classes: int = 6) -> Examples:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n * classes) % classes
    angle = y * (2 * torch.pi / classes)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return Examples(centre + 0.3 * torch.randn(len(y), 2, generator=generator), y)


def stream() -> TaskStream:
    return split_by_class(clouds(), clouds(), classes_per_task=2)


def mlp(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 16), *extra, nn.Tanh(), nn.Linear(16, 6))


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def jitter(inputs: Any, generator: torch.Generator | None) -> Any:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


CASES: dict[str, tuple[Prior, tuple[nn.Module, ...], dict[str, Any]]] = {
    "ewc": (lifelong.ewc(Categorical()), (), {}),
    "mc ewc": (lifelong.ewc(Categorical(), estimator="mc"), (), {}),
    "si": (lifelong.si(Categorical()), (), {}),
    "fromp": (lifelong.fromp(Categorical(), memory=4), (), {"memory_batch_size": 4}),
    "lwf": (lifelong.lwf(Categorical()), (), {}),
    "dropout": (lifelong.kprior(Categorical(), memory=4), (nn.Dropout(0.3),), {}),
    "batch norm": (lifelong.kprior(Categorical(), memory=4), (nn.BatchNorm1d(16),), {}),
    "scheduler": (lifelong.derpp(Categorical(), memory=6), (), {"scheduler": cosine, "clip": 1.0}),
    "autocast": (lifelong.kprior(Categorical(), memory=4), (), {"autocast": torch.bfloat16}),
    "augment": (lifelong.kprior(Categorical(), memory=4), (), {"augment": jitter, "min_steps": 7}),
    "kronecker": (
        lifelong.online_laplace(Categorical(), structure="kronecker"),
        (),
        {"curvature_dtype": torch.bfloat16},
    ),
    "separate": (lifelong.separate(Categorical()), (), {}),
    "joint": (lifelong.joint(Categorical()), (nn.BatchNorm1d(16),), {}),
}


def learner(case: str, **options: Any) -> Learner:
    prior, extra, more = CASES[case]
    arguments = {"optimizer": adam(1e-2), "epochs": 3, "batch_size": 10, **more, **options}
    return Learner(mlp(*(type(m)(m.p if isinstance(m, nn.Dropout) else 16) for m in extra)),
                   prior, **arguments)  # fmt: skip


class KilledError(Exception):
    pass


def kill_at(task: int, epoch: int) -> Callable[[Progress], None]:
    def on_epoch(progress: Progress) -> None:
        if (progress.task, progress.epoch) == (task, epoch):
            raise KilledError

    return on_epoch


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("task", "epoch"), [(1, 2), (2, 3)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, case, task, epoch):
    whole = learner(case)
    torch.manual_seed(7)
    whole.run(stream())
    killed = learner(case)
    torch.manual_seed(7)
    with pytest.raises(KilledError):
        killed.run(stream(), folder=tmp_path, on_epoch=kill_at(task, epoch))
    resumed = learner(case, seed=99)
    torch.manual_seed(99)
    resumed.load(tmp_path / CHECKPOINT)
    resumed.run(stream())
    assert resumed.accuracy == whole.accuracy
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.prior.num_tasks == 3


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_curvature_is_multiplied_in_the_dtype_that_was_asked_for(dtype):
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, 1e-3), "epochs": 1}
    one = learner("kronecker", **{**sgd, "curvature_dtype": dtype})
    first, second = stream()[:2]
    one.learn(first)
    model, prior, task = copy.deepcopy(one.model), one.prior, second.train
    order = torch.Generator()
    order.set_state(one.generator.get_state())
    one.fit(second)
    assert one.prior is prior
    used = prior if dtype is None else prior.rounded(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for index in torch.randperm(len(task), generator=order).split(10):
        inputs, labels, _ = task.batch(index)
        optimizer.zero_grad()
        used.loss(model, inputs, labels, num_data=len(task), head=task.head).backward()
        optimizer.step()
    assert same(weights(model), weights(one.model))


@pytest.mark.parametrize("double", [False, True])
def test_by_itself_only_single_precision_is_rounded(monkeypatch, double):
    monkeypatch.setattr("lifelong.learner.multiplies_bfloat16", lambda device: True)
    one = learner("kronecker", curvature_dtype="auto")
    if double:
        one.model.double()
    params, train = list(one.model.parameters()), stream()[0].train
    inputs = torch.as_tensor(train.inputs)
    data = replace(train, inputs=inputs.double() if double else inputs)
    prior = one.prior.update(one.model, data)
    assert (one._rounded(prior, params) is prior) == double
    monkeypatch.setattr("lifelong.learner.multiplies_bfloat16", lambda device: False)
    assert one._rounded(prior, params) is prior


@pytest.mark.parametrize("case", ["si", "scheduler", "dropout"])
def test_a_fit_that_the_callback_stops_goes_on_after_that_epoch(case):
    whole, stopped = learner(case), learner(case)
    task = stream()[0]
    torch.manual_seed(7)
    whole.learn(task)
    torch.manual_seed(7)
    with pytest.raises(KilledError):
        stopped.fit(task, on_epoch=kill_at(0, 2))
    epochs: list[int] = []
    stopped.fit(task, on_epoch=lambda progress: epochs.append(progress.epoch))
    stopped.recall(task, stopped.memorise(task))
    assert epochs == [3]
    assert same(weights(stopped.model), weights(whole.model))


def test_a_finished_run_is_only_read(tmp_path):
    whole = learner("ewc")
    whole.run(stream(), folder=tmp_path)
    again = learner("ewc").load(tmp_path / CHECKPOINT)
    again.run(stream())
    assert again.accuracy == whole.accuracy
    assert same(weights(again.model), weights(whole.model))
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_run_tests_every_task_seen_and_tells_of_each():
    tasks: list[int] = []
    progress: list[Progress] = []
    matrix = learner("ewc").run(stream(), on_task=tasks.append, on_epoch=progress.append)
    assert tasks == [0, 1, 2]
    assert [(p.task, p.epoch, p.epochs) for p in progress[:4]] == [
        (0, 1, 3), (0, 2, 3), (0, 3, 3), (1, 1, 3),
    ]  # fmt: skip
    assert all(math.isfinite(p.loss) and p.seconds > 0 for p in progress)
    evaluated = ~matrix.values.isnan()
    assert torch.equal(evaluated, torch.ones(3, 3).tril().bool())


def test_a_run_may_test_one_task_ahead():
    """R[t, t+1] beside what the run says without; no number of it changes."""
    plain, ahead = learner("ewc"), learner("ewc")
    expected, found = plain.run(stream()).values, ahead.run(stream(), ahead=True).values
    assert torch.equal(found.tril(), expected.nan_to_num().tril())
    assert (~found.isnan()).sum(1).tolist() == [2, 3, 3]
    again = learner("ewc")
    again.learn(stream()[0])
    test = stream()[1].test
    assert test is not None
    assert found[0, 1] == lifelong.evaluate(again.model, test, Categorical()).accuracy
    # Half way, the matrix is of the tasks so far.
    half = learner("ewc")
    half.accuracy = [[0.5, 0.25], [0.5, 0.75, 0.25]]
    assert half.matrix.to_list() == [[0.5, 0.25], [0.5, 0.75]]


def test_a_run_saves_no_more_often_than_it_is_told(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(lifelong.learner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Learner, "save", lambda self, path: saved.append(now[0]))

    def epoch(progress: Progress) -> None:
        now[0] += 10.0

    learner("ewc").run(stream(), folder=tmp_path, save_every=25.0, on_epoch=epoch)
    # At once, then from 25 s on: epochs end at 0, 10, 20 and tasks at 30, 60, 90.
    assert saved == [0.0, 30.0, 60.0, 90.0]
    saved.clear()
    learner("ewc").run(stream(), folder=tmp_path, save_every=1e9)
    assert len(saved) == 2  # at once, and where it ended
    saved.clear()
    learner("ewc").run(stream(), folder=tmp_path)
    assert len(saved) == 1 + 3 * 3 + 3


@pytest.mark.parametrize("case", ["ewc", "fromp", "joint"])
def test_gradients_count_new_and_remembered_examples(tmp_path, case):
    fresh = learner(case)
    fresh.run(stream(), folder=tmp_path)
    steps, new = 3 * 3, 3 * 24  # three epochs of 24 examples, 10 at a time
    later = {"ewc": new, "fromp": new + steps * 4}  # 4 of each step from memory
    expected = new + 2 * later[case] if case in later else new * (1 + 2 + 3)
    assert fresh.gradients == expected
    assert learner(case).load(tmp_path / CHECKPOINT).gradients == expected


def test_num_drawn_is_what_a_value_reads():
    fresh = learner("fromp")
    fresh.run(stream())
    # Whole tasks of four.
    assert [fresh.prior.num_drawn(n) for n in (None, 5, 100)] == [12, 4, 12]
    assert lifelong.ewc(Categorical()).num_drawn() == 0


def test_separate_forgets_nothing_and_joint_learns_all():
    separate = learner("separate", epochs=20).run(stream())
    assert torch.equal(separate.values[2], separate.values.diagonal())
    assert learner("joint", epochs=20).run(stream()).average_accuracy > 0.9


def test_the_joint_pool_lies_where_the_data_lie():
    """Data in main memory, a memory on the device: without a device, so with tensors of none."""
    data = clouds()
    prior = lifelong.joint(Categorical()).update(mlp(), data)
    learner = Learner(mlp(), prior)
    with FakeTensorMode(allow_non_fake_inputs=True):
        (term,) = (t for t in prior.terms if isinstance(t, MemoryTerm))
        rows = {n: torch.empty_like(getattr(term.memory, n), device="cuda") for n in MEMORY_ROWS}
        held = replace(term, memory=replace(term.memory, **rows))
        learner.prior = replace(prior, terms=(held,))
        memory = learner._pool(data).memory
        assert {str(getattr(memory, name).device) for name in MEMORY_ROWS} == {"cpu"}
        assert len(memory) == 2 * len(data)


def test_separate_starts_each_task_afresh():
    one = learner("separate")
    one.learn(stream()[0])
    other = learner("separate")
    other.generator.set_state(one.generator.get_state())
    one.fit(stream()[1])
    other.fit(stream()[1])
    assert same(weights(one.model), weights(other.model))


# -------------------------------------------------------------------- adaptations


def adaptable(gradient: str = "stored", memory: int | None = None) -> Learner:
    """A linear model in float64 that learned two tasks to the minimum."""
    recipe = Recipe(structure="dense", gradient=gradient, memory=memory)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = nn.Linear(2, 6).double()
    learner = Learner(model, Prior(Categorical(), recipe, (Regulariser(0.1),)))
    for task in doubled():
        done = learner.add(task)
        assert done.method == "newton"
        assert done.converged
    return learner


def doubled() -> list[Task]:
    tasks = [stream()[0], stream()[1]]
    for t in tasks:
        object.__setattr__(t.train, "inputs", t.train.inputs.double())  # type: ignore[union-attr]
    return tasks


def batch(model: nn.Module, precision: float, *data: Examples) -> Tensor:
    """The weights of training on all of it, from elsewhere."""
    best = laws.retrained(
        Case("", lambda seed: model, Categorical(), ()), model, Regulariser(precision), *data
    )
    return laws.weights(best)


@pytest.mark.parametrize("gradient", ["stored", "stationary"])
def test_the_four_adaptations_of_a_learner(gradient):
    learner = adaptable(gradient)
    first, second = (task.train for task in doubled())
    assert (
        laws.distance(laws.weights(learner.model), batch(learner.model, 0.1, first, second)) < 1e-8
    )
    done = learner.remove(task=0, ids=first.ids[:3])
    truth = batch(learner.model, 0.1, first[3:], second)
    assert done.gradients > 0
    assert laws.distance(laws.weights(learner.model), truth) < 1e-8
    learner.regularise(2.0)
    truth = batch(learner.model, 2.0, first[3:], second)
    assert laws.distance(laws.weights(learner.model), truth) < 1e-8
    old = learner.model
    before = laws.weights(old)
    smaller = nn.Linear(2, 3).double()
    initial = {n: v.clone() for n, v in smaller.state_dict().items()}
    learner.transfer(smaller, classes=(0, 3, 2))
    assert learner.model is smaller
    assert torch.equal(laws.weights(old), before)
    assert same(learner._initial, initial)
    relabelled = [
        replace(d[i], labels=torch.tensor([0, -1, 2, 1])[d.labels[i]], head=h)
        for d, i, h in (
            (first[3:], (first.labels[3:] != 1).nonzero().squeeze(1), (0,)),
            (second, slice(None), (1, 2)),
        )
    ]
    truth = batch(smaller, 2.0, *relabelled)
    assert laws.distance(laws.weights(smaller), truth) < 1e-8
    seconds = learner.seconds
    assert learner.remove(relabelled[1][:4], task=1).seconds < learner.seconds - seconds
    truth = batch(smaller, 2.0, relabelled[0], relabelled[1][4:])
    assert laws.distance(laws.weights(smaller), truth) < 1e-8


def test_run_and_adapt_and_run_on(tmp_path):
    """The accuracies so far stay, and a saved learner goes on after an adaptation."""
    tasks = list(stream())
    learner = Learner(mlp(), lifelong.kprior(Categorical(), memory=6), optimizer=adam(1e-2))
    learner.run(tasks[:2])
    rows_ = [list(row) for row in learner.accuracy]
    learner.remove(ids=learner.prior.memory.origin[:2], task=0, max_iterations=5)
    learner.regularise(0.5, max_iterations=5)
    assert learner.accuracy == rows_
    learner.save(tmp_path / "x")
    other = Learner(mlp(), learner.prior, optimizer=adam(1e-2)).load(tmp_path / "x")
    matrices = [each.run(tasks) for each in (learner, other)]
    assert torch.equal(matrices[0].values.nan_to_num(), matrices[1].values.nan_to_num())
    assert matrices[0].values[1, 0] == rows_[1][0]


def test_methods_without_a_minimum_in_closed_form():
    learner = Learner(mlp(), lifelong.lwf(Categorical()))
    first, second, _ = stream()
    for task in (first, second):
        learner.add(task, method="adam", lr=0.01, max_iterations=40)
    assert learner.prior.num_tasks == 2
    learner = Learner(mlp(), lifelong.joint(Categorical(), precision=0.1))
    for task in (first, second):
        learner.add(task, max_iterations=60)
    learner.remove(task=0, max_iterations=60)
    assert learner.prior.num_data == len(second)


def test_what_is_not_trained_follows_by_name():
    learner = Learner(mlp(nn.BatchNorm1d(16)), lifelong.kprior(Categorical(), memory=6))
    first = stream()[0]
    learner.model[0].bias.requires_grad_(False)
    learner.learn(first)
    statistics = learner.model[1].running_mean.clone()
    other = mlp(nn.BatchNorm1d(16))
    other[0].bias.requires_grad_(False)
    with torch.no_grad():
        other[0].bias.fill_(7.0)
    bias = learner.model[0].bias.clone()
    learner.transfer(other, max_iterations=2)
    assert torch.equal(other[1].running_mean, statistics)
    assert torch.equal(other[0].bias, bias)


def test_what_is_trained_here_alone_follows_by_name(monkeypatch):
    """The refit starts from a body that was frozen and is trained now, or the other way round."""
    monkeypatch.setattr("lifelong.learner.refit", lambda *_, **__: None)
    for before, now in ((False, True), (True, False)):
        learner = Learner(mlp(), lifelong.kprior(Categorical(), memory=6))
        learner.model[0].requires_grad_(before)
        learner.learn(stream()[0])
        model, other = learner.model, mlp()
        other[0].requires_grad_(now)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what was trained and is frozen leaves g behind
            learner.transfer(other, allow_unmatched=True)
        assert same(weights(other), weights(model))


def test_a_few_examples_are_all_kept():
    learner = adaptable(memory=10)
    first = doubled()[0].train
    before = len(learner.prior.memory)
    learner.add(first[:3])
    assert len(learner.prior.memory) == before + 3
    assert learner.prior.recipe.memory == 10


def test_an_adaptation_that_raises_never_happened():
    learner = adaptable(memory=3)
    first = doubled()[0].train
    outside = replace(first, labels=first.labels + 9)
    wrong = replace(first, inputs=first.inputs * math.nan)
    wider, narrow, deeper = nn.Linear(2, 8).double(), nn.Linear(2, 2).double(), mlp().double()
    models = {m: laws.weights(m) for m in (learner.model, wider, narrow, deeper)}
    model, prior, seconds = learner.model, learner.prior, learner.seconds
    random, everywhere = learner.generator.get_state(), torch.get_rng_state()
    for call, error, match in (
        (lambda: learner.add(outside), ValueError, "labels"),
        (lambda: learner.add(wrong), lifelong.NonFiniteError, "NaN"),
        (lambda: learner.remove(ids=torch.tensor([999])), ValueError, "in memory"),
        (lambda: learner.regularise(-1.0), ValueError, "precision"),
        (lambda: learner.regularise(1.0, method="sgd"), ValueError, "method"),
        (lambda: learner.transfer(deeper), lifelong.StaleAnchorError, "map them by"),
        (lambda: learner.transfer(wider, method="sgd"), ValueError, "method"),
        (lambda: learner.transfer(narrow, classes=(0, 9)), ValueError, "classes"),
    ):
        with pytest.raises(error, match=match):
            call()
        assert learner.model is model
        assert learner.prior is prior
        assert learner.seconds == seconds
        assert all(torch.equal(laws.weights(m), w) for m, w in models.items())
    assert torch.equal(learner.generator.get_state(), random)
    assert torch.equal(torch.get_rng_state(), everywhere)


def test_learners_that_cannot_be_adapted():
    first = stream()[0]
    with pytest.raises(ValueError, match="a learner of separate models"):
        learner("separate").regularise(1.0)
    with pytest.raises(ValueError, match="learns from the path of training; expected learn"):
        learner("si").add(first)
    halfway = learner("ewc")
    epochs = halfway._epochs(first)
    next(epochs)
    with pytest.raises(ValueError, match="a task is half learned"):
        halfway.regularise(1.0)


def test_the_verbs_one_by_one_are_learn():
    one, other = learner("dropout"), learner("dropout")
    task = stream()[0]
    torch.manual_seed(0)
    one.learn(task)
    torch.manual_seed(0)
    other.fit(task)
    items = other.memorise(task)
    prior = other.recall(task, items)
    assert prior is other.prior
    assert len(other.identify(task)) == len(task)
    with torch.no_grad():
        for model in (one.model, other.model):
            model[0].weight += 0.1
    assert torch.equal(one.prior(one.model), other.prior(other.model))


def test_identify_by_leverage_finds_its_variance():
    prior = lifelong.kprior(Categorical(), memory=4, score="leverage")
    learner = Learner(mlp(), prior)
    scores = learner.identify(stream()[0])
    learner.learn(stream()[0])
    assert bool((scores > 0).all())
    assert len(learner.prior.memory or ()) == 4


# ------------------------------------------------------------------ bad input


def snapshot(learner: Learner) -> dict[str, Any]:
    return {
        "weights": weights(learner.model),
        "modes": [m.training for m in learner.model.modules()],
        "prior": learner.prior,
        "generator": learner.generator.get_state(),
        "global": torch.get_rng_state(),
    }


def unchanged(learner: Learner, before: dict[str, Any]) -> None:
    after = snapshot(learner)
    assert same(after["weights"], before["weights"])
    assert after["modes"] == before["modes"]
    assert after["prior"] is before["prior"]
    assert torch.equal(after["generator"], before["generator"])
    assert torch.equal(after["global"], before["global"])


def broken(data: Examples, **changes: Any) -> Task:
    return Task(1, "broken", replace(data, **changes))


def with_nan(inputs: Tensor) -> Tensor:
    inputs = inputs.clone()
    inputs[20] = math.nan
    return inputs


TRAIN = stream()[1].train
BAD_TASKS = {
    "nan inputs": (
        broken(TRAIN, inputs=with_nan(TRAIN.inputs)),
        "the loss became nan.*put back|output is NaN",
    ),
    "outside of the head": (broken(TRAIN, head=(0, 1)), r"labels \[2, 3\] lie outside of the head"),
    "beyond the outputs": (
        broken(TRAIN, labels=TRAIN.labels + 9, head=None),
        "has 6 outputs",
    ),
    "a head beyond the outputs": (broken(TRAIN, head=(2, 3, 8)), "the model has 6 outputs; grow"),
    "int32 labels": (broken(TRAIN, labels=TRAIN.labels.int()), "convert them with y.long()"),
    "labels of another shape": (broken(TRAIN, labels=torch.ones(24, 3)), r"shape \(24, 6\)"),
}


@pytest.mark.parametrize("bad", BAD_TASKS)
@pytest.mark.parametrize("case", ["ewc", "lwf", "dropout", "joint"])
def test_a_failed_fit_never_happened(case, bad):
    one = learner(case)
    one.learn(stream()[0])
    one.model.eval()
    one.model[0].train()
    before = snapshot(one)
    task, message = BAD_TASKS[bad]
    with pytest.raises((ValueError, TypeError), match=message):
        one.fit(task)
    unchanged(one, before)


def test_weights_that_blow_up_in_the_last_step_are_noticed():
    class Explode(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["params"][0].data.fill_(math.inf)

    one = Learner(mlp(), lifelong.finetune(Categorical()), batch_size=999,
                  optimizer=lambda p: Explode(p, lr=1.0))  # fmt: skip
    before = snapshot(one)
    with pytest.raises(lifelong.NonFiniteError, match=r"the parameter 0\.weight is NaN or inf"):
        one.fit(stream()[0])
    unchanged(one, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size must be at least 1, got 0 and 64"),
        ({"batch_size": 0}, "at least 1, got 1 and 0"),
        ({"memory_batch_size": 0}, "memory_batch_size must be at least 1, or None for all, got 0"),
        ({"min_steps": -1}, "min_steps must be at least 0, got -1"),
        ({"curvature_dtype": "half"}, "curvature_dtype must be a dtype"),
        ({"clip": -1.0}, "clip must be positive, or None for no clipping, got -1.0"),
    ],
)
def test_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Learner(mlp(), lifelong.finetune(Categorical()), **arguments)


def test_a_stream_without_tests_has_no_matrix():
    with pytest.raises(ValueError, match=r"task '0/1' has no test examples; call learn\(\)"):
        learner("ewc").run(split_by_class(clouds(), classes_per_task=2))


def test_wrong_test_examples_show_before_training():
    first, *_ = stream()
    one = learner("ewc")
    before = snapshot(one)
    with pytest.raises(ValueError, match="has 6 outputs"):
        one.run([replace(first, test=replace(first.test, labels=first.test.labels + 9, head=None))])
    unchanged(one, before)


def test_a_folder_that_cannot_be_written_shows_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    one = learner("ewc")
    before = snapshot(one)
    with pytest.raises(OSError, match="choose another folder"):
        one.run(stream(), folder=tmp_path / "file" / "runs")
    unchanged(one, before)


def spoil(path: Path, **changes: Any) -> None:
    state = lifelong.checkpoint.load(path, kind="learner")
    lifelong.checkpoint.save(path, {**state, **changes}, kind="learner")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "truncated or not a checkpoint"),
        ("other model", r"is of another model: \['0.bias', '0.weight'.*build the model as it was"),
        ("other prior", "holds a prior that cannot be read"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, case, message):
    other = learner("ewc")
    other.learn(stream()[0])
    path = other.save(tmp_path / "c")
    if case == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif case == "other prior":
        spoil(path, prior={"recipe": {}})
    one = learner("fromp")
    if case == "other model":
        one.model = nn.Sequential(nn.Linear(2, 17), nn.Linear(17, 6))
    before = snapshot(one)
    with pytest.raises(CheckpointError, match=message):
        one.load(path)
    unchanged(one, before)
