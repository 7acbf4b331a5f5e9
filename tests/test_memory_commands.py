"""``lifelong memory`` as a person meets it: what it shows, changes and refuses."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lifelong
from lifelong import Categorical, Examples, Memory, cli, runs
from lifelong.commands import memory as commands
from lifelong.commands.flags import parse
from lifelong.learner import CHECKPOINT, Learner
from lifelong.store import Where, open_store

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """(exit code, standard output, standard error) of ``lifelong memory ...``."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))

    def call(*args: Any) -> tuple[int, str, str]:
        code = cli.main(["memory", *map(str, args)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def images(n: int) -> Memory:
    """n grey images of 4 x 4, in tasks of three, labels 0 and 1."""
    return Memory(
        inputs=torch.arange(n * 16).reshape(n, 1, 4, 4).to(torch.float32),
        labels=torch.arange(n) % 2,
        reference=torch.tensor([[2.0, 0.0, -1.0]]).repeat(n, 1),
        soft_weight=torch.ones(n),
        hard_weight=torch.zeros(n),
        task=torch.arange(n) // 3,
        origin=torch.arange(n) * 10,
        head=torch.zeros(n, dtype=torch.int64),
        heads=((0, 1),),
    )


@pytest.fixture(params=["store", "store.lance"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Items 1 to 6, then one encoded image and one text."""
    path = tmp_path / request.param
    png = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(png, "PNG")
    one = images(1)
    with open_store(path) as opened:
        opened.append(images(6), scores={"lambda": torch.arange(6.0)}, message="six")
        opened.append(one, inputs=[png.getvalue()], ids=["17"], notes=["[red]a note\x1b[2J"])
        opened.append(one, inputs=["hello there"], ids=["a text"])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``lifelong run`` leaves it: two seeds."""
    folder = tmp_path_factory.mktemp("run")
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    for seed in (0, 1):
        model = nn.Linear(3, 2)
        learner = Learner(model, lifelong.kprior(Categorical(), precision=1.0, memory=4))
        learner.prior = learner.prior.update(model, Examples(x, y))
        learner.save(folder / f"seed-{seed}" / CHECKPOINT)
    (folder / "config.toml").write_text("")
    return folder


# Help -------------------------------------------------------------------------------------------


def test_help(command: Command) -> None:
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert [name for name in commands.COMMANDS if f"\n  {name} " not in out] == []
    assert max(map(len, out.splitlines())) <= 80
    assert command() == (2, out, "")


@pytest.mark.parametrize("name", sorted(commands.COMMANDS))
def test_each_commands_help(command: Command, name: str) -> None:
    code, out, err = command(name, "--help")
    assert (code, err) == (0, "")
    assert "STORE" in out
    assert "None" not in out
    assert f"  lifelong memory {name} " in out[out.index("examples:") :]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, lifelong.cli as cli\n"
        "for args in (['--help'], ['ls', '--help'], ['lst']):\n"
        "    cli.main(['memory', *args])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_page_shows_commands_that_exist() -> None:
    page = Path(__file__).parent.parent / "docs" / "memory-store.md"
    lines = [
        shlex.split(line, comments=True)[2:]
        for line in page.read_text().splitlines()
        if line.startswith("lifelong memory ")
    ]
    assert {name for name, *_ in lines} == set(commands.COMMANDS)
    for name, *args in lines:
        parse(commands.COMMANDS[name].flags, name, "", "", args).check()


# Look -------------------------------------------------------------------------------------------


def test_ls(command: Command, store: Path) -> None:
    code, out, err = command("ls", store)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("8 items in version 3 of ")
    assert lines[1].split() == [
        "item", "id", "task", "label", "input", "soft", "hard", "lambda", "since", "note"
    ]  # fmt: skip
    assert lines[2].split()[:4] == ["1", "0:0", "0", "0"]
    assert "tensor 1 × 4 × 4, 64 B" in lines[2]
    assert "[red]a note�[2J" in out  # neither markup nor an escape of the terminal
    assert "\x1b" not in out

    code, out, err = command("ls", store, "--limit", 2, "--offset", 1, "--task", 0)
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["2", "3"]
    assert "2 items more: --offset 3, or --limit 5" in err


@pytest.mark.parametrize(
    ("flags", "items"),
    [
        (["--task", "1"], [4, 5, 6]),
        (["--label", "1"], [2, 4, 6]),
        (["--label", "1", "--task", "1"], [4, 6]),
        (["--ids", "3,1:40, 3"], [3, 5]),
        (["--ids", "id=17"], [7]),
        (["--text", "hello"], [8]),
        (["--version", "1", "--limit", "2"], [1, 2]),
        (["--offset", "7"], [8]),
        (["--offset", "8"], []),
        (["--task", "5"], []),
    ],
)
def test_ls_json(command: Command, store: Path, flags: list[str], items: list[int]) -> None:
    code, out, err = command("ls", store, "--json", *flags)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [item["item"] for item in found["items"]] == items
    assert found["total"] >= len(items)
    assert found["version"] == (1 if "--version" in flags else 3)
    code, out, err = command("ls", store, *flags)
    assert code == 0
    assert bool(items) == (out.count("\n") > 1 + (len(items) == 0))


def test_ids_from_a_file(command: Command, store: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("1\n0:10, a text\n\n")
    _, out, _ = command("ls", store, "--json", "--ids", f"@{tmp_path}/ids.txt")
    assert [item["item"] for item in json.loads(out)["items"]] == [1, 2, 8]


def test_show(command: Command, store: Path, run: Path) -> None:
    code, out, err = command("show", store, "1:30")
    assert (code, err) == (0, "")
    for part in ("item 4 of", "1, example 30 there", "lambda 3", "version 1, 20", "1 *", "0.000"):
        assert part in out
    assert "soft label" not in out.split("Stands")[1].split("\n", 1)[1]  # no prior: logits alone
    code, out, _ = command("show", store, "a text")
    assert "hello there" in out
    _, out, _ = command("show", store, 8, "--json")
    found = json.loads(out)
    assert (found["input"], found["outputs"], found["soft_label"]) == (
        "hello there",
        [2, 0, -1],
        None,
    )


def test_show_a_soft_label(command: Command, run: Path, tmp_path: Path) -> None:
    command("import", run, tmp_path / "s", "--seed", 0)
    _, out, _ = command("show", tmp_path / "s", 1, "--json")
    found = json.loads(out)
    expected = torch.tensor(found["outputs"]).softmax(0)
    assert torch.allclose(torch.tensor(found["soft_label"]), expected)
    _, out, _ = command("show", tmp_path / "s", 1)
    assert "█" in out
    assert f"{float(expected[0]):.3f}" in out


def test_images(command: Command, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    for item, size, corner in (("1", (4, 4), 255), ("id=17", (4, 3), 11)):
        code, _, err = command("show", store, item, "--image", file)
        assert code == 0
        assert str(file) in err
        with Image.open(file) as image:
            assert (image.format, image.size) == ("PNG", size)
            assert image.getpixel((size[0] - 1, size[1] - 1)) == corner
    code, _, _ = command("show", store, 1, "--image", file, "--shape", "2,8")
    with Image.open(file) as image:
        assert image.size == (8, 2)
    file.unlink()
    for args, message in (
        ([8], "item 8 is text: it has no image"),
        ([1, "--shape", "3,3"], "--shape 3,3 does not hold the 16 numbers of item 1"),
        ([1, "--shape", "16"], "not an image: say --shape H,W or C,H,W"),
    ):
        code, out, err = command("show", store, *args, "--image", file)
        assert (code, out) == (2, "")
        assert message in err
        assert not file.exists()
    code, _, err = command("show", store, 1, "--image", tmp_path / "a.jpg")
    assert (code, "name it a.png" in err) == (2, True)
    file.write_bytes(b"no picture")
    code, _, err = command("show", store, 1, "--image", file)
    assert (code, "is there, and is no PNG" in err) == (2, True)
    assert file.read_bytes() == b"no picture"


def test_history_and_diff(command: Command, store: Path) -> None:
    command("drop", store, "--ids", "2", "--message", "a wrong label")
    code, out, err = command("history", store)
    assert (code, err) == (0, "")
    assert "a wrong label" in out
    _, out, _ = command("history", store, "--json")
    kinds = [v["kind"] for v in json.loads(out)["versions"]]
    assert kinds == ["append", "append", "append", "drop"]
    _, out, _ = command("diff", store, 1, 4, "--json")
    assert json.loads(out) == {"a": 1, "b": 4, "added": [7, 8], "dropped": [2], "changed": []}
    _, out, _ = command("diff", store, 1, 4)
    assert ["came", "2", "7,", "8"] in [line.split() for line in out.splitlines()]
    code, out, err = command("diff", store, 4, 4)
    assert (code, out) == (0, "")
    assert "hold the same items" in err


def test_looking_changes_nothing(command: Command, store: Path, tmp_path: Path) -> None:
    def state() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in store.rglob("*") if p.is_file()}

    command("ls", store)  # SQLite makes its index of the log at the first look
    before = state()
    for args in (["ls"], ["show", 1], ["history"], ["diff", 1, 2], ["verify"]):
        assert command(args[0], store, *args[1:])[0] == 0
    command("export", store, tmp_path / "out.safetensors")
    changed = [p for p, data in state().items() if before.get(p) != data]
    assert [p for p in changed if not p.endswith(("-shm", "-wal"))] == []


def test_verify(command: Command, store: Path) -> None:
    code, out, err = command("verify", store)
    assert (code, err) == (0, "")
    assert out.startswith("version 3: 8 items and ")
    assert "all as they were written" in out
    (store / "notes.txt").write_text("mine")
    code, out, _ = command("verify", store)
    assert code == 0
    assert "note: notes.txt: is not the store's" in out
    pattern = images(6).inputs[3].numpy().tobytes()  # type: ignore[index]
    for path in store.rglob("*"):
        if path.is_file() and pattern in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(pattern, pattern[::-1]))
    code, out, _ = command("verify", store)
    assert code == 1
    assert "damage: " in out
    assert "the store is damaged" in out
    code, out, _ = command("verify", store, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)


def test_export(command: Command, store: Path, tmp_path: Path) -> None:
    code, out, err = command("export", store, tmp_path / "x.parquet", "--version", 1)
    assert (code, err) == (0, "")
    assert out == f"6 items in {tmp_path}/x.parquet\n"
    _, out, _ = command("export", store, tmp_path / "x.safetensors", "--json")
    assert json.loads(out) == {"file": f"{tmp_path}/x.safetensors", "items": 8}
    (tmp_path / "x.safetensors").write_bytes(b"a checkpoint")
    code, out, err = command("export", store, tmp_path / "x.safetensors")
    assert (code, out, "is no export" in err) == (1, "", True)
    assert (tmp_path / "x.safetensors").read_bytes() == b"a checkpoint"


# Change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s", "s.lance"])
def test_import(command: Command, run: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    code, out, err = command("import", run, path, "--seed", 1)
    assert (code, err) == (0, "")
    assert out.startswith("4 items from ")
    file = run / "seed-1" / CHECKPOINT
    kept = Learner(nn.Linear(3, 2), lifelong.kprior(Categorical(), precision=1.0, memory=4))
    memory = kept.load(file).prior.memory
    assert memory is not None
    with open_store(path, "r") as store:
        assert torch.equal(store.memory().inputs, memory.inputs)  # type: ignore[arg-type]
        assert store.history()[0].message == f"imported from {run}"
    _, out, _ = command("import", file, path, "--json")
    assert json.loads(out) == {"version": 2, "items": 4, "from": str(file)}

    command("forget", path, "--ids", "1", "--yes")
    code, _, err = command("import", file, path)
    assert (code, "was forgotten in version 3" in err, "say --readmit" in err) == (1, True, True)
    assert command("import", file, path, "--readmit")[0] == 0


def test_import_refuses(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for args, message in (
        ([run, tmp_path / "s"], "has seeds 0, 1: say which with --seed"),
        ([run, tmp_path / "s", "--seed", 2], "has no seed 2; it has 0, 1"),
        ([tmp_path / "no", tmp_path / "s"], "there is no run in"),
        ([tmp_path / "empty", tmp_path / "s"], "there is no learner.safetensors in"),
        ([run, tmp_path / "file", "--seed", 0], "file is a file; a store is a folder"),
        ([run, run, "--seed", 0], "is a run, not a store; make one of it, in a folder of its own"),
        ([run, run / "seed-1", "--seed", 0], "seed-1 is a run, not a store"),
    ):
        before = sorted(run.rglob("*"))
        code, out, err = command("import", *args)
        assert (code, out) == (2, "")
        assert message in err
        assert sorted(run.rglob("*")) == before
    code, _, err = command("import", tmp_path / "file", tmp_path / "s")
    assert (code, "is truncated or not a checkpoint" in err) == (1, True)
    lifelong.checkpoint.save(tmp_path / "odd", {"prior": {}}, kind="learner")
    code, _, err = command("import", tmp_path / "odd", tmp_path / "s")
    assert (code, "holds a prior that cannot be read" in err) == (1, True)
    assert not (tmp_path / "s").exists()


def test_drop_and_restore(command: Command, store: Path) -> None:
    code, out, err = command("drop", store, "--task", 0, "--label", 1)
    assert (code, out) == (0, "1 item dropped in version 4\n")
    assert f"lifelong memory restore {store} 3" in err
    code, out, _ = command("restore", store, 3)
    assert (code, out) == (0, "version 5 is as version 3 was: 8 items\n")
    _, out, _ = command("drop", store, "--ids", "1,2", "--json")
    assert json.loads(out) == {"version": 6, "dropped": 2}
    _, out, _ = command("restore", store, 1, "--json")
    assert json.loads(out) == {"version": 7, "items": 6}


def test_forget(command: Command, store: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of = [x.numpy().tobytes() for x in images(6).inputs]  # type: ignore[union-attr]

    def found(i: int) -> bool:
        return any(bytes_of[i] in p.read_bytes() for p in store.rglob("*") if p.is_file())

    command("drop", store, "--ids", "2")
    code, out, err = command("forget", store, "--ids", "2,0:20")
    assert (code, out) == (2, "")
    assert "there is nobody to ask: say --yes" in err
    for answer in ("", "y\n", "forget it\n"):
        stdin = io.StringIO(answer)
        stdin.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = command("forget", store, "--ids", "2,0:20")
        assert (code, out) == (1, "")
        assert "nothing was forgotten" in err
    assert found(1)
    assert found(2)
    stdin = io.StringIO("forget\n")
    stdin.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stdin)
    code, out, err = command("forget", store, "--ids", "2,0:20", "--run", run)
    assert code == 0
    assert "forget erases 2 items (2, 0:20) from every version" in err
    assert f"and from the checkpoints of {run}. It cannot be undone." in err
    assert f"No run may be going on in {run}" in err
    assert f"{run}/config.toml was not looked into: remove it if it holds or names an item" in err
    assert "does not reach: exports, backups" in err
    assert out.startswith("2 items erased: ")
    assert not found(1)
    assert not found(2)
    assert found(3)
    code, _, err = command("ls", store, "--ids", "0:20")
    assert (code, "not in today's memory: 0:20; forgotten: 0:20" in err) == (2, True)

    (store / "mine.txt").write_text("")
    code, out, err = command("forget", store, "--task", 1, "--yes", "--json")
    assert (code, json.loads(out)["items"]) == (0, 3)
    assert "forget erases 3 items (of task 1, which lifelong adapt counts as 2: 4, 5, 6)" in err
    assert "No run" not in err
    code, _, err = command("forget", store, "--ids", "1", "--yes")
    assert "mine.txt was not looked into" in err
    with open_store(store, "r") as opened:
        assert opened.count(Where()) == 2


def test_forget_refuses_a_run_that_goes_on(
    command: Command, store: Path, run: Path, tmp_path: Path
) -> None:
    """Its next checkpoint would hold the items again."""
    shutil.copytree(run, tmp_path / "run")
    asked = ("forget", store, "--ids", "2", "--yes", "--run", tmp_path / "run")
    with runs.claimed(tmp_path / "run"):
        code, out, err = command(*asked)
        assert (code, out) == (2, "")
        assert f"a run goes on in {tmp_path / 'run'}: let it end" in err
    with open_store(store, "r") as opened:
        assert opened.count() == 8
    assert command(*asked)[0] == 0  # once it has ended
    with open_store(store, "r") as opened:
        assert opened.count() == 7


def test_forgetting_tells_of_a_prior_that_learned(
    command: Command, run: Path, tmp_path: Path
) -> None:
    command("import", run, tmp_path / "s", "--seed", 0)
    code, _, err = command("forget", tmp_path / "s", "--ids", "1", "--yes")
    assert code == 0
    assert "take their influence out with Prior.forget" in err


def test_compact(command: Command, store: Path) -> None:
    command("drop", store, "--ids", "2")
    code, out, err = command("compact", store)
    assert (code, err) == (0, "")
    assert out.startswith("4 versions before, ")
    with open_store(store, "r") as opened:  # the newest one, and that of compact itself
        assert [v.number for v in opened.history()] == [4, 5]
    _, out, _ = command("compact", store, "--keep", 3, "--json")
    assert set(json.loads(out)) == {"version", "bytes_before", "bytes_after"}


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["store"], indirect=True)
@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["lst", "STORE"], 2, "there is no command 'lst'; did you mean 'ls'?"),
        (["ls", "nowhere"], 2, "there is no store in nowhere; lifelong memory import RUN nowhere"),
        (["drop", "nowhere", "--ids", "1"], 2, "there is no store in nowhere"),
        (["ls", "empty"], 2, "empty is empty, not a store"),
        (["ls", "file"], 2, "file is a file; a store is a folder"),
        (["ls", "run"], 2, "run is a run, not a store; make one of it, in a folder of its own"),
        (["ls", "other"], 1, "no store at other; lifelong memory import RUN STORE makes one"),
        (["ls", "STORE", "--version", "9"], 1, "0 to 3 are kept; lifelong memory history lists"),
        (["ls", "STORE", "--limit", "0"], 2, "--limit must be at least 1, got 0"),
        (["ls", "STORE", "--ids", "99,3"], 2, "not in today's memory: 99; lifelong memory ls"),
        (["ls", "STORE", "--ids", "2", "--version", "0"], 2, "not in version 0: 2"),
        (["ls", "STORE", "--ids", "@none"], 2, "--ids @none: cannot read none: No such file"),
        (["ls", "STORE", "--ids", " ,"], 2, "there are no ids; write them as in --ids 3,5,9"),
        (["ls", "STORE", "--ids", "1", "--task", "1"], 2, "give --ids, or --task, --label and"),
        (["show", "STORE", "17"], 2, "not in today's memory: 17"),
        (["show", "STORE", "0:0"], 2, "2 items are called 0:0: say 1, 9"),
        (["drop", "STORE"], 2, "say which items to drop: --ids, or --task"),
        (["drop", "STORE", "--ids", "77"], 1, "no items [77]; lifelong memory ls lists them"),
        (["show", "STORE", "99999999999999999999"], 2, "not in today's memory: 999999999999999"),
        (["drop", "STORE", "--task", "99999999999999999999"], 1, "no item of today's memory has"),
        (
            ["drop", "STORE", "--task", "77", "--label", "1"],
            1,
            "has task 77 and label 1; lifelong memory ls lists them",
        ),
        (["forget", "STORE", "--yes"], 2, "say which items to forget"),
        (["forget", "STORE", "--ids", "77,1"], 1, "any version has no items [77]"),
        (["forget", "STORE", "--task", "7"], 1, "no item of any version has task 7"),
        (
            ["forget", "STORE", "--ids", "1", "--run", "no", "--yes"],
            2,
            "--run no: there is no such",
        ),
        (["restore", "STORE", "7"], 1, "there is no version 7"),
        (["diff", "STORE", "1", "9"], 1, "there is no version 9"),
        (["compact", "STORE", "--keep", "0"], 2, "--keep must be at least 1, got 0"),
        (["export", "STORE", "a.txt"], 1, "ends in .safetensors or .parquet, got a.txt"),
    ],
)
def test_mistakes_name_the_right_way(
    command: Command,
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "other", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other" / "x.txt").write_text("")
    (tmp_path / "run" / "config.toml").write_text("")
    if args[:3] == ["show", "STORE", "0:0"]:
        with open_store(store) as opened:
            opened.append(images(1))
    before = sorted(p for p in tmp_path.rglob("*") if not p.name.endswith(("-shm", "-wal")))
    found, out, err = command(*[store if a == "STORE" else a for a in args])
    assert (found, out) == (code, "")
    assert message in err
    after = sorted(p for p in tmp_path.rglob("*") if not p.name.endswith(("-shm", "-wal")))
    assert after == before


def test_an_empty_store(command: Command, tmp_path: Path) -> None:
    open_store(tmp_path / "s").close()
    code, out, err = command("ls", tmp_path / "s")
    assert (code, out, err) == (0, "", "version 0 holds no items\n")
    code, out, err = command("history", tmp_path / "s")
    assert (code, out) == (0, "")
    assert "nothing was committed yet" in err
