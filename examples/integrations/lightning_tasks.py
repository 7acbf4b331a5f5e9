"""Digits in pairs, one pair after another, with Lightning's Trainer and a prior.

pip install 'lifelong[lightning,sklearn]'
python examples/integrations/lightning_tasks.py
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lifelong
from lifelong.integrations.lightning import LifelongCallback


class Digits(LightningModule):
    """An ordinary LightningModule: nothing in it knows of the prior."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(
    num_tasks: int = 5, epochs: int = 15, folder: str | Path = "runs/lightning"
) -> list[float]:
    """Accuracy on each pair of digits at the end, among all ten."""
    torch.manual_seed(0)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    data = lifelong.Examples(x.float() / 16, y)
    test = torch.arange(len(y)) % 5 == 0
    tasks = lifelong.split_by_class(
        data[(~test).nonzero()[:, 0]], data[test.nonzero()[:, 0]], scenario="class"
    )

    module = Digits()
    callback = LifelongCallback(lifelong.recommended(lifelong.Categorical(), memory=50))
    seen = list(tasks)[:num_tasks]
    for task in seen:
        trainer = Trainer(
            max_epochs=epochs,
            callbacks=[callback],  # the line that a lifelong run has more than another
            accelerator="cpu",
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(module, DataLoader(task.train, batch_size=32, shuffle=True))
    trainer.save_checkpoint(Path(folder) / "last.ckpt")  # the prior is in it
    found = [lifelong.evaluate(module, t.test, lifelong.Categorical()).accuracy for t in seen]
    print("accuracy on each task:", ", ".join(f"{a:.2f}" for a in found))
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    main()
