r"""Lightning's ``Trainer`` with a prior: extra ``lightning``.

    callback = LifelongCallback(lifelong.recommended(Categorical()))
    for task in tasks:
        Trainer(callbacks=[callback], ...).fit(module, DataLoader(task, shuffle=True))

The module's loss is a mean in nats per example, as ``F.cross_entropy`` is. To its gradient the
callback adds, before each step of the optimiser,

    ∇ prior(theta) / num_data,        once, whatever the number of micro-batches or processes

in ``on_before_optimizer_step``: after accumulation, the mean over processes and unscaling, before
clipping and the step, as in a loop written by hand. The prior is computed outside of autocast.

Fabric leaves the loop to you, so nothing is needed but the loop's own lines:

    past = prior(model) / len(task)                 # model = fabric.setup(...)
    fabric.backward(F.cross_entropy(model(x), y) + past)
    prior = prior.update(model, task)               # after the task
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

try:
    from lightning.pytorch import (  # pyright: ignore[reportMissingImports]
        Callback,
        LightningModule,
        Trainer,
    )
    from lightning.pytorch.strategies import (  # pyright: ignore[reportMissingImports]
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
    )
except ImportError as error:
    raise ImportError(
        f"the callback needs the extra 'lightning': pip install 'lifelong[lightning]' ({error})"
    ) from error

from ..data import Head, num_examples, require_repeatable
from ..errors import CheckpointError
from ..models import parameters
from ..prior import Prior


class LifelongCallback(Callback):
    """Gives a ``Trainer`` a prior; ``callback.prior`` is the one in use.

    prior: of the tasks before. num_data: examples of the task, what the prior is divided by; by
    default those of the training data. head: the classes that compete in this task (the module's
    loss must see to it itself), by default what the data set carries. memory_batch_size:
    remembered examples drawn at each step, None for all. module: the submodule that the prior is
    of, as in ``get_submodule``; "" is the LightningModule, whose ``forward`` must then take the
    inputs. data: what the prior is updated with, in order and unaugmented; by default the data set
    of the training loader. update: at the end of each ``fit``, in every process; False leaves it
    to ``callback.update(trainer)``. seed: of what is drawn, the same in all processes.

    The prior is part of the Trainer's checkpoints, and comes back with ``fit(ckpt_path=...)``; a
    checkpoint written after ``fit`` (``trainer.save_checkpoint``) holds the new one.

    Raises TypeError where the prior is none; in ``fit`` ValueError where examples cannot be
    counted, for a strategy that splits parameters (FSDP, DeepSpeed, model parallel), for an
    optimiser that unscales gradients itself (fused, with 16-mixed), and for a prior that reads
    the path of training (SI) or trains otherwise; NotRepeatableError for data that are augmented
    at random; StaleAnchorError for another model.
    """

    def __init__(
        self,
        prior: Prior,
        *,
        num_data: int | None = None,
        head: Head | None = None,
        memory_batch_size: int | None = None,
        module: str = "",
        data: Any = None,
        update: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(prior, Prior):
            raise TypeError(
                f"expected a prior such as lifelong.ewc(Categorical()), got {type(prior).__name__}"
            )
        self.prior, self.num_data, self.head, self.data = prior, num_data, head, data
        self.memory_batch_size, self.module, self.updates = memory_batch_size, module, update
        self.generator = torch.Generator().manual_seed(seed)
        self._within = False  # a task that is not yet in the prior
        self._count = 0

    # ---------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the examples, and let the prior look at the task (LwF, equal tasks); that not
        again where a checkpoint goes on within it."""
        recipe = self.prior.recipe
        if recipe.structure == "path" or recipe.reference is not None:
            raise ValueError(
                f"the {recipe.name} prior watches a loop of its own; use lifelong.Learner"
            )
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                "FSDP, DeepSpeed and model parallel strategies split the parameters, which a prior "
                "knows by name and shape; expected one device or strategy='ddp'"
            )
        if self.updates:  # told now, and not after hours of training
            require_repeatable(self._data(trainer))
        prior = self.prior.to(pl_module.device)
        if not self._within and (recipe.distil or recipe.equal_tasks):
            prior = prior.prepare(self._model(pl_module), self._data(trainer), head=self.head)
        self._count = self.num_data or num_examples(self._data(trainer))
        self.prior, self._within = prior, True

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add ∇ prior / num_data to the gradients of this optimiser's parameters."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise ValueError(
                f"{type(optimizer).__name__} unscales the gradients within its step, so that the "
                "prior would be scaled too; pass fused=False, or precision='bf16-mixed'"
            )
        model = self._model(pl_module)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        params = [p for p in parameters(model).values() if id(p) in mine]
        add_gradient(
            self.prior,
            model,
            self._count,
            params=params,
            batch_size=self.memory_batch_size,
            generator=self.generator,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The prior of the next task, unless ``update`` is False; an interrupted ``fit`` does not
        come here. Not in ``on_fit_end``, where the model has left its device."""
        if self.updates:
            self.update(trainer)

    def update(self, trainer: Trainer, data: Any = None, **options: Any) -> Prior:
        """``Prior.update`` with what was learned. data: as the callback's by default. options: of
        ``Prior.update``. On several processes each reads all of the data, so that all have the
        same prior without communication. Raises as ``Prior.update``, ValueError without data."""
        data = self._data(trainer) if data is None else data
        options = {"head": self.head, "generator": self.generator, **options}
        self.prior = self.prior.update(self._model(trainer.lightning_module), data, **options)
        self._within = False
        return self.prior

    def _model(self, pl_module: LightningModule) -> nn.Module:
        return pl_module.get_submodule(self.module)

    def _data(self, trainer: Trainer) -> Any:
        if self.data is not None:
            return self.data
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__"):
            raise ValueError(
                "the training data are not one loader of a data set with a length; pass data=, "
                "the examples in order, or num_data= and update=False"
            )
        return dataset

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The prior, where its draws are, and whether a task is half learned."""
        return {
            "prior": self.prior.state_dict(),
            "generator": self.generator.get_state(),
            "within": self._within,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What ``state_dict`` gave. Raises CheckpointError where it cannot be read; then nothing
        was changed."""
        try:
            prior = Prior.from_state_dict(state_dict["prior"])
            generator, within = state_dict["generator"], bool(state_dict["within"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint holds a prior that cannot be read ({error!r}); upgrade lifelong, "
                "or use the last good one"
            ) from error
        self.prior, self._within = prior, within
        self.generator.set_state(generator.cpu())


def add_gradient(
    prior: Prior,
    model: nn.Module,
    num_data: int,
    *,
    params: list[nn.Parameter] | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """p.grad += ∇ prior(theta) / num_data, for ``params`` or all that are trained.

    For gradients that are unscaled, averaged over processes, and not yet clipped.
    """
    params = list(parameters(model).values()) if params is None else params
    with torch.enable_grad():
        value = prior(model, batch_size=batch_size, generator=generator) / num_data
    if not value.requires_grad or not params:
        return
    grads = torch.autograd.grad(value, params, allow_unused=True)
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad.add_(grad)
