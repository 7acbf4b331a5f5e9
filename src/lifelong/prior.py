r"""``Prior``: what the past says about the weights, as a function of the model, in nats.

    Prior(theta) = R(theta) + <g, d> + ½ <d, G d> + sum_function D + sum_replay l

Every past example's gradient at the anchor is carried exactly once, and so is its curvature. A
method is a choice of terms (``terms.py``) and a ``Recipe`` that says how they are made again
after each task. Three fall out:

    EWC                      Recipe(structure="diagonal", gradient="anchored")
    a K-prior                Recipe(precision=delta, memory=200, gradient="stationary")
    gradient reconstruction  Recipe(structure="diagonal", memory=200, gradient="stored")

A prior is frozen: ``update``, ``replace``, ``forget`` and the rest return a new one, so that
yesterday's prior cannot change under you and a run can be replayed.
Sources: Khan & Swaroop 2021; Daxberger et al. 2023; Kirkpatrick et al. 2017; Pan et al. 2020.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import checkpoint, likelihoods, recall, removal, select
from .averaging import averaged
from .budget import Fidelity
from .curvature import Curvature, Diagonal, diagonal_curvature
from .curvature import from_state_dict as curvature_from_state_dict
from .curvature.block_diagonal import is_rounded
from .curvature.follow import follow
from .data import (
    BATCH_SIZE,
    Data,
    Head,
    Shard,
    every_label,
    head_mask,
    head_of,
    num_examples,
    require_repeatable,
    whole,
)
from .distributed import Ranks
from .divergences import Logit
from .errors import ClippedWarning, StaleAnchorError
from .groups import Groups
from .likelihoods import Likelihood, require_likelihood
from .memory import Memory, Sample, is_top, memorise
from .models import (
    Inputs,
    Params,
    concat,
    evaluating,
    forward,
    forward_at,
    match,
    parameters,
    read,
    require_finite,
    rows,
    snapshot,
    unwrapped,
)
from .named import named, unnamed
from .notebook import table
from .path import PathIntegral
from .recall import Pass, Terms
from .recipe import Recipe
from .removal import OnIndefinite
from .scores import identify
from .sharded import is_sharded
from .terms import (
    KernelTerm,
    MemoryTerm,
    Regulariser,
    WeightTerm,
    complete,
    is_belief,
    is_own,
    kernel_term,
    term_state,
    terms_from_states,
)
from .terms import to as move_term
from .transfer import ABSENT, Classes, NewClasses, plan, renamed_heads, require_classes
from .transfer import transfer as _transfer

_IN_MEMORY = (MemoryTerm, KernelTerm)


@dataclass(frozen=True, eq=False, repr=False)
class Prior:
    """A sum of terms in nats, and the recipe that remakes them.

    likelihood: of the outputs. recipe: see ``Recipe``. terms: summed. curvature: of the past
    data, where only the kernels of FROMP use it. num_data, num_tasks: what has been learned.
    heads: the class sets that occurred. strengths: of each task's curvature, given or found.
    beliefs: by how much each task was multiplied since (``discount``, ``*``), 1 for a new one.
    task_size: for how many examples each task counts, where the recipe makes them equal; else 0.
    shards: over how many ranks the memory is spread (``spread``); 1 where it is all here.

    A model may come in its wrapper (DistributedDataParallel, ``torch.compile``): names are those of
    the module inside, which is also what memory is asked of.
    """

    likelihood: Likelihood
    recipe: Recipe = field(default_factory=Recipe)
    terms: Terms = ()
    curvature: Curvature | None = None
    num_data: int = 0
    num_tasks: int = 0
    heads: tuple[Head | None, ...] = ()
    strengths: tuple[float, ...] = ()
    beliefs: tuple[float, ...] = ()
    task_size: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        require_likelihood(self.likelihood)
        unsaid = (1.0,) * (self.num_tasks - len(self.beliefs))
        object.__setattr__(self, "beliefs", self.beliefs + unsaid)

    def __repr__(self) -> str:
        """What it is of and how large, and not all of its numbers."""
        remembered = sum(len(t.memory) for t in self.terms if isinstance(t, _IN_MEMORY))
        return (
            f"Prior({self.recipe.name}, {self.likelihood!r}, "
            f"{self.num_data:,} examples in {self.num_tasks} tasks, {remembered:,} remembered, "
            f"{self.num_bytes:,} bytes)"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("of", f"{self.num_data:,} examples in {self.num_tasks} tasks"),
            ("likelihood", repr(self.likelihood)),
            *((type(t).__name__, f"{t.num_bytes:,} bytes") for t in self.terms),
        ]
        if self.curvature is not None:
            rows.append(("G", type(self.curvature).__name__))
        if self.strengths:
            rows.append(("strengths", ", ".join(f"{s:.3g}" for s in self.strengths[:20])))
        return table(f"Prior: {self.recipe.name}", rows)

    # ---------------------------------------------------------------- value

    def __call__(
        self,
        model: nn.Module,
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """Nats, a scalar with a gradient in the model's parameters.

        batch_size: items drawn from each memory instead of all of it: an unbiased estimate, at a
        cost that does not grow with the number of tasks. The memory is read in eval mode.
        ranks: each reads its part of what is drawn, with generators in one state, and the mean of
        their values and gradients, as DistributedDataParallel takes it, is that of one process.
        Raises StaleAnchorError where the model is no longer the one that the prior knows,
        ValueError for a memory that is spread over another number of ranks. Given
        DistributedDataParallel, its backward raises ValueError where that would leave gradients
        on this rank (``averaging``).
        """
        wrapper, model = model, unwrapped(model)
        value, drawn = self.weight_space(model), self._draw(batch_size, generator, ranks)
        if drawn:
            with evaluating(model):
                f = forward(model, concat([sample.inputs for _, sample in drawn]))
            value = value + self._function_space(f, drawn)
        return averaged(value, wrapper)

    def loss(
        self,
        model: nn.Module,
        inputs: Inputs,  # (B, ...)
        labels: Tensor,  # (B,) or (B, C)
        *,
        num_data: float,
        head: Head | None = None,
        batch_size: int | None = None,
        augment: Callable[[Inputs], Inputs] | None = None,
        generator: torch.Generator | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """mean nll of the batch + prior / num_data: nats per example, in one forward pass.

        The same as ``nll.mean() + prior(model, ...) / num_data``, with new data and memory in one
        batch. A model with modules that act differently in training (dropout, batch
        normalisation, a forward that reads ``self.training``) takes two passes, so that the memory
        is still read in eval mode.

        augment: changes both kinds of inputs for this step. A remembered input then answers for
        the soft label of the unchanged one, as in Daxberger et al. 2023; or, by ``Recipe.ask``, for
        what the anchor says of the changed one, as in Beyer et al. 2022: then the divergence is
        still 0 and flat at the anchor. g and G are of the inputs as they are.
        What kernels couple is never changed: their means are of one input each.
        ranks: inputs and labels are this rank's; the prior is as in a call with ``ranks``.
        Raises ValueError or TypeError for labels outside of the head, beyond the outputs or of
        another type, for a batch without examples and a num_data that is not positive;
        StaleAnchorError as calling the prior does.
        """
        if not num_data > 0:
            raise ValueError(
                f"num_data must be the number of examples of the task at hand, got {num_data}"
            )
        n = rows(inputs)
        if n == 0:  # whose mean is NaN, and then all weights are
            raise ValueError("the batch holds no examples; pass at least one, or call prior(model)")
        wrapper, model = model, unwrapped(model)  # new data go through it: it adds up gradients
        past = self.weight_space(model)  # first: FSDP2's root keeps whole weights after a forward
        drawn = self._draw(batch_size, generator, ranks)
        remembered = [read(sample.inputs) for _, sample in drawn]
        if augment is not None:
            inputs = augment(inputs)
            remembered = [
                x if isinstance(term, KernelTerm) else augment(x)
                for (term, _), x in zip(drawn, remembered, strict=True)
            ]
        if not drawn or _mode_matters(model):
            f_new = forward(wrapper, inputs)
            if drawn:
                with evaluating(model):
                    f_old = forward(model, concat(remembered))
        else:
            f_new, f_old = forward(wrapper, concat([inputs, *remembered])).tensor_split([n])
        f_new = _at_least_float32(f_new)
        mask = head_mask(head, f_new.shape[1], f_new.device)
        if labels.device.type == "cpu":  # elsewhere the check would wait for the device
            self.likelihood.validate(f_new.detach(), labels, mask)
        nll = self.likelihood.nll(self.likelihood.mask(f_new, mask), labels).mean()
        if drawn:
            asked = self._asked(model, drawn, remembered) if augment is not None else None
            past = past + self._function_space(f_old, drawn, asked)  # type: ignore[possibly-undefined]
        return nll + past / num_data

    def weight_space(self, model: nn.Module) -> Tensor:
        """Nats of the terms that need the weights alone: all of the prior but its memories."""
        model = unwrapped(model)
        first = next(model.parameters())
        with _full_precision(first.device):
            values = [term(model) for term in self._weight_space_terms]
            if not values:
                return torch.zeros((), dtype=first.dtype, device=first.device)
            return sum(values[1:], start=values[0])

    def rounded(self, dtype: torch.dtype = torch.bfloat16) -> Prior:
        """The same prior with the Kronecker factors of G in ``dtype``, for the steps of training.

        A product with a Kronecker G costs as much as a small network's own step, and in bfloat16 a
        quarter of that where the processor multiplies it (``models.multiplies_bfloat16``); its
        relative error is about 0.4 %. Update and save the prior that it was made of.
        """
        terms = tuple(t.rounded(dtype) if isinstance(t, WeightTerm) else t for t in self.terms)
        same = all(new is old for new, old in zip(terms, self.terms, strict=True))
        return self if same else replace(self, terms=terms)

    @cached_property
    def _weight_space_terms(self) -> list[Callable[[nn.Module], Tensor]]:
        return complete(self.terms)

    def num_drawn(self, batch_size: int | None = None) -> int:
        """Remembered examples that one value reads, with ``batch_size`` drawn from each memory."""
        held = [term for term in self.terms if isinstance(term, _IN_MEMORY)]
        return sum(term.num_drawn(batch_size) for term in held)

    def _draw(
        self, n: int | None, generator: torch.Generator | None, ranks: Ranks | None = None
    ) -> list[tuple[Any, Any]]:
        held = [t for t in self.terms if isinstance(t, _IN_MEMORY) and len(t.memory)]
        if ranks is not None and self.shards > 1:
            self._require_shards(ranks)
            if generator is not None and n is not None:  # parts differ in length, and in draws
                seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
                generator = torch.Generator(generator.device).manual_seed(seed + ranks.rank)
            n = None if n is None else -(-n // ranks.size)
        drawn = [(term, term.draw(n, generator)) for term in held]
        if ranks is None or self.shards > 1:
            return drawn
        parts = [(term, sample.part(ranks.rank, ranks.size)) for term, sample in drawn]
        return [(term, part) for term, part in parts if len(part)]

    def _asked(
        self, model: nn.Module, drawn: list[tuple[Any, Any]], inputs: list[Inputs]
    ) -> list[Tensor | None] | None:
        """f* of the anchor at augmented inputs, for each memory that is drawn from; None for those
        without soft labels, and altogether where the recipe asks nobody or there is no one anchor.
        """
        anchors = [t for t in self.terms if isinstance(t, WeightTerm)]
        if not self.recipe.ask or len(anchors) != 1:
            return None
        theta = anchors[0].anchor
        with evaluating(model), torch.no_grad():
            return [
                _beliefs(forward_at(model, theta, x), sample, term.memory)
                if isinstance(term, MemoryTerm) and term.has_soft
                else None
                for (term, sample), x in zip(drawn, inputs, strict=True)
            ]

    def _function_space(
        self,
        f: Tensor,
        drawn: list[tuple[Any, Any]],
        asked: list[Tensor | None] | None = None,
    ) -> Tensor:
        f = _at_least_float32(f)
        for term, _ in drawn:
            _require_outputs(f.shape[1], term.memory)
        parts = f.split([rows(sample.inputs) for _, sample in drawn])
        with _full_precision(f.device):
            values: list[Tensor] = [
                term.value(part, sample, self.likelihood)
                if reference is None
                else term.value(part, sample, self.likelihood, reference)
                for (term, sample), part, reference in zip(
                    drawn, parts, asked or [None] * len(drawn), strict=True
                )
            ]
            return sum(values[1:], start=values[0])

    # ---------------------------------------------------------------- parts

    @property
    def regulariser(self) -> Regulariser | None:
        """R, or None where there is none."""
        return next((t for t in self.terms if isinstance(t, Regulariser)), None)

    @property
    def weight(self) -> WeightTerm | None:
        """The quadratic at the anchor, or None before the first update."""
        return next((t for t in self.terms if isinstance(t, WeightTerm)), None)

    @property
    def memory(self) -> Memory | None:
        """All remembered examples, or None."""
        held = [t.memory for t in self.terms if isinstance(t, _IN_MEMORY)]
        merged = None
        for memory in held:
            merged = memory if merged is None else merged.add(memory)
        return merged

    @property
    def num_bytes(self) -> int:
        """What must be stored: anchor, g, G, kernels and memory."""
        curvature = 0 if self.curvature is None else self.curvature.num_bytes
        return sum(term.num_bytes for term in self.terms) + curvature

    def __add__(self, other: Prior) -> Prior:
        """Both sums of terms; the first one's recipe goes on, and the second one's tasks are
        numbered after the first one's."""
        if not isinstance(other, Prior):
            return NotImplemented
        if self.likelihood != other.likelihood:
            raise ValueError(
                f"cannot add a prior of {self.likelihood} to one of {other.likelihood}: "
                "the same outputs must mean the same"
            )
        if self.task_size and other.task_size:  # each task then counts for as many examples
            other = other._equal_tasks(self.task_size)
        if self.shards != other.shards:
            raise ValueError(
                f"cannot add a prior whose memory is spread over {other.shards} ranks to one over "
                f"{self.shards}; expected both spread(ranks), or both collected(ranks)"
            )
        curvatures = [c for c in (self.curvature, other.curvature) if c is not None]
        known = bool(self.strengths or other.strengths)
        return replace(
            self,
            task_size=self.task_size or other.task_size,
            terms=self.terms + tuple(_later(term, self.num_tasks) for term in other.terms),
            curvature=sum(curvatures[1:], start=curvatures[0]) if curvatures else None,
            num_data=self.num_data + other.num_data,
            num_tasks=self.num_tasks + other.num_tasks,
            heads=tuple(dict.fromkeys((*self.heads, *other.heads))),
            strengths=self._each_strength + other._each_strength if known else (),
            beliefs=self.beliefs + other.beliefs,
        )

    def __mul__(self, factor: float) -> Prior:
        """Every term times ``factor``: how much this part of the past is believed."""
        if not isinstance(factor, (int, float)) or not (factor >= 0 and math.isfinite(factor)):
            raise ValueError(
                f"a prior can be multiplied by a finite number of at least 0, got {factor!r}"
            )
        terms = tuple(term * float(factor) for term in self.terms)
        return replace(self, terms=terms, beliefs=tuple(b * factor for b in self.beliefs))

    __rmul__ = __mul__

    # ---------------------------------------------------------------- update

    def prepare(self, model: nn.Module, data: Data, *, head: Head | None = None) -> Prior:
        """Call before a task is learned: LwF records what the old model says of the new inputs,
        over all classes seen so far; a prior of equal tasks lets each past task count for as many
        examples as the new one has. The other priors return themselves.
        """
        if self.recipe.equal_tasks:
            return self._equal_tasks(num_examples(data))
        if self.recipe.distil == 0 or self.num_tasks == 0:
            return self
        model = unwrapped(model)
        require_repeatable(data)
        items = memorise(model, data, self.likelihood, head=head_of(data, head))
        seen = _union(self.heads)
        items = replace(items, heads=(seen,)).weighted(self.recipe.distil, 0.0)
        kept = tuple(term for term in self.terms if not isinstance(term, MemoryTerm))
        made = replace(self, terms=(*kept, MemoryTerm(items, self.recipe.divergence)), shards=1)
        return made if self.shards == 1 else made.spread(self._ranks_of(data))

    def update(
        self,
        model: nn.Module,
        data: Data,
        *,
        head: Head | None = None,
        path: PathIntegral | None = None,
        groups: Tensor | None = None,
        max_groups: int = 100,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prior:
        """Identify, memorise and recall: today's posterior is tomorrow's prior.

        model: at the weights that were learned from ``data`` and this prior; read in eval mode.
        head: the class set of these examples; by default the one that the data carry.
        path: the ``PathIntegral`` that watched the training, where structure is "path".
        groups: (N,) integers from 0, -1 for none: whose example each is (a customer, a hospital).
        Its share of g and G is kept, as much again as g and G themselves for each group and so in
        ``max_groups`` at most, for ``forget(model, groups=[k])`` without the data. A group may go
        on in later tasks. Data that are no ``Examples`` are read once for each group.
        batch_size: of the passes over the data; the result does not depend on it.

        Raises ValueError where the memory is larger than the task, labels lie outside of the
        head or there are no data; NotRepeatableError for a shuffled or augmented loader;
        NonFiniteError; StaleAnchorError where parameters were renamed or resized.
        """
        model = unwrapped(model)
        self._require_anchor(model)  # before anything is drawn
        if isinstance(data, Shard) and self.shards == 1:
            self._require_one(data.ranks, model, generator)
        over: dict[str, Any] = {"head": head, "generator": generator, "batch_size": batch_size}
        how: dict[str, Any] = {"path": path, "groups": groups, "max_groups": max_groups}
        with _undrawn(generator):
            # Not held here: once they are in memory, these copies of their inputs can go.
            return self.recall(model, data, self.memorise(model, data, **over), **how, **over)

    def identify(
        self,
        model: nn.Module,
        data: Data,
        *,
        head: Head | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Tensor:
        """(N,) the recipe's score of each example; raises as ``lifelong.identify``."""
        model = unwrapped(model)
        return identify(
            model,
            data,
            self.likelihood,
            score=self.recipe.score,  # type: ignore[arg-type]
            head=head,
            variance=self._score_variance(model, data, head, generator, batch_size),
            generator=generator,
            batch_size=batch_size,
        )

    def memorise(
        self,
        model: nn.Module,
        data: Data,
        *,
        head: Head | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Memory | None:
        """The items of ``data`` that the recipe keeps, with the recipe's weights."""
        recipe, model = self.recipe, unwrapped(model)
        if not recipe.keeps_memory:
            return None
        require_repeatable(data)
        available = num_examples(data)
        size, carry = recipe.memory, None
        if recipe.total and isinstance(size, int):
            size = min(size, available)
        if isinstance(size, Fidelity):
            precision = self.regulariser.precision if self.regulariser is not None else 0.0
            carry = recipe.carry(precision or 1.0)
        variance = self._score_variance(model, data, head, generator, batch_size)
        items = memorise(
            model,
            data,
            self.likelihood,
            budget=size,
            score=recipe.score,
            per_class=recipe.per_class,
            descending=recipe.descending,
            head=head,
            task=self.num_tasks,
            variance=variance,
            carry=carry,
            top_outputs=recipe.top_outputs,
            generator=generator,
            batch_size=batch_size,
        )
        stands_for = torch.ones_like(items.soft_weight)
        if recipe.population:
            stands_for = _population(items, data, available, recipe)
        soft, hard = recipe.soft * stands_for, recipe.hard * stands_for
        if recipe.replay_fraction:
            count = round(recipe.replay_fraction * len(items))
            replayed = torch.randperm(len(items), generator=generator)[:count].to(soft.device)
            soft[replayed], hard[replayed] = 0.0, stands_for[replayed]
        return items.weighted(soft, hard)

    def recall(
        self,
        model: nn.Module,
        data: Data,
        items: Memory | None = None,
        *,
        head: Head | None = None,
        path: PathIntegral | None = None,
        groups: Tensor | None = None,
        max_groups: int = 100,
        generator: torch.Generator | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prior:
        """The prior at the model's present weights, with ``data`` in the past and ``items`` kept.

        New gradient, curvature and soft labels are all computed before anything is put together:
        whatever raises leaves this prior as it was. Raises as ``update``.
        """
        if self.shards > 1:
            ranks = self._ranks_of(data)
            over: Any = {"head": head, "path": path, "groups": groups, "max_groups": max_groups}
            over |= {"generator": generator, "batch_size": batch_size}
            return self.collected(ranks).recall(model, data, items, **over).spread(ranks)
        recipe, head, model = self.recipe, head_of(data, head), unwrapped(model)
        if any(isinstance(t, WeightTerm) and is_rounded(t.curvature) for t in self.terms):
            raise ValueError(
                "this prior is rounded for the steps of training (Prior.rounded); update the prior "
                "that it was made of"
            )
        if groups is not None:  # what they take out again is theirs, not a sample's
            recipe = replace(recipe, curvature_examples=None)
        require_repeatable(data)
        self._require_anchor(model)
        if isinstance(data, Shard):
            self._require_one(data.ranks, model, generator)
            if groups is not None:
                raise ValueError("groups are of one process's data; expected plain data with them")
        past = self if recipe.discount == 1 else self.discount(recipe.discount)
        if recipe.equal_tasks:  # as ``prepare`` did, if it was called
            past = past._equal_tasks(num_examples(data))
        old = None if recipe.distil else past.memory
        if old is not None and recipe.refresh and not recipe.kernel:
            old = old.refresh(model)
        new = num_examples(data)
        if new == 0:
            raise ValueError("the data hold no examples; pass a task with at least one")
        over = Pass(model, data, self.likelihood, head, generator, batch_size)
        if items is not None and old is not None:
            _require_outputs(items.reference.shape[1], old)
        if items is not None:  # of this task, whatever they were made as
            items = replace(items, task=torch.full_like(items.task, self.num_tasks))
        if recipe.compact is not None:
            held, kept, evicted = recall.compacted(old, items, recipe, over)
        else:
            held, kept, evicted = recall.merge(
                old, items, recipe, self.num_data, new, self.likelihood, generator
            )
        del old, items
        with evaluating(model):
            curvature, strength = recall.curvature(
                past.terms,
                recipe,
                over,
                extra=past.curvature,
                kept=kept,
                evicted=evicted,
                path=path,
                beliefs=past.beliefs,
                strengths=past._each_strength,
            )
            g = recall.gradient(past.terms, recipe, over, held=held, kept=kept)
            shares = removal.grouped(
                past.terms,
                recipe if strength is None else recipe.with_strength(strength),
                over,
                groups,
                held=held,
                kept=kept,
                evicted=evicted,
                max_groups=max_groups,
                beliefs=past.beliefs,
                strengths=past._each_strength,
            )
        terms: list[Any] = [t for t in past.terms if is_belief(t)]
        in_weights = None if recipe.kernel else curvature
        # A gradient of 0 has an anchor too: what is forgotten later is taken out of it there.
        anchored = recipe.gradient != "none" or in_weights is not None or shares is not None
        if anchored or recipe.distil or recipe.ask:
            terms.append(WeightTerm(snapshot(parameters(model)), g, in_weights, shares))
        if held is not None and len(held):
            each = (past.num_data + new) / (past.num_tasks + 1)
            terms.append(self._memory_term(model, held, curvature, each))
        return replace(
            past,
            terms=tuple(terms),
            curvature=curvature if recipe.kernel == "gp" else None,
            num_data=past.num_data + new,
            num_tasks=past.num_tasks + 1,
            heads=tuple(dict.fromkeys((*past.heads, head))),
            strengths=past.strengths if strength is None else (*past._each_strength, strength),
            beliefs=(*past.beliefs, 1.0),
        )

    def _memory_term(
        self, model: nn.Module, held: Memory, curvature: Curvature | None, task_size: float
    ) -> MemoryTerm | KernelTerm:
        """task_size: the mean number of examples of a task, for which each kernel may stand."""
        recipe = self.recipe
        if recipe.kernel is None:
            return MemoryTerm(held, recipe.divergence)
        covariance = None
        if recipe.kernel == "gp" and curvature is not None:
            covariance = recall.variance(curvature, recipe.kernel_precision)
        return kernel_term(
            model,
            held,
            self.likelihood,
            variance=covariance,
            jitter=recipe.jitter,
            strength=recipe.soft * (task_size if recipe.population else 1.0),
        )

    def _require_one(
        self, ranks: Ranks, model: nn.Module, generator: torch.Generator | None
    ) -> None:
        """Raise ValueError where ranks come with different weights or different pasts, or would
        draw different examples."""
        sums = [p.detach().double().sum().item() for p in parameters(model).values()]
        ranks.require_same("weights of the model (their sums)", [round(x, 6) for x in sums])
        past = (self.recipe.to_dict(), self.num_data, self.num_tasks, self.num_bytes)
        ranks.require_same("prior", past)
        recipe = self.recipe
        if recipe.keeps_memory or recipe.curvature_examples or recipe.estimator == "mc":
            state = torch.get_rng_state() if generator is None else generator.get_state()
            digest = hashlib.sha256(state.numpy().tobytes()).hexdigest()[:12]
            ranks.require_same("state of the generator (pass generator= of one seed)", digest)

    def _require_anchor(self, model: nn.Module) -> None:
        """The model is the one that the prior knows, and its weights are numbers."""
        params = parameters(model)
        for term in self.terms:
            if not isinstance(term, WeightTerm):
                continue
            match(model, term.anchor)
            unknown, frozen = params.keys() - term.anchor.keys(), term.anchor.keys() - params.keys()
            if unknown:
                raise StaleAnchorError(
                    "the model has trainable parameters that the prior does not know: "
                    f"{sorted(unknown)[:5]}; freeze them, or call prior.grow(model)"
                )
            if frozen:
                raise StaleAnchorError(
                    f"parameters that the prior knows are frozen now: {sorted(frozen)[:5]}; set "
                    "their requires_grad, or call prior.transfer(model, allow_unmatched=True)"
                )
        for name, p in params.items():
            require_finite(p, f"the parameter {name}")

    def _score_variance(
        self,
        model: nn.Module,
        data: Data,
        head: Head | None,
        generator: torch.Generator | None,
        batch_size: int,
    ) -> Params | None:
        """Sigma, where the score needs it."""
        if self.recipe.score not in ("leverage", "sensitivity"):
            return None
        with evaluating(model):
            new = diagonal_curvature(
                model,
                data,
                self.likelihood,
                head=head_of(data, head),
                generator=generator,
                batch_size=batch_size,
            )
        old = recall.total_curvature(self.terms, self.curvature)
        precision = self.regulariser.precision if self.regulariser is not None else 0.0
        precision = max(precision, self.recipe.kernel_precision)
        if old is not None:  # of any structure: the score reads the variances alone
            new = new + Diagonal(old.diagonal())
        return recall.variance(new, precision)

    # ---------------------------------------------------------------- change

    def discount(self, factor: float) -> Prior:
        """Every term of data times ``factor``: an older past is believed less. R stays.

        FROMP's kernels are made afresh by each update, so theirs lasts until the next one; the
        curvature that they are made of keeps it.
        Raises ValueError for a factor outside [0, 1].
        """
        if not 0 <= factor <= 1:
            raise ValueError(f"discount must lie in [0, 1], got {factor}")
        return self._believed(factor)

    def _believed(self, factor: float) -> Prior:
        terms = tuple(t if is_belief(t) else t * factor for t in self.terms)
        curvature = None if self.curvature is None else self.curvature * factor
        beliefs = tuple(b * factor for b in self.beliefs)
        return replace(self, terms=terms, curvature=curvature, beliefs=beliefs)

    def _equal_tasks(self, size: int) -> Prior:
        """Each past task counts for ``size`` examples; for what it did where there are none."""
        if size == 0:
            return self
        if self.task_size in (0, size):
            return replace(self, task_size=size)
        return replace(self._believed(size / self.task_size), task_size=size)

    def replace(self, *, regulariser: Regulariser) -> Prior:
        """Another regulariser. R is a term of its own and g is of data only, so R is swapped.

        Where g is "stationary" or "anchored" it is minus the old R's gradient at the anchor, the
        data's own gradient at a minimum: a number by now, right whatever R becomes.
        """
        others = tuple(t for t in self.terms if not isinstance(t, Regulariser))
        return replace(self, terms=(regulariser, *others))

    def with_term(self, term: Any) -> Prior:
        """With one more term, of the user's own: ``term(model)`` in nats, differentiable, and
        ``term * number`` (``terms.WeightSpaceTerm``).

        It is a belief beside R and data: it stays as it is in updates, removals and transfers. A
        file holds no code: ``load(path, own=[term])``. Raises TypeError for what is no such term.
        """
        missing = [n for n in ("__call__", "__mul__", "num_bytes") if not hasattr(term, n)]
        if missing or not is_own(term):
            raise TypeError(
                "expected a term of your own, with term(model) -> nats, term * number and "
                f"num_bytes, got {type(term).__name__}"
                + (f" without {', '.join(missing)}" if missing else "; update makes those")
            )
        return replace(self, terms=(*self.terms, term))

    def forget(
        self,
        model: nn.Module,
        data: Data | None = None,
        *,
        task: int | None = None,
        ids: Tensor | None = None,
        where: Callable[[Memory], Tensor] | None = None,
        groups: Tensor | Sequence[int] | None = None,
        head: Head | None = None,
        on_indefinite: OnIndefinite = "raise",
        batch_size: int = BATCH_SIZE,
    ) -> Prior:
        """Take examples out of the past; refit the model from the anchor afterwards.

        data: the examples, read again, with the ids they had; a ``Shard`` of them is sent to every
        rank, and each then does all of the removal. Those in memory are dropped, and
        their residual leaves g (not all that g holds of items that stand for more than themselves
        and were seen from a later anchor: ``docs/unlearning.md``); of the others J*ᵀ r leaves g
        and J*ᵀ H J* leaves G (never -l, which is unbounded below).
        task, ids, where: which ones; all of them must hold, and they are enough where all are in
        memory. where: memory -> (M,) bool, such as ``lambda memory: memory.labels == 3``. Without
        data only what is in memory leaves: ``task=0`` alone takes the items of task 0, and its
        other examples stay in g and G (``num_data`` counts what left).
        An id counts within its task, and each task has its own strength and belief. With data and
        several tasks, ``task`` may be left out only where neither makes a difference.
        With both data and ids, only those of the data that have one of the ids are taken out.
        groups: whole groups by number, whose shares ``update(..., groups=)`` kept: without data,
        seen or not. Beside data: (N,), the group of each, and the shares shrink by them; a prior
        with shares asks for it where the data are not in memory, or they would leave again
        with their group.
        on_indefinite: where G would turn indefinite, "raise", or "clip" it to its positive part
        with a ClippedWarning: then less curvature leaves than came.
        The model's weights are set to the anchor meanwhile, and restored.

        Warns with NotHeldWarning where some examples are in no part of the prior: replay alone
        keeps no gradient or curvature of what is not in memory, so nothing of it can leave.
        Raises ValueError where all are; for examples that are neither given nor remembered; where
        ``task`` does not say which, for ids that are remembered of several tasks or with other
        inputs or labels than those given, and for data not in memory where the tasks' ``strengths``
        or ``beliefs`` differ; for ids or groups that are no integers, no group at all, a task that
        was not learned, groups that are not known (so also for one forgotten twice), for priors
        that mix their examples (kernels, path integrals) or their anchors (sums; offline EWC of
        several tasks), and where G would turn indefinite.
        """
        found = self._removal(
            model,
            data,
            task=task,
            ids=ids,
            where=where,
            groups=groups,
            head=head,
            on_indefinite=on_indefinite,
            batch_size=batch_size,
        )
        if found.clipped:
            stays = f"{100 * found.clipped:.3g} % of the curvature to be removed stays in it"
            told = f"G would have turned indefinite and was clipped to its positive part: {stays}"
            warnings.warn(ClippedWarning(told, found.clipped), stacklevel=2)
        return self._without(found)

    def _removal(
        self,
        model: nn.Module,
        data: Data | None,
        *,
        head: Head | None = None,
        ids: Tensor | None = None,
        groups: Tensor | Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
        **which: Any,
    ) -> removal.Removal:
        """What ``forget`` takes out, for ``unlearn``, whose audit counts it."""
        self._require_collected("forget")
        model, over = unwrapped(model), None
        if isinstance(data, Shard) and groups is not None:
            raise ValueError("groups are of one process's data; expected plain data with them")
        if data is not None:
            data = whole(data)
        if data is not None:
            require_repeatable(data)
            over = Pass(model, data, self.likelihood, head_of(data, head), None, batch_size)
        if sum(isinstance(t, WeightTerm) for t in self.terms) > 1:
            raise ValueError(
                "a sum of priors has several anchors, so nothing tells where these examples were "
                "learned; forget from each prior before adding them"
            )
        return removal.forget(
            self.terms,
            self.recipe,
            over,
            model=model,
            likelihood=self.likelihood,
            ids=None if ids is None else torch.as_tensor(ids),
            groups=None if groups is None else torch.as_tensor(groups),
            beliefs=self.beliefs,
            strengths=self._each_strength,
            **which,
        )

    def _without(self, found: removal.Removal) -> Prior:
        return replace(self, terms=found.terms, num_data=max(0, self.num_data - found.count))

    def relabel(
        self,
        model: nn.Module,
        data: Data,
        labels: Tensor | Sequence[Any],
        *,
        task: int | None = None,
        exactly: bool = False,
        head: Head | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prior:
        r"""Give past examples other labels; refit the model from the anchor afterwards.

        A remembered example counts by its label, l(y', f), from now on; its soft label came of the
        wrong one. One that is not remembered is from now on, beyond the budget, where the prior
        has a memory. G, which does not depend on labels, stays.

        exactly: what the old labels said of the first order leaves g, too,

            g' = g - sum_i J*_iᵀ r_i                            of those in memory
            g' = g + sum_i J*_iᵀ (t(y_i) - t(y'_i))             of the others (t: the statistic)

        as it does in a prior without a memory anyway. For a generalised linear model whose past is
        held exactly the result is the prior that the right labels would have made. For a network
        such a linear pull has no lower bound and holds near the anchor alone; with many labels it
        led some priors away from all that they knew.

        data: the examples as they were learned, with their ids and the labels that they had;
        labels: (N,) or (N, C), the right ones, in that order; task: of which task they are, which
        may be left out as in ``forget``.

        Raises ValueError where the prior holds nothing of labels, for labels that do not fit, ids
        that are given twice or remembered with other inputs or labels, and for priors whose
        curvature or sums hold labels (the estimator "empirical", groups), that mix their examples,
        or have several anchors.
        """
        self._require_collected("relabel")
        model = unwrapped(model)
        data = whole(data)
        require_repeatable(data)
        if sum(isinstance(t, WeightTerm) for t in self.terms) > 1:
            raise ValueError(
                "a sum of priors has several anchors, so nothing tells where these examples were "
                "learned; relabel in each prior before adding them"
            )
        terms = removal.relabel(
            self.terms,
            self.recipe,
            Pass(model, data, self.likelihood, head_of(data, head), None, batch_size),
            torch.as_tensor(labels),
            exactly=exactly,
            task=task,
            beliefs=self.beliefs,
            strengths=self._each_strength,
        )
        return replace(self, terms=terms)

    def rebase(self, model: nn.Module, *, batch_size: int = BATCH_SIZE) -> Prior:
        """The same past, seen from the model's present weights, as ``update`` sees it, but without
        new data: call it after a refit that ends an adaptation.

        g becomes the gradient of the weight and function terms here, and soft labels are asked
        for again where the recipe refreshes them; so what the old labels said of examples that
        are gone is not kept. For a generalised linear model the prior is the same function; for
        a network it keeps its value's gradient here. Kernels (FROMP) stay where they are.
        Raises StaleAnchorError, NonFiniteError, ValueError for a memory that is spread over ranks.
        """
        self._require_collected("rebase")
        model = unwrapped(model)
        self._require_anchor(model)
        with evaluating(model):
            params = parameters(model)
            curvature = recall.total_curvature(self.terms)
            g = {n: torch.zeros_like(p) for n, p in params.items()}
            terms: list[Any] = []
            groups: Groups | None = None
            quadratic = any(isinstance(t, WeightTerm) for t in self.terms)
            for term in self.terms:
                if isinstance(term, WeightTerm):
                    g = recall.plus(g, term.slope(params))
                    if term.groups is not None:
                        d = recall.plus(snapshot(params), term.anchor, -1.0)
                        shares = term.groups.mapped(lambda share, d=d: share.rebased(d))
                        groups = shares if groups is None else groups + shares
                    continue
                if isinstance(term, MemoryTerm) and self.recipe.refresh and term.has_soft:
                    soft = replace(term, memory=term.memory.weighted(term.memory.soft_weight, 0.0))
                    g, quadratic = (
                        recall.plus(g, recall.slope(soft, model, self.likelihood, batch_size)),
                        True,
                    )
                    term = replace(term, memory=term.memory.refresh(model, batch_size))
                    if not term.memory.is_whole:  # what is left of a soft label is not flat
                        soft = replace(
                            term, memory=term.memory.weighted(term.memory.soft_weight, 0.0)
                        )
                        slope = recall.slope(soft, model, self.likelihood, batch_size)
                        g = recall.plus(g, slope, -1.0)
                terms.append(term)
        if quadratic:
            terms.append(WeightTerm(snapshot(params), g, curvature, groups))
        return replace(self, terms=tuple(terms))

    @property
    def _each_strength(self) -> tuple[float, ...]:
        """Of every task; the recipe's, or 1, for those whose strength was not noted."""
        usual = self.recipe.strength
        other = 1.0 if isinstance(usual, str) else float(usual)
        return self.strengths + (other,) * (self.num_tasks - len(self.strengths))

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
        previous: nn.Module | None = None,
        allow_unmatched: bool = False,
    ) -> Prior:
        """The same past for another model: fewer or more layers, features, classes; other names.

        Memory terms move to any model. g, G and the anchor follow by name: ``parameters`` maps
        the new model's names to the prior's (by default equal names; ``{}`` shares none), among
        the parameters that are trained. One may hold fewer or more entries along any dimension:
        the common leading block is kept. New entries, and new parameters, start with their
        present value as the anchor, without gradient or curvature; R is on them as on the others.

        classes: for each output of the model the old one, None for a new one; needed where
        outputs are dropped or in another order. Examples of a dropped class leave memory, and
        soft labels are renormalised over the others. head: the parameters whose rows are the
        outputs; by default found by asking the model at remembered inputs. new_classes: what a
        remembered soft label says of outputs that it never saw: "zero" probability, or "mask":
        nothing.

        labels: True turns remembered examples into replay of their true labels, which carries
        their residuals to any model; False keeps their soft labels; by default True where some of
        g cannot follow and memory holds all of the past, which is then exact for every change
        (why: ``lifelong.transfer``). previous: the model that this prior was learned with, needed
        where residuals of remembered examples must leave g (a class is dropped, or labels=True,
        with a part of the past in memory). structure: convert G first, and in the recipe, to one
        that follows everything. allow_unmatched: leave behind what cannot follow, with a
        UserWarning that names it; where nothing is shared, memory alone is left: distillation. Of
        groups, what is remembered can still be forgotten then if it replays its labels.

        Raises StaleAnchorError where names, dimensions or outputs do not match, unless
        ``allow_unmatched``; ValueError for maps that name what does not exist or one thing twice,
        for a curvature that cannot follow, for logits matched by squares (DER) with "zero", for
        kernels or learned vectors that should lose a class, for a missing ``previous``, for outputs
        that are no classes, which cannot be added to remembered ones, and for a memory that is
        spread over ranks.
        """
        self._require_collected("transfer")
        model = unwrapped(model)
        terms, curvature, recipe = self.terms, self.curvature, self.recipe
        if structure is not None:
            if structure not in ("diagonal", "dense"):
                raise ValueError(f"structure must be 'diagonal' or 'dense', got {structure!r}")
            terms = tuple(_converted(t, structure) for t in terms)
            curvature = None if curvature is None else _convert(curvature, structure)
            recipe = replace(recipe, structure=structure) if recipe.structure else recipe
        how = plan(
            terms,
            model,
            names=parameters,
            classes=classes,
            head=head,
            curvature=curvature,
            previous=previous,
            allow_unmatched=allow_unmatched,
        )
        grows = how.classes is not None and None in how.classes
        squares = any(isinstance(t, MemoryTerm) and isinstance(t.divergence, Logit) for t in terms)
        require_classes(self.likelihood, how.classes)
        terms, behind = _transfer(
            terms,
            model,
            how,
            likelihood=self.likelihood,
            recipe=recipe,
            holds_all=self._holds_all,
            new_classes=new_classes,
            labels=labels,
            previous=previous,
            allow_unmatched=allow_unmatched,
            beliefs=self.beliefs,
        )
        if grows and squares and new_classes == "zero":
            raise ValueError(
                "a logit has no value that means probability 0, so squared logits cannot say "
                "that of a new class; pass new_classes='mask'"
            )
        if curvature is not None:
            curvature, lost = follow(curvature, how.current, how.places, leave=allow_unmatched)
            behind += [n for n in (*how.lost, *lost) if n not in behind]
        if behind:
            warnings.warn(
                f"the new model leaves behind what the past said of {len(behind)} parameters "
                f"({', '.join(behind[:5])}{', ...' if len(behind) > 5 else ''}); what is in "
                "memory it keeps",
                stacklevel=2,
            )
        dropped = sum(len(t.memory) for t in self.terms if isinstance(t, _IN_MEMORY)) - sum(
            len(t.memory) for t in terms if isinstance(t, _IN_MEMORY)
        )
        return replace(
            self,
            terms=terms,
            curvature=curvature,
            recipe=recipe,
            num_data=max(0, self.num_data - dropped),
            heads=renamed_heads(self.heads, how),
        )

    @property
    def _holds_all(self) -> bool:
        """Whether every past example is in memory."""
        held = sum(len(t.memory) for t in self.terms if isinstance(t, _IN_MEMORY))
        return self.num_data > 0 and held == self.num_data

    # ---------------------------------------------------------------- weights over ranks

    def sharded_like(self, model: nn.Module) -> Prior:
        """The same prior with anchor, g and a diagonal G sharded as the model's parameters are
        (FSDP2's ``fully_shard``): each rank keeps and computes its own part. Nothing is sent.

        For the steps of training: ``update`` needs the ``whole`` prior and a network with whole
        weights (``lifelong.sharded.load_whole``). Raises ValueError for a curvature of whole layers
        and a model that is not sharded, StaleAnchorError where it is another one.
        """
        model = unwrapped(model)
        params = dict(model.named_parameters())
        if not all(is_sharded(p) for p in params.values()):
            raise ValueError(
                "expected a model whose parameters are all sharded, by fully_shard(model); got "
                f"plain ones: {[n for n, p in params.items() if not is_sharded(p)][:5]}"
            )
        for term in self.terms:
            if isinstance(term, WeightTerm):
                match(model, term.anchor)
        return replace(
            self,
            terms=tuple(
                t.sharded_like(params) if isinstance(t, WeightTerm | Regulariser) else t
                for t in self.whole().terms
            ),
        )

    def whole(self) -> Prior:
        """The prior with whole anchors and curvatures on every rank, which all must call; itself
        where nothing is sharded."""
        return replace(
            self,
            terms=tuple(
                t.whole() if isinstance(t, WeightTerm | Regulariser) else t for t in self.terms
            ),
        )

    # ---------------------------------------------------------------- memory over ranks

    def spread(self, ranks: Ranks) -> Prior:
        """The same prior with a part of the memory on each rank, every ``ranks.size``-th item,
        believed as many times: the mean over the ranks, as DistributedDataParallel takes it, of
        ``prior(model)`` and its gradient is that of the whole.

        An update (with a ``Shard``) collects the memory, chooses, and spreads it again: what a rank
        holds between updates is its part alone, and while one lasts all of it. With ``batch_size``
        each rank draws from its own; ``ranks=`` makes that a part of the number.
        Raises ValueError for kernels, which couple their items, for joint training, which draws
        from all of them, and for a memory that is spread already.
        """
        if self.shards > 1 or any(isinstance(t, KernelTerm) for t in self.terms):
            raise ValueError(
                f"the memory of this {self.recipe.name} prior cannot be spread: it is over "
                f"{self.shards} ranks already, or kernels couple its items"
            )
        if self.recipe.kernel or self.recipe.reference:
            raise ValueError(
                f"the {self.recipe.name} prior needs all of its memory at once; leave it on every "
                "rank"
            )
        terms = tuple(
            replace(t, memory=t.memory.spread(ranks.rank, ranks.size))
            if isinstance(t, MemoryTerm)
            else t
            for t in self.terms
        )
        return replace(self, terms=terms, shards=ranks.size)

    def collected(self, ranks: Ranks) -> Prior:
        """The prior with all of its memory on every rank; itself where it is not spread.

        Raises ValueError where it is spread over another number of ranks.
        """
        if self.shards == 1:
            return self
        self._require_shards(ranks)
        terms = tuple(
            replace(t, memory=t.memory.collected(ranks)) if isinstance(t, MemoryTerm) else t
            for t in self.terms
        )
        return replace(self, terms=terms, shards=1)

    @staticmethod
    def joined(parts: Sequence[Prior]) -> Prior:
        """The prior whose ``spread`` over ``len(parts)`` ranks the parts are, in the order of
        ranks: of files that each rank has saved, to go on with on another number of ranks.

        Raises ValueError where these are not all the parts.
        """
        if not parts or any(part.shards != len(parts) for part in parts):
            raise ValueError(
                f"expected all parts of one prior, got {len(parts)} of priors that are spread over "
                f"{sorted({part.shards for part in parts})} ranks"
            )
        if len(parts) == 1:
            return parts[0]
        terms = tuple(
            replace(t, memory=Memory.joined([part.terms[i].memory for part in parts]))  # type: ignore[union-attr]
            if isinstance(t, MemoryTerm)
            else t
            for i, t in enumerate(parts[0].terms)
        )
        return replace(parts[0], terms=terms, shards=1)

    def _require_shards(self, ranks: Ranks) -> None:
        if ranks.size != self.shards:
            raise ValueError(
                f"the memory of this prior is spread over {self.shards} ranks, and there are "
                f"{ranks.size}; join the {self.shards} parts by Prior.joined(parts), and then "
                "spread(ranks)"
            )

    def _require_collected(self, what: str) -> None:
        if self.shards > 1:
            raise ValueError(
                f"{what} needs all of the memory, which is spread over {self.shards} ranks; call "
                "prior.collected(ranks) on each of them first, and spread(ranks) afterwards"
            )

    def _ranks_of(self, data: Data) -> Ranks:
        """Those that this prior is spread over."""
        if not isinstance(data, Shard):
            raise ValueError(
                f"the memory of this prior is spread over {self.shards} ranks, so its data must "
                "say that they are a part: expected lifelong.shard(data), on every rank"
            )
        self._require_shards(data.ranks)
        return data.ranks

    def grow(self, model: nn.Module, *, new_classes: NewClasses = "zero") -> Prior:
        """``transfer`` to the same model after its head was given more outputs."""
        return self.transfer(model, new_classes=new_classes)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Prior:
        """On another device, or in another floating dtype."""
        curvature = None if self.curvature is None else self.curvature.to(device, dtype)
        terms = tuple(move_term(term, device, dtype) for term in self.terms)
        return replace(self, terms=terms, curvature=curvature)

    # ---------------------------------------------------------------- files

    def save(self, path: str | Path) -> Path:
        """Write the prior to one safetensors file, atomically; ``Prior.load`` reads it.

        Raises OSError where the folder cannot be written, ValueError for a prior of which this rank
        has a part; an old file is then left as it was.
        """
        weights = (t for t in self.terms if isinstance(t, WeightTerm))
        if any(is_sharded(x) for t in weights for x in t.anchor.values()):
            raise ValueError(
                "this rank has a part of the prior's weights; call prior.whole() on every rank, "
                "and save that on one"
            )
        return checkpoint.save(path, self.state_dict(), kind="prior")

    @classmethod
    def load(cls, path: str | Path, *, own: Sequence[Any] = ()) -> Prior:
        """What ``save`` wrote, on the CPU; own: its terms of ``with_term``, in their order.

        Raises FileNotFoundError, CheckpointError; ValueError where ``own`` are others.
        """
        return cls.from_state_dict(checkpoint.load(path, kind="prior"), own=own)

    def state_dict(self) -> dict[str, Any]:
        """Nested dict of tensors and plain values, as ``checkpoint.save`` takes it."""
        return {
            "likelihood": named(self.likelihood),
            "recipe": self.recipe.to_dict(),
            "terms": [term_state(term) for term in self.terms],
            "curvature": None if self.curvature is None else self.curvature.state_dict(),
            "num_data": self.num_data,
            "num_tasks": self.num_tasks,
            "heads": [None if h is None else list(h) for h in self.heads],
            "strengths": list(self.strengths),
            "beliefs": list(self.beliefs),
            "task_size": self.task_size,
            "shards": self.shards,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], *, own: Sequence[Any] = ()) -> Prior:
        """own: as in ``load``. Raises KeyError for a missing entry, ValueError for a term that is
        not known or not given."""
        curvature = state["curvature"]
        return cls(
            likelihood=unnamed(likelihoods, state["likelihood"]),
            recipe=Recipe.from_dict(state["recipe"]),
            terms=terms_from_states(state["terms"], own),
            curvature=None if curvature is None else curvature_from_state_dict(curvature),
            num_data=state["num_data"],
            num_tasks=state["num_tasks"],
            heads=tuple(None if h is None else tuple(h) for h in state["heads"]),
            strengths=tuple(state["strengths"]),
            beliefs=tuple(state["beliefs"]),
            task_size=state.get("task_size", 0),  # of files from before it was written
            shards=state.get("shards", 1),
        )


def _later(term: Any, tasks: int) -> Any:
    """The term with its tasks numbered from ``tasks`` on."""
    if isinstance(term, _IN_MEMORY):
        memory = term.memory
        return replace(term, memory=replace(memory, task=memory.task + tasks))
    if not isinstance(term, WeightTerm) or term.groups is None:
        return term
    later = torch.tensor([tasks, 0, 0], device=term.groups.members.device)
    groups = replace(term.groups, members=term.groups.members + later)
    return replace(term, groups=groups)


def _convert(curvature: Curvature, structure: Literal["diagonal", "dense"]) -> Curvature:
    return Diagonal(curvature.diagonal()) if structure == "diagonal" else curvature.dense()


def _converted(term: Any, structure: Literal["diagonal", "dense"]) -> Any:
    if not isinstance(term, WeightTerm):
        return term

    def changed(part: Any) -> Any:
        held = part.curvature is not None
        return replace(part, curvature=_convert(part.curvature, structure)) if held else part

    groups = None if term.groups is None else term.groups.mapped(changed)
    return replace(changed(term), groups=groups)


def _population(items: Memory, data: Data, available: int, recipe: Recipe) -> Tensor:
    """(M,) how many of the N examples each item stands for: N / M, and N_c / M_c of its class c
    where items were drawn at random, as many of each class: else rare classes would count more."""
    even = torch.full_like(items.soft_weight, available / len(items))
    labels = items.labels
    if not recipe.by_class or labels.ndim != 1 or labels.is_floating_point():
        return even
    return select.represented(labels, every_label(data).to(labels.device)).to(even)


def _union(heads: tuple[Head | None, ...]) -> Head | None:
    """All classes of some heads; None where one of them is all outputs."""
    if any(h is None for h in heads):
        return None
    return tuple(sorted({c for h in heads for c in h or ()}))


@contextmanager
def _undrawn(generator: torch.Generator | None) -> Iterator[None]:
    """Where something raises inside, what was drawn is given back."""
    state = torch.get_rng_state() if generator is None else generator.get_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state) if generator is None else generator.set_state(state)
        raise


def _require_outputs(count: int, memory: Memory) -> None:
    known = memory.reference.shape[1]
    if count != known:
        raise StaleAnchorError(
            f"the model has {count} outputs, and the memory holds beliefs about {known}; for a "
            "head that grew call prior.grow(model)"
        )


def _beliefs(f: Tensor, sample: Memory | Sample, memory: Memory) -> Tensor:
    """The anchor's outputs, but where the stored ones say that a class did not exist; cut as those
    are, since g makes up for what is cut off."""
    stored: Tensor = read(sample.reference)
    f, masks = torch.where(stored <= ABSENT, stored.to(f.dtype), f), memory.head_masks
    top = memory.reference
    if not is_top(top):
        return f
    return top.like(f, None if masks is None else masks[sample.head])[slice(None)]


def _mode_matters(model: nn.Module) -> bool:
    """Whether some module in training mode may act otherwise than in eval mode."""
    return any(m.training and _acts_in_training(m) for m in model.modules())


def _acts_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Attention and recurrent layers keep their dropout as a number.
    return (
        isinstance(module, _MODAL)
        or _asks_its_mode(type(module))
        or any(
            "drop" in name and isinstance(value, float) and value > 0
            for name, value in vars(module).items()
        )
    )


def _asks_its_mode(kind: type[nn.Module]) -> bool:
    """Whether its forward, if not torch's own, reads ``self.training``: stochastic depth does."""
    forward = inspect.unwrap(kind.forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "training" in names and not forward.__module__.startswith("torch.nn.")


_MODAL = (nn.modules.batchnorm._NormBase, nn.RReLU)  # instance normalisation is a _NormBase too


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast is for the model: an inverse kernel or an anchor has no digits to lose."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _at_least_float32(f: Tensor) -> Tensor:
    return f.float() if f.dtype in (torch.bfloat16, torch.float16) else f
