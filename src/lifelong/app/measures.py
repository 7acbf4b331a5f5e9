"""What a pass over data tells of the network in force: how much each remembered example moves it,
how well its probabilities hold on the tests, and how faithful a memory of any size would be.

Made by a job, and kept in measured.json beside the store until the network changes:

    leverage     tr(H V), V = J Sigma Jᵀ: how much of the fit an example takes
    sensitivity  ||V r||: how far the output moves when the example is left out, at first order
    spread       tr V: how unsure the output is

Sigma = (diag G + precision I)⁻¹, G of the prior and of the memory together. A diagonal one leaves
out how weights make up for each other, so that V is too large: read the order, not the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapted_runs import Past, restored
from ..checkpoint import write
from ..curvature import Curvature, Diagonal, diagonal_curvature
from ..data import Examples, head_mask
from ..function_space import function_kernel
from ..learner import Learner
from ..memory import Memory, reference_outputs
from ..metrics import CalibrationBins, calibration_bins
from ..models import take
from ..prior import Prior
from ..recall import by_head, total_curvature
from ..reconstruction import fidelity_curve
from ..run_memory import learner_file
from ..sensitivity import sensitivities

FILE = "measured.json"
MOST_ITEMS = 5_000  # whose sensitivity is computed: those with the largest residual
MOST_READ = 5_000  # examples of a task that a curve of fidelity reads
MOST_TASKS = 6  # with a curve of fidelity
MOST_ROWS = 20_000  # of Jacobians, for the neighbours of one item
BINS = 10
_LEAST_PRECISION = 1e-3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Measures:
    """run, stamp: of which network, by its folder's name. scores: "task/origin" -> name -> value;
    left_out: remembered examples beyond ``MOST_ITEMS``. calibration: of each task with tests, and
    bins of all of them; fidelity: curves of some tasks; kept: how many examples of it are
    remembered. notes: why something is missing."""

    run: str
    stamp: int
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: int = 0
    calibration: list[dict[str, Any]] = field(default_factory=list)
    bins: dict[str, list[float | None]] = field(default_factory=dict)
    fidelity: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ece(self) -> float | None:
        """Expected calibration error over all tests."""
        if not self.bins:
            return None
        columns = (self.bins[n] for n in ("count", "confidence", "right"))
        return CalibrationBins(*(torch.tensor(c, dtype=torch.float64) for c in columns)).error()


def stamp_of(run: Path, seed: int | None) -> int:
    return learner_file(run, seed).stat().st_mtime_ns


def load(place: Path, run: Path | None, seed: int | None) -> Measures | None:
    """Those of this run's network as it is now; None where it was not measured."""
    if run is None:
        return None
    try:
        content = json.loads((place / FILE).read_text(encoding="utf-8"))
        found = Measures(**content)
        return found if (found.run, found.stamp) == (run.name, stamp_of(run, seed)) else None
    except (OSError, ValueError, TypeError):
        return None


def measure(place: Path, run: Path, seed: int | None, say: Say) -> Measures:
    """Measure and keep it. Raises as ``restored``."""
    stamp = stamp_of(run, seed)
    learner, past = restored(run, seed)
    prior, notes = learner.prior, []
    scores: dict[str, dict[str, float]] = {}
    left_out = 0
    if prior.memory is not None and len(prior.memory):
        say("sensitivity of the remembered examples")
        scores, left_out = _scores(learner, prior, prior.memory)
    say("calibration on the tests")
    calibration, bins = _calibration(learner, past)
    say("fidelity against memory")
    try:
        fidelity = _fidelity(learner, prior, past)
    except ValueError as error:
        fidelity = []
        notes.append(f"There is no curve of fidelity: {error}")
    found = Measures(run.name, stamp, scores, left_out, calibration, bins, fidelity, notes)
    place.mkdir(parents=True, exist_ok=True)
    write(place / FILE, json.dumps(asdict(found), allow_nan=False) + "\n")
    return found


def remove(place: Path) -> None:
    """Forget them: they name examples."""
    (place / FILE).unlink(missing_ok=True)


# ------------------------------------------------------------------------------- examples


def _sigma(learner: Learner, prior: Prior, memory: Memory) -> tuple[Curvature, float]:
    """(diag G, precision)."""
    of_past = total_curvature(prior.terms)
    total = None if of_past is None else Diagonal(of_past.diagonal())
    if total is None or prior.recipe.exclude_memory:
        for part, head in by_head(memory):
            stands_for = part.soft_weight + part.hard_weight
            pair = (part.inputs, part.labels)
            G = diagonal_curvature(
                learner.model, pair, prior.likelihood, head=head, weights=stands_for
            )
            total = G if total is None else total + G
    if total is None:
        raise ValueError("there is no remembered example")
    precision = 0.0 if prior.regulariser is None else prior.regulariser.precision
    return total, max(precision, _LEAST_PRECISION)


def _scores(
    learner: Learner, prior: Prior, memory: Memory
) -> tuple[dict[str, dict[str, float]], int]:
    likelihood = prior.likelihood
    f = likelihood.mask(memory.outputs, memory.mask)
    order = likelihood.residual(f, memory.labels).norm(dim=-1).argsort(descending=True)
    some = memory[order[:MOST_ITEMS]]
    curvature, damping = _sigma(learner, prior, memory)
    found: dict[str, dict[str, float]] = {}
    for part, head in by_head(some):
        for items in _pieces(part):
            each = sensitivities(
                learner.model,
                Examples(items.inputs, items.labels, head=head),
                likelihood,
                curvature,
                damping,
            )
            spread = each.covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
            columns = {
                "leverage": (each.hessian * each.covariance.mT).sum((-2, -1)),
                "sensitivity": each.score("output"),
                "spread": spread,
            }
            listed = {name: values.tolist() for name, values in columns.items()}
            for n, key in enumerate(_keys(items)):
                found[key] = {name: values[n] for name, values in listed.items()}
    return found, max(0, len(memory) - len(some))


def _pieces(memory: Memory, size: int = 64) -> Iterator[Memory]:
    for start in range(0, len(memory), size):
        yield memory[slice(start, start + size)]


def _keys(memory: Memory) -> list[str]:
    pairs = zip(memory.task.tolist(), memory.origin.tolist(), strict=True)
    return [key_of(task, origin) for task, origin in pairs]


def key_of(task: int, origin: int) -> str:
    return f"{task}/{origin}"


# ------------------------------------------------------------------------------- tests, sizes


def _calibration(
    learner: Learner, past: Past
) -> tuple[list[dict[str, Any]], dict[str, list[float | None]]]:
    likelihood, found = learner.prior.likelihood, []
    total = CalibrationBins.zeros(BINS)
    for task, test in enumerate(past.tests):
        if test is None or not len(test):
            continue
        batch = test.batch(slice(None))
        f = reference_outputs(learner.model, batch.inputs).cpu()
        f = likelihood.mask(f, head_mask(test.head, f.shape[1])).double()
        mean = likelihood.mean(f)
        own = calibration_bins(mean, batch.labels, BINS)
        confidence, predicted = mean.max(-1)
        total = total.add(confidence, predicted == batch.labels)
        found.append({
            "task": task,
            "examples": len(test),
            "accuracy": float((predicted == batch.labels).double().mean()),
            "nll": float(likelihood.nll(f, batch.labels).mean()),
            "ece": own.error(),
        })  # fmt: skip
    if not found:
        return [], {}
    return found, {n: getattr(total, n).tolist() for n in ("count", "confidence", "right")}


def _fidelity(learner: Learner, prior: Prior, past: Past) -> list[dict[str, Any]]:
    tasks = [t for t, data in enumerate(past.train) if len(data) > 1]
    some = sorted({tasks[round(k * (len(tasks) - 1) / max(1, MOST_TASKS - 1))]
                   for k in range(MOST_TASKS)} if tasks else set())  # fmt: skip
    found = []
    for task in some:
        data = past.train[task]
        if len(data) > MOST_READ:
            draw = torch.Generator().manual_seed(task)
            data = data[torch.randperm(len(data), generator=draw)[:MOST_READ]]
        drawn = torch.Generator().manual_seed(task)
        curve = fidelity_curve(prior, learner.model, data, generator=drawn)
        memory = prior.memory
        kept = 0 if memory is None else int((memory.task == task).sum())
        values = [v if math.isfinite(v) else None for v in curve.values]
        found.append({
            "task": task,
            "sizes": list(curve.sizes),
            "values": values,
            "kept": kept,
            "read": len(data),
        })  # fmt: skip
    return found


# ------------------------------------------------------------------------------- neighbours


@dataclass(frozen=True, eq=False)
class Network:
    """A learner as it lies in a run's folder, with the posterior of its weights."""

    learner: Learner
    memory: Memory
    curvature: Curvature
    precision: float

    @classmethod
    def of(cls, run: Path, seed: int | None) -> Network:
        """Raises ValueError where it remembers nothing, else as ``restored``."""
        learner, _ = restored(run, seed)
        memory = learner.prior.memory
        if memory is None or not len(memory):
            raise ValueError("this network remembers no example")
        return cls(learner, memory, *_sigma(learner, learner.prior, memory))


def neighbours(
    network: Network, scores: Mapping[str, Mapping[str, float]], key: str, count: int = 12
) -> list[tuple[str, float]]:
    """The remembered examples whose outputs move with this one's: (key, correlation), most first.

        rho(x, x') = sum_c k_cc(x, x') / sqrt(tr V(x) tr V(x')),    k = J Sigma J'ᵀ

    between -1 and 1, over the outputs of x's head. Of those with a ``spread`` in ``scores``, at
    most as many as have ``MOST_ROWS`` outputs, evenly. Raises KeyError for an unknown key.
    """
    memory = network.memory
    keys = _keys(memory)
    me = {k: n for n, k in enumerate(keys)}[key]
    head = memory.heads[int(memory.head[me])]
    mask = head_mask(head, memory.reference.shape[1])
    width = memory.reference.shape[1] if mask is None else int(mask.sum())
    others = [
        n for n, k in enumerate(keys)
        if n != me and memory.head[n] == memory.head[me] and scores.get(k, {}).get("spread", 0) > 0
    ]  # fmt: skip
    most = max(50, MOST_ROWS // width)
    if len(others) > most:
        others = [others[k * len(others) // most] for k in range(most)]
    mine = scores[key]["spread"]
    if not others or mine <= 0:
        return []
    index = torch.tensor(others)
    k = function_kernel(
        network.learner.model,
        take(memory.inputs, torch.tensor([me])),
        network.curvature,
        network.precision,
        others=take(memory.inputs, index),
        outputs="diag",
        likelihood=network.learner.prior.likelihood,
        mask=mask,
    )[0]
    spreads = torch.tensor([scores[keys[n]]["spread"] for n in others], dtype=torch.float64)
    rho: Tensor = k.double() / (mine * spreads).sqrt()
    best = rho.argsort(descending=True)[:count].tolist()
    return [(keys[others[n]], float(rho[n])) for n in best]
