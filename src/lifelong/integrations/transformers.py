r"""Hugging Face ``Trainer`` with a prior: extra ``hf``.

    trainer = LifelongTrainer(model, args, train_dataset=task, prior=lifelong.ewc(Categorical()))
    trainer.train()
    prior = trainer.update_prior()      # the prior for the next task's trainer

What is minimised at each step of the optimiser, in nats per item of the data:

    sum_i l(y_i, f(x_i)) / (items of the step) + prior(model) / num_data

An item is an example, or of a causal language model a token that is predicted. The loss is the
nll of the prior's likelihood, so that both parts have the same unit, whatever the model's own loss
averages over. A ``TrainerCallback`` can add no loss, so ``compute_loss`` is overridden.

The prior's gradient is added once for a step of the optimiser, with its last micro-batch: there
the gradients of several processes are averaged, and to them the prior is the same, so it is
counted once under accumulation and on several processes; it is inside of the scaled, the clipped
and the logged loss as in a loop written by hand. The order is the Trainer's: backward of the
scaled loss, unscale, clip, step. Only parameters with ``requires_grad`` have a prior: of a PEFT
model the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

try:
    from transformers import (  # pyright: ignore[reportMissingImports]
        Trainer,
    )
    from transformers.trainer_utils import (  # pyright: ignore[reportMissingImports]
        get_last_checkpoint,
    )
except ImportError as error:
    raise ImportError(
        f"the Trainer with a prior needs the extra 'hf': pip install 'lifelong[hf]' ({error})"
    ) from error

from ..data import Head, head_mask
from ..errors import CheckpointError
from ..likelihoods import Likelihood, NextTokens
from ..models import logits
from ..prior import Prior

FILE = "prior.safetensors"  # beside the weights, in each checkpoint
IGNORED = -100  # the label of a token that is not to be predicted
_COUNTED = "lifelong_counted"  # the input that tells the hooks which tokens these are not

LossFunction = Callable[..., Tensor]


def mean_nll(likelihood: Likelihood, head: Head | None = None) -> LossFunction:
    """What ``Trainer(compute_loss_func=...)`` takes: the likelihood's nll in nats per item.

    (outputs, labels, num_items_in_batch) -> sum of nll / num_items_in_batch, which the Trainer
    counts over all micro-batches of a step (and all processes); of this batch where it is None.
    head: the classes that compete. Raises ValueError where labels are missing, and ValueError or
    TypeError where they do not fit.
    """

    def loss(outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        if labels is None:
            raise ValueError("the batch has no 'labels', without which there is no likelihood")
        f = logits(outputs)
        f = f.float() if f.dtype in (torch.bfloat16, torch.float16) else f
        if isinstance(likelihood, NextTokens):
            f, labels = f[:, :-1].flatten(1), labels[:, 1:]
            items = (labels != IGNORED).sum()
        else:
            items = len(labels)
        mask = head_mask(head, f.shape[1], f.device)
        if labels.device.type == "cpu":  # elsewhere the check would wait for the device
            likelihood.validate(f.detach(), labels, mask)
        total = likelihood.nll(likelihood.mask(f, mask), labels).sum()
        if num_items_in_batch is None:
            return total / items
        # The Trainer counts labels: C for each example where a label is a vector.
        per_item = labels[0].numel() if labels.is_floating_point() else 1
        return total * per_item / num_items_in_batch

    return loss


class LifelongMixin:
    """Gives a ``Trainer`` a prior: ``class Mine(LifelongMixin, Seq2SeqTrainer)``.

    prior: of the tasks before; ``trainer.prior`` is the one in use. num_data: items of the
    training data, by default counted: what the prior is divided by. head: the classes of this
    task, None for all. memory_batch_size: remembered examples drawn at each step, None for all;
    drawn from the global random state, which the Trainer's checkpoints hold.
    loss: "likelihood" is the nll of the prior's likelihood (``mean_nll``); "model" is the model's
    own loss or ``compute_loss_func``, which must then be a mean in nats over the same items.

    Raises TypeError where the prior is none, ValueError for engines that split or flatten the
    parameters (DeepSpeed, FSDP), for label smoothing with "likelihood", a head with "model", and
    for a language model whose prior is not of the weights alone (see ``NextTokens``).
    """

    def __init__(
        self,
        *args: Any,
        prior: Prior,
        num_data: int | None = None,
        head: Head | None = None,
        memory_batch_size: int | None = None,
        loss: Literal["likelihood", "model"] = "likelihood",
        **kwargs: Any,
    ) -> None:
        if not isinstance(prior, Prior):
            raise TypeError(
                f"expected a prior such as lifelong.ewc(Categorical()), got {type(prior).__name__}"
            )
        if loss not in ("likelihood", "model"):
            raise ValueError(f"loss must be 'likelihood' or 'model', got {loss!r}")
        if loss == "likelihood":
            if kwargs.get("compute_loss_func") is not None:
                raise ValueError(
                    "compute_loss_func was given; pass loss='model' to use it in place of the "
                    "likelihood's nll"
                )
            kwargs["compute_loss_func"] = mean_nll(prior.likelihood, head)
        elif head is not None:
            raise ValueError("a head masks the likelihood's loss; expected loss='likelihood'")
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "DeepSpeed and FSDP split or flatten the parameters, which a prior knows by name "
                "and shape; expected plain or distributed data parallel training"
            )
        if loss == "likelihood" and trainer.label_smoother is not None:
            raise ValueError("label smoothing is no likelihood; expected label_smoothing_factor=0")
        if isinstance(prior.likelihood, NextTokens):
            _require_weights_alone(prior)
            if not trainer._loss_shifts_labels:
                raise ValueError(
                    f"NextTokens is of decoders whose labels are their inputs; "
                    f"{type(trainer.model).__name__} is none"
                )
        self.prior = prior.to(trainer.args.device)
        self.head, self.memory_batch_size, self._given = head, memory_batch_size, num_data
        self._num_data: int | None = None

    # ---------------------------------------------------------------- training

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """``Trainer.train``. A checkpoint brings its prior with it.

        A prior that looks at a task before it is learned (LwF, equal tasks) does so here.
        Raises CheckpointError for a checkpoint without a prior, ValueError where items cannot be
        counted.
        """
        trainer: Any = self
        folder = resume_from_checkpoint
        if isinstance(folder, bool):
            folder = get_last_checkpoint(trainer.args.output_dir) if folder else None
        if folder is not None:
            self.prior = self._load(Path(folder))
        elif self.prior.recipe.distil or self.prior.recipe.equal_tasks:
            self.prior = self.prior.prepare(
                trainer.model, self.data(trainer.train_dataset), head=self.head
            )
        self._num_data = self._given or self._count()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loss, and in training the prior's part of a step of the optimiser.

        The Trainer divides a loss that is a mean over its micro-batch by the number of
        micro-batches, and leaves one that was divided by ``num_items_in_batch``: the prior is
        multiplied to match.
        """
        trainer: Any = super()
        own = trainer.compute_loss(
            model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not (model.training and torch.is_grad_enabled()):
            return own
        me: Any = self
        if not me.accelerator.sync_gradients:  # a later micro-batch of this step has the prior
            return own
        past = self.prior(me.model, batch_size=self.memory_batch_size) / self.num_data
        if not self._is_scaled(num_items_in_batch):
            past = past * me.current_gradient_accumulation_steps
        return (own[0] + past, own[1]) if return_outputs else own + past

    @property
    def num_data(self) -> int:
        """Items of the training data: what the prior is divided by."""
        if self._num_data is None:
            self._num_data = self._given or self._count()
        return self._num_data

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer takes the loss as divided for accumulation: as ``training_step``."""
        me: Any = self
        said = getattr(me, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        counted = me.model_accepts_loss_kwargs and num_items_in_batch is not None
        return counted or me.compute_loss_func is not None

    # ---------------------------------------------------------------- the prior

    def update_prior(
        self,
        dataset: Any = None,
        *,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> Prior:
        """``Prior.update`` with what was learned; ``trainer.prior`` is the new prior.

        dataset: by default the training data. Batches are made by the Trainer's collator, in
        order; ``batch_size``: by default that of evaluation. generator: of draws, by default
        seeded with ``args.seed``. On several processes each reads all of the data, so that all
        have the same prior without communication. options: of ``Prior.update``.

        Raises as ``Prior.update``; ValueError where examples that are to be remembered have
        several lengths, as by a collator that pads to the longest of a batch.
        """
        me: Any = self
        if generator is None:
            generator = torch.Generator().manual_seed(me.args.seed)
        dataset = me.train_dataset if dataset is None else dataset
        size = batch_size or me.args.eval_batch_size
        data = self.data(dataset, size)
        options = {"head": self.head, "generator": generator, "batch_size": size, **options}
        if isinstance(self.prior.likelihood, NextTokens):
            with next_tokens(me.model):
                self.prior = self.prior.update(me.model, data, **options)
        else:
            if self.prior.recipe.keeps_memory:
                _require_one_length(data, self.prior)
            self.prior = self.prior.update(me.model, data, **options)
        return self.prior

    def data(self, dataset: Any, batch_size: int | None = None) -> Any:
        """The examples as the library reads them: in order, by the Trainer's collator, without the
        columns that the model does not take."""
        me: Any = self
        collate = me.data_collator
        if hasattr(dataset, "remove_columns") and hasattr(dataset, "column_names"):
            dataset = me._remove_unused_columns(dataset)
        else:
            collate = me._get_collator_with_removed_columns(collate)
        size = batch_size or me.args.eval_batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=collate)
        return _Shifted(loader) if isinstance(self.prior.likelihood, NextTokens) else loader

    def _count(self) -> int:
        me: Any = self
        dataset = me.train_dataset
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                "the training data have no length, and the prior is divided by their number; pass "
                "num_data, the examples (of a language model: predicted tokens) of one epoch"
            )
        if isinstance(self.prior.likelihood, NextTokens):
            return sum(int((y != IGNORED).sum()) for _, y in self.data(dataset))
        return len(dataset)

    # ---------------------------------------------------------------- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The model, and the prior in use beside it: in each checkpoint too."""
        me: Any = self
        if me.args.should_save:
            folder = Path(me.args.output_dir if output_dir is None else output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.prior.save(folder / FILE)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _load(self, folder: Path) -> Prior:
        me: Any = self
        if not (folder / FILE).is_file():
            raise CheckpointError(
                f"the checkpoint {folder} holds no {FILE}: a Trainer without a prior wrote it. "
                "Start without resume_from_checkpoint, from its weights"
            )
        return Prior.load(folder / FILE).to(me.args.device)


class LifelongTrainer(LifelongMixin, Trainer):  # pyright: ignore[reportGeneralTypeIssues]
    """``transformers.Trainer`` with a prior; its arguments, and those of ``LifelongMixin``."""


# -------------------------------------------------------------------- language models


@contextmanager
def next_tokens(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, a causal language model's output is (B, (T - 1) V): what ``NextTokens`` reads.

    The inputs may hold ``lifelong_counted`` (B, T - 1), which tokens are to be predicted: the
    outputs for others are 0 and free of the weights, so that labels that are drawn for them add no
    curvature. The model's parameters keep their names: it is not wrapped, but hooked.
    """
    counted: list[Tensor | None] = []

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        counted.append(kwargs.pop(_COUNTED, None))
        return args, kwargs

    def after(_: nn.Module, __: Any, output: Any) -> Tensor:
        f, which = logits(output)[:, :-1], counted.pop()
        return (f if which is None else f * which.unsqueeze(-1).to(f.dtype)).flatten(1)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after),
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Shifted:
    """Batches of a language model as (inputs, labels of the next tokens (B, T - 1))."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        return map(_shifted, self.loader)  # the loader starts here: who guards its draw sees it


def _shifted(batch: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Tensor]:
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return {**inputs, _COUNTED: labels != IGNORED}, labels


def _require_weights_alone(prior: Prior) -> None:
    recipe = prior.recipe
    if recipe.keeps_memory or recipe.distil or recipe.kernel:
        raise ValueError(
            f"the {recipe.name} prior remembers outputs, which of a language model are tokens x "
            "vocabulary numbers for each text; expected a prior of the weights alone: "
            "lifelong.ewc(NextTokens(V), estimator='mc'), or another Recipe with memory=0"
        )


def _require_one_length(data: DataLoader, prior: Prior) -> None:
    """What is remembered is put in one batch, also with the items of before."""
    shapes = set() if prior.memory is None else {_lengths(prior.memory.inputs)}
    for batch in data:
        shapes.add(_lengths({name: v for name, v in batch.items() if name != "labels"}))
    if len(shapes) > 1:
        raise ValueError(
            f"examples of several shapes, {sorted(shapes, key=str)[:3]}, cannot be remembered "
            "together: tokenise all tasks with padding='max_length' and one max_length"
        )


def _lengths(inputs: Any) -> Any:
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:])
    return tuple(sorted((name, tuple(value.shape[1:])) for name, value in inputs.items()))
