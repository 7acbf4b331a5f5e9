"""The Trainer with a prior does what the loop written by hand does, step by step, in float64.

The extra ``hf`` is 320 MB, so these tests run by ``make test-integrations``, not by ``make test``.
Networks are tiny and random: no weights are read.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

if __name__ == "__main__":  # as a script, of several processes
    import conftest  # noqa: F401  # as pytest would

pytest.importorskip("transformers", reason="needs the extra hf")
pytest.importorskip("accelerate", reason="needs the extra hf")
peft = pytest.importorskip("peft", reason="needs the extra hf")

import transformers as hf  # noqa: E402

# Said by the newest transformers about what the newest PEFT does; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

import lifelong  # noqa: E402
from lifelong import Categorical  # noqa: E402
from lifelong.errors import CheckpointError  # noqa: E402
from lifelong.integrations.transformers import (  # noqa: E402
    LifelongMixin,
    LifelongTrainer,
    mean_nll,
    next_tokens,
)
from lifelong.likelihoods import NextTokens  # noqa: E402
from lifelong.models import forward, parameters  # noqa: E402

V, T, N, CLASSES = 40, 7, 22, 4


def bert(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.BertConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=T,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return hf.BertForSequenceClassification(config).to(dtype)


def llama(dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=12,
        max_position_embeddings=T,
        tie_word_embeddings=True,
    )
    return hf.LlamaForCausalLM(config).to(dtype)


def lora(model: Any, kind: str = "SEQ_CLS") -> Any:
    torch.manual_seed(1)
    targets = ["query", "value"] if kind == "SEQ_CLS" else ["q_proj", "v_proj"]
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=kind)
    )


def texts(seed: int = 0, count: int = N) -> list[dict[str, Any]]:
    """Token ids of several lengths, padded to T, with a class each."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(3, T + 1, (), generator=generator))
        ids = torch.randint(1, V, (T,), generator=generator)
        seen = (torch.arange(T) < length).long()
        label = int(torch.randint(0, CLASSES, (), generator=generator))
        out.append({"input_ids": ids * seen, "attention_mask": seen, "labels": label})
    return out


def sentences(seed: int = 0, count: int = N) -> list[dict[str, Any]]:
    """The same for a language model; the first token is a prompt that is not predicted."""
    out = []
    for item in texts(seed, count):
        labels = item["input_ids"].masked_fill(item["attention_mask"] == 0, -100)
        labels[:2] = -100
        out.append({**item, "labels": labels})
    return out


class Recording:
    """A collator that notes the batches it makes: what the loop by hand then reads."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = hf.default_data_collator(items)
        self.batches.append(batch)
        return batch


def arguments(folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "label_names": ["labels"],
    }
    return hf.TrainingArguments(**{**values, **changes})


def constant(model: Any) -> tuple[Any, Any]:
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(chosen, lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def trainer_of(model: Any, folder: Path, prior: Any, data: Any, **changes: Any) -> Any:
    own = {
        name: changes.pop(name)
        for name in ("head", "num_data", "memory_batch_size", "loss", "compute_loss_func")
        if name in changes
    }
    return LifelongTrainer(
        model,
        arguments(folder, **changes),
        train_dataset=data,
        data_collator=Recording(),
        optimizers=constant(model),
        prior=prior,
        **own,
    )


def learned(model: Any, data: Any, prior: Any) -> Any:
    """The prior of a first task that nothing was trained on: its weights are the anchor."""
    inputs = {k: torch.stack([torch.as_tensor(x[k]) for x in data]) for k in data[0]}
    labels = inputs.pop("labels")
    return prior.update(model, lifelong.Examples(inputs, labels))


def by_hand(model: Any, batches: list, prior: Any, accumulate: int, **how: Any) -> None:
    """One epoch's worth of batches after another: mean nll + prior / num_data, clip, step."""
    optimizer, _ = constant(model)
    half = bool(how.get("half"))
    steps = -(-N // 3)
    for epoch in range(2):
        epoch_batches = batches[epoch * steps : (epoch + 1) * steps]
        for start in range(0, steps, accumulate):
            part = epoch_batches[start : start + accumulate]
            rows = sum(len(b["labels"]) for b in part)
            for i, batch in enumerate(part):
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                # As Accelerate does: autocast is round each forward pass, and not round the loss.
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    f = model(**inputs).logits
                f = f.float() if half else f
                if how.get("mean_of_means"):
                    loss = F.cross_entropy(f, batch["labels"]) / len(part)
                else:
                    loss = F.cross_entropy(f, batch["labels"], reduction="sum") / rows
                if i == len(part) - 1:
                    with torch.autocast("cpu", torch.bfloat16, enabled=half):
                        past = prior(model)
                    loss = loss + past / N
                loss.backward()
            if how.get("clip"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), how["clip"])
            optimizer.step()
            optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in parameters(model).items()}


def assert_equal(a: dict, b: dict, tolerance: float = 1e-12) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


KINDS = {
    "ewc": lambda: lifelong.ewc(Categorical(), precision=0.1, strength=3.0),
    "kprior": lambda: lifelong.kprior(Categorical(), precision=0.1, memory=6),
}


# -------------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.0), (3, 0.3)])
@pytest.mark.parametrize("average", [True, False])
def test_equals_loop_by_hand(
    tmp_path: Path, kind: str, accumulate: int, clip: float, average: bool
) -> None:
    """22 examples in batches of 3: the last step of an epoch has fewer micro-batches and rows."""
    prior = learned(bert(), texts(1), KINDS[kind]())
    model = bert()
    trainer = trainer_of(
        model,
        tmp_path,
        prior,
        texts(2),
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        average_tokens_across_devices=average,
    )
    trainer.train()
    other = bert()
    by_hand(other, trainer.data_collator.batches, prior, accumulate, clip=clip)
    assert_equal(weights(model), weights(other))
    with torch.no_grad():
        moved = bert()
        assert not torch.allclose(model.classifier.weight, moved.classifier.weight)


def test_gradient_of_each_step(tmp_path: Path) -> None:
    """The gradient that the optimiser sees, before it moves: the trainer's against autograd's."""
    prior = learned(bert(), texts(1), KINDS["ewc"]())
    model, seen = bert(), []

    class Watch(hf.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            seen.append((weights(model), grads))

    trainer = trainer_of(model, tmp_path, prior, texts(2), gradient_accumulation_steps=3)
    trainer.add_callback(Watch())
    trainer.train()
    steps = -(-N // 3)
    batches = trainer.data_collator.batches
    starts = [e * steps + s for e in range(2) for s in range(0, steps, 3)]
    assert len(seen) == len(starts)
    for (theta, grads), start in zip(seen, starts, strict=True):
        end = min(start + 3, start - start % steps + steps if start >= steps else steps)
        other = bert()
        other.load_state_dict({**other.state_dict(), **theta})
        part = batches[start:end]
        inputs = {k: torch.cat([b[k] for b in part]) for k in part[0]}
        labels = inputs.pop("labels")
        (F.cross_entropy(other(**inputs).logits, labels) + prior(other) / N).backward()
        assert_equal(grads, {n: p.grad for n, p in other.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_model_s_own_loss_and_scaling(tmp_path: Path, accumulate: int) -> None:
    """A mean over each micro-batch, which the Trainer divides by their number."""

    class Own(LifelongMixin, hf.Trainer):
        loss_is_scaled_for_ga = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = False

    prior = learned(bert(), texts(1), KINDS["ewc"]())
    model = bert()
    trainer = Own(
        model,
        arguments(tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=texts(2),
        data_collator=Recording(),
        optimizers=constant(model),
        prior=prior,
        loss="model",
    )
    trainer.train()
    other = bert()
    by_hand(other, trainer.data_collator.batches, prior, accumulate, mean_of_means=True)
    assert_equal(weights(model), weights(other))


def test_model_s_own_loss_as_the_trainer_counts_it(tmp_path: Path) -> None:
    """A language model is given num_items_in_batch: its own loss equals the likelihood's."""
    ends = []
    for loss in ("model", "likelihood"):
        model = llama()
        prior = lifelong.ewc(NextTokens(V), precision=0.5, estimator="mc")
        trainer = trainer_of(
            model, tmp_path, prior, sentences(), loss=loss, gradient_accumulation_steps=3
        )
        trainer.train()
        ends.append(weights(model))
    # The models' own loss is in float32, whatever the model's type.
    assert_equal(*ends, tolerance=1e-4)


def test_mixed_precision_equals_loop_by_hand(tmp_path: Path) -> None:
    prior = learned(bert(torch.float32), texts(1), KINDS["kprior"]())
    model = bert(torch.float32)
    trainer = trainer_of(
        model,
        tmp_path,
        prior,
        texts(2),
        bf16=True,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
    )
    trainer.train()
    other = bert(torch.float32)
    by_hand(other, trainer.data_collator.batches, prior, 2, clip=1.0, half=True)
    assert_equal(weights(model), weights(other), tolerance=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_scaler_holds_the_prior(tmp_path: Path, clip: float) -> None:
    """Scale, accumulate, unscale, clip, step: a power of 2 changes no digit, so all agree.

    Half precision needs a GPU; the scaler does not, so it is put where Accelerate has its own.
    """
    prior = learned(bert(), texts(1), KINDS["kprior"]())
    model = bert()
    trainer = trainer_of(
        model, tmp_path, prior, texts(2), gradient_accumulation_steps=3, max_grad_norm=clip
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10_000)
    seen: list[float] = []

    def unscale(optimizer: Any = None) -> None:
        seen.append(scaler.get_scale())
        scaler.unscale_(trainer.accelerator._optimizers[0].optimizer)

    trainer.accelerator.scaler = scaler
    trainer.accelerator.unscale_gradients = unscale
    trainer.train()
    assert seen
    assert scaler.get_scale() == 2.0**12  # it was used, and no step was skipped
    assert scaler._growth_tracker == trainer.state.global_step
    other = bert()
    by_hand(other, trainer.data_collator.batches, prior, 3, clip=clip)
    assert_equal(weights(model), weights(other))


def test_same_accuracy_on_two_tasks(tmp_path: Path) -> None:
    """fit, update, fit: the Trainer's weights and predictions are those of the plain loop."""
    model, other = bert(), bert()
    prior = mine = KINDS["kprior"]()
    for seed in (1, 2):
        trainer = trainer_of(model, tmp_path, prior, texts(seed))
        trainer.train()
        batches = list(trainer.data_collator.batches)
        prior = trainer.update_prior()
        by_hand(other, batches, mine, 1)
        mine = mine.update(
            other, examples(texts(seed)), generator=torch.Generator().manual_seed(42)
        )
    assert_equal(weights(model), weights(other))
    inputs = examples(texts(1)).inputs
    with torch.no_grad():
        same = forward(model, inputs).argmax(-1) == forward(other, inputs).argmax(-1)
        torch.testing.assert_close(prior(model), mine(other), rtol=1e-10, atol=1e-10)
    assert same.all()
    assert len(prior.memory) == 12


def examples(data: Any) -> Any:
    inputs = {k: torch.stack([torch.as_tensor(x[k]) for x in data]) for k in data[0]}
    return lifelong.Examples(inputs, inputs.pop("labels"))


def test_evaluation_has_no_prior(tmp_path: Path) -> None:
    model = bert()
    prior = learned(bert(seed=3), texts(1), KINDS["ewc"]())
    assert float(prior(model).detach()) > 0.1
    trainer = trainer_of(model, tmp_path, prior, texts(2))
    found = trainer.evaluate(texts(3))["eval_loss"]
    data = examples(texts(3))
    with torch.no_grad():
        losses = F.cross_entropy(forward(model, data.inputs), data.labels)
    assert found == pytest.approx(float(losses), rel=1e-6)


def test_head_of_a_task(tmp_path: Path) -> None:
    """Outputs outside of the head take no part in the loss, and the prior knows the head."""
    data = [{**item, "labels": item["labels"] % 2} for item in texts(2)]
    model = bert()
    trainer = trainer_of(model, tmp_path, KINDS["ewc"](), data, head=(0, 1))
    start = weights(model)
    trainer.train()
    prior = trainer.update_prior()
    assert prior.heads == ((0, 1),)
    rows = (weights(model)["classifier.weight"] - start["classifier.weight"]).abs().sum(1)
    shrunk = 1e-2 * 16  # Adam's steps under R alone, which pulls all rows to 0
    assert rows[:2].min() > 0
    assert rows[2:].max() <= shrunk * 8
    assert float(prior.weight.curvature.diagonal()["classifier.weight"][2:].abs().max()) == 0


def test_a_prior_that_looks_first(tmp_path: Path) -> None:
    """LwF records what the old model says of the new texts, before it learns them."""
    model = bert()
    prior = lifelong.lwf(Categorical()).update(model, examples(texts(1)))
    trainer = trainer_of(model, tmp_path, prior, texts(2), max_steps=2)
    expected = prior.prepare(bert(), examples(texts(2)))
    trainer.train()
    torch.testing.assert_close(trainer.prior.memory.reference, expected.memory.reference)


# -------------------------------------------------------------------- files


def test_resume_goes_on_exactly(tmp_path: Path) -> None:
    """Memories are drawn from the random state that the checkpoint holds."""
    prior = learned(bert(), texts(1), KINDS["kprior"]())
    how: dict[str, Any] = {"memory_batch_size": 2, "save_strategy": "steps", "save_steps": 5}
    whole = bert()
    trainer_of(whole, tmp_path / "a", prior, texts(2), **how).train()
    first = bert()
    trainer_of(first, tmp_path / "b", prior, texts(2), **how).train()
    assert_equal(weights(whole), weights(first), 0.0)
    again = bert()
    blank = KINDS["kprior"]()
    trainer = trainer_of(again, tmp_path / "b", blank, texts(2), **how)
    trainer.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert_equal(weights(whole), weights(again))
    assert trainer.prior.num_tasks == 1


def test_the_last_checkpoint_is_found(tmp_path: Path) -> None:
    prior = learned(bert(), texts(1), KINDS["ewc"]())
    trainer_of(
        bert(), tmp_path, prior, texts(2), save_strategy="steps", save_steps=5, max_steps=5
    ).train()
    model = bert()
    trainer = trainer_of(model, tmp_path, KINDS["ewc"](), texts(2), max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    torch.testing.assert_close(trainer.prior(model), prior(model))


def test_checkpoint_of_a_plain_trainer(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    hf.Trainer(bert(), args, train_dataset=texts()).train()
    trainer = trainer_of(bert(), tmp_path, KINDS["ewc"](), texts())
    with pytest.raises(CheckpointError, match="without a prior wrote it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_adapters_come_back_with_their_prior(tmp_path: Path) -> None:
    """Names of the adapters are the same after save_pretrained and from_pretrained."""
    model = lora(bert())
    trainer = trainer_of(model, tmp_path, KINDS["ewc"](), texts(1))
    trainer.train()
    prior = trainer.update_prior()
    trainer.save_model(str(tmp_path / "end"))
    base = bert()
    back = peft.PeftModel.from_pretrained(base, tmp_path / "end", is_trainable=True)
    loaded = lifelong.Prior.load(tmp_path / "end" / "prior.safetensors")
    back = back.double()
    torch.testing.assert_close(loaded(back), prior(model))
    assert set(prior.weight.anchor) == set(parameters(model))
    assert all("lora" in n or "classifier" in n for n in prior.weight.anchor)


# -------------------------------------------------------------------- language models


def reference_fisher(model: Any, data: Any) -> dict[str, torch.Tensor]:
    """sum over texts of (gradient of the text's nll)², by one backward pass for each text."""
    total = {n: torch.zeros_like(p) for n, p in parameters(model).items()}
    for item in data:
        inputs = {k: v.unsqueeze(0) for k, v in item.items() if k != "labels"}
        f = model(**inputs).logits[0, :-1]
        y = item["labels"][1:]
        loss = F.cross_entropy(f, y, ignore_index=-100, reduction="sum")
        grads = torch.autograd.grad(loss, list(parameters(model).values()))
        for (name, _), g in zip(parameters(model).items(), grads, strict=True):
            total[name] += g.square()
    return total


def test_curvature_of_a_language_model(tmp_path: Path) -> None:
    model = lora(llama(), "CAUSAL_LM")
    for p in parameters(model).values():  # B starts at 0, and then nothing flows into A
        torch.nn.init.normal_(p, std=0.3)
    prior = lifelong.ewc(NextTokens(V), estimator="empirical")
    trainer = trainer_of(model, tmp_path, prior, sentences())
    found = trainer.update_prior().weight.curvature.diagonal()
    assert_equal(found, reference_fisher(model, sentences()), 1e-9)
    assert model(**examples(sentences(0, 2)).inputs).logits.shape == (2, T, V)


def test_drawn_tokens_give_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """One predicted token a text: J_tᵀ H_t J_t by autograd, and nothing of the other tokens."""
    model = lora(llama(), "CAUSAL_LM")
    for p in parameters(model).values():
        torch.nn.init.normal_(p, std=0.3)
    data = sentences(0, 3)
    for item in data:
        item["labels"][3:] = -100
    params = list(parameters(model).values())
    exact = {n: torch.zeros_like(p) for n, p in parameters(model).items()}
    for item in data:
        inputs = {k: v.unsqueeze(0) for k, v in item.items() if k != "labels"}
        f = model(**inputs).logits[0, 1]
        p = f.detach().softmax(0)
        for c in range(V):
            v = -p.clone()
            v[c] += 1
            grads = torch.autograd.grad(f, params, v * p[c].sqrt(), retain_graph=True)
            for name, g in zip(exact, grads, strict=True):
                exact[name] += g.square()
    total = {n: torch.zeros_like(p) for n, p in exact.items()}
    draws = 400
    with next_tokens(model):
        trainer = trainer_of(model, tmp_path, lifelong.ewc(NextTokens(V), estimator="mc"), data)
        for name, value in lifelong.diagonal_curvature(
            model,
            trainer.data(data),
            NextTokens(V),
            estimator="mc",
            num_samples=draws,
            generator=torch.Generator().manual_seed(0),
        ).values.items():
            total[name] = value
    a = torch.cat([v.flatten() for v in total.values()])
    b = torch.cat([v.flatten() for v in exact.values()])
    assert float((a - b).norm() / b.norm()) < 4 / draws**0.5
    assert float((a.sum() - b.sum()).abs() / b.sum()) < 4 / draws**0.5


def test_prior_keeps_the_earlier_text(tmp_path: Path) -> None:
    """Learn text A, then B: with the prior, A's loss rises less."""

    def loss(model: Any, data: Any) -> float:
        with torch.no_grad(), next_tokens(model):
            batch = examples(data)
            f, y = forward(model, batch.inputs), batch.labels[:, 1:]
            return float(NextTokens(V).nll(f, y).sum() / (y != -100).sum())

    rises = []
    for strength in (0.0, 100.0):
        model = llama()
        prior = lifelong.ewc(NextTokens(V), estimator="mc", strength=strength)
        trainer = trainer_of(model, tmp_path, prior, sentences(1), num_train_epochs=15)
        trainer.train()
        before = loss(model, sentences(1))
        prior = trainer.update_prior()
        trainer_of(model, tmp_path, prior, sentences(2), num_train_epochs=15).train()
        rises.append(loss(model, sentences(1)) - before)
    assert rises[1] < 0.5 * rises[0]


def test_tokens_are_counted(tmp_path: Path) -> None:
    prior = lifelong.ewc(NextTokens(V), estimator="mc")
    trainer = trainer_of(llama(), tmp_path, prior, sentences())
    assert trainer.num_data == sum(int((x["labels"][1:] != -100).sum()) for x in sentences())
    assert trainer_of(llama(), tmp_path, prior, sentences(), num_data=7).num_data == 7


# -------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Same global batch, gloo, with accumulation and clipping: weights and the next prior."""
    out = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", __file__, str(folder), str(12 // count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        out[count] = torch.load(folder / "end.pt", weights_only=True)
    assert_equal(out[1], out[2], 1e-10)


def run_in_process(folder: Path, batch_size: int) -> None:
    prior = learned(bert(), texts(1), KINDS["kprior"]())
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = LifelongTrainer(
        model,
        arguments(
            folder,
            per_device_train_batch_size=batch_size // 2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            ddp_backend="gloo",
            train_sampling_strategy="sequential",
        ),
        train_dataset=texts(2, 24),
        # Not Adam: it would make steps of the noise where a gradient is 0 (a key's bias).
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        prior=prior,
    )
    trainer.train()
    prior = trainer.update_prior()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        end = {**weights(model), **{f"g {n}": v for n, v in prior.weight.gradient.items()}}
        torch.save(end, folder / "end.pt")


# -------------------------------------------------------------------- wrong use


def test_wrong_use_is_told(tmp_path: Path) -> None:
    ewc = KINDS["ewc"]()
    with pytest.raises(TypeError, match="expected a prior"):
        trainer_of(bert(), tmp_path, 0.5, texts())
    with pytest.raises(ValueError, match="loss must be"):
        trainer_of(bert(), tmp_path, ewc, texts(), loss="mine")
    with pytest.raises(ValueError, match="loss='model'"):
        trainer_of(bert(), tmp_path, ewc, texts(), compute_loss_func=mean_nll(Categorical()))
    with pytest.raises(ValueError, match="head masks the likelihood"):
        trainer_of(bert(), tmp_path, ewc, texts(), loss="model", head=(0,))
    with pytest.raises(ValueError, match="label smoothing"):
        trainer_of(bert(), tmp_path, ewc, texts(), label_smoothing_factor=0.1)
    tokens = lifelong.ewc(NextTokens(V), estimator="mc")
    with pytest.raises(ValueError, match="NextTokens is of decoders"):
        trainer_of(bert(), tmp_path, tokens, texts())
    with pytest.raises(ValueError, match="a prior of the weights alone"):
        trainer_of(llama(), tmp_path, lifelong.kprior(NextTokens(V), memory=2), sentences())
    exact = trainer_of(llama(), tmp_path, lifelong.ewc(NextTokens(V)), sentences())
    with pytest.raises(TypeError, match="pass estimator='mc'"):
        exact.update_prior()


def test_data_that_cannot_be_counted(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(texts())

    trainer = trainer_of(bert(), tmp_path, KINDS["ewc"](), Stream(), max_steps=2)
    with pytest.raises(ValueError, match="pass num_data"):
        trainer.train()
    trainer_of(bert(), tmp_path, KINDS["ewc"](), Stream(), max_steps=2, num_data=N).train()


def test_lengths_that_differ(tmp_path: Path) -> None:
    short = [{k: v[:5] if k != "labels" else v for k, v in x.items()} for x in texts()]
    trainer = trainer_of(bert(), tmp_path, KINDS["kprior"](), short)
    prior = trainer.update_prior()
    trainer = trainer_of(bert(), tmp_path, prior, texts())
    with pytest.raises(ValueError, match="padding='max_length'"):
        trainer.update_prior()
    assert trainer.prior.num_tasks == 1


def test_missing_labels() -> None:
    with pytest.raises(ValueError, match="no 'labels'"):
        mean_nll(Categorical())(torch.zeros(2, 3), None)


if __name__ == "__main__":
    run_in_process(Path(sys.argv[1]), int(sys.argv[2]))
