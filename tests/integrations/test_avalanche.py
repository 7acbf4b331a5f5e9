"""Avalanche with a prior does what the loop written by hand does, with the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("avalanche", reason="needs the extra avalanche", exc_type=ImportError)
# Avalanche says so wherever nothing is logged.
pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning")

from avalanche.benchmarks import (  # noqa: E402
    class_incremental_benchmark,
    task_incremental_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import as_classification_dataset  # noqa: E402
from avalanche.models import IncrementalClassifier, MultiTaskModule  # noqa: E402
from avalanche.training.plugins import SupervisedPlugin  # noqa: E402
from avalanche.training.supervised import Naive  # noqa: E402

import lifelong  # noqa: E402
from lifelong import Categorical  # noqa: E402
from lifelong.integrations.avalanche import LifelongPlugin  # noqa: E402
from lifelong.models import parameters  # noqa: E402

C = 6


class Arrays(torch.utils.data.Dataset):
    """Points around C means: what Avalanche reads, an item and ``targets``."""

    def __init__(self, seed: int, count: int = 20) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(C).repeat(count).tolist()
        means = 3 * torch.randn(C, 4, generator=torch.Generator().manual_seed(9))
        noise = torch.randn(C * count, 4, generator=generator)
        self.x = (means[torch.tensor(self.targets)] + noise).double()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.targets[index]


def benchmark(task: bool) -> Any:
    data = {n: as_classification_dataset(Arrays(s)) for n, s in (("train", 0), ("test", 1))}
    found = class_incremental_benchmark(data, class_order=list(range(C)), num_experiences=3)
    return with_classes_timeline(task_incremental_benchmark(found)) if task else found


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, C)).double()


class Recording(SupervisedPlugin):
    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.batches.append((strategy.mb_x, strategy.mb_y))


def strategy_of(model: nn.Module, *plugins: Any, lr: float = 0.01) -> Any:
    return Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=8,
        train_epochs=5,
        eval_mb_size=64,
        plugins=list(plugins),
        evaluator=None,
    )


def rows(experience: Any) -> lifelong.Examples:
    items = [experience.dataset.eval()[i] for i in range(len(experience.dataset))]
    return lifelong.Examples(
        torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
    )


PRIORS = {
    "ewc": lambda: lifelong.ewc(Categorical(), precision=0.1, strength=3.0),
    "kprior": lambda: lifelong.kprior(Categorical(), memory=8),
    "gradient_reconstruction": lambda: lifelong.gradient_reconstruction(Categorical(), memory=8),
    "lwf": lambda: lifelong.lwf(Categorical()),
}


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("task", [False, True])
def test_equals_loop_by_hand(kind: str, task: bool) -> None:
    """Class- and task-incremental: the same weights, accuracy and prior, in float64."""
    model, notes, stream = network(), Recording(), benchmark(task)
    generator = torch.Generator().manual_seed(1)
    plugin = LifelongPlugin(
        PRIORS[kind](),
        heads="experience" if task else "all",
        memory_batch_size=4,
        generator=generator,
    )
    strategy = strategy_of(model, plugin, notes)
    other, prior, mine = network(), PRIORS[kind](), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    for experience in stream.train_stream:
        notes.batches.clear()
        strategy.train(experience)
        data, classes = rows(experience), sorted(experience.classes_in_this_experience)
        head = tuple(classes) if task else None
        prior = prior.prepare(other, data, head=head)
        for x, y in notes.batches:
            f = other(x)
            if task:
                keep = torch.zeros(C, dtype=torch.bool)
                keep[classes] = True
                f = f.masked_fill(~keep, -1e9)
            loss = F.cross_entropy(f, y)
            loss = loss + prior(other, batch_size=4, generator=mine) / len(data)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prior = prior.update(other, data, head=head, generator=mine)
    for name, p in parameters(model).items():
        torch.testing.assert_close(p, parameters(other)[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(plugin.prior(model), prior(other), rtol=1e-8, atol=1e-10)


def test_what_was_learned_is_kept() -> None:
    """Task-incremental accuracy of the first task, in Avalanche's own evaluation."""
    seen: list[torch.Tensor] = []

    class Watch(SupervisedPlugin):
        def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
            seen.append((strategy.mb_output.argmax(1) == strategy.mb_y).double())

    model, stream = network(), benchmark(task=True)
    plugin = LifelongPlugin(lifelong.kprior(Categorical(), memory=20), heads="experience")
    strategy = strategy_of(model, plugin, Watch())
    for experience in stream.train_stream:
        strategy.train(experience)
    strategy.eval(stream.test_stream)
    assert torch.cat(seen).mean() > 0.9
    assert plugin.prior.num_tasks == 3
    assert plugin.prior.heads == ((0, 1), (2, 3), (4, 5))


def test_a_classifier_that_grows() -> None:
    """Avalanche replaces the output layer; the prior follows it."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
            self.classifier = IncrementalClassifier(16, initial_out_features=2, masking=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(self.features(x.float()))

    plugin = LifelongPlugin(lifelong.kprior(Categorical(), memory=8))
    model = Growing()
    strategy = strategy_of(model, plugin)
    sizes = []
    for experience in benchmark(task=False).train_stream:
        strategy.train(experience)
        sizes.append(plugin.prior.memory.reference.shape[1])
    assert sizes == [2, 4, 6]


def test_evaluation_does_not_train() -> None:
    model, plugin = network(), LifelongPlugin(PRIORS["ewc"]())
    strategy = strategy_of(model, plugin)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    strategy.eval(benchmark(task=False).test_stream)
    assert plugin.prior.num_tasks == 0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_wrong_use_is_told() -> None:
    with pytest.raises(TypeError, match="expected a prior"):
        LifelongPlugin(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads must be"):
        LifelongPlugin(PRIORS["ewc"](), heads="each")  # type: ignore[arg-type]

    class Heads(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, C)

    model = Heads()
    strategy = strategy_of(model, LifelongPlugin(PRIORS["ewc"]()))
    with pytest.raises(ValueError, match="heads='experience'"):
        strategy.train(benchmark(task=True).train_stream[0])
