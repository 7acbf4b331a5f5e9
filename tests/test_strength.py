"""Strength "auto": 1 where G is exact, else the fall of the loss over what G says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmarks.strength as bench
import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import Tensor, nn

import lifelong
from lifelong import Categorical, Examples, Poisson, Prior, Regulariser, runs
from lifelong.config import RunConfig
from lifelong.curvature import estimate
from lifelong.memory import memorise
from lifelong.models import parameters
from lifelong.recall import Pass, fit_curvature
from lifelong.recipe import Recipe
from lifelong.strength import RATE, STEPS, beginning, find_strength, rehearse
from lifelong.terms import MemoryTerm
from lifelong.testing import cases, laws

LINEAR = cases.linear_gaussian()
GLMS = {case.name: case for case in cases.glms()}
AUTO = ("ewc", "online_ewc", "online_laplace", "gradient_reconstruction")


def net(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def task(seed: int = 0, size: int = 24) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    labels = (x @ torch.randn(3, 4, generator=generator, dtype=torch.float64)).argmax(1)
    return Examples(x, labels, torch.arange(size) + 100 * seed)


def elsewhere(model: nn.Module, by: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        n: p.detach() + by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for n, p in parameters(model).items()
    }


def fitted(model: nn.Module, data: Examples, likelihood: Any, precision: float = 1e-3) -> nn.Module:
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(150):
        adam.zero_grad()
        loss = likelihood.nll(model(data.inputs), data.labels).sum()
        (loss + Regulariser(precision)(model)).backward()
        adam.step()
    model.zero_grad(set_to_none=True)
    return model


def nll(model: nn.Module, params: dict[str, Tensor], data: Examples, likelihood: Any) -> Tensor:
    f = torch.func.functional_call(model, params, (data.inputs,))
    return likelihood.nll(f, data.labels).sum()


# --------------------------------------------------------------- where 1 is exact, it is 1


@pytest.mark.parametrize("structure", ["dense", "kronecker", "block"])
@pytest.mark.parametrize("memory", [0, 5])
def test_it_is_exactly_1_for_a_linear_model_with_gaussian_noise(
    structure: str, memory: int
) -> None:
    model, data = LINEAR.make_model(3), LINEAR.data[0]
    kept = memorise(model, data, LINEAR.likelihood, budget=memory) if memory else None
    out = None if kept is None else kept.origin
    G = estimate(model, data, LINEAR.likelihood, structure=structure, exclude=out)  # type: ignore[arg-type]
    term = None if kept is None else MemoryTerm(kept)
    for by in (1e-2, 1.0, 30.0):
        start = elsewhere(model, by)
        found = find_strength(model, data, LINEAR.likelihood, G, start, memory=term, exclude=out)
        assert found == 1.0


def test_three_tasks_in_a_row_stay_exact() -> None:
    for preset in (lifelong.online_laplace, lifelong.gradient_reconstruction):
        prior = preset(
            LINEAR.likelihood,
            structure="dense",
            strength="auto",
            precision=0.5,
            **({"memory": 4, "population": False} if "memory" in preset.__kwdefaults__ else {}),
        )
        assert laws.add(prior, LINEAR, tasks=3) < 1e-8
        _, after = laws.learn(prior, LINEAR, tasks=3)
        assert after.strengths == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("case", GLMS.values(), ids=GLMS)
def test_it_is_1_where_every_example_is_kept(case: cases.Case) -> None:
    prior = lifelong.gradient_reconstruction(
        case.likelihood, memory=None, structure="dense", precision=0.5
    )
    assert prior.recipe.strength == "auto"
    _, after = laws.learn(prior, case, tasks=2)
    assert after.strengths == (1.0, 1.0)
    assert laws.add(prior, case, tasks=2) < 1e-6


# --------------------------------------------------------------- elsewhere it is the ratio


def test_the_scaled_quadratic_has_the_loss_of_the_weights_where_learning_began() -> None:
    data, likelihood = task(), Categorical()
    model = fitted(net(), data, likelihood)  # sure of itself, so that G says little
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    start = elsewhere(model)
    G = estimate(model, data, likelihood, structure="diagonal")
    found = find_strength(model, data, likelihood, G, start)
    assert found > 1.5
    d = {n: start[n] - theta[n] for n in theta}
    at = {n: p.clone().requires_grad_() for n, p in theta.items()}
    value = nll(model, at, data, likelihood)
    slopes = torch.autograd.grad(value, list(at.values()))
    linear = sum((g * d[n]).sum() for n, g in zip(d, slopes, strict=True))
    quadratic = value + linear + 0.5 * (G * found).quad(d)
    torch.testing.assert_close(quadratic.detach(), nll(model, start, data, likelihood))


def test_a_diagonal_of_a_quadratic_gives_a_ratio_of_two_curvatures() -> None:
    """d'Hd / d'diag(H)d, and never less than 1."""
    model, data = LINEAR.make_model(3), LINEAR.data[0]
    with torch.no_grad():  # with inputs that lean on each other, so that the diagonal errs
        data = Examples(data.inputs + 1.0, data.labels)  # type: ignore[operator]
    H = estimate(model, data, LINEAR.likelihood, structure="dense")
    G = estimate(model, data, LINEAR.likelihood, structure="diagonal")
    ratios = []
    for seed in range(8):
        torch.manual_seed(seed)
        start = {n: p.detach() + torch.randn_like(p) for n, p in model.named_parameters()}
        d = {n: start[n] - p.detach() for n, p in model.named_parameters()}
        ratios.append(float(H.quad(d) / G.quad(d)))
        found = find_strength(model, data, LINEAR.likelihood, G, start)
        assert found == pytest.approx(max(1.0, ratios[-1]), rel=1e-9)
    assert min(ratios) < 1 < max(ratios)


def test_neither_the_number_of_examples_nor_the_unit_of_G_matters() -> None:
    model, data, likelihood, start = net(), task(), Categorical(), elsewhere(net())
    twice = Examples(
        torch.cat([data.inputs, data.inputs]),  # type: ignore[list-item]
        torch.cat([data.labels, data.labels]),
    )
    found = []
    for examples in (data, twice):
        G = estimate(model, examples, likelihood, structure="diagonal") * 0.01
        found.append(find_strength(model, examples, likelihood, G, start))
        third = find_strength(model, examples, likelihood, G * (1 / 3), start)
        assert third == pytest.approx(3 * found[-1], rel=1e-9)
        assert found[-1] == find_strength(
            model, examples, likelihood, G, start, batch_size=len(examples)
        )
    assert found[0] > 1
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_examples_that_are_left_out_take_no_part() -> None:
    model, data, likelihood, start = net(), task(), Categorical(), elsewhere(net())
    out = torch.tensor([0, 5, 6])
    rest = data[torch.tensor([i for i in range(len(data)) if i not in (0, 5, 6)])]
    G = estimate(model, rest, likelihood, structure="diagonal") * 0.01
    found = find_strength(model, data, likelihood, G, start, exclude=out)
    assert found == pytest.approx(find_strength(model, rest, likelihood, G, start), rel=1e-12)


def test_an_example_that_stands_for_several_is_as_good_as_copies_of_it() -> None:
    model, data, likelihood, start = net(), task(), Categorical(), elsewhere(net())
    weights = torch.arange(24) % 4
    copies = data[torch.repeat_interleave(torch.arange(24), weights)]
    G = estimate(model, data, likelihood, structure="diagonal") * 0.01
    found = find_strength(model, data, likelihood, G, start, weights=weights)
    assert found == pytest.approx(find_strength(model, copies, likelihood, G, start), rel=1e-12)


def test_a_rehearsal_brings_the_memory_back_and_ends_below_the_plain_ratio() -> None:
    likelihood, data = Categorical(), task(size=200)
    model = fitted(net(), data, likelihood)
    theta = {n: p.detach().clone() for n, p in model.named_parameters()}
    term = MemoryTerm(memorise(model, data, likelihood, budget=20, score="random"))
    start = elsewhere(model, 1.0)
    away = rehearse(model, theta, start, term, likelihood)

    def loss(params: dict[str, Tensor]) -> float:
        f = torch.func.functional_call(model, params, (term.memory.inputs,))
        return float(term.value(f, term.memory, likelihood))

    assert loss(away) < 0.1 * loss(start)
    # A step of Adam is about its rate, in each coordinate.
    length = torch.cat([(start[n] - theta[n]).flatten() for n in theta]).square().mean().sqrt()
    way = torch.cat([(away[n] - start[n]).flatten() for n in theta]).abs().max()
    assert way < 2 * STEPS * RATE * length
    G = estimate(model, data, likelihood, structure="diagonal") * 0.01
    plain = find_strength(model, data, likelihood, G, start)
    assert 1 < find_strength(model, data, likelihood, G, start, memory=term) < plain


# --------------------------------------------------------------- it is careful


def test_it_is_1_where_nothing_can_be_told() -> None:
    model, data, likelihood = net(), task(), Categorical()
    G = estimate(model, data, likelihood, structure="diagonal")
    here = {n: p.detach() for n, p in model.named_parameters()}
    term = MemoryTerm(memorise(model, data, likelihood, budget=4))
    assert find_strength(model, data, likelihood, G, here) == 1.0
    assert find_strength(model, data, likelihood, G, here, memory=term) == 1.0
    assert find_strength(model, data, likelihood, G * 0.0, elsewhere(model)) == 1.0
    counts = Examples(data.inputs, torch.ones(len(data), 4, dtype=torch.float64))
    G = estimate(model, counts, Poisson(), structure="diagonal")
    far = {n: 1e6 * p for n, p in elsewhere(model).items()}
    assert find_strength(model, counts, Poisson(), G, far) == 1.0
    never = {n: torch.full_like(p, torch.inf) for n, p in far.items()}
    assert find_strength(model, counts, Poisson(), G, never) == 1.0


@pytest.mark.parametrize("by", [1e-7, 1e-6, 1e-5, 1e-3, 1.0])
def test_rounding_never_raises_it(by: float) -> None:
    """In single precision it is never above that of double precision, and the same if far away."""
    x = torch.randn(5000, 3, generator=_generator())
    labels = torch.randint(4, (5000,), generator=_generator(1))
    torch.manual_seed(0)
    single = nn.Linear(3, 4)
    double = nn.Linear(3, 4).double()
    double.load_state_dict(single.state_dict())
    for seed in range(8):
        torch.manual_seed(seed)
        start = {n: p.detach() + by * torch.randn(p.shape) for n, p in single.named_parameters()}
        found = []
        for model in (single, double):
            like = model.weight
            data = Examples(x.to(like), labels)
            G = estimate(model, data, Categorical(), structure="diagonal")
            there = {n: v.to(like) for n, v in start.items()}
            found.append(find_strength(model, data, Categorical(), G, there))
        assert 1 <= found[0] <= found[1] * (1 + 1e-4)
        if by == 1:
            assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_the_model_is_left_as_it_was_and_draws_repeat() -> None:
    model, data, likelihood = net().train(), task(size=200), Categorical()
    items = memorise(model, data, likelihood, budget=100, score="random", generator=_generator())
    term, start = MemoryTerm(items), elsewhere(model)
    G = estimate(model, data, likelihood, structure="diagonal") * 0.01
    with laws.untouched(model):
        found = [
            find_strength(model, data, likelihood, G, start, memory=term, generator=_generator(s))
            for s in (0, 0, 1)
        ]
    assert found[0] == found[1] != found[2]  # 100 items are too many for every step


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_learning_began_halfway_to_what_was_believed_before() -> None:
    theta = {"a": torch.tensor([2.0, 4.0]), "b": torch.tensor([6.0])}
    halves = beginning(theta, None)
    assert torch.equal(halves["a"], theta["a"] / 2)
    between = beginning(theta, Regulariser(1.0, {"a": torch.tensor([0.0, 2.0])}))
    assert between["a"].tolist() == [1.0, 3.0]
    assert between["b"].tolist() == [3.0]


# --------------------------------------------------------------- in priors


@pytest.mark.parametrize("preset", AUTO)
def test_presets_take_it_and_say_what_was_found(preset: str, tmp_path: Path) -> None:
    options = {"memory": 4} if preset == "gradient_reconstruction" else {}
    make = lifelong.presets.PRESETS[preset]
    after = make(Categorical(), strength="auto", **options)
    model = net()
    for data in (task(0), task(1)):
        after = after.update(fitted(model, data, after.likelihood), data)
    laws.moved(model)
    assert len(after.strengths) == 2
    assert min(after.strengths) >= 1 < max(after.strengths)
    again = Prior.load(after.save(tmp_path / "prior.safetensors"))
    assert again.strengths == after.strengths
    assert again.recipe == after.recipe
    assert torch.equal(again(model), after(model))


def test_a_strength_that_was_found_is_the_one_that_is_given() -> None:
    model = fitted(net(), task(), Categorical())
    found = lifelong.online_ewc(Categorical(), strength="auto").update(model, task())
    assert found.strengths[0] > 1
    given = lifelong.online_ewc(Categorical(), strength=found.strengths[0]).update(model, task())
    assert given.strengths == found.strengths
    assert laws.identical(found, given, laws.moved(model)) < 1e-12


@pytest.mark.parametrize("make", [lifelong.recommended, lifelong.gradient_reconstruction])
def test_a_margin_multiplies_what_was_found_and_nothing_else(make: Any) -> None:
    model, moved = fitted(net(), task(0), Categorical()), None
    plain, wider = (make(Categorical(), memory=4, margin=m) for m in (1.0, 3.0))
    for data in (task(0), task(1)):
        model = fitted(model, data, Categorical())
        plain, wider = (
            p.update(model, data, generator=torch.Generator().manual_seed(0))
            for p in (plain, wider)
        )
    assert wider.strengths == tuple(3.0 * s for s in plain.strengths)
    moved = laws.moved(model)
    memory = [replace(p, terms=tuple(t for t in p.terms if isinstance(t, MemoryTerm)))
              for p in (plain, wider)]  # fmt: skip
    assert torch.equal(memory[0](moved), memory[1](moved))
    torch.testing.assert_close(wider.weight_space(moved), 3.0 * plain.weight_space(moved))


def test_a_margin_is_of_a_strength_that_was_found() -> None:
    with pytest.raises(ValueError, match=r'expected strength="auto" with a margin of 2.0, got 1.0'):
        Recipe(structure="diagonal", margin=2.0)
    with pytest.raises(ValueError, match="margin must be finite and not negative, got -1"):
        Recipe(structure="diagonal", strength="auto", margin=-1)


def test_what_leaves_the_curvature_went_in_as_strongly() -> None:
    likelihood, data = Categorical(), task()
    model = fitted(net(), data, likelihood)
    prior = lifelong.gradient_reconstruction(
        likelihood, memory=0, strength="auto", margin=2.0, precision=1e-3
    )
    after = prior.update(model, data)
    assert after.strengths[0] > 1
    for which in ({"task": 0}, {}):
        left = after.forget(model, data[torch.arange(5)], **which)
        rest = estimate(model, data[torch.arange(5, 24)], likelihood, structure="diagonal")
        assert left.weight is not None
        assert left.weight.curvature is not None
        for n, v in left.weight.curvature.diagonal().items():
            torch.testing.assert_close(v, after.strengths[0] * rest.diagonal()[n])


def test_sums_of_priors_keep_both() -> None:
    model = net()
    a = lifelong.online_ewc(Categorical(), strength=2.0)
    a = a.update(model, task(0)).update(model, task(1))
    b = lifelong.online_ewc(Categorical(), strength=3.0).update(model, task(2))
    assert (a + b).strengths == (2.0, 2.0, 3.0)


def test_priors_without_a_curvature_have_none() -> None:
    prior = lifelong.gradient_reconstruction(Categorical(), weight=False, memory=4)
    assert prior.update(net(), task()).strengths == ()


# --------------------------------------------------------------- plain values


def test_a_recipe_with_auto_comes_back_from_its_file() -> None:
    recipe = Recipe("mine", structure="diagonal", strength="auto")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    "make",
    [
        lambda: Recipe(structure="path", strength="auto"),
        lambda: Recipe(structure="diagonal", kernel="gp", strength="auto"),
        lambda: Recipe(structure="diagonal", strength="much"),  # type: ignore[arg-type]
        lambda: Recipe(soft="auto"),  # type: ignore[arg-type]
        lambda: lifelong.si(Categorical(), strength="auto"),  # type: ignore[arg-type]
        lambda: lifelong.kprior(Categorical(), strength="auto"),  # type: ignore[arg-type]
        lambda: lifelong.fromp(Categorical(), strength="auto"),  # type: ignore[arg-type]
        lambda: fit_curvature(
            Recipe(structure="diagonal", strength="auto"), Pass(net(), task(), Categorical())
        ),
    ],
)
def test_where_it_means_nothing_it_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be a number here"):
        make()


def test_settings_of_runs_and_config_files_take_it() -> None:
    values = {
        "benchmark": "two-moons",
        "prior": "online_ewc",
        "epochs": 1,
        "set": {"strength": "auto"},
    }
    config = RunConfig.from_dict(values)
    assert config.settings == {"strength": "auto"}
    assert 'strength = "auto"' in config.to_toml()
    assert RunConfig.from_dict(config.to_dict()) == config
    plan = runs.prepare(config)
    assert plan.arguments["strength"] == "auto"
    assert len(runs.execute(plan)["accuracy"]) > 0


def test_the_benchmark_runs_goes_on_and_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--smoke", "--only", "split-digits-task"]
    bench.main(arguments)
    first = (tmp_path / "split-digits-task.json").read_text()
    assert "auto/0" in capsys.readouterr().out
    bench.main(arguments)  # nothing is left to do
    assert capsys.readouterr().out == ""
    assert (tmp_path / "split-digits-task.json").read_text() == first
    found = json.loads((tmp_path / "result.json").read_text())["split-digits-task"]
    assert found["best"] == "1"
    assert found["auto_minus_best"] == pytest.approx(found["mean"]["auto"] - found["mean"]["1"])
    assert len(json.loads(first)["auto/0"]["strengths"]) == 5


def test_the_benchmark_says_that_it_reads_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--data"):
        bench.stream(bench.SETTINGS["permuted-mnist"], None)


def test_held_out_examples_are_training_examples() -> None:
    tasks = bench.stream(bench.SETTINGS["split-digits-task"], None, validate=True)
    plain = bench.stream(bench.SETTINGS["split-digits-task"], None)
    assert sum(len(t.train) + len(t.test or ()) for t in tasks) == sum(len(t.train) for t in plain)
