"""Memories inside checkpoints: found wherever they are in the tree, and items taken out of them.

A prior's, learner's or export's file holds memories as dicts with the columns of ``Memory``. What
lies beside a memory and has a row for each item (a kernel's blocks, the ids of an export) goes with
its items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..memory import Memory
from . import codec, files

COLUMNS = frozenset(field.name for field in fields(Memory))
KINDS = ("prior", "learner", "memory")  # of the files that may hold memories


@dataclass(frozen=True)
class Match:
    """Items to take out: by (task, origin), or by the digest of their input."""

    places: frozenset[tuple[int, int]]
    digests: frozenset[bytes]

    def keep(self, state: Mapping[str, Any]) -> Tensor:
        """(M,) bool of a memory's state: True for those that stay."""
        places = zip(state["task"].tolist(), state["origin"].tolist(), strict=True)
        found = [place in self.places for place in places]
        inputs = state["inputs"]
        rows = [] if is_encoded(inputs) else codec.encode_inputs(inputs)
        if is_encoded(inputs):
            layout = codec.InputLayout(inputs["encoded"])
            rows = [(layout, data) for data in unpacked(inputs)]
        if rows and self.digests:
            spec = rows[0][0].spec
            found = [
                hit or codec.digest(spec, data) in self.digests
                for hit, (_, data) in zip(found, rows, strict=True)
            ]
        return ~torch.tensor(found, dtype=torch.bool)


def is_memory(value: Any) -> bool:
    """Whether a dict is a memory's state."""
    return isinstance(value, Mapping) and value.keys() >= COLUMNS


def map_memories(
    tree: Any,
    change: Callable[[dict[str, Any]], dict[str, Any] | None],
    found: Callable[[Any], bool] = is_memory,
) -> Any:
    """The tree with ``change`` applied to every dict whose "memory" is one, or that is one.

    change: takes {"memory": state, ...}, the dict round the memory; None leaves it as it is.
    """
    if isinstance(tree, Mapping):
        if found(tree.get("memory")):
            return change(dict(tree)) or tree
        if found(tree):
            return (change({"memory": tree}) or {"memory": tree})["memory"]
        return {key: map_memories(value, change, found) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_memories(value, change, found) for value in tree]
    return tree


def select(holder: Mapping[str, Any], keep: Tensor) -> dict[str, Any]:
    """The dict round a memory with the items marked in ``keep`` (M,) alone."""
    index = keep.nonzero().squeeze(1)
    result = dict(holder)
    state = dict(holder["memory"])
    for name in state.keys() - {"heads"}:
        state[name] = _rows(state[name], index)
    result["memory"] = state
    for name in ("ids", "notes"):
        if name in holder:
            result[name] = [holder[name][i] for i in index.tolist()]
    if "scores" in holder:
        result["scores"] = {name: values[index] for name, values in holder["scores"].items()}
    if "blocks" in holder:
        result["blocks"] = marginal(holder["blocks"], keep)
    return result


def marginal(blocks: list[Any], keep: Tensor) -> list[dict[str, Any]]:
    r"""A kernel's blocks without some rows: what the Gaussian says of the others alone.

    The inverse of a part of K is a Schur complement, K_aa⁻¹ = P_aa - P_ab P_bb⁻¹ P_ba with
    P = K⁻¹, a what stays and b what goes: exact.
    """
    result, start = [], 0
    for block in blocks:
        stay = keep[block["start"] : block["stop"]]
        a, b = stay.nonzero().squeeze(1), (~stay).nonzero().squeeze(1)
        if len(a) == 0:
            continue
        precision = block["precision"]
        if precision is not None and len(b):
            p = precision.double()
            cross = p[:, a][:, :, b]
            part = p[:, a][:, :, a] - cross @ torch.linalg.solve(p[:, b][:, :, b], cross.mT)
            precision = (0.5 * (part + part.mT)).to(precision.dtype)
        stop = start + len(a)
        new = {**block, "start": start, "stop": stop, "mean": block["mean"][a]}
        result.append({**new, "precision": precision})
        start = stop
    return result


def without(state: Any, match: Match) -> Any:
    """A file's state without the matching items and their places; None where it has none of them.

    The places: in memories, and in the members of groups (``Groups``), which name (task, origin).
    """
    places = set(match.places)
    found = False

    def change(holder: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal found
        memory = holder["memory"]
        keep = match.keep(memory)
        if bool(keep.all()):
            return None
        found = True
        places.update(zip(memory["task"][~keep].tolist(), memory["origin"][~keep].tolist()))
        return select(holder, keep)

    fewer = map_memories(state, change)
    unnamed = without_members(fewer, places)
    return unnamed if found or unnamed is not fewer else None


def without_members(tree: Any, places: Set[tuple[int, int]]) -> Any:
    """The tree with no row of those places in the members of groups; itself where none had any."""
    if isinstance(tree, Mapping):
        if tree.keys() == {"shares", "members"}:
            members = tree["members"]
            keep = [(task, origin) not in places for task, origin, _ in members.tolist()]
            return tree if all(keep) else {**tree, "members": members[torch.tensor(keep)]}
        new = {key: without_members(value, places) for key, value in tree.items()}
        return new if any(new[key] is not tree[key] for key in new) else tree
    if isinstance(tree, list):
        rows = [without_members(value, places) for value in tree]
        return rows if any(a is not b for a, b in zip(rows, tree)) else tree
    return tree


@dataclass(frozen=True)
class Survey:
    """What is to be done below a folder. rewrite: files with matching items; erase: reports,
    which show the memory, and what a kill left half-written; foreign: all that was not looked
    into, links too."""

    rewrite: tuple[Path, ...]
    erase: tuple[Path, ...]
    foreign: tuple[Path, ...]


def survey(folder: Path, match: Match, skip: Callable[[Path], bool] = lambda _: False) -> Survey:
    """Read every checkpoint of KINDS below a folder; nothing is changed.

    skip: what is not looked at, and not listed. Raises StoreError for a folder that cannot be
    looked into. A file that cannot be read, or whose contents make no sense, is foreign.
    """
    rewrite, erase, foreign = [], [], []
    for path in files.entries(folder):
        if skip(path):
            continue
        plain = path.is_file() and not path.is_symlink()
        temporary = path.name.startswith(".") and ".safetensors." in path.name
        if plain and (temporary or path.name == "report.html"):
            erase.append(path)
            continue
        try:
            if not plain or _scrubbed(path, match)[1] is not None:
                (rewrite if plain else foreign).append(path)
        except _ODD:
            foreign.append(path)
    return Survey(tuple(rewrite), tuple(erase), tuple(foreign))


def carry_out(found: Survey, match: Match) -> list[Path]:
    """What was surveyed: files are written again without the items, and the old ones erased."""
    changed = []
    for path in found.erase:
        (files.discard if path.name.startswith(".") else files.erase)(path)
        changed.append(path)
    for path in found.rewrite:
        kind, state = _scrubbed(path, match)
        if state is not None:
            files.overwrite(path, checkpoint.dumps(state, kind=kind))
            changed.append(path)
    return changed


_ODD = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OSError)


def _scrubbed(path: Path, match: Match) -> tuple[str, Any]:
    """A file's kind and new state, None where it has none of the items. Raises _ODD for another."""
    kind = checkpoint.kind_of(path)
    if kind not in KINDS:
        raise ValueError(f"{path} is no file that may hold memories")
    return kind, without(checkpoint.load(path, kind=kind), match)


def is_encoded(inputs: Any) -> bool:
    """Whether inputs are the packed images or texts of an export."""
    return isinstance(inputs, Mapping) and inputs.keys() == {"encoded", "bytes", "ends"}


def packed(kind: str, values: list[bytes]) -> dict[str, Any]:
    """Images or texts as one tensor of bytes, and where each ends."""
    joined = bytearray(b"".join(values))
    flat = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()
    ends = torch.tensor([len(v) for v in values], dtype=torch.int64).cumsum(0)
    return {"encoded": kind, "bytes": flat, "ends": ends}


def unpacked(inputs: Mapping[str, Any]) -> list[bytes]:
    data, ends = inputs["bytes"].numpy().tobytes(), inputs["ends"].tolist()
    return [data[start:stop] for start, stop in zip([0, *ends], ends)]


def _rows(value: Any, index: Tensor) -> Any:
    if is_encoded(value):
        values = unpacked(value)
        return packed(value["encoded"], [values[i] for i in index.tolist()])
    if isinstance(value, Mapping):
        return {name: x[index] for name, x in value.items()}
    return value[index]
