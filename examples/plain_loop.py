"""Three lines added to a training loop: handwritten digits, permuted anew in each task.

    python examples/plain_loop.py

All tasks share one output layer (domain-incremental). Run it with lifelong.finetune in place of
lifelong.kprior to see what is forgotten. The digits come with scikit-learn, so nothing is loaded.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import lifelong
from lifelong.toys import digits


def main(num_tasks: int = 4, epochs: int = 10) -> list[float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    likelihood = lifelong.Categorical()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    stream = lifelong.permuted(*digits(), num_tasks=num_tasks)

    prior = lifelong.kprior(likelihood, precision=1e-2, memory=50)
    for task in stream:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for x, y in task.loader(batch_size=32, epochs=epochs, generator=generator):
            # The past is in nats, summed; the new loss is a mean over len(task) examples.
            past = prior(model, batch_size=64, generator=generator)
            loss = F.cross_entropy(model(x), y) + past / len(task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prior = prior.update(model, task.train, generator=generator)

        seen = stream[: task.index + 1]
        accuracy = [lifelong.evaluate(model, t.test, likelihood).accuracy for t in seen]
        print(f"after {task.name:14}", " ".join(f"{a:.3f}" for a in accuracy))
    print(f"remembered: {len(prior.memory)} examples, {prior.num_bytes / 1024:.0f} KiB in all")
    return accuracy


if __name__ == "__main__":
    main()
