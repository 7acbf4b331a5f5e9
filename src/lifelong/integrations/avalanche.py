r"""A prior through Avalanche's strategies: extra ``avalanche``.

    plugin = LifelongPlugin(lifelong.kprior(Categorical(), memory=100))
    strategy = Naive(model=model, optimizer=optimizer, train_mb_size=32, plugins=[plugin])
    for experience in benchmark.train_stream:
        strategy.train(experience)

Each step minimises  criterion + prior(model) / N  in nats per example, N those of the experience;
after it the prior is updated with its data, read without training transforms. The criterion must be
the likelihood's nll, averaged: ``CrossEntropyLoss()`` for ``Categorical``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

try:
    from avalanche.models import (  # pyright: ignore[reportMissingImports]
        MultiTaskModule,
    )
    from avalanche.training.plugins import (  # pyright: ignore[reportMissingImports]
        SupervisedPlugin,
    )
except ImportError as error:
    raise ImportError(
        f"the plugin for Avalanche needs the extra 'avalanche': pip install 'lifelong[avalanche]' "
        f"({error})"
    ) from error

from ..data import Head, head_mask
from ..prior import Prior
from ..terms import WeightTerm


class LifelongPlugin(SupervisedPlugin):  # pyright: ignore[reportGeneralTypeIssues]
    """Carries a prior from experience to experience; ``plugin.prior`` is the one in use.

    heads: "all" outputs compete (class- and domain-incremental benchmarks), or those of each
    "experience" (task-incremental: in training and evaluation the others get probability 0).
    memory_batch_size: remembered examples drawn at each step, None for all. generator: of draws.

    A classifier that grows (Avalanche's ``IncrementalClassifier``) is followed by ``Prior.grow``.
    Raises TypeError where the prior is none; in training ValueError for a model of several heads
    (``MultiTaskModule``), whose outputs change their meaning with the task: one output layer and
    heads="experience" learn the same.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        heads: Literal["all", "experience"] = "all",
        memory_batch_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(prior, Prior):
            raise TypeError(
                f"expected a prior such as lifelong.ewc(Categorical()), got {type(prior).__name__}"
            )
        if heads not in ("all", "experience"):
            raise ValueError(f"heads must be 'all' or 'experience', got {heads!r}")
        self.prior, self.heads = prior, heads
        self.memory_batch_size, self.generator = memory_batch_size, generator

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        if any(isinstance(m, MultiTaskModule) for m in strategy.model.modules()):
            raise ValueError(
                "a prior knows a model of one output layer, and this one has a head for each "
                "task (MultiTaskModule); use one layer, and LifelongPlugin(heads='experience')"
            )
        self.prior = self.prior.to(strategy.device)
        if _has_grown(self.prior, strategy.model):
            self.prior = self.prior.grow(strategy.model)
        self.prior = self.prior.prepare(
            strategy.model, _examples(strategy.experience), head=self._head(strategy)
        )

    def after_forward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.mb_output = self._masked(strategy)

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        strategy.mb_output = self._masked(strategy)

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        past = self.prior(
            strategy.model, batch_size=self.memory_batch_size, generator=self.generator
        )
        strategy.loss = strategy.loss + past / len(strategy.experience.dataset)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.prior = self.prior.update(
            strategy.model,
            _examples(strategy.experience),
            head=self._head(strategy),
            generator=self.generator,
        )

    def _head(self, strategy: Any) -> Head | None:
        if self.heads == "all":
            return None
        return tuple(sorted({int(c) for c in strategy.experience.dataset.targets}))

    def _masked(self, strategy: Any) -> Tensor:
        f: Tensor = strategy.mb_output
        return self.prior.likelihood.mask(f, head_mask(self._head(strategy), f.shape[1], f.device))


class _Pairs(Dataset):
    """(input, label) of Avalanche's (input, label, task)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        x, y, *_ = self.dataset[index]
        return x, y


def _examples(experience: Any) -> _Pairs:
    """The experience's own data, without what plugins added and without augmentation."""
    return _Pairs(experience.dataset.eval())


def _has_grown(prior: Prior, model: nn.Module) -> bool:
    """Whether a parameter has another shape than at the prior's anchor."""
    now = dict(model.named_parameters())
    return any(
        name in now and now[name].shape != value.shape
        for term in prior.terms
        if isinstance(term, WeightTerm)
        for name, value in term.anchor.items()
    )
