"""Files: one safetensors file per checkpoint, with a versioned json beside the tensors.

``save`` takes any nesting of dicts, lists, tensors and plain values; the tensors go into the file's
body and the rest into its header as json. Nothing is ever unpickled. A file is written beside its
place and moved there in one step, so a kill at any moment leaves the last good one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from .errors import CheckpointError

VERSION = 1
_TENSOR = "__tensor__"
_PAIRS = "__pairs__"


def save(path: str | Path, state: Any, *, kind: str) -> Path:
    """Write ``state`` to ``path``, atomically and flushed to disk; folders are made.

    kind: what it is ("prior", "learner"), asked for again by ``load``.
    Raises TypeError for a value that json and safetensors cannot hold, OSError with the path where
    the folder cannot be written; the old file, if any, is left as it was.
    """
    path = Path(path)
    write(path, dumps(state, kind=kind))
    return path


def dumps(state: Any, *, kind: str) -> bytes:
    """The bytes that ``save`` writes. Raises TypeError as ``save``."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, tensors)
    header = {"lifelong": json.dumps({"version": VERSION, "kind": kind, "state": tree})}
    return serialise(tensors, metadata=header)


def kind_of(path: str | Path) -> str | None:
    """The kind of a file that ``save`` wrote; None where it is no such file, or damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            kind = json.loads((file.metadata() or {})["lifelong"])["kind"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def load(path: str | Path, *, kind: str) -> Any:
    """What ``save`` wrote.

    Raises FileNotFoundError; CheckpointError where the file is truncated, is not of this library,
    of another kind, or from a newer version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a checkpoint ({error}); use the last good one"
        ) from error
    if "lifelong" not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one that lifelong wrote; expected a {kind}"
        )
    try:
        content = json.loads(metadata["lifelong"])
        version, found = content["version"], content["kind"]
        if version > VERSION:
            raise CheckpointError(
                f"{path} has version {version}, and this lifelong reads up to {VERSION}; "
                "upgrade lifelong"
            )
        if found != kind:
            raise CheckpointError(f"{path} holds a {found}, expected a {kind}")
        return _restore(content["state"], tensors)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a header that cannot be read ({error!r}); use the last good one"
        ) from error


def write(path: str | Path, data: bytes | str) -> None:
    """Put ``data`` at ``path`` in one step: a temporary file beside it, flushed, then renamed."""
    path = Path(path)
    raw = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {path.parent} ({error.strerror}); choose another folder",
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(
                error.errno,
                f"could not write {path} ({error.strerror}); free some space or choose another "
                "folder. What was there before is unharmed",
            ) from error
        raise


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy where storage is shared, which safetensors refuses.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and key not in (_TENSOR, _PAIRS) for key in value):
            return {key: _flatten(item, tensors) for key, item in value.items()}
        return {_PAIRS: [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_flatten(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"cannot save a {type(value).__name__}; expected tensors and plain values")


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            # A tensor that lies anywhere in the file's bytes; a copy is aligned as torch's own are,
            # without which the same product of matrices may end in another last bit.
            return tensors[value[_TENSOR]].clone()
        if value.keys() == {_PAIRS}:
            return {_key(_restore(k, tensors)): _restore(v, tensors) for k, v in value[_PAIRS]}
        return {key: _restore(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    return value


def _key(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
