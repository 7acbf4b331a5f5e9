"""The command line: ``lifelong demo``, ``run``, ``bench``, ``adapt``, ``plan``, ``memory``,
``report`` and ``ui``.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody reads the output any more
(``| head``). Only this module and ``commands.bench`` read the environment
(LIFELONG_DATA) and sets torch's threads; torch is imported once there is something to compute.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from .commands.bench import bench
from .commands.certificate import certificate
from .commands.completion import completion
from .commands.flags import parse, plain
from .commands.memory import memory
from .commands.plan import forecast
from .commands.report import report
from .commands.ui import ui
from .config import (
    DemoFlags,
    Experiment,
    Output,
    Overrides,
    RunConfig,
    RunFlags,
    UsageError,
    flags_of,
)

HELP = """\
usage: lifelong COMMAND [OPTIONS]

Learn tasks one after another without forgetting.

commands:
  demo         learn handwritten digits, two at a time, with six methods; one table, one page
  run          train one method on one benchmark, and keep settings, results and checkpoints
  bench        compute a table of methods at equal memory, and keep a record
  adapt        change a saved run: add or remove examples, regularise, another network
  plan         estimate memory, time and price of a long run before it starts
  memory       look into a memory on disk; drop, restore and forget examples
  report       one page of runs, and their figures and tables as files
  ui           a page in the browser: what is remembered, learning curves, changes
  certificate  check a certificate of unlearning, or make a key to sign with
  completion   a script that completes commands and flags in bash, zsh or fish

options:
  -h, --help    show this help; after a command, the help of that command
  --version     show the version

options of every command:
  --quiet       results and errors alone, no progress and no remarks
  --json        print one JSON object on standard output, and nothing else there
  --no-color    no escape codes, as with NO_COLOR
  --debug       show the whole traceback of an error

files:
  runs/x/           a run: config.toml, log.txt, result.json, seed-0/learner.safetensors
  runs/x.ui/        what lifelong ui keeps beside it: memory, changes, certificates

environment:
  LIFELONG_DATA     folder with the data sets, where --data is not given
  NO_COLOR          any value: no colours, nor other escape codes

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted

examples:
  lifelong demo
  lifelong run --benchmark split-mnist --data DIR --prior fromp --memory 40 --seeds 3
  lifelong adapt remove runs/x --label 3 --out runs/y
"""

RUN = """\
Train one method on one benchmark, and keep settings, results and checkpoints in
a folder. A run that was interrupted goes on with --resume, and ends with the
same numbers."""

RUN_EXAMPLES = """
examples:
  lifelong run                                        digits and FROMP: needs no files
  lifelong run --benchmark split-mnist --data DIR --prior fromp --memory 40 --seeds 3 --out runs/x
  lifelong run --resume runs/x                        go on after an interruption
  lifelong run --config runs/x/config.toml --prior ewc --set strength=10 --out runs/y
  lifelong run --prior ewc --json --quiet > ewc.json
  torchrun --nproc-per-node=2 -m lifelong run --out runs/x     two processes, the same numbers
"""

DEMO = """\
Learn scikit-learn's handwritten digits in five tasks of two digits each, seen
once.

The same network learns them with nothing, with three priors, and on everything
at once; first told which two digits to choose from (task-incremental), then
choosing from all ten (class-incremental). Prints one table for each and writes
a page with pictures. Takes about a minute."""

DEMO_EXAMPLES = """
examples:
  lifelong demo
  lifelong demo --seeds 1 --out runs/quick
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code. Prints errors as one line on standard error."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        with plain() if "--no-color" in given or os.environ.get("NO_COLOR") else nullcontext():
            code = _main([arg for arg in given if arg != "--no-color"])
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # or Python says so as it flushes for the last time
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE
    return code


_PIPE = 128 + 13  # as the shell tells of a program that SIGPIPE ended


def _main(args: list[str]) -> int:
    if args[:1] == ["help"] and len(args) > 1:  # lifelong help run
        args = [*args[1:], "--help"]
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        from importlib.metadata import version

        sys.stdout.write(f"lifelong {version('lifelong')}\n")
        return 0
    commands = {
        "demo": _demo,
        "run": _run,
        "bench": bench,
        "adapt": _adapt,
        "memory": memory,
        "plan": forecast,
        "report": report,
        "ui": ui,
        "certificate": certificate,
        "completion": completion,
    }
    name, *rest = args
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean 'lifelong {near[0]}'?" if near else "see lifelong --help"
        kind = "option" if name.startswith("-") else "command"
        return _fail("lifelong", f"there is no {kind} {name!r}; {hint}", 2)
    prog = f"lifelong {name}"
    if name in _STILL:
        rest = [arg for arg in rest if arg != "--quiet"]
    try:
        return commands[name](rest)
    except SystemExit as stop:  # of tyro: after --help, or a wrong flag that it has explained
        if isinstance(stop.__context__, BrokenPipeError):  # of rich, which hides it
            return _PIPE
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        if "--debug" in rest:
            raise
        return _fail(prog + _which(), _one_line(error), 2 if isinstance(error, UsageError) else 1)


_STILL = ("plan", "report", "ui", "certificate", "completion")  # they show no progress


def _fail(prog: str, message: str, code: int) -> int:
    sys.stderr.write(f"{prog}: {message}\n")
    return code


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    text = " ".join(text.split())
    if isinstance(error, ValueError | OSError | ImportError) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


# run ----------------------------------------------------------------------------------------------


def _run(args: list[str]) -> int:
    flags = parse(RunFlags, "lifelong run", RUN, RUN_EXAMPLES, args)
    if flags.output.resume is not None:
        return _resume(flags)
    if flags.output.config is not None:
        given, from_file = flags.output.track, flags_of(flags.output.config)
        try:
            flags = parse(RunFlags, "lifelong run", RUN, "", [*from_file, *args])
        except SystemExit:
            sys.stderr.write(f"lifelong run: the wrong setting is in {flags.output.config}\n")
            raise
        flags = replace(flags, output=replace(flags.output, track=given or flags.output.track))
    data = flags.experiment.data or _data_from_environment()
    experiment = replace(flags.experiment, data=None if data is None else data.absolute())
    config = RunConfig(experiment, flags.training)
    folder = flags.output.out or Path("runs", f"{experiment.benchmark}-{experiment.prior}")
    return _go(config, folder, flags.output, new=True)


def _resume(flags: RunFlags) -> int:
    from . import runs

    folder = flags.output.resume
    if folder is None:
        raise UsageError("--resume wants the folder of a run")
    given = _given(replace(flags.experiment, data=None), Experiment()) + _given(
        flags.training, Overrides()
    )
    given += [name for name in ("out", "config") if getattr(flags.output, name) is not None]
    if given:
        listed = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(
            f"--resume takes the settings from {folder}; leave out {listed}, or start another run"
        )
    config = runs.load_config(folder)
    if flags.experiment.data is not None:  # where the data lie decides no number
        experiment = replace(config.experiment, data=flags.experiment.data.absolute())
        config = replace(config, experiment=experiment)
    changed = runs.changed_versions(folder)
    if changed and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(
            f"lifelong run: since this run was started, {'; '.join(changed)}: its numbers may "
            "differ in the last digits from those of an uninterrupted run\n"
        )
    return _go(config, folder, flags.output, new=False)


def _given(flags: Any, defaults: Any) -> list[str]:
    names = [f.name for f in fields(flags)]
    return [name for name in names if getattr(flags, name) != getattr(defaults, name)]


def _data_from_environment() -> Path | None:
    value = os.environ.get("LIFELONG_DATA")
    return Path(value) if value else None


def _go(config: RunConfig, folder: Path, output: Output, *, new: bool) -> int:
    import torch

    from . import runs
    from .display import run_progress, run_table

    with _processes() as ranks:
        first = ranks is None or ranks.rank == 0
        if new and first:
            runs.require_free(folder)
        torch.set_num_threads(config.training.threads)
        plan = runs.prepare(config)
        try:
            # What cannot be told is said before there is a run.
            with _tracking(plan, folder, output if first else None) as told:
                if new and first:
                    runs.create(plan, folder)
                with run_progress(plan, quiet=output.quiet or not first) as shown:
                    summary = runs.execute(plan, folder, _both(shown, told), ranks)
        except KeyboardInterrupt:
            if first:
                sys.stderr.write(f"\nInterrupted. Go on with: {runs.resume_command(folder)}\n")
            return 130
        except ConnectionError as error:
            raise ConnectionError(
                f"{error}. What was saved is unharmed: go on with {runs.resume_command(folder)}, "
                "under torchrun again or without"
            ) from error
    if not first:
        return 0
    if output.json:
        sys.stdout.write(json.dumps({**summary, "out": str(folder)}, allow_nan=False) + "\n")
    else:
        run_table(plan, summary, folder)
    return 0


def _tracking(plan: Any, folder: Path, output: Output | None) -> Any:
    """A watch that tells trackers; None where there are none, as on ranks but the first."""
    if output is None or not (output.track or (folder / "trackers.json").is_file()):
        return nullcontext()
    from .trackers import tracking

    said = sys.stderr

    def problem(text: str) -> None:
        said.write(f"lifelong run: {text}\n")

    return tracking(plan, folder, output.track, problem, quiet=output.quiet)


def _both(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return one or other

    def watch(event: Any) -> None:
        one(event)
        other(event)

    return watch


@contextmanager
def _processes() -> Iterator[Any]:
    """The processes that torchrun has started, which learn together; None without it."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield None
        return
    from .distributed import Ranks

    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks()
    finally:
        distributed.destroy_process_group()


# All ranks do the same work, so that none waits long unless another one hangs.
_PATIENCE = timedelta(minutes=10)


def _which() -> str:
    """Which of several processes speaks."""
    return f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""


# demo ---------------------------------------------------------------------------------------------


def _demo(args: list[str]) -> int:
    flags = parse(DemoFlags, "lifelong demo", DEMO, DEMO_EXAMPLES, args)
    import torch

    from . import demo
    from .display import demo_progress, demo_tables

    torch.set_num_threads(flags.threads)
    page = flags.out / "report.html"
    demo.require_writable(flags.out)
    with demo_progress(quiet=flags.quiet) as watch:
        found = demo.learn(range(flags.seeds), watch)
    demo.write(replace(found, command=shlex.join(["lifelong", "demo", *args])), page)
    if flags.json:
        from .report import summary_rows

        tables = [{"title": s.title, "rows": summary_rows(s)} for s in found.sections]
        sys.stdout.write(json.dumps({"tables": tables, "report": str(page)}) + "\n")
    else:
        demo_tables(found, page)
    return 0


# adapt --------------------------------------------------------------------------------------------


def _adapt(args: list[str]) -> int:
    from .commands import adapt

    return adapt.main(args, parse)
