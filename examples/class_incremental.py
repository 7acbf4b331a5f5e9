"""Classes that keep coming: one output layer that grows, and all classes seen so far compete.

    python examples/class_incremental.py

Two digits come at a time. Nothing in the new images says that an old digit may still occur, so the
past is replayed with true labels, each item weighted by how many past examples it stands for.
"""

from __future__ import annotations

import torch
from torch import nn

import lifelong
from lifelong.toys import digits


def main(epochs: int = 10, memory: int = 100) -> list[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    likelihood = lifelong.Categorical()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2))
    stream = lifelong.split_by_class(*digits(), classes_per_task=2, scenario="class")

    prior = lifelong.experience_replay(likelihood, memory=memory, balanced=True)
    for task in stream:
        if task.index:
            lifelong.widen(model, "3", num_outputs=2 * (task.index + 1))
            prior = prior.grow(model)  # old examples now compete with the new classes
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)  # of the layer as it is now
        for x, y in task.loader(batch_size=32, epochs=epochs, generator=generator):
            # New data and memory in one forward pass.
            loss = prior.loss(model, x, y, num_data=len(task), batch_size=64, generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prior = prior.update(model, task.train, generator=generator)

        seen = stream[: task.index + 1]
        accuracy = [lifelong.evaluate(model, t.test, likelihood).accuracy for t in seen]
        print(f"after {task.name:4}", " ".join(f"{a:.3f}" for a in accuracy))
    return accuracy


if __name__ == "__main__":
    main()
