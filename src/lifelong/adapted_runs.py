"""Adapted runs: a saved run, changed in one of five ways, in a folder of its own.

    adapt(Path("runs/x"), Path("runs/y"), Remove(label=3))

runs/y/config.json, config.toml   those of runs/x, and in the first what was changed since
runs/y/adaptation.json            accuracy before and after, gradients and seconds, of each seed
runs/y/seed-0/learner.safetensors the learner; the next adaptation starts from it
runs/y/added-1.safetensors        the examples that the first change added from a file

The old run is only read. The new folder is put together beside its place, under a name of its own,
and moved there whole; a kill leaves that one, which is hidden, and nothing at the new place.
**Examples that were added from a file are copied into the run**, and from there into each run that
is adapted from it, with the sha256 of the copy in config.json: they are known by the copy from then
on, whatever becomes of the file. A removal leaves those that it removes out of its own copy.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .benchmarks import learner_options
from .certificate import certify_removal, load_private_key
from .checkpoint import dumps, write
from .checkpoint import load as load_checkpoint
from .config import UsageError
from .data import Examples, Head
from .divergences import Logit
from .errors import CheckpointError, ClippedWarning, NotHeldWarning
from .learner import CHECKPOINT, Learner
from .likelihoods import Categorical
from .memory import remember
from .metrics import evaluate
from .models import concat, device_of, rows
from .networks import mlp
from .prior import Prior
from .readers import load
from .recipe import Recipe
from .refit import Refit, is_convex, refit
from .runs import CONFIG, LOG, TOML, VERSIONS, Plan, load_config, log, prepare, versions
from .terms import MemoryTerm
from .unlearning import audit

ADAPTATION = "adaptation.json"


# -------------------------------------------------------------------- changes


@dataclass(frozen=True)
class Add:
    """Learn the next task of the benchmark (by its number, from 1), or the examples of a file
    (Parquet, .npz), under ``head``."""

    task: int | None = None
    file: Path | None = None
    head: Head | None = None


@dataclass(frozen=True)
class Remove:
    """Unlearn examples: those with these ids, of this task (from 1), of this class; all of what is
    given must hold."""

    ids: tuple[int, ...] | None = None
    task: int | None = None
    label: int | None = None


@dataclass(frozen=True)
class Relabel:
    """Correct labels: those of the examples with these ids, of this task (from 1); label: one for
    all of them, or one for each."""

    ids: tuple[int, ...]
    label: int | tuple[int, ...]
    task: int | None = None


@dataclass(frozen=True)
class Regularise:
    """R = ½ precision ‖theta‖² instead."""

    precision: float


@dataclass(frozen=True)
class Transfer:
    """Hidden layers of these widths; ``outputs`` classes, the new ones last; of the classes, only
    ``keep``, in that order."""

    hidden: tuple[int, ...] | None = None
    outputs: int | None = None
    keep: tuple[int, ...] | None = None


Change = Add | Remove | Relabel | Regularise | Transfer
Added = tuple[Examples, Examples | None]  # examples to learn, their test examples


@dataclass(frozen=True)
class Certifying:
    """A certificate of the removal in each seed's folder. key: a PEM file with the Ed25519 key that
    signs it; None leaves it unsigned. note: of whoever asked for the removal."""

    key: Path | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Past:
    """What a run has learned by now. train: of each task, what is left of it; tests: its test
    examples; hidden: widths of the network where they are not the benchmark's."""

    train: tuple[Examples, ...]
    tests: tuple[Examples | None, ...]
    outputs: int
    hidden: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Adapted:
    """The learner after the change, what was removed or relabelled of which task, and the cost.
    clipped: the largest part of a curvature that was to leave and stays; not_held: of how many of
    the removed the prior held nothing."""

    learner: Learner
    removed: Mapping[int, Examples]
    cost: Refit
    notes: tuple[str, ...] = ()
    clipped: float = 0.0
    not_held: int = 0


# -------------------------------------------------------------------- one adaptation


def adapt(
    run: Path,
    out: Path,
    change: Change,
    *,
    seed: int | None = None,
    data: Path | None = None,
    compare: bool = False,
    certifying: Certifying | None = None,
    watch: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Change a saved run and write the result to ``out``; what ``adaptation.json`` holds.

    seed: this one alone; by default all that the run has. data: where the data lie, if not where
    they lay. compare: also train a fresh network on what is left. certifying: of a removal, write
    a certificate with its audit into each seed's folder. options: of ``refit``.

    Raises UsageError for a folder without a run or one that is not free, and for a change that
    does not fit; CheckpointError; as the verb of ``Learner``. Then nothing was written.
    """
    config = load_config(run, adapted=True)
    require_unused(out)
    if certifying is not None:
        if not isinstance(change, Remove):
            raise UsageError("a certificate is of a removal; this change removes nothing")
        if certifying.key is not None:  # a key that cannot be read shows before the work
            load_private_key(certifying.key)
    if data is not None:
        config = replace(config, experiment=replace(config.experiment, data=data.absolute()))
    seeds = _seeds(run, config.seed_list, seed)
    plan, before = prepare(config), _history(run)
    results: list[dict[str, Any]] = []
    learned, step = 0, {}
    name = "relabelled" if isinstance(change, Relabel) else "removed"
    added: Added | None = None
    near = next(folder for folder in out.absolute().parents if folder.exists())
    place = Path(tempfile.mkdtemp(dir=near, prefix=f".{out.name}."))
    partial = place / "run"  # with the usual rights, which place has not
    try:
        for number in seeds:
            learner, past = _restored(plan, run, number, before)
            if step and len(past.train) != learned:
                raise UsageError(
                    f"seed {number} has learned {len(past.train)} tasks and another {learned}; let "
                    f"the run end (lifelong run --resume {run}), or choose one by --seed"
                )
            learned = len(past.train)
            removed = _chosen(change, past) if isinstance(change, Remove | Relabel) else {}
            if isinstance(change, Relabel):
                _require_labels(change, removed, past.outputs)
            step = _step(change, removed, 1 + len(before["steps"] if before else []))
            what = change
            if isinstance(what, Add):
                added = added or _added(what, past, plan)  # a file is read once
                what = added[0]
            right = _corrected(change, removed) if isinstance(change, Relabel) else removed
            tests = _accuracies(learner.model, past, right)
            origin = (copy.deepcopy(learner.model), learner.prior)
            found = _change(learner, past, what, removed, plan, options)
            after = _after(past, step, added)
            result = _result(number, name, found, tests, _accuracies(learner.model, after, right))
            fresh = None
            if compare:
                result["retrained"], fresh = _retrained(learner, after, plan, number, options)
            results.append(result)
            if watch is not None:
                watch(f"seed {number} is adapted")
            folder = partial / f"seed-{number}"
            learner.save(folder / CHECKPOINT)
            if certifying is not None:
                seconds = result.get("retrained", {}).get("seconds")
                said = _certify(folder, certifying, found, origin, fresh, after, seconds)
                result["notes"] += said
                result["certificate"] = f"seed-{number}/certificate.html"
        history = before or {"learned": learned, "steps": []}
        history = {**history, "steps": _carry(partial, run, history, step, added)}
        summary = {"from": str(run), "change": history["steps"][-1], "seeds": results}
        _write(partial, run, history, summary)
        _move(partial, out)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return summary


def _move(folder: Path, out: Path) -> None:
    """To a place that is free or empty. Raises UsageError where another call has taken it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with suppress(FileNotFoundError):
            out.rmdir()
        folder.rename(out)
    except OSError:
        require_unused(out)
        raise


def require_unused(out: Path) -> None:
    """Raise UsageError where something lies at ``out`` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder with --out")


def _seeds(run: Path, known: Iterable[int], seed: int | None) -> list[int]:
    found = [s for s in known if (run / f"seed-{s}" / CHECKPOINT).is_file()]
    if not found:
        raise UsageError(f"{run} holds no learner yet; let its run end first")
    if seed is not None and seed not in found:
        listed = ", ".join(map(str, found))
        raise UsageError(f"{run} holds no learner of seed {seed}; it has {listed}")
    return found if seed is None else [seed]


def restored(run: Path, seed: int | None = None) -> tuple[Learner, Past]:
    """The learner of a run, or of one that was adapted, and what it has learned by now.

    seed: by default the first that the run has. Raises UsageError for a folder without a run or
    learner; CheckpointError, FileNotFoundError where files or data are damaged or missing.
    """
    config = load_config(run, adapted=True)
    (number, *_) = _seeds(run, config.seed_list, seed)
    return _restored(prepare(config), run, number, _history(run))


def _history(run: Path) -> dict[str, Any] | None:
    return json.loads((run / CONFIG).read_text(encoding="utf-8")).get("adaptations")


def _restored(
    plan: Plan, run: Path, seed: int, history: Mapping[str, Any] | None
) -> tuple[Learner, Past]:
    learner = plan.make_learner(seed)
    steps = history["steps"] if history else []
    past = Past((), (), plan.stream.num_outputs)
    if history:
        past = _first(plan, history["learned"])
        for step in steps:
            added = None
            if step["kind"] == "add":
                at = step.get("task")
                added = (_copied(run, step), None) if at is None else _next(plan, at)
            past = _after(past, step, added)
        model = _network(plan, past)
        learner = Learner(model, learner.prior, seed=seed, **learner_options(plan.training))
    learner.load(run / f"seed-{seed}" / CHECKPOINT)
    return learner, past if history else _first(plan, len(learner.accuracy))


def _first(plan: Plan, learned: int) -> Past:
    tasks = list(plan.stream)[:learned]
    return Past(
        tuple(t.train for t in tasks), tuple(t.test for t in tasks), plan.stream.num_outputs
    )


def _network(plan: Plan, past: Past) -> nn.Module:
    """The benchmark's network, or one of other widths: its inputs, its activation."""
    model = plan.make_model(past.outputs)
    if past.hidden is None:
        return model
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = [type(m) for m in model.children() if not isinstance(m, (nn.Linear, nn.Flatten))]
    sizes = (layers[0].in_features, *past.hidden, past.outputs)
    return mlp(*sizes, activation=kinds[0] if kinds else nn.ReLU)


# -------------------------------------------------------------------- the five changes


def _change(
    learner: Learner,
    past: Past,
    change: Examples | Remove | Relabel | Regularise | Transfer,
    removed: Mapping[int, Examples],
    plan: Plan,
    options: Mapping[str, Any],
) -> Adapted:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(change, Examples):
            cost = learner.add(change, **options)
        elif isinstance(change, Remove):
            # A network's G is of several anchors, so that a part of it seldom fits into the rest.
            how: dict[str, Any] = {"on_indefinite": "clip"}
            *some, (last, examples) = removed.items()
            for task, others in some:  # one refit for all of them
                learner.prior = learner.prior.forget(learner.model, others, task=task, **how)
            cost = learner.remove(examples, task=last, **how, **options)
        elif isinstance(change, Relabel):
            right = _corrected(change, removed)
            *some, (last, examples) = removed.items()
            for task, others in some:
                labels = right[task].labels
                exactly = is_convex(learner.model, learner.prior)
                learner.prior = learner.prior.relabel(
                    learner.model, others, labels, task=task, exactly=exactly
                )
            cost = learner.relabel(examples, right[last].labels, task=last, **options)
        elif isinstance(change, Regularise):
            cost = learner.regularise(change.precision, **options)
        else:
            cost = _transferred(learner, past, change, plan, options)
    notes = tuple(dict.fromkeys(str(w.message) for w in caught if w.category in _NOTES))
    parts = [w.message.fraction for w in caught if isinstance(w.message, ClippedWarning)]
    not_held = sum(w.message.count for w in caught if isinstance(w.message, NotHeldWarning))
    return Adapted(learner, removed, cost, notes, max(parts, default=0.0), not_held)


_NOTES = (UserWarning, ClippedWarning, NotHeldWarning)


def _next(plan: Plan, number: int) -> Added:
    task = list(plan.stream)[number - 1]
    return task.train, task.test


def _added(change: Add, past: Past, plan: Plan) -> Added:
    if (change.task is None) == (change.file is None):
        raise UsageError("say what to add: --from FILE, or --task N of the benchmark")
    if change.task is not None:
        tasks = list(plan.stream)
        if change.task != len(past.train) + 1 or change.task > len(tasks):
            following = len(past.train) + 1
            told = f"the next one is {following}" if following <= len(tasks) else "all are learned"
            raise UsageError(
                f"--task {change.task} cannot be added: {told} ({len(tasks)} tasks); other "
                "examples come from --from FILE"
            )
        return _next(plan, change.task)
    examples = load(change.file)
    expected = next(iter(past.train)).batch(slice(0, 1)).inputs if past.train else None
    got = examples.batch(slice(0, 1)).inputs
    if isinstance(expected, Tensor) and isinstance(got, Tensor) and got.shape != expected.shape:
        if got.numel() != expected.numel():
            raise UsageError(
                f"{change.file} holds inputs of shape {tuple(got.shape[1:])}, the run learned "
                f"{tuple(expected.shape[1:])}; give examples of the same kind"
            )
        shape = (rows(examples.inputs), *expected.shape[1:])
        examples = replace(examples, inputs=examples.inputs.reshape(shape))  # type: ignore[union-attr]
    return replace(examples, head=change.head), None


def _labels_of(change: Relabel) -> dict[int, int]:
    """Id -> its right label."""
    if isinstance(change.label, int):
        return dict.fromkeys(change.ids, change.label)
    if len(change.label) != len(change.ids):
        raise UsageError(
            f"--to: expected one label, or one for each of the {len(change.ids)} ids, got "
            f"{len(change.label)}"
        )
    return dict(zip(change.ids, change.label, strict=True))


def _corrected(change: Relabel, chosen: Mapping[int, Examples]) -> dict[int, Examples]:
    """The same examples with their right labels."""
    right = _labels_of(change)
    return {
        task: replace(e, labels=torch.tensor([right[int(i)] for i in e.ids]).to(e.labels))
        for task, e in chosen.items()
    }


def _require_labels(change: Relabel, chosen: Mapping[int, Examples], outputs: int) -> None:
    for examples in _corrected(change, chosen).values():
        known = range(outputs) if examples.head is None else examples.head
        wrong = sorted({int(y) for y in examples.labels} - set(known))
        if wrong:
            listed = ", ".join(map(str, sorted(known)[:20]))
            raise UsageError(f"--to {wrong[0]}: the classes of these examples are {listed}")


def _chosen(change: Remove | Relabel, past: Past) -> dict[int, Examples]:
    """Task -> its examples that leave, or get another label."""
    label = change.label if isinstance(change, Remove) else None
    if change.ids is None and change.task is None and label is None:
        raise UsageError("say what to remove: --ids 3,5,9 or --ids @FILE, --task N, --label C")
    if change.task is not None and not 1 <= change.task <= len(past.train):
        raise UsageError(f"--task {change.task}: the run has learned tasks 1 to {len(past.train)}")
    found: dict[int, Examples] = {}
    for index, examples in enumerate(past.train):
        if change.task not in (None, index + 1):
            continue
        which = torch.ones(len(examples), dtype=torch.bool)
        if change.ids is not None:
            which &= torch.isin(examples.ids, torch.tensor(change.ids))
        if label is not None:
            which &= examples.labels == label
        if bool(which.any()):
            found[index] = examples[which.nonzero().squeeze(1)]
    of = "" if change.task is None else f" of task {change.task}"
    if change.ids is not None:
        known = {int(i) for examples in found.values() for i in examples.ids}
        missing = [i for i in change.ids if i not in known]
        if missing:
            listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise UsageError(
                f"--ids: {listed} {'are' if len(missing) > 1 else 'is'} not among the examples"
                f"{of} that the run has learned and still knows"
            )
        if sum(len(examples) for examples in found.values()) > len(known):
            raise UsageError("--ids: several tasks have examples of these ids; say --task N, too")
    if not found:
        raise UsageError(
            f"nothing to remove: no example{of} with label {label} is among those that the "
            "run has learned and still knows"
            if label is not None
            else f"nothing to remove: no example{of} is left"
        )
    return found


def _transferred(
    learner: Learner, past: Past, change: Transfer, plan: Plan, options: Mapping[str, Any]
) -> Refit:
    classes = _classes(change, past)
    if change.hidden is None and classes is None:
        raise UsageError("say what to change: --hidden 64,64, --classes N or --keep 0,1,4")
    if change.hidden is not None and learner.prior.memory is None:
        raise UsageError(
            f"the {learner.prior.recipe.name} prior of this run remembers no examples, and nothing "
            "else moves to other hidden layers; run with a memory, such as --prior kprior"
        )
    outputs = past.outputs if classes is None else len(classes)
    goal = Past((), (), outputs, past.hidden if change.hidden is None else change.hidden)
    how: dict[str, Any] = {"classes": classes}
    if change.hidden is not None:
        how |= {"parameters": {}, "allow_unmatched": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(learner.generator.initial_seed()))
        model = _network(plan, goal)
        model.to(device_of(learner.model))
        if isinstance(learner.prior.recipe.divergence, Logit):
            how["new_classes"] = "mask"  # no logit means that a class is impossible
        if classes is not None and not learner.prior.memory:
            # No memory tells which parameters the outputs are: here they are the last layer's.
            *_, (name, layer) = (p for p in model.named_modules() if isinstance(p[1], nn.Linear))
            how["head"] = tuple(f"{name}.{n}" for n, _ in layer.named_parameters())
        return learner.transfer(model, **how, **options)


def _classes(change: Transfer, past: Past) -> tuple[int | None, ...] | None:
    """For each new output the old one."""
    if change.outputs is None and change.keep is None:
        return None
    if change.keep is not None:
        wrong = [c for c in change.keep if not 0 <= c < past.outputs]
        if wrong or len(set(change.keep)) < len(change.keep):
            raise UsageError(f"--keep wants different classes of 0 to {past.outputs - 1}")
    keep = tuple(range(past.outputs)) if change.keep is None else change.keep
    outputs = len(keep) if change.outputs is None else change.outputs
    if outputs < len(keep):
        raise UsageError(
            f"--classes {outputs}: the network has {len(keep)}; say which are kept: --keep 0,1,4"
        )
    return (*keep, *([None] * (outputs - len(keep))))


# -------------------------------------------------------------------- what is left


def _step(change: Change, removed: Mapping[int, Examples], number: int) -> dict[str, Any]:
    """The change as plain values, from which ``_after`` tells what is left; number: which change
    of the run it is, from 1."""
    kind = type(change).__name__.lower()
    if isinstance(change, Remove):
        return {"kind": kind, "ids": {str(t): e.ids.tolist() for t, e in removed.items()}}
    if isinstance(change, Relabel):
        right = _labels_of(change)
        labels = {str(t): {str(int(i)): right[int(i)] for i in e.ids} for t, e in removed.items()}
        return {"kind": kind, "labels": labels}
    values = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in asdict(change).items()}
    step = {"kind": kind, **{k: v for k, v in values.items() if v is not None}}
    return {**step, "copy": f"added-{number}.safetensors"} if "file" in step else step


def _carry(
    folder: Path,
    run: Path,
    history: Mapping[str, Any],
    step: Mapping[str, Any],
    added: Added | None,
) -> list[dict[str, Any]]:
    """All steps of the new run, and in ``folder`` the copies of what they added from files, less
    what ``step`` removes; each step has its copy's sha256."""
    steps, task = [], history["learned"]
    for each in (*history["steps"], step):
        if "copy" in each:
            new = each is step and added is not None
            examples = added[0] if new else _copied(run, each)  # type: ignore[index]
            gone = torch.tensor(step.get("ids", {}).get(str(task), []), dtype=torch.int64)
            kept = examples[(~torch.isin(examples.ids, gone)).nonzero().squeeze(1)]
            read = kept.batch(slice(None))
            state = {"inputs": read.inputs, "labels": read.labels, "ids": read.ids}
            raw = dumps({**state, "head": kept.head}, kind=_COPY)
            write(folder / each["copy"], raw)
            each = {**each, "sha256": hashlib.sha256(raw).hexdigest()}
        task += each["kind"] == "add"
        steps.append(dict(each))
    return steps


_COPY = "examples"


def _copied(run: Path, step: Mapping[str, Any]) -> Examples:
    """What a step added from a file. Raises CheckpointError where the copy is not as it was."""
    path = run / step["copy"]
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: it holds examples that the run was given")
    if hashlib.sha256(path.read_bytes()).hexdigest() != step["sha256"]:
        raise CheckpointError(f"{path} is not as it was written; take the folder from a backup")
    state = load_checkpoint(path, kind=_COPY)
    head = state.pop("head")
    return Examples(**state, head=None if head is None else tuple(head))


def _after(past: Past, step: Mapping[str, Any], added: Added | None) -> Past:
    if added is not None:
        train, test = added
        return replace(past, train=(*past.train, train), tests=(*past.tests, test))
    if step["kind"] == "remove":
        train = list(past.train)
        for task, ids in step["ids"].items():
            examples = train[int(task)]
            kept = ~torch.isin(examples.ids, torch.tensor(ids))
            train[int(task)] = examples[kept.nonzero().squeeze(1)]
        return replace(past, train=tuple(train))
    if step["kind"] == "relabel":
        train = list(past.train)
        for task, labels in step["labels"].items():
            train[int(task)] = _with_labels(train[int(task)], labels)
        return replace(past, train=tuple(train))
    if step["kind"] == "transfer":
        hidden, keep = step.get("hidden"), step.get("keep")
        change = Transfer(
            None if hidden is None else tuple(hidden),
            step.get("outputs"),
            None if keep is None else tuple(keep),
        )
        classes = _classes(change, past)
        if classes is not None:
            past = replace(
                past,
                train=tuple(_relabelled(e, classes) for e in past.train),
                tests=tuple(None if e is None else _relabelled(e, classes) for e in past.tests),
                outputs=len(classes),
            )
        return past if change.hidden is None else replace(past, hidden=change.hidden)
    return past


def _with_labels(examples: Examples, labels: Mapping[str, int]) -> Examples:
    """With these labels, by id; ids that it does not have are of examples that have left."""
    values = examples.labels.clone()
    for name, label in labels.items():
        values[examples.ids == int(name)] = label
    return replace(examples, labels=values)


def _relabelled(examples: Examples, classes: Sequence[int | None]) -> Examples:
    """Those of the kept classes, with their new numbers."""
    where = {c: i for i, c in enumerate(classes) if c is not None}
    size = 1 + max(*where, int(examples.labels.max()) if len(examples) else 0)
    table = torch.tensor([where.get(c, -1) for c in range(size)])
    new = table[examples.labels]
    kept = (new >= 0).nonzero().squeeze(1)
    head = examples.head
    if head is not None:
        head = tuple(where[c] for c in head if c in where)
    return replace(examples, labels=new)[kept] if not head else replace(
        examples, labels=new, head=head
    )[kept]  # fmt: skip


# -------------------------------------------------------------------- what it came to


def _accuracies(
    model: nn.Module, past: Past, removed: Mapping[int, Examples]
) -> tuple[float | None, float | None]:
    """On the tests of the tasks, and on what is or was removed; see ``_mean``."""
    return _mean(model, past.tests), _mean(model, removed.values())


def _mean(model: nn.Module, tests: Iterable[Examples | None]) -> float | None:
    """Over the tasks, each counting the same, as the accuracy matrix does; None without tests."""
    held = [test for test in tests if test is not None and len(test)]
    each = [evaluate(model, test, Categorical()).accuracy for test in held]
    return sum(each) / len(each) if each else None


def _result(
    seed: int,
    name: str,
    found: Adapted,
    before: tuple[float | None, float | None],
    after: tuple[float | None, float | None],
) -> dict[str, Any]:
    cost = asdict(found.cost)
    count = sum(len(examples) for examples in found.removed.values())
    return {
        "seed": seed,
        "accuracy_before": before[0],
        "accuracy_after": after[0],
        **({name: count, f"{name}_before": before[1], f"{name}_after": after[1]} if count else {}),
        **{n: cost[n] for n in ("method", "iterations", "gradients", "seconds", "converged")},
        "notes": list(found.notes),
    }


def _retrained(
    learner: Learner, left: Past, plan: Plan, seed: int, options: Mapping[str, Any]
) -> tuple[dict[str, Any], nn.Module]:
    """A fresh network on all that is left, at once, to the same minimum under the same R: what it
    came to, and the network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _network(plan, left).to(device_of(learner.model))
    items = None
    for task, examples in enumerate(left.train):
        if not len(examples):
            continue
        batch = examples.batch(slice(None))
        blank = torch.zeros(len(examples), left.outputs)
        one = remember(batch, blank, head=examples.head, task=task).weighted(0.0, 1.0)
        items = one if items is None else items.add(one)
    regulariser = learner.prior.regulariser
    terms: list[Any] = [] if regulariser is None else [regulariser]
    if items is not None:
        terms.append(MemoryTerm(items))
    cost = refit(model, Prior(Categorical(), Recipe("joint"), tuple(terms)), **options)
    result = {
        "accuracy": _mean(model, left.tests),
        "gradients": cost.gradients,
        "seconds": cost.seconds,
        "method": cost.method,
        "converged": cost.converged,
    }
    return result, model


def _certify(
    folder: Path,
    certifying: Certifying,
    found: Adapted,
    origin: tuple[nn.Module, Prior],
    fresh: nn.Module | None,
    left: Past,
    fresh_seconds: float | None,
) -> list[str]:
    """Certificate and audit of one seed; what is to be known of the audit, which the note says too.

    An audit asks one head: where the removed examples are of tasks with several, it is of the task
    that loses most. Its attacks tell the removed examples from test examples of their classes: of
    others they would tell the class.
    """
    model, prior = origin
    heads = {left.train[task].head for task in found.removed}
    tasks, said = list(found.removed), []
    if len(heads) > 1:
        tasks = [max(tasks, key=lambda task: len(found.removed[task]))]
        said.append(f"The audit is of task {tasks[0] + 1}, which loses most of the examples.")
    kept = [left.train[task] for task in tasks if len(left.train[task])]
    tests = [test for task in tasks if (test := left.tests[task]) is not None and len(test)]
    listed = ("task " if len(tasks) == 1 else "tasks ") + ", ".join(str(t + 1) for t in tasks)
    checked = None
    if not kept:
        said.append(f"There is no audit: no example of {listed} is left to compare with.")
    elif not tests:
        said.append(f"There is no audit: there are no test examples of {listed}.")
    else:
        removed, test = _together([found.removed[task] for task in tasks]), _together(tests)
        same = test[torch.isin(test.labels, removed.labels).nonzero().squeeze(1)]
        others = same if len(same) >= 2 else test
        if len(removed) < 2:
            said.append("No attack was made: it compares at least two removed examples.")
        elif others is test and len(test) >= 2:
            said.append(
                "The attacks tell the removed examples from those of other classes: there are no "
                "two test examples of their own."
            )
        seconds = {"unlearning": found.cost.seconds}
        if fresh_seconds is not None:
            seconds["retraining"] = fresh_seconds
        checked = audit(
            model,
            found.learner.model,
            fresh,
            likelihood=prior.likelihood,
            removed=removed,
            kept=_together(kept),
            test=test,
            others=others,
            seconds=seconds,
        )
    certify_removal(
        folder,
        before=model,
        after=found.learner.model,
        prior_before=prior,
        prior_after=found.learner.prior,
        removed=found.removed,
        refit=found.cost,
        clipped=found.clipped,
        not_held=found.not_held,
        audit=checked,
        note=" ".join([certifying.note, *said]).strip(),
        key=certifying.key,
    )
    return said


def _together(parts: Sequence[Examples]) -> Examples:
    """Examples of one head, as one."""
    read = [part.batch(slice(None)) for part in parts]
    inputs, labels = concat([b.inputs for b in read]), torch.cat([b.labels for b in read])
    return Examples(inputs, labels, ids=torch.cat([b.ids for b in read]), head=parts[0].head)


def _write(
    partial: Path, run: Path, history: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    if (run / TOML).is_file():
        shutil.copy(run / TOML, partial / TOML)
    if (run / LOG).is_file():
        shutil.copy(run / LOG, partial / LOG)
    write(partial / VERSIONS, json.dumps(versions(), indent=2) + "\n")
    write(partial / ADAPTATION, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    content = json.loads((run / CONFIG).read_text(encoding="utf-8"))
    content["adaptations"] = history
    write(partial / CONFIG, json.dumps(content, indent=2, allow_nan=False) + "\n")
    log(partial, f"adapted from {run}: {json.dumps(summary['change'])[:200]}")
