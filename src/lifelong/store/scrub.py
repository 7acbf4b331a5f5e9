"""Memories inside checkpoints: found wherever they are in the tree, and items taken out of them.

A prior's, learner's or export's file holds memories as dicts with the columns of ``Memory``. What
lies beside a memory and has a row for each item (a kernel's blocks, the ids of an export) goes with
its items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def scrub(path: Path, match: Match) -> bool:
    """Write a file again without the matching items, and erase the old one; whether it had any."""
    kind = checkpoint.kind_of(path)
    if kind not in KINDS:
        return False
    found = False

    def change(holder: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal found
        keep = match.keep(holder["memory"])
        if bool(keep.all()):
            return None
        found = True
        return select(holder, keep)

    state = map_memories(checkpoint.load(path, kind=kind), change)
    if found:
        files.overwrite(path, checkpoint.dumps(state, kind=kind))
    return found


def scrub_folder(folder: Path, match: Match, *, skip: frozenset[str] = frozenset()) -> list[Path]:
    """``scrub`` every safetensors file below a folder, leave out links; what was changed.

    Reports (report.html), which show the memory, and what a kill left of half-written checkpoints
    are removed too. skip: names in the folder itself that are not looked at.
    """
    changed = []
    for path in files.walk(folder):
        if path.parent == folder and path.name in skip:
            continue
        temporary = path.name.startswith(".") and ".safetensors." in path.name
        if temporary or path.name == "report.html":
            files.erase(path)
            changed.append(path)
        elif path.suffix == ".safetensors" and scrub(path, match):
            changed.append(path)
    return changed


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
