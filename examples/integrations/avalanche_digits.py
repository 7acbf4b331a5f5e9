"""Avalanche's strategies with a prior: handwritten digits, two at a time, task-incremental.

    pip install 'lifelong[avalanche]'
    python examples/integrations/avalanche_digits.py

The digits come with scikit-learn, so nothing is loaded.
"""

from __future__ import annotations

import torch
from avalanche.benchmarks import class_incremental_benchmark, task_incremental_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import Naive
from torch import nn
from torch.utils.data import TensorDataset

import lifelong
from lifelong.integrations.avalanche import LifelongPlugin
from lifelong.toys import digits


class Arrays(TensorDataset):
    """What Avalanche reads: items, and all labels as ``targets``."""

    def __init__(self, examples: lifelong.Examples) -> None:
        super().__init__(examples.inputs, examples.labels)
        self.targets = examples.labels.tolist()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        x, y = super().__getitem__(index)
        return x, int(y)


def main(epochs: int = 10) -> float:
    torch.manual_seed(0)
    train, test = digits()
    benchmark = task_incremental_benchmark(
        class_incremental_benchmark(
            {
                "train": as_classification_dataset(Arrays(train)),
                "test": as_classification_dataset(Arrays(test)),
            },
            class_order=list(range(10)),
            num_experiences=5,
        )
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    plugin = LifelongPlugin(lifelong.kprior(lifelong.Categorical(), memory=40), heads="experience")
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-3),
        train_mb_size=32,
        train_epochs=epochs,
        eval_mb_size=256,
        plugins=[plugin],
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    metrics = strategy.eval(benchmark.test_stream)
    found = next(value for name, value in metrics.items() if "Acc_Stream" in name)
    print(f"accuracy over all tasks: {found:.3f}; {plugin.prior}")
    return found


if __name__ == "__main__":
    main()
