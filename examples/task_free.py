"""No task boundaries: digits drift from one pair of classes to the next, in small chunks.

    python examples/task_free.py

An update needs data, not a task: it is called after each chunk, whatever the chunk holds. A
reservoir keeps the memory, and so the cost of a step, the same from the first chunk to the last.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import lifelong
from lifelong.toys import digits


def main(num_chunks: int = 20, epochs: int = 5, memory: int = 200) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    likelihood = lifelong.Categorical()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    train, test = digits()
    stream = lifelong.blurred(
        lifelong.split_by_class(train, test, scenario="class"), num_chunks=num_chunks
    )

    prior = lifelong.derpp(likelihood, memory=memory)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)  # nobody says when to start afresh
    for chunk in stream:
        for x, y in chunk.loader(batch_size=16, epochs=epochs, generator=generator):
            past = prior(model, batch_size=64, generator=generator)
            loss = F.cross_entropy(model(x), y) + past / len(chunk)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        prior = prior.update(model, chunk.train, generator=generator)
        accuracy = lifelong.evaluate(model, test, likelihood).accuracy
        print(f"{chunk.name:26} {len(prior.memory):3} remembered, all ten digits {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
