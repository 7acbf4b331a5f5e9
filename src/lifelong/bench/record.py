"""Records: the folder that a table leaves behind, and what it comes to.

OUT/config.json     the table: rows and their settings, published numbers, goals
OUT/versions.json   of everything that could change a number, when a cell was last computed
OUT/machine.json    processor, cores, memory, at the same time
OUT/log.txt         a line for each cell that started, ended or failed
OUT/cells/*.json    one cell each: its definition, its result or its error, the git revision
OUT/result.json     rows: mean, standard error and values over seeds; generated from the cells
OUT/work, OUT/cache checkpoints and what cells share; no part of the record

Nothing in it names a host or a folder of the machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from .. import runs
from ..checkpoint import write
from ..config import UsageError
from ..errors import CheckpointError
from ..metrics import AccuracyMatrix, mean_and_standard_error
from .table import Cell, Table, defaults, plain

FORMAT = 1
CONFIG, VERSIONS, MACHINE, RESULT = "config.json", "versions.json", "machine.json", "result.json"
CELLS, WORK, CACHE = "cells", "work", "cache"


# A cell -------------------------------------------------------------------------------------------


def stem(table: Table, cell: Cell) -> str:
    """METHOD_MEMORY_seed-K"""
    return f"{table.method(cell.method).slug}_{cell.memory}_seed-{cell.seed}"


def cell_path(out: Path, table: Table, cell: Cell) -> Path:
    return out / CELLS / f"{stem(table, cell)}.json"


def write_cell(
    out: Path,
    table: Table,
    cell: Cell,
    *,
    result: Mapping[str, Any] | None = None,
    error: str | None = None,
    seconds: float = 0.0,
    resumed: bool = False,
) -> dict[str, Any]:
    """Write a cell that is done, or that failed with ``error``; returns what was written.

    seconds: of the process that ended it, also where an earlier one began it (``resumed``).
    """
    content = {
        "format": FORMAT,
        **asdict(cell),
        "status": "done" if error is None else "failed",
        "error": error,
        "wall_seconds": seconds,
        "resumed": resumed,
        "revision": runs.versions().get("revision"),
        "definition": table.definition(cell.method),
        "result": None if result is None else without_nan(plain(result)),
    }
    write_json(cell_path(out, table, cell), content)
    return content


def read_cells(out: Path) -> list[dict[str, Any]]:
    """All cells of a record, by name. Raises CheckpointError where one cannot be read."""
    found = []
    for path in sorted((out / CELLS).glob("*.json")):
        try:
            found.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); remove it, and the cell is computed again"
            ) from error
    return found


def cell_of(content: Mapping[str, Any]) -> Cell:
    return Cell(*(content[name] for name in ("table", "method", "memory", "seed")))


# A record -----------------------------------------------------------------------------------------


def open_record(out: Path, table: Table, *, smoke: bool = False, redo: Sequence[str] = ()) -> None:
    """Make the record, or find that ``table`` may go on with the one that is there; the cells of
    the methods ``redo`` are removed.

    Raises UsageError, and changes nothing, where the folder holds another table or anything else,
    or where its cells have another definition than the table's rows now: it says what differs.
    """
    for name in redo:
        table.method(name)
    config = _read_config(out)
    if config is None and out.exists() and any(p.name != runs.LOCK for p in out.iterdir()):
        raise UsageError(f"{out} holds something else; choose another folder with --out")
    if config is not None and (config["table"], config["smoke"]) != (table.name, smoke):
        kind = "a smoke test of" if config["smoke"] else "the table"
        raise UsageError(
            f"{out} holds {kind} {config['table']!r}; choose another folder with --out"
        )
    cells = read_cells(out)
    known = {method.name for method in table.methods}
    changed: dict[str, list[str]] = {}
    for content in cells:
        name = content["method"]
        if name in known and name not in redo:
            different = changes(table, name, content["definition"])
            if different:
                changed[name] = different
    if changed:
        told = "; ".join(f"{name}: {', '.join(diff)}" for name, diff in sorted(changed.items()))
        again = " ".join(f'"{name}"' if " " in name else name for name in sorted(changed))
        raise UsageError(
            f"the record in {out} was made with other settings ({told}); put them back, choose "
            f"another folder with --out, or compute these rows anew with --redo {again}"
        )
    for content in cells:
        if content["method"] in redo:
            cell_path(out, table, cell_of(content)).unlink()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, _config(table, smoke, config))


def write_origin(out: Path) -> None:
    """What the cells that are computed now come from. A call that computes none leaves it."""
    write_json(out / VERSIONS, runs.versions())
    write_json(out / MACHINE, machine())


def _read_config(out: Path) -> dict[str, Any] | None:
    path = out / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        newer = config["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); choose another folder") from error
    if newer:
        raise UsageError(f"{path} was written by a newer lifelong; upgrade to go on with it")
    if "table" not in config:
        raise UsageError(f"{out} holds another kind of run; choose another folder with --out")
    return config


def _config(table: Table, smoke: bool, before: Mapping[str, Any] | None) -> dict[str, Any]:
    methods = {
        m.name: {
            **table.definition(m.name),
            "memories": list(m.memories_of(table)),
            "tuned": m.tuned,
            "note": m.note,
        }
        for m in table.methods
    }
    for row in methods.values():
        row.pop("setup")
    return plain(
        {
            "format": FORMAT,
            "table": table.name,
            "title": table.title,
            "note": table.note,
            "smoke": smoke,
            "seeds": table.seeds,
            "memories": table.memories,
            "setup": table.setup,
            "methods": {**(before or {}).get("methods", {}), **methods},
            "published": [asdict(p) for p in table.published],
            "goals": [asdict(g) for g in table.goals],
        }
    )


def changes(table: Table, name: str, then: Mapping[str, Any]) -> list[str]:
    """What differs between the definition ``then`` of a row and the table's now; a setting that
    was not there then had its default. Of a recipe only what both know is compared: a field that
    came or went since is a change of code, which the cells' revisions tell."""
    now = table.definition(name)
    recipes = then.get("recipe", {}), now.get("recipe", {})
    both = recipes[0].keys() & recipes[1].keys()
    then, now = (
        {**d, "recipe": {k: r[k] for k in sorted(both)}}
        for d, r in zip((then, now), recipes, strict=True)
    )
    if is_dataclass(table.run) and not isinstance(table.run, type):
        then = {**then, "setup": _filled(then["setup"], defaults(table.run))}
    return differences(then, now)


def _filled(values: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found = {**default, **values}
    for name, inside in default.items():
        if isinstance(inside, Mapping) and isinstance(values.get(name), Mapping):
            found[name] = _filled(values[name], inside)
    return found


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """What differs between two nestings of plain values, as "training.epochs 5 -> 3"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for name in dict.fromkeys((*old, *new)):
            inside = f"{place}.{name}" if place else str(name)
            found += differences(old.get(name), new.get(name), inside)
        return found
    return [] if old == new else [f"{place} {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    return "unset" if value is None else json.dumps(value)


# What the cells come to ---------------------------------------------------------------------------


def summarise(table: Table, cells: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows in the table's order, then others that the record holds: for each number that is a
    plain float or int in all of a row's cells, its mean, standard error (ddof 1; None for one
    seed) and values over seeds. Cells that failed are listed with their errors.

    Two metrics need other rows, of the same seed, and are filled in where those are there:
    ``learning_transfer`` (the row "separate") and ``intransigence`` (the row "joint").
    """
    cells = sorted(cells, key=lambda c: c["seed"])
    done = [c for c in cells if c["status"] == "done"]
    references = {
        (c["definition"]["preset"], c["seed"]): c["result"]
        for c in done
        if c["definition"]["preset"] in ("separate", "joint")
    }
    rows = []
    for method, memory in _row_names(table, cells):
        row = [c for c in cells if (c["method"], c["memory"]) == (method, memory)]
        mine = [c for c in row if c["status"] == "done"]
        failed = [c for c in row if c["status"] == "failed"]
        results = [{**c["result"], **_compared(c, references)} for c in mine]
        rows.append(
            {
                "method": method,
                "memory": memory,
                "preset": row[0]["definition"]["preset"],
                "seeds": [c["seed"] for c in mine],
                "revisions": sorted({c["revision"] or "unknown" for c in mine}),
                **{name: over_seeds(values) for name, values in _numbers(results)},
                "failed": [{"seed": c["seed"], "error": c["error"]} for c in failed],
            }
        )
    return {"format": FORMAT, "table": table.name, "title": table.title, "rows": rows}


def _row_names(table: Table, cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    there = list(dict.fromkeys((c["method"], c["memory"]) for c in cells))
    order = {m.name: i for i, m in enumerate(table.methods)}
    return sorted(there, key=lambda row: (order.get(row[0], len(order)), row[0], row[1]))


def _numbers(results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[float]]]:
    for name in results[0] if results else ():
        values = [r.get(name) for r in results]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            yield name, values  # type: ignore[misc]


def _compared(
    cell: Mapping[str, Any], references: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, float]:
    matrix = cell["result"].get("matrix")
    if matrix is None:
        return {}
    own, found = AccuracyMatrix.from_list(matrix), {}
    for preset, name in (("separate", "learning_transfer"), ("joint", "intransigence")):
        reference = references.get((preset, cell["seed"]))
        if reference is not None and reference.get("matrix") is not None:
            last = AccuracyMatrix.from_list(reference["matrix"]).values[-1]
            if len(last) == own.num_tasks:
                found[name] = getattr(own, name)(last)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error (None for one value) and the values."""
    mean, error = mean_and_standard_error(values)
    return {
        "mean": mean,
        "standard_error": None if math.isnan(error) else error,
        "per_seed": list(values),
    }


def write_result(out: Path, table: Table) -> dict[str, Any]:
    """Summarise the cells that are there; returns what was written."""
    summary = summarise(table, read_cells(out))
    write_json(out / RESULT, summary)
    return summary


# Files --------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Processor, cores and memory; nothing that names the machine."""
    total = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": total,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def without_nan(value: Any) -> Any:
    """With None where a number is NaN or infinite: json has neither."""
    if isinstance(value, Mapping):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    write(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
