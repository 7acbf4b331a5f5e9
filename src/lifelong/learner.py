"""``Learner``: the loop over fit, identify, memorise, recall, written once. The one mutable object.

    learner = Learner(model, lifelong.fromp(Categorical(), memory=40), epochs=15)
    matrix = learner.run(stream).accuracy

What was learned is changed by ``add``, ``remove``, ``regularise`` and ``transfer``.

It does nothing that a plain loop could not do: ``docs`` and the README show that loop.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checkpoint
from .augment import Augment
from .curvature.follow import followed
from .data import Data, Examples, Head, head_mask, shard
from .distributed import Ranks
from .errors import CheckpointError, NonFiniteError
from .memory import Memory, remember
from .metrics import AccuracyMatrix, Evaluation, evaluate
from .models import (
    Inputs,
    evaluating,
    forward,
    move,
    multiplies_bfloat16,
    parameters,
    require_finite,
    rows,
    snapshot,
)
from .path import PathIntegral
from .prior import Prior
from .refit import Refit, is_convex, refit, steps_of_removal
from .removal import OnIndefinite
from .streams import Task
from .terms import MemoryTerm, Regulariser, is_own
from .transfer import Classes, NewClasses, plan

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer, int], Any]


@dataclass(frozen=True)
class Progress:
    """Where a run is: after ``epoch`` of ``epochs`` in task ``task``; loss in nats per example."""

    task: int
    epoch: int
    epochs: int
    loss: float
    seconds: float


def adam(lr: float = 1e-3) -> MakeOptimizer:
    """Adam with the usual momenta: a fresh one for each task."""
    return lambda params: torch.optim.Adam(params, lr=lr)


def passes(count: int, *, epochs: int, batch_size: int, min_steps: int = 0) -> int:
    """Epochs over a task of ``count`` examples: ``epochs``, or as many as make ``min_steps``."""
    return max(epochs, -(-min_steps // -(-count // batch_size)))


class Learner:
    """Learns tasks one after another under a prior.

    model, prior: what is trained, and what the past says. optimizer: makes a fresh one for each
    task. scheduler: (optimizer, number of steps) -> a scheduler stepped after each batch.
    epochs, batch_size: of new data. memory_batch_size: remembered examples per step; None takes
    all of them. clip: largest norm of the gradient. autocast: a dtype for mixed precision.
    curvature_dtype: of products with Kronecker factors in training (``Prior.rounded``); "auto" is
    bfloat16 for a float32 model where the processor multiplies that faster, None rounds nothing.
    augment: changes inputs in training, new and remembered (``lifelong.augment``). min_steps: a
    task that makes fewer in ``epochs`` passes gets more of them.
    seed: of the order of the data, of augmentation and of every draw from memory.
    ranks: processes that train together, each with a learner of the same arguments and weights and
    with all of the data at hand. Each takes its part of every batch, and of the task for what
    follows it; gradients are added up, so that weights, prior and accuracies are those of one
    process, to rounding (augmentation, dropout and "mc" draw anew on each). Rank 0 writes files.
    Of what is drawn from memory each reads its part, too.
    """

    def __init__(
        self,
        model: nn.Module,
        prior: Prior,
        *,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        epochs: int = 1,
        batch_size: int = 64,
        memory_batch_size: int | None = None,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        augment: Augment | None = None,
        min_steps: int = 0,
        curvature_dtype: torch.dtype | Literal["auto"] | None = "auto",
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        if epochs < 1 or batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}"
            )
        if memory_batch_size is not None and memory_batch_size < 1:
            raise ValueError(
                f"memory_batch_size must be at least 1, or None for all, got {memory_batch_size}"
            )
        if min_steps < 0:
            raise ValueError(f"min_steps must be at least 0, got {min_steps}")
        if isinstance(curvature_dtype, str) and curvature_dtype != "auto":
            raise ValueError(
                f'curvature_dtype must be a dtype, "auto" or None, got {curvature_dtype!r}'
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {clip}")
        self.model, self.prior = model, prior
        self.optimizer, self.scheduler = optimizer or adam(), scheduler
        self.epochs, self.batch_size, self.memory_batch_size = epochs, batch_size, memory_batch_size
        self.clip, self.autocast = clip, autocast
        self.augment, self.min_steps, self.curvature_dtype = augment, min_steps, curvature_dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.ranks = ranks
        self.accuracy: list[list[float]] = []
        self.seconds = 0.0
        self.gradients = 0  # examples, new and remembered, whose loss was differentiated
        self._initial = copy.deepcopy(model.state_dict())
        self.finished: list[Mapping[str, Any]] = []  # of "separate": a model's state for each task
        self._within: dict[str, Any] | None = None  # of an unfinished task

    # ---------------------------------------------------------------- verbs

    def fit(self, task: Task, *, on_epoch: Callable[[Progress], None] | None = None) -> None:
        """theta* = argmin of nll + prior on one task; goes on within it after a resume.

        Raises NonFiniteError where the loss or a weight becomes NaN or infinite, ValueError or
        TypeError for labels outside of the head, beyond the outputs or of another type: then the
        model, the prior and the random states are put back to where they were when the call
        began. What ``on_epoch`` raises passes through, and the next call goes on after that epoch.
        """
        with closing(self._epochs(task)) as epochs:
            for progress in epochs:
                if on_epoch is not None:
                    on_epoch(progress)

    def identify(self, task: Task) -> Tensor:
        """(N,) scores by the prior's recipe."""
        return self.prior.identify(self.model, task.train, generator=self.generator)

    def memorise(self, task: Task) -> Memory | None:
        """The examples of the task that the prior would keep."""
        return self.prior.memorise(self.model, self._shared(task), generator=self.generator)

    def recall(self, task: Task, items: Memory | None = None) -> Prior:
        """Make the learned posterior the next prior, keeping ``items``."""
        self.prior = self.prior.recall(
            self.model, self._shared(task), items, path=self._path, generator=self.generator
        )
        return self.prior

    def learn(self, task: Task, *, on_epoch: Callable[[Progress], None] | None = None) -> None:
        """fit, then memorise and recall."""
        self.fit(task, on_epoch=on_epoch)
        self.conclude(task)

    def conclude(self, task: Task) -> None:
        """memorise and recall: what follows ``fit`` in ``learn``."""
        start = time.perf_counter()
        if self.prior.recipe.reference == "separate":
            self.finished.append(copy.deepcopy(self.model.state_dict()))
        self.recall(task, self.memorise(task))
        self.seconds += time.perf_counter() - start

    # ---------------------------------------------------------------- adaptations
    #
    # A change of the prior, a refit from the present weights, and the prior seen from there. What
    # raises leaves the learner, its model and its prior as they were.

    def add(self, data: Task | Examples, **options: Any) -> Refit:
        """Learn more examples, from where the model is to the minimum of their nll and the prior,
        in eval mode and by second-order steps where they apply: ``learn`` trains by the learner's
        own optimiser and epochs instead.

        Of fewer examples than the prior keeps of a task, it keeps all.
        options: of ``refit`` (method, tolerance, max_iterations, lr, ...), here and below.
        Returns what it cost. Raises as ``refit`` and ``Prior.update``; ValueError within a task,
        for a learner of separate models, and for a prior that learns from the path of training.
        """
        examples = data.train if isinstance(data, Task) else data
        if self.prior.recipe.structure == "path":
            raise ValueError(
                f"the {self.prior.recipe.name} prior learns from the path of training; expected "
                "learn(task), which watches it"
            )
        with self._adapting() as finish:
            prior = self.prior
            if not prior.recipe.equal_tasks:  # a few more examples are no task beside the others
                prior = prior.prepare(self.model, examples)
            done = refit(self.model, prior, examples, **options)
            whole, kept = prior.recipe, prior.recipe.memory
            kept = min(kept, len(examples)) if isinstance(kept, int) else kept  # of a few, all
            once = replace(whole, memory=kept, equal_tasks=False)
            prior = replace(prior, recipe=once)
            prior = prior.update(self.model, examples, generator=self.generator)
            finish(replace(prior, recipe=whole), self.model)
        return done

    def remove(
        self,
        data: Task | Examples | None = None,
        *,
        task: int | None = None,
        ids: Tensor | None = None,
        where: Callable[[Memory], Tensor] | None = None,
        groups: Tensor | Sequence[int] | None = None,
        head: Head | None = None,
        on_indefinite: OnIndefinite = "raise",
        **options: Any,
    ) -> Refit:
        """Unlearn examples: ``Prior.forget`` (which says what the arguments are), and a refit
        to what the others say. The soft labels of those are then asked for again, so that they
        are of a model that did not see the examples. A network takes a few steps where method and
        max_iterations are not given (``refit.steps_of_removal``). Raises as ``Prior.forget`` and
        ``add``."""
        examples = data.train if isinstance(data, Task) else data
        with self._adapting() as finish:
            prior = self.prior.forget(
                self.model,
                examples,
                task=task,
                ids=ids,
                where=where,
                groups=groups,
                head=head,
                on_indefinite=on_indefinite,
            )
            done = self._in_few_steps(prior, options)
            finish(prior.rebase(self.model), self.model)
        return done

    def relabel(
        self,
        data: Task | Examples,
        labels: Tensor | Sequence[Any],
        *,
        task: int | None = None,
        head: Head | None = None,
        **options: Any,
    ) -> Refit:
        """Correct labels of the past: ``Prior.relabel`` (which says what the arguments are; exactly
        where the objective is convex), and a refit to what the examples say now. A network takes
        a few steps, as in ``remove``. Raises as ``Prior.relabel`` and ``add``."""
        examples = data.train if isinstance(data, Task) else data
        with self._adapting() as finish:
            exactly = is_convex(self.model, self.prior)
            prior = self.prior.relabel(
                self.model, examples, labels, task=task, exactly=exactly, head=head
            )
            done = self._in_few_steps(prior, options)
            finish(prior.rebase(self.model), self.model)
        return done

    def regularise(self, regulariser: Regulariser | float, **options: Any) -> Refit:
        """Change R, given as such or by its precision round 0, and refit. Raises as ``add``."""
        if not isinstance(regulariser, Regulariser):
            regulariser = Regulariser(regulariser)
        with self._adapting() as finish:
            prior = self.prior.replace(regulariser=regulariser)
            done = refit(self.model, prior, **options)
            finish(prior.rebase(self.model), self.model)
        return done

    def transfer(
        self,
        model: nn.Module,
        *,
        parameters: Mapping[str, str] | None = None,
        classes: Classes | None = None,
        head: Sequence[str] | None = None,
        new_classes: NewClasses = "zero",
        labels: bool | None = None,
        structure: Literal["diagonal", "dense"] | None = None,
        allow_unmatched: bool = False,
        **options: Any,
    ) -> Refit:
        """Go on with another model: ``Prior.transfer`` (which says what the arguments are), and a
        refit from the weights that both models have and the new model's own others. Buffers and
        frozen parameters of equal name and shape are copied, unless ``parameters`` maps names.

        ``model`` is the learner's from then on; the old one is left as it is. Raises as
        ``Prior.transfer`` and ``add``; the new model's weights are then as they were, too.
        """
        how: dict[str, Any] = {"classes": classes, "head": head, "previous": self.model}
        how |= {"allow_unmatched": allow_unmatched}
        before = copy.deepcopy(model.state_dict())
        try:
            with self._adapting() as finish:
                places = plan(
                    self.prior.terms,
                    model,
                    names=parameters,
                    curvature=self.prior.curvature,
                    **how,
                )
                prior = self.prior.transfer(
                    model,
                    parameters=parameters,
                    new_classes=new_classes,
                    labels=labels,
                    structure=structure,
                    **how,
                )
                old = snapshot(_parameters(self.model))
                start: dict[str, Tensor] = {}
                if parameters is None:  # also what is not trained here or there
                    start = {
                        n: v
                        for n, v in self.model.state_dict().items()
                        if n in before and v.shape == before[n].shape
                    }
                shared = {n: p for n, p in places.places.items() if p.old is not None}
                start |= followed(old, {n: places.current[n] for n in shared}, shared)
                model.load_state_dict(start, strict=False)
                done = refit(model, prior, **options)
                finish(prior.rebase(model), model)
        except BaseException:
            model.load_state_dict(before)
            raise
        self._initial = before
        return done

    def _in_few_steps(self, prior: Prior, options: Mapping[str, Any]) -> Refit:
        """A refit after what can be trusted near the anchor alone (``steps_of_removal``)."""
        rest = dict(options)
        chosen = (rest.pop(name, default) for name, default in _OF_REFIT.items())
        method, steps = steps_of_removal(self.model, prior, *chosen)
        return refit(self.model, prior, method=method, max_iterations=steps, **rest)

    @contextmanager
    def _adapting(self) -> Iterator[Callable[[Prior, nn.Module], None]]:
        """Gives what ends an adaptation: it takes the prior and the model from then on."""
        if self._within is not None:
            raise ValueError(
                "a task is half learned; let fit(task) or run(stream) end before the learner is "
                "adapted"
            )
        if self.prior.recipe.reference == "separate":
            raise ValueError(
                "a learner of separate models has one for each task; expected one model and its "
                "prior, such as kprior, to adapt"
            )
        undo, start = self._undo(), time.perf_counter()

        def finish(prior: Prior, model: nn.Module) -> None:
            self.prior, self.model = prior, model

        try:
            yield finish
        except BaseException:
            undo()
            raise
        self.seconds += time.perf_counter() - start

    def run(
        self,
        stream: Iterable[Task],
        *,
        folder: str | Path | None = None,
        save_every: float = 0.0,
        ahead: bool = False,
        on_epoch: Callable[[Progress], None] | None = None,
        on_task: Callable[[int], None] | None = None,
    ) -> AccuracyMatrix:
        """Learn every task and test on those seen so far; with ``folder``, save after each epoch
        and each task, but not within ``save_every`` seconds of the last time, and at the end.

        A learner that was loaded goes on where it was, and ends with the same numbers. ahead: test
        on the next task too, before it is learned (``AccuracyMatrix.zero_shot_transfer``).
        Raises ValueError where a task has no test examples, OSError where the folder cannot be
        written, and as ``fit`` and ``Prior.update``.
        """
        if folder is not None:
            self.save(Path(folder) / CHECKPOINT)  # a folder that cannot be written shows now
        last, behind = time.monotonic(), False

        def save(*, now: bool = False) -> None:
            nonlocal last, behind
            behind = not (now or time.monotonic() - last >= save_every)
            if self.ranks is not None:  # clocks differ, and all save together
                behind = self.ranks.objects(behind)[0]
            if folder is not None and not behind:
                self.save(Path(folder) / CHECKPOINT)
                last = time.monotonic()

        def saved(progress: Progress) -> None:
            save()
            if on_epoch is not None:
                on_epoch(progress)

        seen: list[Task] = []
        pairs = _with_next(stream) if ahead else ((task, None) for task in stream)
        for index, (task, following) in enumerate(pairs):
            if task.test is None:
                raise ValueError(f"task {task.name!r} has no test examples; call learn() instead")
            seen.append(task)
            if index < len(self.accuracy):
                continue
            self._require_labels(task.test)  # told before the training that it would test
            self.learn(task, on_epoch=saved)
            tested = seen if following is None else [*seen, following]
            self.accuracy.append([self.test(old, i).accuracy for i, old in enumerate(tested)])
            save()
            if on_task is not None:
                on_task(index)
        if behind:
            save(now=True)
        return self.matrix

    @property
    def matrix(self) -> AccuracyMatrix:
        """R[t, i]: accuracy on task i after task t, 0 to 1; NaN where not tested."""
        size = len(self.accuracy)
        return AccuracyMatrix.from_list(
            [[*row, *([float("nan")] * (size - len(row)))][:size] for row in self.accuracy]
        )

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Everything that is needed to go on with the same numbers; atomic."""
        prior = self.prior
        if self.ranks is not None:  # of a spread memory all parts, so that any ranks can go on
            prior = prior.collected(self.ranks)
        state = {
            "model": self.model.state_dict(),
            "initial": self._initial,
            "finished": self.finished,
            "prior": prior.state_dict(),
            "accuracy": self.accuracy,
            "seconds": self.seconds,
            "gradients": self.gradients,
            "within": self._within,
            "generator": self.generator.get_state(),
            "global_random": self._random_states(),
        }
        if self.ranks is None:
            return checkpoint.save(path, state, kind="learner")
        if self.ranks.rank == 0:
            checkpoint.save(path, state, kind="learner")
        self.ranks.objects(None)  # nobody goes on, or reads it, before it is there
        return Path(path)

    def load(self, path: str | Path) -> Learner:
        """Go on from ``save``.

        Raises FileNotFoundError; CheckpointError where the file cannot be read or is of another
        model. Then nothing was changed.
        """
        state = checkpoint.load(path, kind="learner")
        try:
            own = [term for term in self.prior.terms if is_own(term)]
            prior = Prior.from_state_dict(state["prior"], own=own)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} holds a prior that cannot be read ({error!r}); upgrade lifelong, or use "
                "the last good one"
            ) from error
        saved, current = (
            {name: getattr(value, "shape", None) for name, value in values.items()}
            for values in (state["model"], self.model.state_dict())
        )
        if saved != current:
            different = sorted(n for n in saved | current if saved.get(n) != current.get(n))
            raise CheckpointError(
                f"{path} is of another model: {different[:5]} differ in name or shape; build the "
                "model as it was when it was saved"
            )
        self.model.load_state_dict(state["model"])
        if self.ranks is not None and self.prior.shards > 1:
            prior = prior.spread(self.ranks)
        self.prior, self._initial = prior, state["initial"]
        self.finished, self.accuracy = state["finished"], state["accuracy"]
        self.seconds, self._within = state["seconds"], state["within"]
        self.gradients = state.get("gradients", 0)
        self.generator.set_state(state["generator"])
        self._set_random_state(state["global_random"])
        return self

    # ---------------------------------------------------------------- inside

    def _random_states(self) -> Tensor:
        """torch's random state; of all ranks, one below the other, since dropout draws on each."""
        state = torch.get_rng_state()
        return state if self.ranks is None else self.ranks.gather(state[None])

    def _set_random_state(self, states: Tensor) -> None:
        """This rank's; the first one's where there were another number of them."""
        states = states.reshape(-1, len(torch.get_rng_state()))
        same = self.ranks is not None and len(states) == self.ranks.size
        # A copy: a state that lies within another tensor was seen to end the process.
        mine = states[self.ranks.rank if self.ranks is not None and same else 0]
        torch.set_rng_state(mine.clone())

    _path: PathIntegral | None = None

    def _epochs(self, task: Task) -> Generator[Progress]:
        """Train epoch by epoch; whatever goes wrong here, and not in the caller, is undone."""
        undo, data, within = self._undo(), task.train, self._within
        try:
            self._require_labels(data)
            reference = self.prior.recipe.reference
            if within is None:
                if reference is not None:
                    self.model.load_state_dict(self._initial)
                self.prior = self.prior.prepare(self.model, self._shared(task))
            prior = self.prior
            params = list(parameters(self.model).values())
            pool = self._pool(data) if reference == "joint" else None
            count = len(data) if pool is None else len(pool.memory)
            optimizer = self.optimizer(params)
            epochs = self.epochs_of(count)
            steps = epochs * -(-count // self.batch_size)
            scheduler = None if self.scheduler is None else self.scheduler(optimizer, steps)
            path = None
            if prior.recipe.structure == "path":
                path = PathIntegral(self.model, optimizer, prior, count)
            self._path = path
            first, start = 0, time.perf_counter()
            if within is not None:
                # An optimiser goes on in the tensors that it is given.
                optimizer.load_state_dict(copy.deepcopy(within["optimizer"]))
                if scheduler is not None:
                    scheduler.load_state_dict(within["scheduler"])
                if path is not None:
                    path.load_state_dict(within["path"])
                first, start = within["epoch"], start - within["seconds"]
            prior = self._rounded(prior, params)
            with path if path is not None else nullcontext():
                for epoch in range(first, epochs):
                    loss = self._epoch(data, pool, prior, optimizer, scheduler, params)
                    seconds = time.perf_counter() - start
                    self._within = {
                        "optimizer": optimizer.state_dict(),
                        "scheduler": None if scheduler is None else scheduler.state_dict(),
                        "path": None if path is None else path.state_dict(),
                        "epoch": epoch + 1,
                        "seconds": seconds,
                    }
                    yield Progress(len(self.accuracy), epoch + 1, epochs, loss, seconds)
        except Exception:
            undo()
            raise
        self._within = None
        self.seconds += time.perf_counter() - start

    def epochs_of(self, count: int) -> int:
        """Passes over a task of ``count`` examples."""
        return passes(
            count, epochs=self.epochs, batch_size=self.batch_size, min_steps=self.min_steps
        )

    def _augmented(self, inputs: Inputs) -> Inputs:
        if self.augment is None:
            return inputs
        return self.augment(inputs, self.generator if self._own is None else self._own)

    _own: torch.Generator | None = None  # of what a rank draws by itself, in one epoch

    def _shared(self, task: Task) -> Data:
        """A task for what follows its training: a rank's part of it where there are ranks."""
        if self.ranks is None:
            return task.train
        count = len(task.train)
        start, stop = (count * (self.ranks.rank + i) // self.ranks.size for i in (0, 1))
        mine = task.train[start:stop]
        return shard(mine, self.ranks, ids=mine.ids)

    def _mine(self, index: Tensor) -> Tensor:
        """A rank's part of a batch."""
        return index if self.ranks is None else index[self.ranks.rank :: self.ranks.size]

    def _summed(self, params: list[nn.Parameter], loss: Tensor) -> Tensor:
        """The gradients of all ranks in place of this one's, and the sum of their losses: all of
        them see one that is not finite, so that all of them stop."""
        if self.ranks is None:
            return loss
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        *grads, loss = self.ranks.sum([*grads, loss.detach()])
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        if self._path is not None:
            self._path.keep()
        return loss

    def _loss(self, prior: Prior, data: Examples, part: Tensor, size: int) -> Tensor:
        """Nats per example of a batch of ``size``, of which ``part`` is this rank's: over the ranks
        the losses add up to that of one process."""
        count, device = len(data), self._device
        share = 1 if self.ranks is None else self.ranks.size
        memory: dict[str, Any] = {"batch_size": self.memory_batch_size, "generator": self.generator}
        memory["ranks"] = self.ranks
        if len(part) == 0:
            return prior(self.model, **memory) / (share * count)
        inputs, labels, _ = data.batch(part)
        weight = len(part) / size
        loss = prior.loss(
            self.model,
            move(inputs, device),
            move(labels, device),
            num_data=count if self.ranks is None else weight * share * count,
            head=data.head,
            augment=None if self.augment is None else self._augmented,
            **memory,
        )
        return loss if self.ranks is None else weight * loss

    def _undo(self) -> Callable[[], None]:
        """What puts everything that ``fit`` changes back to where it is now."""
        state = copy.deepcopy(self.model.state_dict())
        modes = [(module, module.training) for module in self.model.modules()]
        prior, within, path = self.prior, self._within, self._path
        gradients = self.gradients
        random, global_random = self.generator.get_state(), torch.get_rng_state()

        def undo() -> None:
            self.model.load_state_dict(state)
            for module, training in modes:
                module.training = training
            self.prior, self._within, self._path = prior, within, path
            self.gradients = gradients
            self.generator.set_state(random)
            torch.set_rng_state(global_random)

        return undo

    def _require_labels(self, data: Examples) -> None:
        """All labels are ones that the model can learn; told before the first step."""
        f, labels = self._output_of_one(data), move(data.labels, self._device)
        mask = head_mask(data.head, f.shape[1], f.device)
        self.prior.likelihood.validate(f.expand(len(labels), -1), labels, mask)

    def _output_of_one(self, data: Examples) -> Tensor:
        with evaluating(self.model), torch.no_grad():
            return forward(self.model, move(data.batch(slice(0, 1)).inputs, self._device))

    def _epoch(
        self,
        data: Examples,
        pool: MemoryTerm | None,
        prior: Prior,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        params: list[nn.Parameter],
    ) -> float:
        """One pass over the data; the mean loss, nats per example."""
        self.model.train()
        count = len(data) if pool is None else len(pool.memory)
        device = params[0].device
        total = 0.0
        remembered = 0 if pool is not None else prior.num_drawn(self.memory_batch_size)
        order = torch.randperm(count, generator=self.generator)
        if self.ranks is not None and self.augment is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator))
            self._own = torch.Generator().manual_seed(seed + self.ranks.rank)
        share = 1 if self.ranks is None else self.ranks.size
        for index in order.split(self.batch_size):
            optimizer.zero_grad(set_to_none=True)
            part = self._mine(index)
            with self._precision(device):
                if pool is None:
                    loss = self._loss(prior, data, part, len(index))
                else:
                    loss = prior.weight_space(self.model) / (share * count)
                    if len(part):
                        drawn = pool.memory[part].to(device)
                        f = forward(self.model, self._augmented(drawn.inputs))
                        f = f.float() if self.autocast else f
                        loss = pool.value(f, drawn, prior.likelihood) / len(index) + loss
            if loss.requires_grad:  # a rank may have nothing to say
                loss.backward()
            loss = self._summed(params, loss)
            if not torch.isfinite(loss):
                raise NonFiniteError(
                    f"the loss became {loss.item()} after {total / max(1, count):.4g} nats per "
                    "example; lower the learning rate or clip the gradient. The model was put "
                    "back to where this task began"
                )
            if self.clip is not None:
                nn.utils.clip_grad_norm_(params, self.clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total += loss.item() * len(index)
            self.gradients += len(index) + remembered
        for name, p in parameters(self.model).items():  # a gradient can overflow where no loss does
            require_finite(p, f"the parameter {name}")
        return total / count

    def _precision(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    def _rounded(self, prior: Prior, params: Sequence[nn.Parameter]) -> Prior:
        """The prior as the steps of training see it."""
        dtype = self.curvature_dtype
        if isinstance(dtype, str):
            single = all(p.dtype == torch.float32 for p in params)
            faster = single and multiplies_bfloat16(params[0].device.type)
            dtype = torch.bfloat16 if faster else None
        return prior if dtype is None else prior.rounded(dtype)

    def _pool(self, data: Examples) -> MemoryTerm:
        """All examples so far, each under its own head: what joint training trains on."""
        batch = data.batch(slice(None))
        place = batch.labels.device  # of the whole pool; what is drawn is moved
        blank = torch.zeros(rows(batch.inputs), self._output_of_one(data).shape[1], device=place)
        items = remember(batch, blank, head=data.head).weighted(0.0, 1.0)
        old = self.prior.memory
        return MemoryTerm(items if old is None else old.to(place).add(items.to(place)))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def model_of(self, index: int) -> nn.Module:
        """What answers for task ``index``: the model, or of "separate" a copy with its weights."""
        if index >= len(self.finished):
            return self.model
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.finished[index])
        return model

    def test(self, task: Task, index: int | None = None) -> Evaluation:
        """How good ``model_of(index)`` (by default the task's own number) is on the test examples,
        in the precision that it was trained in. Raises ValueError where there are none, and as
        ``lifelong.evaluate``."""
        if task.test is None:
            raise ValueError(f"task {task.name!r} has no test examples")
        model = self.model_of(task.index if index is None else index)
        with self._precision(self._device):
            return evaluate(model, task.test, self.prior.likelihood)


def _with_next(stream: Iterable[Task]) -> Iterator[tuple[Task, Task | None]]:
    """Each task with the one that follows it."""
    tasks = iter(stream)
    task = next(tasks, None)
    while task is not None:
        following = next(tasks, None)
        yield task, following
        task = following


_parameters = parameters  # of a model: ``transfer`` has an argument of this name

CHECKPOINT = "learner.safetensors"
_OF_REFIT: dict[str, Any] = {"method": "auto", "max_iterations": None}
