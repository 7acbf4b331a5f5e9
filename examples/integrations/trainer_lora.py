"""Hugging Face's Trainer and PEFT: LoRA adapters learn new intents and keep the old ones.

    pip install 'lifelong[hf]'
    python examples/integrations/trainer_lora.py

Six intents come two at a time. The network is small and random and the sentences are made here, so
that nothing is loaded; the lines for a model of your own are the same.
"""

from __future__ import annotations

import random
import tempfile
from typing import Any

import peft
import torch
import transformers as hf

import lifelong
from lifelong.integrations.transformers import LifelongTrainer

INTENTS = {
    "music": ["song", "album", "play", "artist", "loud"],
    "weather": ["rain", "sun", "storm", "degrees", "cloudy"],
    "bank": ["balance", "transfer", "account", "card", "interest"],
    "travel": ["flight", "hotel", "train", "ticket", "visa"],
    "kitchen": ["recipe", "oven", "boil", "butter", "spoon"],
    "alarm": ["wake", "clock", "minutes", "snooze", "morning"],
}
FILLERS = ["please", "can", "you", "tell", "me", "about", "the", "my", "now", "what", "is", "how"]
VOCABULARY = ["[PAD]", *FILLERS, *(word for words in INTENTS.values() for word in words)]
LENGTH = 8


def rows(labels: list[int], count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences of fillers with two words of their intent, padded to one length."""
    draw, found = random.Random(seed), []
    for label in labels:
        words = list(INTENTS.values())[label]
        for _ in range(count):
            sentence = draw.choices(FILLERS, k=draw.randint(2, 5)) + draw.choices(words, k=2)
            draw.shuffle(sentence)
            ids = [VOCABULARY.index(word) for word in sentence]
            padding = LENGTH - len(ids)
            found.append(
                {
                    "input_ids": ids + [0] * padding,
                    "attention_mask": [1] * len(ids) + [0] * padding,
                    "labels": label,
                }
            )
    return found


def network() -> Any:
    config = hf.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=len(INTENTS),
    )
    layers = ["word_embeddings", "query", "value", "dense"]
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers, task_type="SEQ_CLS")
    return peft.get_peft_model(hf.BertForSequenceClassification(config), lora)


def accuracy(model: Any, data: list[dict[str, Any]]) -> float:
    inputs = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
    return lifelong.evaluate(
        model, lifelong.Examples(inputs, inputs.pop("labels")), lifelong.Categorical()
    ).accuracy


def main(epochs: int = 15) -> list[float]:
    torch.manual_seed(0)
    model = network()
    tasks = [[0, 1], [2, 3], [4, 5]]
    tests = [rows(labels, 50, seed=100 + labels[0]) for labels in tasks]
    found: list[float] = []
    prior = lifelong.gradient_reconstruction(lifelong.Categorical(), memory=20)
    for index, labels in enumerate(tasks):
        with tempfile.TemporaryDirectory() as folder:
            arguments = hf.TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=32,
                learning_rate=1e-2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                label_names=["labels"],
            )
            trainer = LifelongTrainer(
                model, arguments, train_dataset=rows(labels, 80, seed=labels[0]), prior=prior
            )
            trainer.train()
            prior = trainer.update_prior()  # for the next task's trainer
        found = [accuracy(model, data) for data in tests[: index + 1]]
        print("accuracy on each task so far:", " ".join(f"{a:.3f}" for a in found))
    print(f"{len(prior.weight.anchor)} tensors of adapters and head carry the prior")
    return found


if __name__ == "__main__":
    main()
