"""``Recipe``: how a method remakes its prior after each task. A preset is one of these.

Frozen and made of plain values, so that the configuration of a run is the recipe in its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from . import divergences
from .budget import Bytes, Fidelity, Given, parse, plain
from .curve import Carry
from .divergences import KL, Divergence
from .named import known, named, unnamed
from .scores import ScoreName

Fitted = Literal[
    "diagonal", "dense", "isotropic", "kronecker", "eigen_kronecker", "low_rank", "block"
]
Structure = Fitted | Literal["path"]
Estimator = Literal["exact", "mc", "empirical"]
Gradient = Literal["stored", "carried", "stationary", "anchored", "none"]
Kernel = Literal["gp", "identity"]
Reference = Literal["joint", "separate"]
Compact = Literal["em", "closed_form"]
Auto = Literal["auto"]

_CHOICES: Mapping[str, tuple[str | None, ...]] = MappingProxyType(
    {
        "structure": (*get_args(Fitted), "path", None),
        "estimator": get_args(Estimator),
        "gradient": get_args(Gradient),
        "score": (*get_args(ScoreName), "k_centre"),
        "kernel": (*get_args(Kernel), None),
        "reference": (*get_args(Reference), None),
        "compact": (*get_args(Compact), None),
    }
)


def require_strength(name: str, value: float | str) -> None:
    """Raise ValueError where a strength is no number, negative, NaN or infinite."""
    if isinstance(value, str):
        raise ValueError(
            f"{name} must be a number here, got {value!r}; only the strength of a curvature that "
            "is fitted to data can be 'auto'"
        )
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


@dataclass(frozen=True)
class Recipe:
    """How a prior is made again after each task. Strengths multiply nats; 1 is Bayes.

    Weight term
        structure: of G: "diagonal", "dense", "isotropic", "kronecker" (K-FAC), "eigen_kronecker",
            "low_rank" (``rank`` directions a task), "block" (dense by module), "path" (SI's path
            integral) or None for no G. Sums over tasks are exact, directions are kept beside each
            other, but for ``merge``.
        merge: after each task and removal Kronecker products become one of the same trace, so that
            bytes and seconds do not grow with them. False keeps one for each (the exact sum).
        estimator: "exact" GGN, "mc" (labels from the model) or "empirical" (true labels).
        strength: multiplies the curvature of each new task (EWC's lambda). "auto" chooses it for
            each task from its data (``lifelong.strength``); ``Prior.strengths`` tells which. Not
            for "path" or with a kernel.
        margin: multiplies a strength that "auto" found. That is of a way back, and the next task
            takes the way that the prior lets through: where G is an approximation, the past
            loses more there than G says.
        discount: multiplies the whole past before a new task is added (online EWC's gamma).
        curvature_examples: how many examples of a task are read for its G and for a strength of
            "auto": that many of those not kept, drawn at random, each for N / n of them. Unbiased,
            and what G costs no longer grows with the task. None reads all, as a task with
            ``groups`` does, whose shares must add up. ``forget`` takes an example out with its
            own curvature all the same, right on average.
        equal_tasks: each past task counts as much as the one at hand, as if it had had as many
            examples: where N_s of a task come before N of a new one, all of its terms are
            multiplied by N / N_s (``Prior.beliefs`` tells). Bayes' rule counts examples, so that a
            large task is learned at the cost of small ones; a mean accuracy over tasks counts
            tasks. Call ``Prior.prepare`` before each task. Not with a ``total`` memory or a kernel.
        exclude_memory: leave the examples that are kept out of G, so that none counts twice.
        path_damping: SI's xi.
        gradient: what g holds after a task, at the new anchor theta*:
            "stored"      the data's own gradient: exact at any anchor, converged or not
            "carried"     the gradient of the old terms, not of the new data (offline EWC)
            "stationary"  minus that of R and of replay: exact where theta* is a minimum
            "anchored"    minus that of R: R is pulled to theta* (online EWC, K-priors)
            "none"        0, and R stays where it is

    Memory
        memory: examples to keep, for each task, or in ``total``; None keeps all; 0 none. Or bytes,
            "20MB", which never holds more; or ``Fidelity(0.95)``, as few of each task as reach it
            near the anchor: with strength "auto", as if the strength were 1.
        score, per_class, descending: which ones (``identify``; also "k_centre").
        population: an item stands for N / M examples, not only for itself; a kernel for N. Drawn at
            random, as many of each class, N and M are those of its class. In a ``total`` memory
            the items that stay stand for those that leave, as strongly as they were believed.
        soft, hard: how much an item counts by its soft and by its true label.
        replay_fraction: this part of the new items is kept by its true label alone.
        divergence: of soft labels. refresh: ask the model again after each task.
        ask: in training with augmentation, the soft label of a changed input is what the weights
            theta* say of that very input, one more forward pass without gradient; so the term is
            0 and flat at theta* there too; with ``top_outputs`` it is cut as the stored one is.
            False: it is that of the unchanged input. Buffers (running statistics) are the model's
            own of that moment.
        top_outputs: of each item's soft label the so many largest outputs, and one number for the
            others (``lifelong.top_outputs``); None keeps all. For many classes; what is cut off is
            made up for in g, so that the gradient at theta* stays right. KL alone.
        kernel: "gp" (FROMP) or "identity" (FROMP-L2) couples the means of the outputs instead.
        kernel_precision, jitter: delta of FROMP's covariance, and what is added to K.

        compact: the items are no examples but vectors learned from all of them and from the
        vectors of before (``lifelong.compact``), by "em" or in "closed_form"; for a linear head.
        compact_damping, compact_iterations: the EM's eps, and how often.

    On the data at hand
        distil: LwF's strength: the current inputs are the memory. Needs ``Prior.prepare``.
        reference: not a prior but a yardstick, for the learner: "joint" trains on all data
        again, "separate" trains a fresh model for each task.
    """

    name: str = "prior"
    structure: Structure | None = None
    rank: int = 20
    estimator: Estimator = "exact"
    merge: bool = True
    strength: float | Auto = 1.0
    margin: float = 1.0
    discount: float = 1.0
    exclude_memory: bool = True
    curvature_examples: int | None = None
    equal_tasks: bool = False
    path_damping: float = 0.1
    gradient: Gradient = "stored"
    memory: Given | None = 0
    total: bool = False
    score: str = "lambda"
    per_class: bool = True
    descending: bool = True
    population: bool = False
    soft: float = 1.0
    hard: float = 0.0
    replay_fraction: float = 0.0
    divergence: Divergence = field(default_factory=KL)
    refresh: bool = True
    ask: bool = False
    top_outputs: int | None = None
    kernel: Kernel | None = None
    kernel_precision: float = 1e-3
    jitter: float = 1e-6
    compact: Compact | None = None
    compact_damping: float = 1e-4
    compact_iterations: int = 10
    distil: float = 0.0
    reference: Reference | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        object.__setattr__(self, "memory", parse(self.memory))
        if isinstance(self.memory, Fidelity):
            self._require_curve()
        if self.curvature_examples is not None and self.curvature_examples < 1:
            raise ValueError(
                "curvature_examples must be at least 1, or None for all, got "
                f"{self.curvature_examples}"
            )
        if self.equal_tasks and (self.total or self.kernel or self.distil):
            raise ValueError(
                "equal tasks need terms that are each of one task; expected no total memory, "
                "kernel or distil"
            )
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        for name in ("soft", "hard", "distil", "jitter", "margin"):
            require_strength(name, getattr(self, name))
        if self.margin != 1 and self.strength != "auto":
            raise ValueError(
                f'a margin is of a strength that was found: expected strength="auto" with a margin '
                f"of {self.margin}, got {self.strength}; multiply the strength instead"
            )
        if self.strength != "auto" or self.structure == "path" or self.kernel is not None:
            require_strength("strength", self.strength)
        for name in ("path_damping", "kernel_precision", "compact_damping"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and positive, got {value}")
        for name in ("discount", "replay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.total and self.score not in ("random", "lambda", "residual"):
            raise ValueError(
                f"a total memory compares old and new examples, which score={self.score!r} "
                "cannot; use random, lambda or residual"
            )

        if self.ask and (not self.refresh or self.kernel or self.compact):
            raise ValueError(
                "ask asks the newest weights about augmented inputs: expected refresh=True, and no "
                "kernel or compact, whose beliefs are of one input each"
            )
        if self.top_outputs is not None:
            if self.top_outputs < 1:
                raise ValueError(f"top_outputs must be at least 1, got {self.top_outputs}")
            if self.kernel or self.compact or not isinstance(self.divergence, KL):
                raise ValueError(
                    "the largest outputs and one number for the others are a distribution, which "
                    "only KL reads; expected top_outputs=None with a kernel, compact vectors or "
                    f"the divergence {type(self.divergence).__name__}"
                )
        if self.compact_iterations < 1:
            raise ValueError(
                f"compact_iterations must be at least 1, got {self.compact_iterations}"
            )
        others = (self.structure, self.kernel, self.hard or None, self.replay_fraction or None)
        wrong = not self.memory or isinstance(self.memory, (Bytes, Fidelity))
        if self.compact is not None and (wrong or any(x is not None for x in others)):
            raise ValueError(
                "compact vectors have no true labels and carry all of the curvature: expected a "
                "memory of at least 1, and no structure, kernel, hard or replay_fraction"
            )

    @property
    def keeps_memory(self) -> bool:
        return self.memory != 0

    @property
    def by_class(self) -> bool:
        """Whether the items are drawn at random, as many of each class, so that an item stands for
        a share of its own class alone."""
        return self.score == "random" and self.per_class

    def with_strength(self, strength: float) -> Recipe:
        """With a number in place of "auto", and of its margin."""
        return replace(self, strength=strength, margin=1.0)

    def carry(self, precision: float = 1.0) -> Carry:
        """How a task's examples are carried, for the curve of fidelity against memory.

        A strength of "auto" counts as 1: it is not known before the memory is chosen.
        Raises ValueError where that is no sum over examples: kernels, paths, learned vectors.
        """
        if self.kernel or self.structure == "path" or self.compact is not None:
            raise ValueError(
                f"the {self.name} prior couples its examples, so that its fidelity is no sum over "
                "them; give a number of examples, and measure with fidelity(prior, model, data)"
            )
        return Carry(
            soft=self.soft * (1.0 - self.replay_fraction),
            hard=self.hard * (1.0 - self.replay_fraction) + self.replay_fraction,
            population=self.population,
            by_class=self.by_class,
            divergence=self.divergence,
            structure=self.structure,
            # "auto" is found once the memory is chosen. It is of the way back to where learning
            # began; near the anchor, where fidelity is of, 1 is right and a larger one too much.
            strength=1.0 if self.strength == "auto" else self.strength,
            estimator=self.estimator,
            options={"rank": self.rank} if self.structure == "low_rank" else {},
            exclude=self.exclude_memory,
            precision=precision,
        )

    def _require_curve(self) -> None:
        if self.total:
            raise ValueError(
                "a total memory has a size, in examples or bytes: a fidelity is of one task's "
                "memory; pass total=False"
            )
        self.carry()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        values = {**asdict(self), "memory": plain(parse(self.memory))}
        return {**values, "divergence": named(self.divergence)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Unknown keys warn, since a newer version may have written them."""
        found = known(cls, values)
        return cls(**{**found, "divergence": unnamed(divergences, found["divergence"])})
