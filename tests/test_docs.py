"""The README, docs/ and examples/: every snippet runs, every link holds, every formula converts.

The ``python`` blocks of a page run in order in one namespace, as a reader would type them. What a
page takes for granted is made by ``preamble``: ``model``, ``dataset`` and the like, small and
synthetic.
"""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import tensorboardX  # noqa: F401  # so does it
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lifelong
from lifelong import cli
from lifelong.models import parameters
from lifelong.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
CATEGORICAL = lifelong.Categorical()


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------ what the pages take for granted


def draw(n: int, seed: int = 0) -> TensorDataset:
    """n points of four classes in the plane, as a map-style dataset of (input, label)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    x = torch.randn(n, 3, generator=generator) + F.one_hot(y, 4)[:, :3]
    return TensorDataset(x, y)


def preamble(folder: Path) -> dict[str, Any]:
    dataset, other_dataset = draw(80, seed=1), draw(60, seed=2)
    return {
        "torch": torch,
        "F": F,
        "DataLoader": DataLoader,
        "pytest": pytest,
        "lifelong": lifelong,
        "draw": draw,  # draw(n, seed) -> a dataset
        "model": nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)),
        "network": nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        "tasks": [draw(240, seed=3), draw(220, seed=4)],
        "dataset": dataset,
        "other_dataset": other_dataset,
        "train": dataset[:],  # (inputs, labels)
        "test": other_dataset[:],
        "x": dataset[:32][0],  # one batch
        "y": dataset[:32][1],
        "folder": folder,  # where files may be written
    }


# -------------------------------------------------------------------- reading Markdown


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """(line of its first line, code) of each fenced block of a language."""
    start, code = 0, None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if code is None and line.strip() == f"```{language}":
            start, code = number + 1, []
        elif code is not None and line.strip() == "```":
            yield start, "\n".join(code) + "\n"
            code = None
        elif code is not None:
            code.append(line)


def prose(page: Path) -> str:
    """The page without its fenced blocks and without ``code``."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link, as GitHub names it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


# -------------------------------------------------------------------- the pages


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_snippets_run(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = preamble(tmp_path)
    for line, code in blocks(page, "python"):
        # Blank lines in front, so that a traceback names the line of the page.
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebooks_run_and_show_what_they_gave(
    notebook: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a kernel would run them, cell by cell; what is kept with each cell is no error."""
    cells = [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"])
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), namespace)
        assert all(output["output_type"] != "error" for output in cell["outputs"])
    kinds = {kind for c in cells for o in c["outputs"] for kind in o.get("data", {})}
    assert "image/png" in kinds
    assert str(ROOT) not in notebook.read_text()


def test_the_diff_is_the_loop_beside_it() -> None:
    diff = next(code for _, code in blocks(README, "diff")).splitlines()
    after = [line[1:] for line in diff if not line.startswith("-")]
    loop = next(code for _, code in blocks(README, "python")).splitlines()
    assert loop == ["import lifelong", "", *after]
    assert sum(line.startswith("+") for line in diff) == 3


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_hold(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_and_example_is_linked_from_the_readme() -> None:
    text = README.read_text()
    assert [p for p in (*PAGES[1:], *EXAMPLES, *NOTEBOOKS) if f"]({name(p)})" not in text] == []


def test_results_stand_in_marked_blocks_only() -> None:
    text = README.read_text()
    for block in ("demo", "results"):
        marked = rf"<!-- {block}:begin -->.*?<!-- {block}:end -->"
        assert len(re.findall(marked, text, flags=re.DOTALL)) == 1
        text = re.sub(marked, "", text, flags=re.DOTALL)
    assert re.findall(r".*[%±].*", text) == []


def test_every_preset_is_explained() -> None:
    text = (ROOT / "docs" / "which-prior.md").read_text()
    for section in ("## What each preset is made of", "## What each preset costs"):
        table = text.split(section)[1].split("\n## ")[0]
        rows = {
            n for row in re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for n in row.split(", ")
        }
        missing = {p for p in PRESETS if f"`{p}`" not in rows}
        # It stores nothing of its own: the learner keeps one model for each task.
        assert missing <= {"separate"}, section


def test_the_layout_is_the_package() -> None:
    layout = next(
        code for _, code in blocks(ROOT / "docs" / "design.md", "") if "src/lifelong/" in code
    )
    listed = re.findall(r"^  (\w+(?:\.py|/))", layout, flags=re.MULTILINE)
    package = ROOT / "src" / "lifelong"
    there = {p.name for p in package.glob("*.py")} | {
        f"{p.parent.name}/" for p in package.glob("*/__init__.py")
    }
    assert sorted(listed) == sorted(there - {"__init__.py"})


def test_make_goals_exist() -> None:
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {
        goal
        for _, code in blocks(README, "bash")
        for goal in re.findall(r"^make (\w+)", code, re.M)
    }
    assert {"demo", "test"} <= used <= goals
    first_screen = README.read_text().splitlines()[:30]
    assert all(any(line.startswith(f"make {goal} ") for line in first_screen) for goal in used)


def test_flags_of_the_command_line_exist() -> None:
    code = "import sys; from lifelong.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "run", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = [
        line for _, c in blocks(README, "bash") for line in c.splitlines() if "lifelong run" in line
    ]
    flags = {flag for line in lines for flag in re.findall(r"--[a-z-]+", line)}
    assert flags
    assert [flag for flag in sorted(flags) if flag not in result.stdout] == []


def test_commands_run_one_after_another_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand but for the data set, the training's length, and what serves or takes long."""
    monkeypatch.chdir(tmp_path)
    ran = set()
    for _, code in blocks(README, "bash"):
        for line in code.splitlines():
            program, *words = shlex.split(line.partition(">")[0], comments=True) or [""]
            if program != "lifelong" or words[0] in ("ui", "bench"):
                continue
            told = " ".join(words).replace("split-mnist --data data", "split-digits")
            words = told.split() + (["--epochs", "1"] if "--benchmark" in words else [])
            assert cli.main(words) == 0, line
            ran.add(words[0])
    assert ran == {"run", "report", "certificate", "adapt", "memory"}


# -------------------------------------------------------------------- the examples


@pytest.mark.parametrize(
    ("example", "settings", "least"),
    [
        ("plain_loop", {"num_tasks": 2, "epochs": 2}, 0.6),
        ("class_incremental", {"epochs": 2}, 0.4),
        ("task_free", {"num_chunks": 4, "epochs": 3}, 0.3),
    ],
)
def test_examples_run(example: str, settings: dict[str, int], least: float) -> None:
    path = ROOT / "examples" / f"{example}.py"
    assert path in EXAMPLES
    assert len(path.read_text().splitlines()) < 80
    accuracy = runpy.run_path(str(path))["main"](**settings)
    accuracy = accuracy if isinstance(accuracy, list) else [accuracy]
    assert sum(accuracy) / len(accuracy) > least  # guessing gives 0.1


def test_no_example_is_forgotten() -> None:
    assert {p.stem for p in EXAMPLES} == {"plain_loop", "class_incremental", "task_free"}


# -------------------------------------------------------------- docs/which-prior.md: what is stored


@pytest.mark.parametrize(
    ("prior", "vectors"),
    [
        (lifelong.finetune(CATEGORICAL), 0),
        (lifelong.weight_decay(CATEGORICAL), 0),
        (lifelong.online_ewc(CATEGORICAL), 2),
        (lifelong.online_ewc(CATEGORICAL, precision=1.0), 3),
        (lifelong.ewc(CATEGORICAL), 3),
        (lifelong.online_laplace(CATEGORICAL), 3),
        (lifelong.si(CATEGORICAL), 2),
        (lifelong.kprior(CATEGORICAL, memory=8), 2),
        (lifelong.fromp(CATEGORICAL, memory=8), 1),
        (lifelong.gradient_reconstruction(CATEGORICAL, memory=8), 2),
        (lifelong.gradient_reconstruction(CATEGORICAL, memory=8, gradient="stored"), 3),
        (lifelong.gradient_reconstruction(CATEGORICAL, memory=8, replay=0.5), 3),
        (lifelong.lwf(CATEGORICAL), 1),
        (lifelong.experience_replay(CATEGORICAL, memory=8), 0),
        (lifelong.derpp(CATEGORICAL, memory=8), 0),
        (lifelong.joint(CATEGORICAL), 0),
    ],
)
def test_vectors_stored(prior: lifelong.Prior, vectors: int) -> None:
    model, data = network(), draw(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lifelong.PathIntegral(model, optimizer, prior, len(data)) as path:
        F.cross_entropy(model(data[:][0]), data[:][1]).backward()
        optimizer.step()
    prior = prior.update(model, data, path=path)
    beside = 0 if prior.memory is None else prior.memory.num_bytes
    for term in prior.terms:
        if isinstance(term, lifelong.KernelTerm):  # a kernel and the means, for each output
            m, c = len(term.memory), 4
            beside += 4 * (c * m**2 + c * m)
    num_weights = sum(p.numel() for p in model.parameters())
    assert prior.num_bytes - beside == 4 * num_weights * vectors


# ------------------------------------------------------------------- docs/units.md: the conversions


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def learned(prior: lifelong.Prior, n: int, **update: Any) -> tuple[nn.Module, lifelong.Prior]:
    """(a model that has moved since, the prior after one task of n examples), in float64."""
    model, (x, y) = network(torch.float64), draw(n, seed=n)[:]
    prior = prior.update(model, (x.double(), y), **update)
    return moved(), prior


def moved() -> nn.Module:
    """The network after some learning: a step away from where the priors were made."""
    model, generator = network(torch.float64), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


N_OLD, N_NEW = 24, 16


def slope(value: Tensor, model: nn.Module) -> Tensor:
    weights = list(model.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])


def same_slope(ours: Tensor, theirs: Tensor, model: nn.Module) -> None:
    """The gradients agree: of the losses, what is constant in the weights may differ."""
    expected = slope(theirs, model)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(slope(ours, model), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("strength", "fisher_is", "loss_is"),
    [
        (7.0 * N_NEW / N_OLD, "mean", "mean"),
        (7.0 * N_NEW, "sum", "mean"),
        (7.0, "sum", "sum"),
    ],
)
def test_lambda_of_ewc(strength: float, fisher_is: str, loss_is: str) -> None:
    model, prior = learned(lifelong.ewc(CATEGORICAL, strength=strength), N_OLD)
    weight = prior.weight
    assert weight is not None
    assert isinstance(weight.curvature, lifelong.Diagonal)
    fisher = {n: f / strength for n, f in weight.curvature.values.items()}
    if fisher_is == "mean":
        fisher = {n: f / N_OLD for n, f in fisher.items()}
    d = {n: p - weight.anchor[n] for n, p in model.named_parameters()}
    theirs = 0.5 * 7.0 * sum((fisher[n] * d[n].square()).sum() for n in d)
    per_example = prior(model) / N_NEW
    same_slope(per_example if loss_is == "mean" else per_example * N_NEW, theirs, model)


def test_the_fisher_of_a_mini_batch() -> None:
    g = torch.randn(9, 4, dtype=torch.float64)  # gradients of N examples
    n, b = len(g), 2
    batches = [g[list(chosen)].mean(0).square() for chosen in itertools.combinations(range(n), b)]
    mean = g.mean(0)
    spread = g.square().mean(0) - mean.square()
    expected = mean.square() + spread / b * (n - b) / (n - 1)
    torch.testing.assert_close(torch.stack(batches).mean(0), expected, rtol=1e-12, atol=0)


def test_c_of_si() -> None:
    c, xi = 3.0, 0.2
    prior = lifelong.si(CATEGORICAL, strength=c * N_NEW / N_OLD, damping=xi)
    model, (x, y) = network(torch.float64), draw(N_OLD)[:]
    x = x.double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    omega = {n: torch.zeros_like(p) for n, p in start.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with lifelong.PathIntegral(model, optimizer, prior, N_OLD) as path:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            optimizer.step()
            for n, p in model.named_parameters():
                assert p.grad is not None
                omega[n] -= p.grad * (p.detach() - before[n])
    prior = prior.update(model, (x, y), path=path)
    anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    theirs = torch.zeros((), dtype=torch.float64)
    for n, p in model.named_parameters():
        importance = (omega[n] / ((anchor[n] - start[n]).square() + xi)).clamp(min=0)
        theirs = theirs + c * (importance * (p - anchor[n]).square()).sum()
    same_slope(prior(model) / N_NEW, theirs, model)


def test_tau_of_fromp() -> None:
    tau = 5.0
    prior = lifelong.fromp(CATEGORICAL, memory=8, strength=tau * N_NEW, kernel="identity")
    model, prior = learned(prior, N_OLD)
    memory = prior.memory
    assert memory is not None
    x, y = draw(N_NEW, seed=5)[:]
    nll = F.cross_entropy(model(x.double()), y)
    gap = F.softmax(model(memory.inputs), -1) - F.softmax(memory.reference, -1)
    same_slope((nll + prior(model) / N_NEW) / tau, nll / tau + 0.5 * gap.square().sum(), model)


def test_alpha_and_beta_of_der() -> None:
    alpha, beta = 0.3, 0.5
    prior = lifelong.derpp(
        CATEGORICAL, memory=8, alpha=2 * alpha / 4 * N_NEW / N_OLD, beta=beta * N_NEW / N_OLD
    )
    model, prior = learned(prior, N_OLD)
    memory = prior.memory
    assert memory is not None
    f = model(memory.inputs)
    theirs = alpha * F.mse_loss(f, memory.reference) + beta * F.cross_entropy(f, memory.labels)
    same_slope(prior(model) / N_NEW, theirs, model)


def test_weight_of_replay() -> None:
    prior = lifelong.experience_replay(CATEGORICAL, memory=8, strength=0.7 * N_NEW / N_OLD)
    model, prior = learned(prior, N_OLD)
    memory = prior.memory
    assert memory is not None
    theirs = 0.7 * F.cross_entropy(model(memory.inputs), memory.labels)
    same_slope(prior(model) / N_NEW, theirs, model)


def test_lambda_of_lwf() -> None:
    temperature = 2.0
    prior = lifelong.lwf(CATEGORICAL, strength=0.7, temperature=temperature)
    model, prior = learned(prior, N_OLD)
    x, y = draw(N_NEW, seed=5)[:]
    x = x.double()
    old = network(torch.float64)
    prior = prior.prepare(old, (x, y))
    kl = F.kl_div(
        F.log_softmax(model(x) / temperature, -1),
        F.softmax(old(x).detach() / temperature, -1),
        reduction="batchmean",
    )
    same_slope(prior(model) / N_NEW, 0.7 * temperature**2 * kl, model)


def test_delta_of_kpriors() -> None:
    delta = 0.5
    model, prior = learned(lifelong.kprior(CATEGORICAL, precision=delta, memory=8), N_OLD)
    memory = prior.memory
    assert memory is not None
    soft = F.softmax(memory.reference, -1)
    anchor = dict(network(torch.float64).named_parameters())
    theirs = F.cross_entropy(model(memory.inputs), soft, reduction="sum")
    for n, p in parameters(model).items():
        theirs = theirs + 0.5 * delta * (p - anchor[n].detach()).square().sum()
    same_slope(prior(model), theirs, model)


def test_lambda_tau_and_temperature_of_gradient_reconstruction() -> None:
    strength, tau, temperature, delta = 2.0, 0.25, 2.0, 1e-3
    prior = lifelong.gradient_reconstruction(
        CATEGORICAL,
        memory=8,
        population=False,
        replay=0.5,
        gradient="anchored",
        strength=strength,
        temperature=temperature,
        precision=strength * delta,
    )
    old = network(torch.float64)
    (x_old, y_old), (x, y) = draw(N_OLD)[:], draw(N_NEW, seed=5)[:]
    past = (x_old.double(), y_old)
    items = prior.memorise(old, past, generator=torch.Generator().manual_seed(0))
    assert items is not None
    prior = prior.recall(old, past, items.scaled(tau))
    model, replayed = moved(), items.hard_weight > 0

    f, union = model(torch.cat([x.double(), items.inputs])), N_NEW + len(items)
    new, remembered = f[:N_NEW], f[N_NEW:]
    soft, hard = remembered[~replayed], remembered[replayed]
    believed = F.softmax(items.reference[~replayed] / temperature, -1)
    theirs = F.cross_entropy(new, y, reduction="sum") / union
    theirs = theirs + tau * F.cross_entropy(soft / temperature, believed, reduction="sum") / union
    theirs = theirs + tau * F.cross_entropy(hard, items.labels[replayed], reduction="sum") / union
    kept = lifelong.diagonal_curvature(old, past, CATEGORICAL, exclude=items.origin)
    anchor = dict(old.named_parameters())
    for n, p in model.named_parameters():
        precision = kept.values[n] + delta
        theirs = theirs + 0.5 * strength * (precision * (p - anchor[n]).square()).sum() / union
    ours = F.cross_entropy(new, y, reduction="sum") + prior(model)
    same_slope(ours / union, theirs, model)


def test_weight_decay_is_a_precision() -> None:
    wd, (x, y) = 1e-2, draw(N_NEW)[:]
    with_decay, with_prior = network(torch.float64), network(torch.float64)
    prior = lifelong.weight_decay(CATEGORICAL, precision=wd * N_NEW)
    for model, decay in ((with_decay, wd), (with_prior, 0.0)):
        loss = F.cross_entropy(model(x.double()), y)
        (loss if decay else loss + prior(model) / N_NEW).backward()
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay).step()
    for a, b in zip(with_decay.parameters(), with_prior.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ------------------------------------------------------------------- docs/which-prior.md: tempering


@pytest.mark.parametrize(
    ("prior", "lasts"),
    [
        (lifelong.online_ewc(CATEGORICAL), True),
        (lifelong.kprior(CATEGORICAL, memory=8, precision=0.0), True),
        (lifelong.fromp(CATEGORICAL, memory=8), False),
        (lifelong.experience_replay(CATEGORICAL, memory=100), True),
    ],
    ids=lambda p: p.recipe.name if isinstance(p, lifelong.Prior) else str(p),
)
def test_how_long_a_factor_lasts(prior: lifelong.Prior, lasts: bool) -> None:
    model, prior = learned(prior, N_OLD)
    at_anchor = network(torch.float64)
    x, y = draw(N_NEW, seed=5)[:]
    task = (x.double(), y)
    as_it_is, halved = prior.update(at_anchor, task), (0.5 * prior).update(at_anchor, task)
    changed = float(((as_it_is(model) - halved(model)) / as_it_is(model)).detach().abs())
    assert changed > 0.01 if lasts else changed < 1e-9


def test_a_sum_goes_on_by_the_first_recipe() -> None:
    model, here = learned(lifelong.online_ewc(CATEGORICAL), N_OLD)
    _, there = learned(lifelong.kprior(CATEGORICAL, memory=8), N_OLD)
    both = here + there
    torch.testing.assert_close(both(model), here(model) + there(model))
    x, y = draw(N_NEW, seed=5)[:]
    later = both.update(model, (x.double(), y))
    assert later.recipe == here.recipe
    assert later.memory is not None
    assert len(later.memory) == 8
    assert sum(isinstance(t, lifelong.WeightTerm) for t in later.terms) == 1
    with pytest.raises(ValueError, match="several anchors"):
        both.forget(model, ids=torch.tensor([0]))
