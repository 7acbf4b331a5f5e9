"""``lifelong completion``: a script for the shell, made of the flags' own classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional, arg

from ..config import DemoFlags, RunFlags, UsageError, suggestion
from . import adapt, bench, certificate, memory, plan, report, ui
from .flags import parse

ABOUT = """\
Print a script that completes commands, flags and their values with the Tab key.
Put it where the shell finds it, and open a new one:

  bash   lifelong completion bash > ~/.local/share/bash-completion/completions/lifelong
  zsh    lifelong completion zsh > ~/.zfunc/_lifelong     (with fpath+=~/.zfunc in ~/.zshrc)
  fish   lifelong completion fish > ~/.config/fish/completions/lifelong.fish"""

EXAMPLES = """
examples:
  source <(lifelong completion bash)      for this shell alone
"""

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionFlags:
    """All flags of ``lifelong completion``."""

    shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], arg(metavar="SHELL")]
    """bash, zsh or fish."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class Flag:
    """name: with its dashes; values: those it may have; takes: whether one must follow; path:
    whether that is a file or folder."""

    name: str
    values: tuple[str, ...] = ()
    takes: bool = False
    path: bool = False


def completion(args: list[str]) -> int:
    """The exit code."""
    if args and not args[0].startswith("-") and args[0] not in SHELLS:
        raise UsageError(f"there is no shell {args[0]!r} here; {suggestion(args[0], SHELLS)}")
    flags = parse(CompletionFlags, "lifelong completion", ABOUT, EXAMPLES, args)
    scripts = {"bash": bash, "zsh": zsh, "fish": fish}
    sys.stdout.write(scripts[flags.shell](commands()))
    return 0


def commands() -> dict[str, tuple[Flag, ...]]:
    """ "run", "adapt add", ... -> their flags."""
    found: dict[str, type[Any]] = {
        "demo": DemoFlags,
        "run": RunFlags,
        "bench": bench.BenchFlags,
        **{f"adapt {kind}": flags for kind, flags in adapt.KINDS.items()},
        "plan": plan.PlanFlags,
        **{f"memory {name}": command.flags for name, command in memory.COMMANDS.items()},
        "report": report.ReportFlags,
        "ui": ui.UiFlags,
        "certificate verify": certificate.Verify,
        "certificate key": certificate.Key,
        "completion": CompletionFlags,
    }
    every = (Flag("--help"), Flag("--no-color"), Flag("--quiet"), Flag("--debug"))
    return {name: tuple(dict.fromkeys((*flags_of(kind), *every))) for name, kind in found.items()}


def flags_of(kind: type[Any]) -> Iterator[Flag]:
    """Of a class of flags and those in it; positional ones have no name to complete."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, name, positional = hints[field.name], field.name, False
        while get_origin(hint) is Annotated:
            inner, *notes = get_args(hint)
            name = next((n.name for n in notes if getattr(n, "name", None)), name)
            positional |= any("POSITIONAL" in repr(n).upper() for n in notes)
            hint = inner
        if is_dataclass(hint):
            yield from flags_of(hint)  # type: ignore[arg-type]
        elif not positional:
            yield _flag(name, hint)


def _flag(name: str, hint: Any) -> Flag:
    dashed = "--" + name.replace("_", "-")
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    options = tuple(o for o in options if o is not type(None))
    if options == (bool,):
        return Flag(dashed)
    values = tuple(str(v) for o in options if get_origin(o) is Literal for v in get_args(o))
    return Flag(dashed, values, takes=True, path=Path in options)


# ------------------------------------------------------------------------------- shells


def _tree(found: Mapping[str, tuple[Flag, ...]]) -> dict[str, list[str]]:
    """Command -> its second words, where it has some."""
    tree: dict[str, list[str]] = {}
    for name in found:
        first, _, second = name.partition(" ")
        tree.setdefault(first, [])
        if second:
            tree[first].append(second)
    return tree


def bash(found: Mapping[str, tuple[Flag, ...]]) -> str:
    """A function that looks at the first two words, and at the flag before the one at hand."""
    tree = _tree(found)
    cases = []
    for first, seconds in tree.items():
        if seconds:
            cases.append(f'    "{first}") words="{" ".join(seconds)} --help" ;;')
    inner = []
    for name, flags in found.items():
        inner.append(f'    "{name}") words="{" ".join(f.name for f in flags)}"')
        inner.append('      case "$before" in')
        for flag in flags:
            if flag.values:
                inner.append(f'        {flag.name}) words="{" ".join(flag.values)}" ;;')
            elif flag.takes:
                inner.append(f"        {flag.name}) files=1 ;;")
        inner += ["      esac ;;"]
    return "\n".join([
        "# lifelong completion bash",
        "_lifelong() {",
        '  local at="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '  local first="${COMP_WORDS[1]}" name words="" files=""',
        "  COMPREPLY=()",
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f'    COMPREPLY=($(compgen -W "{" ".join(tree)} --help --version" -- "$at"))',
        "    return",
        "  fi",
        '  name="$first"',
        '  case "$first" in',
        f'    {"|".join(n for n, s in tree.items() if s)}) name="$first ${{COMP_WORDS[2]}}" ;;',
        "  esac",
        '  if [ "$COMP_CWORD" -eq 2 ]; then case "$first" in',
        *cases,
        "  esac; fi",
        '  [ -n "$words" ] || case "$name" in',
        *inner,
        "  esac",
        '  if [ -n "$files" ] || { [ -z "$at" ] && [ "${before#--}" = "$before" ] && '
        '[ "$COMP_CWORD" -gt 2 ]; }; then',
        '    COMPREPLY=($(compgen -f -- "$at"))',
        "  else",
        '    COMPREPLY=($(compgen -W "$words" -- "$at"))',
        '    [ "${#COMPREPLY[@]}" -gt 0 ] || COMPREPLY=($(compgen -f -- "$at"))',
        "  fi",
        "}",
        "complete -o filenames -F _lifelong lifelong",
        "",
    ])  # fmt: skip


def zsh(found: Mapping[str, tuple[Flag, ...]]) -> str:
    """Bash's function, which zsh runs.

    In a folder of functions zsh takes the file for the body of one, and calls that at the first
    Tab: it makes the real one, and must then call it, or that Tab would do nothing.
    """
    start = "#compdef lifelong\nautoload -U +X bashcompinit && bashcompinit\n"
    first = '[ "$funcstack[1]" != _lifelong ] || _bash_complete -o filenames -F _lifelong\n'
    return start + bash(found) + first


def fish(found: Mapping[str, tuple[Flag, ...]]) -> str:
    """A line for each command and flag."""
    tree = _tree(found)
    lines = ["# lifelong completion fish", "complete -c lifelong -f"]
    names = " ".join(tree)
    start = f"not __fish_seen_subcommand_from {names}"
    lines.append(f"complete -c lifelong -n '{start}' -a '{names}'")
    for first, seconds in tree.items():
        if seconds:
            inside = f"__fish_seen_subcommand_from {first}"
            these = " ".join(seconds)
            without = f"{inside}; and not __fish_seen_subcommand_from {these}"
            lines.append(f"complete -c lifelong -n '{without}' -a '{these}'")
    for name, flags in found.items():
        inside = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        for flag in flags:
            line = f"complete -c lifelong -n '{inside}' -l {flag.name[2:]}"
            if flag.values:
                line += f" -x -a '{' '.join(flag.values)}'"
            elif flag.takes:
                line += " -r" + (" -F" if flag.path else "")
            lines.append(line)
    return "\n".join(lines) + "\n"
