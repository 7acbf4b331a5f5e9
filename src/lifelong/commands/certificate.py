"""``lifelong certificate``: check a certificate of unlearning, or make a key to sign with."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..config import UsageError
from .flags import parse

ABOUT = """\
usage: lifelong certificate {verify,key} ...

Check a certificate of unlearning, or make a key to sign with.

  verify FILE --key PUB   is it as it was signed by the owner of this key?
  key FILE                a new Ed25519 key: FILE, for you alone, and FILE.pub
"""

EXAMPLES = """
examples:
  lifelong certificate key audit.pem
  lifelong certificate verify certificate.json --key audit.pem.pub
"""


@dataclass(frozen=True)
class Verify:
    file: Annotated[Positional[Path], arg(metavar="FILE", help="certificate.json")]
    key: Annotated[Path, arg(metavar="PUB", help="the public key of whom you trust, PEM")]
    json: Annotated[bool, arg(help="print one JSON object on standard output")] = False
    debug: Annotated[bool, arg(help="show the whole traceback of an error")] = False


@dataclass(frozen=True)
class Key:
    file: Annotated[Positional[Path], arg(metavar="FILE", help="where the private key goes")]
    json: Annotated[bool, arg(help="print one JSON object on standard output")] = False
    debug: Annotated[bool, arg(help="show the whole traceback of an error")] = False


def certificate(args: list[str]) -> int:
    """The exit code: 0, or 1 for a certificate that is not what was signed."""
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(ABOUT + EXAMPLES)
        return 0 if args else 2
    kind, *rest = args
    prog = f"lifelong certificate {kind}"
    if kind == "key":
        flags = parse(Key, prog, "Make an Ed25519 key to sign with.", EXAMPLES, rest)
        from ..certificate import create_key

        private, public = create_key(flags.file)
        if flags.json:
            told = {"private": str(private), "public": str(public)}
            sys.stdout.write(json.dumps(told) + "\n")
        else:
            sys.stdout.write(f"private key {private}, for you alone\npublic key  {public}\n")
        return 0
    if kind != "verify":
        raise UsageError(f"there is no kind {kind!r}; say verify or key")
    flags = parse(Verify, prog, "Is a certificate as it was signed?", EXAMPLES, rest)
    if not flags.key.is_file():
        raise UsageError(
            f"--key: there is no file {flags.key}; it is the public key, such as x.pub"
        )
    from ..certificate import Certificate, listing

    found = Certificate.load(flags.file).verify(flags.key)
    if flags.json:
        changed = [] if found.valid else list(listing(found.changed))
        told = {"valid": found.valid, "reason": found.reason, "changed": changed}
        sys.stdout.write(json.dumps(told) + "\n")
        return 0 if found.valid else 1
    sys.stdout.write(("VALID. " if found.valid else "NOT VALID. ") + _inert(found.reason) + "\n")
    for field in () if found.valid else listing(found.changed):
        sys.stdout.write(f"  changed: {_inert(field)}\n")
    return 0 if found.valid else 1


def _inert(text: str) -> str:
    """Without codes that a terminal would obey."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
