"""``lifelong adapt`` on saved runs: what it changes, what it leaves, what it says of mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lifelong import adapted_runs, cli, runs
from lifelong.adapted_runs import (
    ADAPTATION,
    Add,
    Certifying,
    Regularise,
    Remove,
    Transfer,
    adapt,
    restored,
)
from lifelong.certificate import Certificate, create_key, digest_examples, digest_prior
from lifelong.checkpoint import load
from lifelong.errors import CheckpointError
from lifelong.learner import CHECKPOINT
from lifelong.prior import Prior

Command = Callable[..., tuple[int, str, str]]
RUN = ("--benchmark", "two-moons", "--epochs", "3", "--batch-size", "50", "--memory", "12")
FEW = ("--max-iterations", "3", "--quiet")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of a K-prior on the moons: two tasks, two classes."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    args = ["run", *RUN, "--prior", "kprior", "--seeds", "2", "--out", str(folder), "--quiet"]
    before = torch.get_rng_state()
    assert cli.main(args) == 0
    torch.set_rng_state(before)
    return folder


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """(exit code, standard output, standard error) of ``lifelong adapt``, in an empty folder."""
    monkeypatch.delenv("LIFELONG_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    def call(*args: str | Path) -> tuple[int, str, str]:
        code = cli.main(["adapt", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call  # type: ignore[misc]


def prior_of(folder: Path, seed: int = 0) -> Prior:
    return Prior.from_state_dict(
        load(folder / f"seed-{seed}" / CHECKPOINT, kind="learner")["prior"]
    )


# Help ---------------------------------------------------------------------------------------------


def test_help(command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    for part in (
        "add",
        "remove",
        "relabel",
        "regularise",
        "transfer",
        "lifelong adapt remove runs/x --label 3",
    ):
        assert part in out
    assert max(map(len, out.splitlines())) <= 100
    assert command() == (2, out, "")
    for kind, flag in (
        ("add", "--from FILE"),
        ("remove", "--label INT"),
        ("relabel", "--to INT,..."),
        ("regularise", "--precision FLOAT"),
        ("transfer", "--keep INT"),
    ):
        code, out, err = command(kind, "--help")
        assert (code, err) == (0, "")
        assert flag in out
        assert "RUN" in out


# The four -----------------------------------------------------------------------------------------


def test_remove_by_id_leaves_the_run_as_it_was(run, command):
    before = files(run)
    ids = load(run / "seed-0" / CHECKPOINT, kind="learner")["prior"]["terms"]
    origin = prior_of(run).memory.origin
    gone = [int(i) for i in origin[prior_of(run).memory.task == 0][:3]]
    assert ids
    listed = ",".join(map(str, gone))
    code, out, err = command("remove", run, "--task", "1", "--ids", listed, "--out", "y", *FEW)
    assert (code, err) == (0, "")
    assert "Accuracy before" in out
    assert "Removed examples" in out
    assert files(run) == before
    after = prior_of(Path("y"))
    assert after.num_data == prior_of(run).num_data - 3
    assert not bool(
        torch.isin(after.memory.origin[after.memory.task == 0], torch.tensor(gone)).any()
    )
    summary = json.loads(Path("y", ADAPTATION).read_text())
    assert [s["seed"] for s in summary["seeds"]] == [0, 1]
    assert summary["change"] == {"kind": "remove", "ids": {"0": sorted(gone)}}
    assert sorted(p.name for p in Path().iterdir()) == ["y"]
    # Once more: they are not there any longer, in the adapted run alone.
    code, _, err = command("remove", "y", "--task", "1", "--ids", listed, "--out", "z", *FEW)
    assert code == 2
    assert "not among the examples of task 1 that the run has learned and still knows" in err
    Path("ids.txt").write_text(listed.replace(",", "\n"))
    code, _, _ = command("remove", run, "--ids", "@ids.txt", "--task", "1", "--out", "z", *FEW)
    assert code == 0
    same = (load(Path(n, "seed-0", CHECKPOINT), kind="learner")["model"] for n in ("y", "z"))
    assert all(torch.equal(a, b) for a, b in zip(*(m.values() for m in same), strict=True))


def test_remove_a_class_and_compare(run, command):
    code, out, _ = command("remove", run, "--label", "1", "--seed", "1", "--out", "y", "--compare",
                           "--json", *FEW)  # fmt: skip
    assert code == 0
    summary = json.loads(out)
    (result,) = summary["seeds"]
    assert result["seed"] == 1
    assert sorted(summary["change"]["ids"]) == ["0", "1"]
    assert result["retrained"]["gradients"] > 0
    assert 0 <= result["removed_after"] <= 1
    assert not bool((prior_of(Path("y"), 1).memory.labels == 1).any())
    assert not Path("y", "seed-0").exists()


def test_a_removal_is_certified(run, command):
    """Signed, with its audit beside the network that was trained afresh; for each seed."""
    create_key("audit.pem")
    signed = ("--certificate", "--key", "audit.pem", "--note", "customer 7 asked")
    args = ("remove", run, "--task", "1", "--label", "1", "--out", "y", "--compare")
    code, out, _ = command(*args, *signed, *FEW)
    assert code == 0
    for seed in (0, 1):
        paper = Certificate.load(f"y/seed-{seed}/certificate.json")
        assert f"y/seed-{seed}/certificate.html" in out
        assert paper.verify("audit.pem.pub").valid
        assert paper.content["note"] == "customer 7 asked"
        audit = paper.content["audit"]
        assert audit["seconds"].keys() == {"unlearning", "retraining"}
        assert audit["distances"]
        ids = json.loads(Path("y", "config.json").read_text())["adaptations"]["steps"][-1]["ids"]
        assert paper.content["removed"]["ids"] == [f"0:{i}" for i in ids["0"]]
        assert paper.content["prior"]["after"] == digest_prior(prior_of(Path("y"), seed))


def test_an_unsigned_certificate_says_so(run, command):
    args = ("remove", run, "--task", "1", "--seed", "0", "--out", "y", "--certificate")
    code, _, _ = command(*args, *FEW)
    assert code == 0
    assert "not signed" in Path("y/seed-0/certificate.html").read_text().lower()


def test_nothing_is_certified_where_nothing_was_removed(command, tmp_path):
    """A prior without gradient and curvature: what it did not keep cannot leave it."""
    common = ["run", *RUN[:-2], "--epochs", "1", "--quiet", "--out"]
    assert cli.main([*common, str(tmp_path / "f"), "--prior", "finetune"]) == 0
    removal = ("--task", "1", "--out", "y", "--certificate", *FEW)
    code, _, err = command("remove", tmp_path / "f", *removal)
    assert code == 1
    assert "holds nothing of" in err
    assert "train afresh without them, or use gradient_reconstruction" in err
    assert not Path("y").exists()
    replay = [str(tmp_path / "e"), "--prior", "experience_replay", "--memory", "6"]
    assert cli.main([*common, *replay]) == 0
    code, out, _ = command("remove", tmp_path / "e", *removal)
    assert code == 0
    assert "the experience_replay prior holds nothing of" in out.replace("\n", " ")
    counts = Certificate.load("y/seed-0/certificate.json").content["removed"]
    kept = int((prior_of(tmp_path / "e").memory.task == 0).sum())
    assert (counts["in_memory"], counts["given"]) == (kept, 0)
    assert counts["not_held"] == len(counts["ids"]) - kept > 0


def test_a_single_example_is_certified_without_an_attack(run, command):
    args = ("remove", run, "--ids", "0", "--task", "1", "--seed", "0", "--certificate", *FEW)
    code, out, _ = command(*args, "--out", "y")
    assert code == 0
    assert "No attack was made" in out
    assert "lbfgs, 3 steps" in out
    content = Certificate.load("y/seed-0/certificate.json").content
    assert content["audit"]["sizes"]["removed"] == 1
    assert content["audit"]["attacks"] == {"before": {}, "unlearned": {}}
    assert content["audit"]["quality"]["removed"]["unlearned"]["num_examples"] == 1
    assert "No attack was made" in content["note"]
    assert "There was no attack" in Path("y/seed-0/certificate.html").read_text()


def test_a_class_is_compared_with_held_out_examples_of_it(run, command, monkeypatch):
    """Not with the other class, which an attack could tell whatever was learned."""
    seen: list[Any] = []
    audit = adapted_runs.audit
    monkeypatch.setattr(adapted_runs, "audit", lambda *a, **k: seen.append(k) or audit(*a, **k))
    args = ("remove", run, "--task", "1", "--seed", "0", "--certificate", *FEW)
    assert command(*args, "--label", "1", "--out", "y")[0] == 0
    (told,) = seen
    assert set(told["others"].labels.tolist()) == {1}
    assert set(told["test"].labels.tolist()) == {0, 1}
    count = int((told["test"].labels == 1).sum())
    content = Certificate.load("y/seed-0/certificate.json").content
    assert content["audit"]["attacks"]["unlearned"]["threshold"]["others"] == count
    assert content["note"] == ""


def test_others_of_another_class_are_told(run, command, monkeypatch):
    first = adapted_runs._first

    def without(*args: Any) -> Any:
        past = first(*args)
        tests = [t[(t.labels != 1).nonzero().squeeze(1)] for t in past.tests]
        return replace(past, tests=tuple(tests))

    monkeypatch.setattr(adapted_runs, "_first", without)
    args = ("remove", run, "--task", "1", "--seed", "0", "--certificate", *FEW)
    code, out, _ = command(*args, "--label", "1", "--out", "y")
    assert code == 0
    note = Certificate.load("y/seed-0/certificate.json").content["note"]
    assert note.startswith("The attacks tell the removed examples from those of other classes")
    assert "of other classes" in " ".join(out.split())


def test_where_there_is_no_audit_it_is_said(run, command):
    """All of a task is gone, or nobody has test examples of it."""
    np.savez("new.npz", x=np.zeros((4, 2), "float32"), y=np.arange(4) % 2)
    assert command("add", run, "--from", "new.npz", "--seed", "0", "--out", "more", *FEW)[0] == 0
    for folder, which, why in (
        (run, ("--task", "1"), "no example of task 1 is left to compare with"),
        ("more", ("--task", "3", "--label", "1"), "there are no test examples of task 3"),
    ):
        out_folder = f"y{which[1]}"
        args = ("remove", folder, *which, "--seed", "0", "--certificate", "--out", out_folder)
        code, out, _ = command(*args, "--note", "asked", *FEW)
        assert code == 0
        assert f"There is no audit: {why}" in " ".join(out.split())
        content = Certificate.load(f"{out_folder}/seed-0/certificate.json").content
        assert content["audit"] is None
        assert content["note"] == f"asked There is no audit: {why}."


def test_a_chain_of_all_kinds(run, command):
    """Each starts from the folder of the last, whose network may be another."""
    new = np.random.default_rng(0).normal(size=(9, 2)).astype("float32")
    np.savez("new.npz", x=new, y=np.arange(9) % 2)
    steps = (
        ("regularise", ("--precision", "0.5")),
        ("add", ("--from", "new.npz")),
        ("transfer", ("--hidden", "7")),
        ("transfer", ("--classes", "3")),
        ("remove", ("--label", "1", "--task", "3")),
        ("transfer", ("--keep", "2,0", "--hidden", "none")),
    )
    last: Path = run
    for i, (kind, options) in enumerate(steps):
        code, _, err = command(kind, last, *options, "--seed", "0", "--out", f"s{i}", *FEW)
        assert (code, err) == (0, "")
        last = Path(f"s{i}")
    assert prior_of(Path("s0")).regulariser.precision == 0.5
    assert prior_of(Path("s1")).num_data == prior_of(run).num_data + 9
    model = load(Path("s2", "seed-0", CHECKPOINT), kind="learner")["model"]
    assert [tuple(v.shape) for v in model.values()] == [(7, 2), (7,), (2, 7), (2,)]
    model = load(Path("s3", "seed-0", CHECKPOINT), kind="learner")["model"]
    assert [tuple(v.shape) for v in model.values()] == [(7, 2), (7,), (3, 7), (3,)]
    model = load(last / "seed-0" / CHECKPOINT, kind="learner")["model"]
    assert [tuple(v.shape) for v in model.values()] == [(2, 2), (2,)]
    assert set(prior_of(last).memory.labels.tolist()) == {1}
    history = json.loads(Path(last, runs.CONFIG).read_text())["adaptations"]
    assert history["learned"] == 2
    assert [step["kind"] for step in history["steps"]] == [kind for kind, _ in steps]
    with pytest.raises(runs.UsageError, match="was adapted, and cannot be resumed"):
        runs.load_config(last)
    assert cli.main(["run", "--resume", str(last)]) == 2


def test_labels_are_corrected(run, command):
    before = files(run)
    memory = prior_of(run).memory
    kept = memory[(memory.task == 0).nonzero().squeeze(1)]
    ids = ",".join(str(int(i)) for i in kept.origin[:2])
    new = [1 - int(y) for y in kept.labels[:2]]
    to = ",".join(map(str, new))
    code, out, err = command("relabel", run, "--ids", ids, "--task", 1, "--to", to,
                             "--out", "right", "--seed", 0, *FEW)  # fmt: skip
    assert (code, err) == (0, "")
    assert "Relabelled examples" in out
    assert files(run) == before
    content = json.loads(Path("right", ADAPTATION).read_text())
    origins = [int(i) for i in kept.origin[:2]]
    labels = {str(i): y for i, y in zip(origins, new, strict=True)}
    assert content["change"] == {"kind": "relabel", "labels": {"0": labels}}
    (result,) = content["seeds"]
    assert result["relabelled"] == 2
    after = prior_of(Path("right")).memory
    place = {(int(t), int(i)): n for n, (t, i) in enumerate(zip(after.task, after.origin))}
    for i, y in zip(origins, new, strict=True):
        assert int(after.labels[place[0, i]]) == y
    assert len(after) == len(memory)
    # The data of the adapted run have the right labels too: they can leave by them, or go back.
    code, out, err = command("remove", "right", "--ids", ids, "--task", 1, "--out", "gone", *FEW)
    assert (code, err) == (0, "")
    assert len(prior_of(Path("gone")).memory) == len(memory) - 2
    back = ",".join(str(1 - y) for y in new)
    code, out, err = command("relabel", "right", "--ids", ids, "--task", 1, "--to", back,
                             "--out", "back", *FEW)  # fmt: skip
    assert (code, err) == (0, "")
    assert len(json.loads(Path("back", "config.json").read_text())["adaptations"]["steps"]) == 2


def test_other_hidden_layers_note_what_they_leave(run, command):
    code, out, err = command(
        "transfer", run, "--hidden", "8,8", "--out", "y", "--max-iterations", "2"
    )
    assert code == 0
    assert "Note: the new model leaves behind" in out
    assert err == "seed 0 is adapted\nseed 1 is adapted\n"


@pytest.mark.parametrize("prior", ["finetune", "ewc", "si", "online_laplace", "lwf", "der"])
def test_classes_of_a_run_that_nothing_tells_them_by(command, tmp_path, prior):
    """Without a memory the outputs are the last layer's rows, squares of logits say nothing of a
    new class, and the rows of the classes that stay are as they were."""
    args = ["--benchmark", "two-moons", "--epochs", "2", "--batch-size", "100", "--quiet"]
    assert cli.main(["run", *args, "--prior", prior, "--out", "x"]) == 0
    grown = ("transfer", "x", "--classes", "3", "--out", "y", "--max-iterations", "1", "--quiet")
    code, _, err = command(*grown)
    assert (code, err) == (0, "")
    code, _, err = command("transfer", "y", "--keep", "1", "--out", "z", *FEW)
    assert (code, err) == (0, "")
    old, wide, narrow = (list(restored(Path(n))[0].model.parameters())[-2] for n in "xyz")
    assert (len(old), len(wide), len(narrow)) == (2, 3, 1)
    if prior == "finetune":  # no prior moves the weights afterwards
        assert torch.equal(wide[:2], old)
        assert torch.equal(narrow, old[1:])


def test_the_next_task_of_a_run_that_was_interrupted(command, tmp_path, monkeypatch):
    folder = tmp_path / "x"
    learn = runs.Learner.learn

    def stop(self, task, **options):
        if task.index == 1:
            raise KeyboardInterrupt
        learn(self, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Learner, "learn", stop)
        assert cli.main(["run", *RUN, "--prior", "kprior", "--out", str(folder), "--quiet"]) == 130
    code, _, err = command("add", folder, "--task", "3", "--out", "y", *FEW)
    assert (code, "the next one is 2" in err) == (2, True)
    code, _, _ = command("add", folder, "--task", "2", "--out", "y", *FEW)
    assert code == 0
    assert prior_of(Path("y")).num_tasks == 2


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("remove", "RUN"), "say what to remove: --ids 3,5,9"),
        (("remove", "RUN", "--ids", "3,x"), "--ids wants whole numbers"),
        (("remove", "RUN", "--ids", "@none"), "--ids: cannot read none: No such file"),
        (("remove", "RUN", "--ids", str(2**63)), "--ids wants whole numbers below 2**63"),
        (("remove", "RUN", "--ids", "9" * 5000), "--ids wants whole numbers below 2**63"),
        (("remove", "RUN", "--ids", str(2**63 - 1)), f"--ids: {2**63 - 1} is not among the"),
        (("remove", "RUN", "--label", str(2**70)), "--label wants a class below 2**63"),
        (("remove", "RUN", "--ids", "99999"), "--ids: 99999 is not among the examples"),
        (("remove", "RUN", "--label", "7"), "nothing to remove: no example with label 7"),
        (("remove", "RUN", "--task", "3"), "--task 3: the run has learned tasks 1 to 2"),
        (("remove", "nowhere", "--label", "1"), "there is no run in nowhere"),
        (("remove", "RUN", "--label", "1", "--seed", "5"), "no learner of seed 5; it has 0, 1"),
        (("remove", "RUN", "--label", "1", "--note", "x"), "are of a certificate; give --certific"),
        (
            ("remove", "RUN", "--label", "1", "--certificate", "--key", "none.pem"),
            "--key: there is no file none.pem; lifelong certificate key none.pem makes one",
        ),
        (("add", "RUN"), "say what to add: --from FILE, or --task N"),
        (("add", "RUN", "--task", "3"), "all are learned (2 tasks)"),
        (("add", "RUN", "--from", "none.npz"), "none.npz"),
        (("add", "RUN", "--from", "wide.npz"), "holds inputs of shape (3,), the run learned (2,)"),
        (("add", "RUN", "--from", "wide.npz", "--head", "a"), "--head wants whole numbers"),
        (("relabel", "RUN", "--ids", "3"), "say what to correct: --ids 17,42 --to 3"),
        (("relabel", "RUN", "--ids", "3,3", "--to", "1"), "give each id once"),
        (("relabel", "RUN", "--ids", "0,1", "--task", "1", "--to", "1,1,0"), "each of the 2 ids"),
        (("relabel", "RUN", "--ids", "0", "--task", "1", "--to", "7"), "--to 7: the classes of"),
        (("relabel", "RUN", "--ids", "99999", "--to", "1"), "99999 is not among the examples"),
        (("regularise", "RUN"), "say what to change: --precision 0.1"),
        (("regularise", "RUN", "--precision", "-1"), "--precision must be a number of at least 0"),
        (("transfer", "RUN"), "say what to change: --hidden 64,64"),
        (("transfer", "RUN", "--hidden", "0"), "--hidden wants widths of at least 1"),
        (("transfer", "RUN", "--classes", "1"), "--classes 1: the network has 2; say which"),
        (("transfer", "RUN", "--keep", "0,0"), "--keep wants different classes of 0 to 1"),
        (("regularise", "RUN", "--precision", "1", "--lr", "0"), "--lr must be a positive number"),
        (("regularise", "RUN", "--precision", "1", "--threads", "0"), "--threads must be at least"),
        (("chop", "RUN"), "there is no kind 'chop' of adaptation"),
        (("removed", "RUN"), "did you mean 'remove'?"),
    ],
)
def test_mistakes_take_one_line_and_write_nothing(run, command, args, message):
    np.savez("wide.npz", x=np.zeros((4, 3), "float32"), y=np.zeros(4, "int64"))
    args = [str(run) if a == "RUN" else a for a in args]
    code, out, err = command(*args, "--out", "y")
    assert (code in (1, 2), out) == (True, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(p.name for p in Path().iterdir()) == ["wide.npz"]


def test_folders_that_are_taken(run, command):
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full", "x").write_text("")
    Path("empty").mkdir()
    for taken in ("file", "full", str(run)):
        code, _, err = command("regularise", run, "--precision", "1", "--out", taken, *FEW)
        assert (code, "exists already; choose another folder with --out" in err) == (2, True)
    assert command("regularise", run, "--precision", "1", "--out", "empty", *FEW)[0] == 0
    assert Path("empty", ADAPTATION).is_file()


def test_a_failure_half_way_leaves_no_folder(run, tmp_path, monkeypatch):
    count = []

    def fail(*args, **kwargs):
        count.append(1)
        if len(count) > 1:
            raise OSError("the disk is full")
        return save(*args, **kwargs)

    save = adapted_runs.Learner.save
    monkeypatch.setattr(adapted_runs.Learner, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        adapt(run, tmp_path / "y", Remove(label=1), max_iterations=1)
    assert len(count) == 2
    assert list(tmp_path.iterdir()) == []


def test_two_calls_at_once_do_not_touch_each_other(run, tmp_path):
    """A mistaken call and a right one come between the seeds of another: what appears first is
    whole, and the other says that the place is taken."""
    out, calls = tmp_path / "deep" / "y", []

    def watch(line: str) -> None:
        if calls:
            return
        calls.append(line)
        with pytest.raises(runs.UsageError, match="nothing to remove"):
            adapt(run, out, Remove(label=77))
        adapt(run, out, Regularise(0.25), max_iterations=1)

    with pytest.raises(runs.UsageError, match="exists already; choose another folder"):
        adapt(run, out, Regularise(0.5), watch=watch, max_iterations=1)
    assert calls
    assert [p.name for p in out.parent.iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    for seed in (0, 1):
        assert prior_of(out, seed).regulariser.precision == 0.25
    # A mistaken call alone leaves the other one whole.
    calls.clear()

    def mistake(line: str) -> None:
        with pytest.raises(runs.UsageError, match="nothing to remove"):
            adapt(run, tmp_path / "z", Remove(label=77))

    adapt(run, tmp_path / "z", Regularise(0.5), watch=mistake, max_iterations=1)
    assert sorted(p.name for p in (tmp_path / "z").glob("seed-*")) == ["seed-0", "seed-1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "z"]
    assert (tmp_path / "z").stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_examples_of_a_file_are_kept_as_they_were(run, tmp_path):
    """What was added is known by the run's own copy: the file may change or go. A removal leaves
    what it removes out of its copy, and no other example."""
    x = np.random.default_rng(0).normal(size=(9, 2)).astype("float32")
    y = np.arange(9) % 2
    file = tmp_path / "new.npz"
    np.savez(file, x=x, y=y)
    one = {"seed": 0, "max_iterations": 1}
    change = adapt(run, tmp_path / "a", Add(file=file, head=(0, 1)), **one)["change"]
    assert change["copy"] == "added-1.safetensors"
    np.savez(file, x=x[::-1], y=y[::-1])
    adapt(tmp_path / "a", tmp_path / "b", Regularise(0.5), **one)
    file.unlink()
    gone = Remove(ids=(2, 5), task=3)
    keep = Certifying(note="copy")
    adapt(tmp_path / "b", tmp_path / "c", gone, certifying=keep, **one)
    paper = Certificate.load(tmp_path / "c" / "seed-0" / "certificate.json")
    expected = digest_examples((torch.tensor(x[[2, 5]]), torch.tensor(y[[2, 5]])))
    assert paper.content["removed"]["sha256"] == expected
    for name, left in (("a", range(9)), ("b", range(9)), ("c", (0, 1, 3, 4, 6, 7, 8))):
        kept = load(tmp_path / name / "added-1.safetensors", kind="examples")
        assert kept["ids"].tolist() == list(left)
        assert torch.equal(kept["inputs"], torch.tensor(x[list(left)]))
        assert kept["head"] == [0, 1]
    raw = x[2].tobytes()
    assert not [f for f, b in files(tmp_path / "c").items() if raw in b]
    # Once more from there: the others can leave, those that left cannot.
    with pytest.raises(runs.UsageError, match="2, 5 are not among"):
        adapt(tmp_path / "c", tmp_path / "d", gone, **one)
    adapt(tmp_path / "c", tmp_path / "d", Remove(ids=(3,), task=3), **one)
    assert len(load(tmp_path / "d" / "added-1.safetensors", kind="examples")["ids"]) == 6
    copied = tmp_path / "c" / "added-1.safetensors"
    copied.write_bytes((tmp_path / "a" / "added-1.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="is not as it was written"):
        adapt(tmp_path / "c", tmp_path / "e", Regularise(1.0), **one)
    copied.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        adapt(tmp_path / "c", tmp_path / "e", Regularise(1.0), **one)
    assert not (tmp_path / "e").exists()


def test_a_run_without_learners_or_memory(run, command, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / runs.CONFIG).write_bytes((run / runs.CONFIG).read_bytes())
    with pytest.raises(runs.UsageError, match="holds no learner yet"):
        adapt(tmp_path / "bare", tmp_path / "y", Remove(label=1))
    args = ["run", *RUN[:-2], "--prior", "ewc", "--out", str(tmp_path / "ewc"), "--quiet"]
    assert cli.main(args) == 0
    with pytest.raises(runs.UsageError, match="remembers no examples"):
        adapt(tmp_path / "ewc", tmp_path / "y", Transfer(hidden=(4,)))
    assert not (tmp_path / "y").exists()
