r"""Certificate: what was unlearned, with what evidence, signed, for people and for machines.

A json file and a page of the same content. The data are named by id and by the sha256 of each
example, and are not in it. Each field has a digest of its canonical json, and Ed25519 signs the
list of digests, so that a check tells *which* field was changed. **A signature says who vouches
for the figures and that they are as they were; it does not make them true.** Whoever verifies
brings the public key: the one that the file might carry would prove nothing.

Needs the package ``cryptography`` (``pip install 'lifelong[audit]'``) to sign and to verify.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint
from .data import Data, Examples, batches
from .errors import CheckpointError
from .models import concat, take
from .prior import Prior
from .refit import Refit
from .removal import Removal
from .unlearning import Audit, Unlearned

FORMAT, VERSION = "lifelong certificate of unlearning", 1
_MOST = 64 * 2**20  # bytes of a file that is read
_DEEPEST = 32  # levels of what is read
_SHOWN, _LONGEST = 20, 80  # names, and characters of each

GUARANTEED = (
    "The examples named here are not in the memory of the prior with the digest given as after.",
    "What the prior's gradient held of them was subtracted from it (of remembered examples that "
    "stand for more than themselves not all that updates added to it), and from its curvature what "
    "it held of those that were not in memory, but for the part given as clipped; of those given "
    "as not_held it held nothing, and nothing was taken out. The prior stands at the new weights.",
    "The soft labels that the prior holds of other examples were asked for again from the new "
    "model, if the prior's recipe refreshes them.",
    "The figures are those of the models whose digests are given.",
)
NOT_GUARANTEED = (
    "That the weights hold nothing of the examples. Removal is exact for generalised linear "
    "models with all data in memory, and for linear-Gaussian ones with a dense curvature; for "
    "networks it is an approximation of first and second order around the old weights, which "
    "knew the examples, and gradient and curvature keep what these orders do not see.",
    "That no attack tells the examples from others: an attack is a lower bound on what leaks.",
    "Anything about copies elsewhere: backups, exports, logs, caches, older checkpoints, models "
    "and soft labels derived from the old model, and blocks of a disk that were freed but not "
    "overwritten.",
    "Differential privacy, or that what a law asks for has been done.",
)


# --- digests --------------------------------------------------------------------------------------


def _sha(*parts: bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "big"))  # so that no two lists of parts run together
        h.update(part)
    return h.hexdigest()


def _tensor_parts(value: Tensor) -> tuple[bytes, bytes, bytes]:
    value = value.detach().cpu().contiguous()
    raw = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return str(value.dtype).encode(), str(tuple(value.shape)).encode(), raw


def digest_examples(data: Data) -> list[str]:
    """The sha256 of each example in order: of its inputs' and label's dtype, shape and bytes.

    Who has an example can see that it is meant; who has a small set of candidates can try them.
    """
    found = []
    for batch in batches(data):
        for i in range(len(batch.labels)):
            row = take(batch.inputs, slice(i, i + 1))
            named = sorted(row.items()) if isinstance(row, Mapping) else [("", row)]
            parts = [p for n, v in named for p in (n.encode(), *_tensor_parts(v[0]))]
            found.append(_sha(*parts, *_tensor_parts(batch.labels[i])))
    return found


def digest_model(model: nn.Module) -> str:
    """The sha256 of the state: names, dtypes, shapes and bytes; of a module's extra state that is
    no tensor the plain values. Raises TypeError where it is neither, ValueError for NaN in it."""
    state = sorted(model.state_dict().items())
    return _sha(*(p for n, v in state for p in (n.encode(), *_state_parts(v))))


def _state_parts(value: Any) -> list[bytes]:
    if isinstance(value, Tensor):
        return list(_tensor_parts(value))
    tensors: dict[str, Tensor] = {}
    tree = canonical(checkpoint._flatten(value, tensors))
    return [tree, *(part for v in tensors.values() for part in _tensor_parts(v))]


def digest_prior(prior: Prior) -> str:
    """The sha256 of all that ``Prior.save`` writes."""
    tensors: dict[str, Tensor] = {}
    tree = checkpoint._flatten(prior.state_dict(), tensors)
    parts = [p for n, v in sorted(tensors.items()) for p in (n.encode(), *_tensor_parts(v))]
    return _sha(canonical(tree), *parts)


def canonical(value: Any) -> bytes:
    """The one way in which a value is written: sorted keys, no spaces, ASCII, no NaN.

    Raises ValueError for NaN and infinities, TypeError for what json cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


# --- the certificate ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verification:
    """valid: the signature is by that key and nothing was changed. changed: the fields that are
    not as they were signed ("audit.seconds.unlearning"). reason: one sentence."""

    valid: bool
    changed: tuple[str, ...]
    reason: str


@dataclass(frozen=True, eq=False)
class Certificate:
    """content: nested plain values; digests: field -> sha256; signature: base64, None unsigned."""

    content: Mapping[str, Any]
    digests: Mapping[str, str]
    signature: str | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Certificate:
        """Unsigned. Raises as ``canonical``, and CheckpointError where keys lie too deep."""
        plain = json.loads(canonical(content))
        _require_shallow(plain)
        return cls(plain, _digests(plain))

    def sign(self, key: Any) -> Certificate:
        """Signed by an Ed25519 private key of ``cryptography``, or the path of its PEM file.

        Raises ImportError without ``cryptography``, and as ``load_private_key``.
        """
        _require_cryptography()
        if isinstance(key, str | os.PathLike):
            key = load_private_key(key)
        fresh = Certificate.of(self.content)
        signed = key.sign(_signed(fresh.digests))
        return replace(fresh, signature=base64.b64encode(signed).decode())

    def verify(self, key: Any) -> Verification:
        """Whether it is as it was signed; key: an Ed25519 public key, or the path of its PEM file.

        Raises ImportError without ``cryptography``, as ``load_public_key``, and CheckpointError
        where two fields have one name.
        """
        if isinstance(key, str | os.PathLike):
            key = load_public_key(key)
        now = _digests(self.content)
        fields = now.keys() | self.digests.keys()
        changed = tuple(sorted(f for f in fields if now.get(f) != self.digests.get(f)))
        if self.signature is None:
            return Verification(False, changed, "The certificate is not signed.")
        _require_cryptography()
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(base64.b64decode(self.signature, validate=True), _signed(self.digests))
        except (InvalidSignature, ValueError):
            return Verification(
                False,
                changed,
                "The signature is not this key's, or the list of digests or the signature was "
                "changed.",
            )
        if changed:
            listed = ", ".join(listing(changed))
            return Verification(False, changed, f"Changed after signing: {listed}.")
        return Verification(True, (), "Signed with this key, and not changed since.")

    def to_json(self) -> str:
        signature = None
        if self.signature is not None:
            signature = {"algorithm": "Ed25519", "value": self.signature}
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "content": self.content,
            "digests": dict(self.digests),
            "signature": signature,
        }
        return json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        """What ``to_json`` wrote. Raises CheckpointError for anything else, so for numbers that are
        not finite and for what is nested more deeply than a certificate is."""
        try:
            whole = json.loads(
                text,
                object_pairs_hook=_unique,
                parse_constant=_no_constant,
                parse_float=_finite,
            )
            _require_shallow(whole)
            if not isinstance(whole, dict) or whole.get("format") != FORMAT:
                raise CheckpointError(f"this is not a {FORMAT}")
            if whole["version"] != VERSION:
                raise CheckpointError(
                    f"the certificate has version {whole['version']!r}, and this lifelong reads "
                    f"{VERSION}; upgrade lifelong"
                )
            signature = whole["signature"]
            if signature is not None and signature["algorithm"] != "Ed25519":
                raise CheckpointError(f"unknown signature {signature['algorithm']!r}")
            value = None if signature is None else signature["value"]
            content, digests = whole["content"], whole["digests"]
            right = isinstance(content, dict) and isinstance(digests, dict)
            if not right or not isinstance(value, str | None):
                raise CheckpointError("the certificate's fields have the wrong types")
            return cls(content, digests, value)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"the certificate is truncated or not one ({error}); ask for it again"
            ) from error

    def to_html(self) -> str:
        """One page that loads nothing and runs nothing; every text in it is escaped."""
        return _template().render(
            c=self.content,
            signed=self.signature is not None,
            signature=self.signature,
            seal=_sha(_signed(self.digests)),
        )

    def save(self, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write certificate.json and certificate.html, each in one step; the two paths.

        Raises OSError where the folder cannot be written.
        """
        place = Path(folder)
        paths = place / "certificate.json", place / "certificate.html"
        checkpoint.write(paths[0], self.to_json())
        checkpoint.write(paths[1], self.to_html())
        return paths

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Raises FileNotFoundError, CheckpointError."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"there is no certificate at {file}")
        if file.stat().st_size > _MOST:
            raise CheckpointError(f"{file} is larger than a certificate can be")
        return cls.from_json(file.read_bytes())


def certify(
    *,
    before: nn.Module,
    after: nn.Module,
    prior: Prior,
    unlearned: Unlearned,
    removed: Data | None,
    ids: Sequence[int | str] | None = None,
    audit: Audit | None = None,
    note: str = "",
    date: datetime | None = None,
    key: Any = None,
) -> Certificate:
    """The certificate of one unlearning; signed where a ``key`` is given.

    before, after: the models; prior: before, the one after is in ``unlearned``. removed: the
    examples, for their digests; None where nobody has them any more (a group known by its
    statistics alone), which is said. ids: their names, by default those that the data carry. note:
    of whoever asked for it. Raises as ``Certificate.sign``, and ValueError where ids and examples
    differ in number, or these from those that ``unlearned`` took out or found in no part of the
    prior.
    """
    examples = [] if removed is None else digest_examples(removed)
    if ids is None:
        own = [] if removed is None else [b.ids.tolist() for b in batches(removed)]
        ids = [i for part in own for i in part]
    if removed is not None and len(ids) != len(examples):
        raise ValueError(f"expected as many ids as examples, {len(examples)}, got {len(ids)}")
    found, done = unlearned.removal, unlearned.refit
    if removed is not None and len(examples) != found.count:
        raise ValueError(
            f"{len(examples)} examples were given as removed, and {found.count} were forgotten; "
            "certify exactly those that were forgotten"
        )
    content = {
        "date": (date or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "note": note,
        "removed": {
            "ids": list(ids),
            "sha256": examples,
            "in_memory": 0 if found.removed is None else len(found.removed),
            "given": found.given,
            "by_statistics": found.by_statistics,
            "not_held": found.not_held,
        },
        "model": {"before": digest_model(before), "after": digest_model(after)},
        "prior": {"before": digest_prior(prior), "after": digest_prior(unlearned.prior)},
        "done": {
            "recipe": prior.recipe.name,
            "clipped": found.clipped,
            "refit": None if done is None else done.method,
            "iterations": 0 if done is None else done.iterations,
            "converged": None if done is None else done.converged,
            "seconds": unlearned.seconds,
        },
        "audit": None if audit is None else audit.to_dict(),
        "versions": {name: version(name) for name in ("lifelong", "torch")},
        "guaranteed": list(GUARANTEED),
        "not_guaranteed": list(NOT_GUARANTEED),
    }
    certificate = Certificate.of(content)
    return certificate if key is None else certificate.sign(key)


def certify_removal(
    folder: str | os.PathLike[str],
    *,
    before: nn.Module,
    after: nn.Module,
    prior_before: Prior,
    prior_after: Prior,
    removed: Mapping[int, Examples],
    refit: Refit,
    clipped: float = 0.0,
    not_held: int = 0,
    audit: Audit | None = None,
    note: str = "",
    key: Any = None,
) -> tuple[Path, Path]:
    """The certificate of a removal that ``Learner.remove`` did, saved in ``folder``: the paths of
    json and page. removed: task -> examples, named "task:id"; not_held: of how many the prior held
    nothing (``NotHeldWarning.count``). Raises as ``certify`` and ``save``, ValueError where nothing
    was removed, or more was not held than was not in memory.
    """
    if not removed:
        raise ValueError("nothing was removed, so there is nothing to certify")
    ids = [f"{task}:{i}" for task, data in removed.items() for i in data.ids.tolist()]
    parts = [data.batch(slice(None)) for data in removed.values()]
    examples = Examples(concat([b.inputs for b in parts]), torch.cat([b.labels for b in parts]))
    held = [0 if p.memory is None else len(p.memory) for p in (prior_before, prior_after)]
    in_memory = held[0] - held[1]
    if not 0 <= not_held <= len(ids) - in_memory or not_held == len(ids):
        raise ValueError(
            f"of {len(ids)} examples {in_memory} were in memory, so {not_held} that the prior did "
            "not hold cannot be; a removal that took nothing out has no certificate"
        )
    gone = None
    if in_memory and prior_before.memory is not None:
        gone = prior_before.memory[slice(0, in_memory)]  # only its number is told
    done = Unlearned(
        prior_after,
        Removal(
            prior_after.terms,
            gone,
            given=len(ids) - in_memory - not_held,
            clipped=clipped,
            not_held=not_held,
        ),
        refit,
        forgetting=0.0,
        seconds=refit.seconds,
    )
    paper = certify(
        before=before,
        after=after,
        prior=prior_before,
        unlearned=done,
        removed=examples,
        ids=ids,
        audit=audit,
        note=note,
        key=key,
    )
    return paper.save(folder)


def _leaves(value: Any, path: str | None = None) -> Iterator[tuple[str, Any]]:
    """(path, value): of every field that is no mapping with entries. A key's dots are escaped.

    The path is None at the root alone, so that an empty key lengthens a path as any other does;
    a root without entries has no field.
    """
    if isinstance(value, Mapping) and (value or path is None):
        for key, inner in value.items():
            escaped = str(key).replace("\\", "\\\\").replace(".", "\\.")
            yield from _leaves(inner, escaped if path is None else f"{path}.{escaped}")
    else:
        yield path or "", value


def _digests(content: Mapping[str, Any]) -> dict[str, str]:
    """Raises CheckpointError where two fields have one name: one digest would cover both."""
    found: dict[str, str] = {}
    for path, value in _leaves(content):
        if path in found:
            raise CheckpointError(f"two fields of the certificate have the name {path!r}")
        found[path] = _sha(canonical(value))
    return found


def _signed(digests: Mapping[str, Any]) -> bytes:
    return canonical({"format": FORMAT, "version": VERSION, "digests": dict(digests)})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of a certificate")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number of a certificate")
    return value


def _require_shallow(value: Any) -> None:
    """Raise CheckpointError for what is nested more deeply than ``_DEEPEST``."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise CheckpointError(f"a certificate is nested in {_DEEPEST} levels at most")
        inside = (v for v in level if isinstance(v, dict | list))
        level = [w for v in inside for w in (v.values() if isinstance(v, dict) else v)]


def listing(names: Sequence[str]) -> list[str]:
    """Names to show to a person: the first 20, each cut at 80 characters, and how many more."""
    shown = [n if len(n) <= _LONGEST else n[: _LONGEST - 3] + "..." for n in names[:_SHOWN]]
    return shown if len(names) <= _SHOWN else [*shown, f"and {len(names) - _SHOWN} more"]


# --- keys -----------------------------------------------------------------------------------------


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "signing and checking signatures need cryptography: pip install 'lifelong[audit]'"
        ) from error


def create_key(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """A new Ed25519 key: the private one at ``path``, which its owner alone can read, the public
    one beside it with the suffix .pub. Both PEM, the private one not encrypted.

    Raises FileExistsError where either is there: a key is never overwritten; ImportError without
    ``cryptography``.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Path(path)
    public = private.with_name(private.name + ".pub")
    if public.exists():
        raise FileExistsError(f"{public} is there already; choose another name for the key")
    key = Ed25519PrivateKey.generate()
    _new_file(
        private,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        0o600,
    )
    raw = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _new_file(public, raw, 0o644)
    return private, public


def _new_file(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise FileExistsError(
            f"{path} is there already; choose another name for the key"
        ) from error
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def load_private_key(path: str | os.PathLike[str]) -> Any:
    """Raises ImportError without ``cryptography``, FileNotFoundError, PermissionError where others
    can read the file, ValueError for what is no Ed25519 key in PEM."""
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    file = Path(path)
    raw = file.read_bytes()
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise PermissionError(f"{file} can be read by others; run: chmod 600 {file}")
    return _key(lambda: load_pem_private_key(raw, None), Ed25519PrivateKey, file, "private")


def load_public_key(path: str | os.PathLike[str]) -> Any:
    """Raises ImportError without ``cryptography``, FileNotFoundError, ValueError for what is no
    Ed25519 key in PEM."""
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    file = Path(path)
    raw = file.read_bytes()
    return _key(lambda: load_pem_public_key(raw), Ed25519PublicKey, file, "public")


def _key(read: Any, kind: type, file: Path, name: str) -> Any:
    try:
        key = read()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no {name} key in PEM ({error})") from error
    if not isinstance(key, kind):
        raise ValueError(f"{file} holds a {type(key).__name__}; expected an Ed25519 {name} key")
    return key


# --- the page -------------------------------------------------------------------------------------


def _visible(value: Any) -> str:
    """Text in which nothing hides: characters that are not printed, or turn the direction of the
    text round, stand as their code."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in str(value))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": _visible, "number": _number}
    text = files("lifelong").joinpath("certificate.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)
