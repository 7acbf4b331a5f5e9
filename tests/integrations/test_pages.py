"""The pages of docs/integrations and the examples run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch
from torch import nn

import lifelong

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "integrations"

pytestmark = [
    # Said by the newest transformers about what the newest PEFT does; neither is ours.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:No loggers specified:UserWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]


def run(page: str, values: dict[str, Any]) -> dict[str, Any]:
    text = (ROOT / "docs" / "integrations" / page).read_text()
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    namespace = {"lifelong": lifelong, "torch": torch, **values}
    for code in found:
        exec(compile(code, page, "exec"), namespace)
    return namespace


def test_transformers_page(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("accelerate", reason="needs the extra hf")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "vocab_size": 30}

    def rows(seed: int, tokens: bool = False) -> list[dict[str, Any]]:
        ids = torch.randint(0, 30, (12, 5), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": x, "labels": x if tokens else i % 2} for i, x in enumerate(ids)]

    end = run(
        "transformers.md",
        {
            "model": hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=2)),
            "lm": hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_key_value_heads=1)),
            "tasks": [rows(0), rows(1)],
            "texts": rows(2, tokens=True),
            "folder": tmp_path,
            "arguments": hf.TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=2,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
        },
    )
    assert end["prior"].num_data == 12


def test_avalanche_page(tmp_path: Path) -> None:
    pytest.importorskip("avalanche", reason="needs the extra avalanche", exc_type=ImportError)
    from avalanche.benchmarks import class_incremental_benchmark
    from avalanche.benchmarks.utils import as_classification_dataset

    module = runpy.run_path(str(EXAMPLES / "avalanche_digits.py"))
    data = as_classification_dataset(module["Arrays"](module["digits"]()[1]))
    run(
        "avalanche.md",
        {
            "model": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            "benchmark": class_incremental_benchmark({"train": data}, num_experiences=2),
            "evaluator": None,
            "folder": tmp_path,
        },
    )
    assert lifelong.Prior.load(tmp_path / "prior.safetensors").num_tasks == 2


def test_trainer_example() -> None:
    pytest.importorskip("transformers", reason="needs the extra hf")
    pytest.importorskip("peft", reason="needs the extra hf")
    found = runpy.run_path(str(EXAMPLES / "trainer_lora.py"))["main"](epochs=8)
    assert min(found) > 0.8


def test_avalanche_example() -> None:
    pytest.importorskip("avalanche", reason="needs the extra avalanche", exc_type=ImportError)
    found = runpy.run_path(str(EXAMPLES / "avalanche_digits.py"))["main"](epochs=3)
    assert found > 0.9


def test_links_hold() -> None:
    for page in (ROOT / "docs" / "integrations").glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 120
