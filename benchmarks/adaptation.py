r"""The four adaptations of K-priors (Khan & Swaroop 2021), by the library's own ``Prior``.

    python -m benchmarks.adaptation --data DIR --out DIR [--sets usps-linear usps-mlp adult ...]

A first model is learned with weight decay, and its prior made: then data come, data go, the
regulariser changes or the model does (``adaptation_sets.py``). Each method adapts the model from
its anchor, with a part of the past data as memory; *batch* learns all the changed data from fresh
weights. Accuracy is that on the test set, and no setting was chosen on it: they are the published
ones, and those of the convolutional networks were chosen on a part of the training data.

K-prior: memory by h' per class, each item counting once by its soft label; replay: the same items
by their true labels, and the regulariser. Other lines are named, and say what they change.

What is removed is not known when the memory is made: it is of all data, and forgetting takes the
removed examples out of it. The released code keeps them in the memory; for a linear model the
objectives are the same but for the choice of items, for a network they are not. That lines with
weights N/M, with the removed examples kept, and with a shared first layer are worth a place was
found on a fifth of USPS's training data, held out.

Gradients are examples times backward passes. Adapting is charged for memory, new data and what it
reads to forget; ``to_batch`` is what had been spent when the test accuracy was first no more than
0.1 point below what batch ends with, ``settled`` when it was so for good, and ``near`` when it
was for good no more than 1 point below.

Finished cells are kept in ``cells.jsonl``, and the next call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lifelong import Examples, Prior, Recipe, Regulariser, identify
from lifelong.memory import Memory, memorise
from lifelong.models import evaluating, parameters
from lifelong.refit import refit
from lifelong.runs import versions
from lifelong.terms import MemoryTerm

from .adaptation_sets import LIKELIHOOD, SETS, Adam, Change, Lbfgs, Newton, Solver

TOLERANCE = 0.001  # of test accuracy: a tenth of a point
NEAR = 0.01
FRESH = 1000  # added to the seed of a model that is learned from scratch

K_PRIOR = Recipe("K-prior", gradient="stationary", score="lambda")
REPLAY = Recipe("replay", gradient="none", score="lambda", soft=0.0, hard=1.0)
# Not balanced over the classes, as N/M would count a rare class too much.
RANDOM = {"score": "random", "population": True, "per_class": False}
RECIPES: Mapping[str, Recipe] = {
    "K-prior": K_PRIOR,
    "replay": REPLAY,
    "replay, random, N/M": replace(REPLAY, **RANDOM),
    "K-prior, stored g": replace(K_PRIOR, gradient="stored"),
    "K-prior, N/M": replace(K_PRIOR, population=True),
    "K-prior, random": replace(K_PRIOR, score="random", per_class=False),
    "K-prior, random, N/M": replace(K_PRIOR, **RANDOM),
    "K-prior, random, N/M, stored g": replace(K_PRIOR, **RANDOM, gradient="stored"),
    "K-prior, G of the rest": replace(K_PRIOR, structure="diagonal"),
    "K-prior, G of the rest, stored g": replace(K_PRIOR, structure="diagonal", gradient="stored"),
}
SAMPLED = "K-prior, sampled by h', weighted"
KEPT = ", removed kept in memory"  # soft - hard at the moving weights, as published
SHARED = ", first layer shared"  # its weights stay near the anchor's, and start there
BETTER = ("K-prior, random, N/M", "K-prior, G of the rest")  # followed with each solver
N_OVER_M = "K-prior, N/M"
LINES = tuple(f"{line}{suffix}" for suffix in ("", KEPT, SHARED) for line in (*RECIPES, SAMPLED))

SLIPS = {
    "regulariser mutated in the loop": "precisions are values of a frozen Change, read afresh by "
    "every cell; the regulariser is a term of its own that Prior.replace swaps",
    "batch line": "batch is trained from fresh weights on the changed problem for each seed, not "
    "replay of everything in the first run",
    "hidden penalty": "the solver sees all of the objective, nll + prior in nats, as one value",
    "loss value ignored by L-BFGS": "the solvers search along the line on the whole objective",
    "stopped early": "convex problems are solved to a gradient near 0, not for 1000 fixed steps",
    "truncated class": "the places that a short class leaves go to the best of the other, and the "
    "count stays an int (select.per_class)",
    "soft labels not detached": "the memory holds tensors without a graph",
    "model surgery by counts": "Prior.transfer follows parameters by name and leading block",
    "binary only": "any likelihood; the convolutional networks have ten classes",
}


@dataclass(frozen=True)
class Config:
    """All settings but those of the sets; the smoke setting of a test is another one of these."""

    sets: tuple[str, ...] = ("usps-linear", "adult", "usps-mlp", "mnist-cnn", "cifar-cnn")
    seeds: tuple[int, ...] = (43, 44, 45)
    fractions: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.07, 0.05, 0.02)
    small: tuple[float, ...] = (0.1, 0.07, 0.05, 0.02)  # of the other lines
    traced: float = 0.05  # the memory at which gradients are counted


SMOKE = Config(
    sets=("digits-linear", "digits-mlp", "digits-cnn"),
    seeds=(43,),
    fractions=(0.2,),
    small=(0.2,),
    traced=0.2,
)


# --- solving --------------------------------------------------------------------------------------


@dataclass
class Trace:
    """Test accuracy after so many gradients; ``spent``: before the first step, and then in all."""

    accuracy_of: Callable[[nn.Module], float] | None = None
    spent: int = 0
    gradients: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)

    def look(self, model: nn.Module, spent: int | None = None) -> None:
        if self.accuracy_of is not None:
            self.gradients.append(self.spent if spent is None else spent)
            self.accuracy.append(self.accuracy_of(model))

    def first(self, target: float) -> int | None:
        """Gradients until the accuracy is at least ``target``."""
        reached = zip(self.gradients, self.accuracy, strict=True)
        return next((g for g, a in reached if a >= target), None)

    def settled(self, target: float) -> int | None:
        """Gradients until the accuracy is at least ``target`` from there on."""
        below = [i for i, a in enumerate(self.accuracy) if a < target]
        after = below[-1] + 1 if below else 0
        return self.gradients[after] if after < len(self.gradients) else None


def solve(
    model: nn.Module,
    prior: Prior,
    data: Examples | None,
    solver: Solver,
    trace: Trace,
    seed: int = 0,
) -> None:
    """Minimise nll(data) + prior from the model's weights, in place."""
    if isinstance(solver, Newton):
        _newton(model, prior, data, solver, trace)
    elif isinstance(solver, Lbfgs):
        _lbfgs(model, prior, data, solver, trace)
    else:
        _adam(model, prior, data, solver, trace, torch.Generator().manual_seed(seed))
    trace.look(model)


def _newton(
    model: nn.Module, prior: Prior, data: Examples | None, solver: Newton, trace: Trace
) -> None:
    """``lifelong.refit``. It tells nothing on its way: a trace stops it after 1, 2, ... steps."""
    start = copy.deepcopy(model.state_dict())
    trace.look(model)
    steps = range(1, solver.iterations) if trace.accuracy_of is not None else ()
    for count in (*steps, solver.iterations):
        model.load_state_dict(start)
        found = refit(model, prior, data, method="newton", max_iterations=count)
        if found.converged or count == solver.iterations:
            trace.spent += found.gradients
            return
        trace.look(model, trace.spent + found.gradients)


def _lbfgs(
    model: nn.Module, prior: Prior, data: Examples | None, solver: Lbfgs, trace: Trace
) -> None:
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=solver.iterations,
        max_eval=2 * solver.iterations,
        history_size=solver.history,
        tolerance_grad=solver.tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    each = size_of(prior, data)

    def closure() -> Tensor:
        trace.look(model)
        optimizer.zero_grad()
        loss = value(model, prior, data) / each
        loss.backward()
        trace.spent += each
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


def _adam(
    model: nn.Module,
    prior: Prior,
    data: Examples | None,
    solver: Adam,
    trace: Trace,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=solver.lr)
    each, remembered = size_of(prior, data), len(prior.memory or ())
    order = iter(())
    for step in range(solver.steps):
        if step < 20 or step % solver.look == 0:
            trace.look(model)
        optimizer.zero_grad()
        if solver.batch is None:
            loss = value(model, prior, data) / each
            trace.spent += each
        else:
            past = prior(model, batch_size=solver.batch, generator=generator)
            trace.spent += min(solver.batch, remembered)
            if data is not None:
                index = next(order, None)
                if index is None:
                    order = iter(torch.randperm(len(data), generator=generator).split(solver.batch))
                    index = next(order)
                past = past + value(model, None, data[index]) * (len(data) / len(index))
                trace.spent += len(index)
            loss = past / each
        loss.backward()
        optimizer.step()


def value(model: nn.Module, prior: Prior | None, data: Examples | None) -> Tensor:
    """nll(data) + prior, nats."""
    parts = [] if prior is None else [prior(model)]
    if data is not None:
        parts.append(LIKELIHOOD.nll(model(data.inputs), data.labels).sum())
    return torch.stack(parts).sum()


def size_of(prior: Prior, data: Examples | None) -> int:
    """Examples that one evaluation of the gradient backpropagates."""
    return len(prior.memory or ()) + (0 if data is None else len(data))


# --- the cells ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One trained model. fraction: of the past data in memory, None without one."""

    set: str
    change: str
    method: str
    fraction: float | None
    solver: str
    seed: int


def cells(name: str, change: Change, kind: str, config: Config, seed: int) -> list[Cell]:
    """What is to be done for one change; batch first, since the others are measured by it."""
    chosen = SETS[name]
    fractions = chosen.fractions or config.fractions
    small = [f for f in fractions if f in config.small]
    first, *more = chosen.solvers

    def cell(method: str, fraction: float | None = None, solver: str = first) -> Cell:
        return Cell(name, kind, method, fraction, solver, seed)

    found = [cell("batch"), cell("anchor")]
    started = change.new_model is None or change.shared
    whole = change.convex or seed == config.seeds[0]  # of a network, some at the first seed alone
    if started and whole:
        found.append(cell("warm"))
    for fraction in fractions:
        # Replay of everything is the objective of batch.
        found += [cell(m, fraction) for m in ("K-prior", "replay") if fraction < 1 or m != "replay"]

    # An own anchor's g and G say nothing of another network's weights. A diagonal G of poly-2's
    # 66,306 weights takes a minute, and moved poly-1 by less than a point at 7 and 10 %.
    def known(methods: tuple[str, ...]) -> list[str]:
        fitting = [m for m in methods if change.new_model is None or "G of" not in m]
        return [m for m in fitting if started or "stored" not in m]

    found += [cell(method, fraction) for method in known(chosen.others) for fraction in small]
    if seed == config.seeds[0]:
        found += [cell(m, fraction) for m in known(chosen.once) for fraction in small[-2:]]
    if kind == "remove":
        ours = ("K-prior",) if change.convex else ("K-prior", N_OVER_M)
        found += [cell(f"{m}{KEPT}", fraction) for m in ours for fraction in small]
    if change.first_layer and change.new_model is not None:
        known_there = (N_OVER_M, "K-prior, random, N/M", "replay, random, N/M")
        found += [cell(f"{m}{SHARED}", fraction) for m in known_there for fraction in small]
    followed = ("K-prior", *known(tuple(m for m in BETTER if m in chosen.others)))
    for solver in more if whole else ():
        found += [cell("batch", solver=solver)]
        found += [cell(method, config.traced, solver) for method in followed]
    return found


@dataclass(frozen=True, eq=False)
class Task:
    """One change at one seed, with the first model learned."""

    change: Change
    base: nn.Module
    seed: int
    removed: Tensor | None  # ids
    after: Examples

    def accuracy(self, model: nn.Module) -> float:
        test = self.change.test
        with torch.no_grad(), evaluating(model):
            return float((model(test.inputs).argmax(1) == test.labels).double().mean())

    def fresh(self) -> nn.Module:
        """The changed model, with random weights."""
        return _built(self.change.new_model or self.change.model, self.seed + FRESH, self.change)

    def start(self, names: Mapping[str, str]) -> nn.Module:
        """The changed model, at the anchor in the coordinates that it shares: new name -> old."""
        model = self.fresh()
        old = parameters(self.base)
        with torch.no_grad():
            for n, p in parameters(model).items():
                if n in names:
                    p.copy_(old[names[n]][tuple(slice(0, size) for size in p.shape)])
        return model

    def shared(self, method: str = "") -> Mapping[str, str]:
        """Which coordinates the changed model shares with the first one."""
        change = self.change
        if change.new_model is not None and not change.shared:
            chosen = change.first_layer if method.endswith(SHARED) else ()
        else:
            chosen = tuple(parameters(self.base))
        return {n: n for n in chosen}


def begin(change: Change, solver: Solver, seed: int) -> Task:
    base = _built(change.model, seed, change)
    prior = Prior(LIKELIHOOD, terms=(Regulariser(change.precision[0]),))
    solve(base, prior, change.before, _from_scratch(solver), Trace(), seed)
    removed = None if change.removed is None else change.removed(base, change.before)
    after = change.before
    if change.new is not None:
        after = Examples(
            torch.cat([after.inputs, change.new.inputs]),  # type: ignore[list-item]
            torch.cat([after.labels, change.new.labels]),
        )
    if removed is not None:
        after = after[~torch.isin(after.ids, removed)]
    return Task(change, base, seed, removed, after)


def _built(build: Callable[[], nn.Module], seed: int, change: Change) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(change.before.inputs.dtype)  # type: ignore[union-attr]


def _from_scratch(solver: Solver) -> Solver:
    """Mini-batches from scratch take as many more steps as the solver says."""
    return (
        solver
        if not isinstance(solver, Adam)
        else replace(solver, steps=solver.steps * solver.longer)
    )


def train(cell: Cell, task: Task, solver: Solver, trace: Trace) -> nn.Module:
    """The model of one cell."""
    change, seed = task.change, task.seed
    names = task.shared(cell.method)
    model = task.fresh() if cell.method == "batch" else task.start(names)
    if cell.method == "anchor":
        trace.look(model)
        return model
    if cell.method in ("batch", "warm"):
        prior = Prior(LIKELIHOOD, terms=(Regulariser(change.precision[1]),))
        solve(model, prior, task.after, _from_scratch(solver), trace, seed)
        return model
    prior = remembered(cell, task)
    if change.new_model is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is left behind is the experiment
            prior = prior.transfer(model, parameters=names, allow_unmatched=not change.shared)
    if task.removed is not None:
        gone = change.before[torch.isin(change.before.ids, task.removed)]
        if cell.method.endswith(KEPT):
            items = memorise(task.base, gone, LIKELIHOOD).weighted(1.0, -1.0)
            prior = replace(prior, terms=(*prior.terms, MemoryTerm(items)))
        else:
            if prior.recipe.gradient == "none" and prior.memory is not None:  # holds that alone
                inside = torch.isin(gone.ids, prior.memory.origin)
                gone = gone[inside.nonzero().squeeze(1)]
            if len(gone):
                prior = prior.forget(task.base, gone)
            trace.spent += len(gone) if prior.recipe.gradient != "none" else 0
    if change.precision[1] != change.precision[0]:
        prior = prior.replace(regulariser=Regulariser(change.precision[1]))
    solve(model, prior, change.new, solver, trace, seed)
    return model


def remembered(cell: Cell, task: Task) -> Prior:
    """The first model's prior, made before anybody knows what will change; but as the released
    code keeps the removed examples beside its memory, there this is of the others."""
    change, base = task.change, task.base
    method = cell.method.removesuffix(KEPT).removesuffix(SHARED)
    recipe = RECIPES.get(method, K_PRIOR)
    if recipe.structure is not None:
        recipe = replace(recipe, structure=SETS[cell.set].structure)
    source = task.after if cell.method.endswith(KEPT) else change.before
    size = max(2, round(cell.fraction * len(change.before)))  # type: ignore[operator]
    size = min(size, len(source))
    prior = Prior(LIKELIHOOD, replace(recipe, memory=size), (Regulariser(change.precision[0]),))
    generator = torch.Generator().manual_seed(task.seed)
    if method == SAMPLED:
        return prior.recall(base, source, sampled(base, source, size, generator))
    return prior.update(base, source, generator=generator)


def sampled(model: nn.Module, data: Examples, size: int, generator: torch.Generator) -> Memory:
    """``size`` examples, i with probability pi_i, standing for 1 / pi_i: sums over the memory are
    unbiased. pi_i grows with h' and with its mean: half of the memory is for what h' forgets."""
    score = identify(model, data, LIKELIHOOD, score="lambda").double()
    share = score + score.mean()
    pi = (size * share / share.sum()).clamp(max=1.0)
    for _ in range(20):  # what those with pi = 1 cannot take goes to the others
        free = pi < 1
        pi[free] = pi[free] * (size - (~free).sum()) / pi[free].sum()
        pi = pi.clamp(max=1.0)
    order = torch.randperm(len(data), generator=generator)
    ends = pi[order].cumsum(0)
    places = torch.arange(size) + torch.rand((), generator=generator, dtype=torch.float64)
    chosen = order[torch.searchsorted(ends, places.clamp(max=float(ends[-1]) - 1e-9))].unique()
    items = memorise(model, data, LIKELIHOOD, ids=data.ids[chosen])
    weight = dict(zip(data.ids.tolist(), (1 / pi).tolist(), strict=True))
    return items.weighted(torch.tensor([weight[i] for i in items.origin.tolist()]), 0.0)


def run(
    config: Config,
    data: Path | None,
    done: dict[Cell, dict],
    say: Callable[[str], None],
    seeds: Sequence[int],
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """(cell, what came out) of all that is not done yet, of some of the seeds."""
    for name in config.sets:
        chosen = SETS[name]
        for seed in seeds:
            changes = chosen.make(chosen.data, data, chosen.limit, chosen.steps, seed)
            for kind, change in changes.items():
                todo = cells(name, change, kind, config, seed)
                if all(cell in done for cell in todo):
                    continue
                start = time.perf_counter()
                task = begin(change, change.solvers[chosen.solvers[0]], seed)
                targets = {c.solver: done[c]["accuracy"] for c in todo if c in done
                           and c.method == "batch"}  # fmt: skip
                for cell in todo:
                    if cell in done:
                        continue
                    found = measure(cell, task, config, targets)
                    if cell.method == "batch":
                        targets[cell.solver] = found["accuracy"]
                    done[cell] = found
                    yield cell, found
                seconds = time.perf_counter() - start
                say(f"{name}, {kind}, seed {seed}: {seconds:.0f} s")


def measure(cell: Cell, task: Task, config: Config, targets: Mapping[str, float]) -> dict[str, Any]:
    start = time.perf_counter()
    counted = cell.fraction in (None, config.traced) and cell.method != "anchor"
    traced = counted and SETS[cell.set].follow
    trace = Trace(task.accuracy if traced else None)
    model = train(cell, task, task.change.solvers[cell.solver], trace)
    accuracy = task.accuracy(model)
    batch = targets.get(cell.solver, accuracy)
    return {
        "accuracy": accuracy,
        "gradients": trace.spent,
        "to_batch": trace.first(batch - TOLERANCE),
        "settled": trace.settled(batch - TOLERANCE),
        "near": trace.settled(batch - NEAR),
        "seconds": round(time.perf_counter() - start, 3),
    }


# --- the record -----------------------------------------------------------------------------------


def load(path: Path) -> dict[Cell, dict]:
    """The finished cells."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [f.name for f in fields(Cell)]
    return {Cell(**{n: row[n] for n in names}): {k: v for k, v in row.items() if k not in names}
            for row in rows}  # fmt: skip


def mean(values: list[float]) -> dict[str, Any]:
    """Mean, standard error and number."""
    at = torch.tensor(values, dtype=torch.float64)
    error = float(at.std() / math.sqrt(len(at))) if len(at) > 1 else None
    return {"mean": float(at.mean()), "standard_error": error, "n": len(values)}


def summary(done: Mapping[Cell, dict], config: Config) -> dict[str, Any]:
    """By set and change: accuracies of each line, gradients, and which bars are met."""
    result: dict[str, Any] = {}
    for cell in done:
        result.setdefault(cell.set, {}).setdefault(cell.change, None)
    for name, changes in result.items():
        for kind in changes:
            of = {c: found for c, found in done.items() if (c.set, c.change) == (name, kind)}
            changes[kind] = _summary_of(of, SETS[name].solvers, config)
    return result


def _summary_of(
    of: Mapping[Cell, dict], solvers: tuple[str, ...], config: Config
) -> dict[str, Any]:
    accuracy: dict[str, dict[str, list[float]]] = {}
    for cell, found in of.items():
        if cell.solver == solvers[0]:
            line = accuracy.setdefault(cell.method, {})
            line.setdefault(_written(cell.fraction), []).append(found["accuracy"])
    lines = {
        method: {fraction: mean(values) for fraction, values in line.items()}
        for method, line in accuracy.items()
    }
    gradients: dict[str, Any] = {}
    for solver in solvers:
        for method in ("batch", "warm", *LINES):
            found = [
                (cell.seed, f)
                for cell, f in of.items()
                if (cell.method, cell.solver) == (method, solver)
                and cell.fraction in (None, config.traced)
            ]
            if found:
                gradients.setdefault(solver, {})[method] = {
                    key: [f[key] for _, f in sorted(found, key=lambda pair: pair[0])]
                    for key in ("to_batch", "settled", "near", "gradients", "accuracy")
                }
    return {"accuracy": lines, "gradients": gradients, "bars": bars(lines, gradients, config)}


def bars(lines: Mapping[str, Any], gradients: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """What must hold: points below batch at the traced memory, and replay above or below."""
    at = _written(config.traced)
    batch = lines["batch"][_written(None)]["mean"]
    found: dict[str, Any] = {
        f"{method}: points below batch at {at}": 100 * (batch - line[at]["mean"])
        for method, line in lines.items()
        if at in line
    }
    ours, replay = lines.get("K-prior", {}), lines.get("replay", {})
    for fraction in ours.keys() & replay.keys():
        if float(fraction) <= 0.1:
            gap = ours[fraction]["mean"] - replay[fraction]["mean"]
            found[f"K-prior: points above replay at {fraction}"] = 100 * gap
    for solver, table in gradients.items():
        for method in table.keys() & {"K-prior", "warm", *BETTER}:
            for key in ("to_batch", "settled", "near", "gradients"):
                found[f"{method}, {solver}: {key} / batch's"] = _ratio(table, method, key)
    return dict(sorted(found.items()))


def _ratio(table: Mapping[str, Any], method: str, key: str) -> float | None:
    """Of the sums over the seeds; None where some seed never got there."""
    ours, theirs = table[method][key], table["batch"][key]
    return None if None in ours or None in theirs else sum(ours) / max(1, sum(theirs))


def _written(fraction: float | None) -> str:
    return "all" if fraction is None else f"{fraction:g}"


def _revisions(path: Path) -> list[str]:
    """Of the calls before; log.txt says which cells came from which."""
    return json.loads(path.read_text())["revisions"] if path.exists() else []


def tables(result: Mapping[str, Any]) -> str:
    """Markdown: accuracies in points with standard errors, then gradients in thousands."""
    out = ["# Tables of result.json", ""]
    for name, changes in result.items():
        for kind, found in changes.items():
            out += [f"## {name}, {kind}", "", *_accuracies(found["accuracy"]), ""]
            for solver, methods in found["gradients"].items():
                out += [*_gradients(solver, methods), ""]
    return "\n".join(out)


def _accuracies(lines: Mapping[str, Any]) -> list[str]:
    fractions = sorted({f for line in lines.values() for f in line if f != "all"}, key=float)
    rows = ["| accuracy, % | all | " + " | ".join(f"{float(f):.0%}" for f in fractions) + " |"]
    rows.append("|---" * (2 + len(fractions)) + "|")
    for method, line in lines.items():
        cells = [_points(line.get(f)) for f in ("all", *fractions)]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return rows


def _points(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    error = value["standard_error"]
    spread = " (one seed)" if error is None else f" ± {100 * error:.2f}"
    return f"{100 * value['mean']:.2f}{spread}"


def _gradients(solver: str, methods: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| 1000 gradients, {solver} | to 0.1 point | for good | to 1 point for good | all |",
        "|---|---|---|---|---|",
    ]
    for method, found in methods.items():
        keys = ("to_batch", "settled", "near", "gradients")
        cells = [", ".join(_thousands(n) for n in found[key]) for key in keys]
        rows.append(f"| {method} | " + " | ".join(cells) + " |")
    return rows


def _thousands(count: int | None) -> str:
    return "never" if count is None else f"{count / 1000:.3g}"


def _called(make: Any) -> str:
    """The function's name, with what is fixed of its arguments."""
    fixed = ", ".join(f"{k}={v}" for k, v in getattr(make, "keywords", {}).items())
    return f"{getattr(make, 'func', make).__name__}({fixed})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with usps-train.parquet and the others")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", help=f"of {', '.join(SETS)}; default: all published")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of them; default 43 44 45")
    parser.add_argument("--summary", action="store_true", help="of the finished cells; none is run")
    parser.add_argument("--smoke", action="store_true", help="seconds; the numbers mean nothing")
    options = parser.parse_args(arguments)
    whole = SMOKE if options.smoke else Config()
    config = replace(whole, sets=tuple(options.sets or whole.sets))
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.jsonl"
    done = load(path)

    def say(line: str) -> None:
        print(line, flush=True)
        with (options.out / "log.txt").open("a") as log:
            log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {line}\n")

    found_versions = versions()  # before anything: the tree may change meanwhile
    revision = found_versions.pop("revision", "unknown")
    found_versions["revisions"] = [*_revisions(options.out / "versions.json"), revision]
    if not options.summary:
        say(f"begins: {', '.join(config.sets)} at revision {revision}; {len(done)} cells are there")
    with path.open("a") as file:
        seeds = () if options.summary else options.seeds or config.seeds
        for cell, found in run(config, options.data, done, say, seeds):
            file.write(json.dumps({**asdict(cell), **found}) + "\n")
            file.flush()
    result = summary(done, config)
    (options.out / "tables.md").write_text(tables(result) + "\n")
    settings = {
        "config": asdict(whole),
        "sets": {n: {**asdict(SETS[n]), "make": _called(SETS[n].make)} for n in config.sets},
        "recipes": {name: recipe.to_dict() for name, recipe in RECIPES.items()},
        "slips of the released code, and how they are avoided": SLIPS,
    }
    for name, content in (
        ("config.json", settings),
        ("versions.json", found_versions),
        ("result.json", result),
    ):
        (options.out / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
