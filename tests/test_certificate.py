"""Certificates: any change shows and is named, keys are safe, the page is inert."""

from __future__ import annotations

import copy
import html
import json
import os
import stat
import sys
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lifelong
from lifelong import Categorical, Examples
from lifelong import certificate as module
from lifelong.certificate import (
    Certificate,
    canonical,
    certify,
    certify_removal,
    create_key,
    digest_examples,
    digest_model,
    digest_prior,
    load_private_key,
    load_public_key,
)
from lifelong.cli import main
from lifelong.errors import CheckpointError
from lifelong.unlearning import audit, unlearn

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "javascript:alert(1)",
    "</table></html>",
    "\u202egnp.exe\u0000\u001b[2J",
    "\ud800",
]


@pytest.fixture(scope="module")
def world() -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.arange(40) % 4
    data, test = Examples(x, y), Examples(torch.randn(20, 3), torch.arange(20) % 4)
    model = nn.Linear(3, 4)
    prior = lifelong.kprior(Categorical(), precision=1.0, memory=None).update(model, data)
    before = copy.deepcopy(model)
    done = unlearn(model, prior, data[:5])
    figures = audit(
        before,
        model,
        copy.deepcopy(model),
        likelihood=Categorical(),
        removed=data[:5],
        kept=data[5:],
        test=test,
        seconds={"unlearning": 0.5, "retraining": 5.0},
    )
    return {
        "before": before,
        "after": model,
        "prior": prior,
        "unlearned": done,
        "removed": data[:5],
        "audit": figures,
        "date": datetime(2026, 11, 24, tzinfo=UTC),
    }


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return create_key(tmp_path_factory.mktemp("keys") / "audit.pem")


@pytest.fixture(scope="module")
def signed(world: dict[str, Any], keys: tuple[Path, Path]) -> Certificate:
    return certify(**world, key=keys[0])


# ------------------------------------------------------------------ what it says


def test_it_names_the_data_and_holds_none(signed: Certificate, world: dict[str, Any]):
    content = signed.content
    assert content["removed"]["ids"] == [0, 1, 2, 3, 4]
    assert content["removed"]["sha256"] == digest_examples(world["removed"])
    assert content["removed"]["in_memory"] == 5
    assert content["model"] == {
        "before": digest_model(world["before"]),
        "after": digest_model(world["after"]),
    }
    assert content["prior"]["after"] == digest_prior(world["unlearned"].prior)
    assert content["audit"] == json.loads(canonical(world["audit"].to_dict()))
    assert content["date"] == "2026-11-24T00:00:00+00:00"
    text = signed.to_json()
    for value in world["removed"].inputs.flatten().tolist():
        assert f"{value:.6f}"[:-1] not in text
    page = signed.to_html()
    for line in (*module.GUARANTEED, *module.NOT_GUARANTEED):
        assert line.split(".")[0] in html.unescape(page)
    assert "backups" in page
    assert "lower bound" in page


def test_without_key_data_or_audit(world: dict[str, Any]):
    bare = certify(**{**world, "removed": None, "audit": None}, ids=["group 3"])
    assert bare.signature is None
    assert bare.content["removed"]["sha256"] == []
    page = bare.to_html()
    assert "Not signed." in page
    assert "There was no audit." in page
    assert "no digests of them" in page
    assert Certificate.from_json(bare.to_json()).content == bare.content
    with pytest.raises(ValueError, match="as many ids as examples, 5, got 1"):
        certify(**world, ids=["one"])


class Noted(nn.Linear):
    """A module whose state holds more than tensors."""

    def __init__(self, note: Any) -> None:
        super().__init__(1, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.note = note

    def get_extra_state(self) -> Any:
        return self.note


def test_digests_tell_examples_models_and_priors_apart(world: dict[str, Any]):
    x, y = torch.zeros(3, 2), torch.tensor([0, 1, 0])
    a, b, c = digest_examples((x, y))
    assert a == c != b
    assert digest_examples((x.double(), y))[0] != a
    assert digest_examples((x.reshape(3, 1, 2), y))[0] != a
    named = digest_examples(Examples({"u": x, "v": x + 1}, y))  # type: ignore[dict-item]
    other = digest_examples(Examples({"v": x, "u": x + 1}, y))  # type: ignore[dict-item]
    assert named[0] != other[0]
    changed = copy.deepcopy(world["before"])
    with torch.no_grad():
        changed.weight[0, 0] = torch.nextafter(changed.weight[0, 0], torch.tensor(10.0))
    assert digest_model(changed) != digest_model(world["before"])
    noted = [Noted(note) for note in ({"a": 1}, {"a": 2}, {"a": torch.ones(1)}, {"a": [1]})]
    assert len({digest_model(m) for m in noted}) == len(noted)
    assert digest_model(Noted({"a": 1})) == digest_model(noted[0])
    with pytest.raises(TypeError, match="expected tensors and plain values"):
        digest_model(Noted(object()))
    assert digest_prior(world["prior"]) == digest_prior(world["prior"].to())
    assert digest_prior(world["prior"]) != digest_prior(2 * world["prior"])


def test_of_a_learner_that_removed(world: dict[str, Any], keys: tuple[Path, Path], tmp_path: Path):
    done, data = world["unlearned"], world["removed"]
    told = {
        "before": world["before"],
        "after": world["after"],
        "prior_before": world["prior"],
        "prior_after": done.prior,
        "refit": done.refit,
        "key": keys[0],
    }
    file, page = certify_removal(tmp_path, removed={0: data[:2], 1: data[2:]}, **told)
    found = Certificate.load(file)
    assert found.verify(keys[1]).valid
    assert found.content["removed"]["ids"] == ["0:0", "0:1", "1:2", "1:3", "1:4"]
    assert found.content["removed"]["sha256"] == digest_examples(data)
    assert found.content["removed"]["in_memory"] == 5
    assert found.content["removed"]["given"] == 0
    assert page.is_file()
    with pytest.raises(ValueError, match="nothing was removed"):
        certify_removal(tmp_path, removed={}, **told)
    for wrong in (1, -1):
        with pytest.raises(ValueError, match=f"so {wrong} that the prior did not hold cannot be"):
            certify_removal(tmp_path, removed={0: data}, not_held=wrong, **told)
    # Of one that was never held: told apart from what left.
    more = {0: data, 1: data[:1]}
    file, page = certify_removal(tmp_path, removed=more, not_held=1, **told)
    counts = Certificate.load(file).content["removed"]
    assert [counts[n] for n in ("in_memory", "given", "not_held")] == [5, 0, 1]
    assert "in no part of the prior" in page.read_text()


def test_the_numbers_agree_with_the_examples(world: dict[str, Any]):
    fewer = replace(world["unlearned"].removal, removed=None)
    for told, fits in ((5, True), (4, False), (6, False)):
        done = replace(world["unlearned"], removal=replace(fewer, given=told))
        if fits:
            assert certify(**{**world, "unlearned": done}).content["removed"]["given"] == 5
        else:
            with pytest.raises(ValueError, match=f"5 examples .* and {told} were forgotten"):
                certify(**{**world, "unlearned": done})
    done = replace(world["unlearned"], removal=replace(fewer, given=2, not_held=3))
    assert certify(**{**world, "unlearned": done}).content["removed"]["not_held"] == 3


# ------------------------------------------------------------------ tampering


def fields(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict) and value:
        return [p for k, v in value.items() for p in fields(v, (*path, k))]
    return [path]


def changed(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return "changed"
    if isinstance(value, int | float):
        return value + 1
    return [*value, "one more"] if isinstance(value, list) else f"{value}!"


def test_every_changed_field_is_named(signed: Certificate, keys: tuple[Path, Path]):
    key = load_public_key(keys[1])
    assert signed.verify(key).valid
    assert Certificate.from_json(signed.to_json()).verify(key).valid
    every = fields(signed.content)
    assert len(every) > 60
    for path in every:
        whole = json.loads(signed.to_json())
        place = whole["content"]
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = changed(place[path[-1]])
        found = Certificate.from_json(json.dumps(whole)).verify(key)
        assert not found.valid
        assert found.changed == (".".join(path),)
        assert ".".join(path) in found.reason


def test_fields_that_come_and_go_and_lists_that_are_resigned(
    signed: Certificate, keys: tuple[Path, Path]
):
    def told(change: Any) -> Any:
        whole = json.loads(signed.to_json())
        change(whole)
        return Certificate.from_json(json.dumps(whole)).verify(keys[1])

    assert told(lambda w: w["content"].update(extra=1)).changed == ("extra",)
    assert told(lambda w: w["content"].pop("note")).changed == ("note",)
    # The digest is mended as well: then the signature does not fit.
    found = told(
        lambda w: (
            w["content"].update(note="x"),
            w["digests"].update(note=Certificate.of({"note": "x"}).digests["note"]),
        )
    )
    assert not found.valid
    assert "list of digests" in found.reason
    assert not told(lambda w: w["signature"].update(value="not base64")).valid
    assert "not signed" in told(lambda w: w.update(signature=None)).reason


def test_another_key_does_not_fit(signed: Certificate, tmp_path: Path):
    _, other = create_key(tmp_path / "other.pem")
    found = signed.verify(other)
    assert (found.valid, found.changed) == (False, ())
    assert "not this key's" in found.reason


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(content=st.dictionaries(st.text(), VALUES))
def test_canonical_json_is_stable(content: dict[str, Any]) -> None:
    """Whatever the order of keys, and after a round trip through a file."""
    first = canonical(content)
    turned = dict(reversed(list(content.items())))
    assert canonical(turned) == first == canonical(json.loads(first))
    certificate = Certificate.of(content)
    again = Certificate.from_json(certificate.to_json())
    assert again.digests == certificate.digests == Certificate.of(again.content).digests


def test_keys_with_dots_are_not_taken_for_each_other():
    a, b = Certificate.of({"a": {"b": 1}}), Certificate.of({"a.b": 1})
    assert a.digests.keys() != b.digests.keys()


# Keys that could be taken for a path, a place in a list or nothing; values that hold nothing.
_KEYS = st.sampled_from(["", ".", "a", "a.b", "b", "\\", "\\.", "0"])
_NEAR = st.recursive(
    st.sampled_from([None, False, 0, 0.0, 1, "", "a", [], {}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(a=st.dictionaries(_KEYS, _NEAR, max_size=3), b=st.dictionaries(_KEYS, _NEAR, max_size=3))
def test_contents_that_differ_have_other_digests(a: dict[str, Any], b: dict[str, Any]) -> None:
    """The list of digests, which is what is signed, tells any two contents apart."""
    same = canonical(a) == canonical(b)
    assert (Certificate.of(a).digests == Certificate.of(b).digests) == same
    wrapped = {**b, "": a}  # the root hidden under an empty key, beside something else
    assert Certificate.of(wrapped).digests != Certificate.of(a).digests


def test_every_small_content_has_digests_of_its_own():
    keys = ["", ".", "a", "a.", "\\", "0"]
    values: list[Any] = [0, "", [], {}]
    inner: list[Any] = []
    for _ in range(2):
        inner = [{k: v} for k in keys for v in values]
        values = [*values, *inner, *[[v] for v in values[:4]]]
    contents = [{k: v} for k in keys for v in values]
    contents += [{k: v, q: w} for k in keys for q in keys if k < q for v in inner[:40]
                 for w in (0, {}, {"": 0})]  # fmt: skip
    contents.append({})
    texts = {canonical(c) for c in contents}
    lists = {canonical(dict(Certificate.of(c).digests)) for c in contents}
    assert len(lists) == len(texts) > 1000


def test_the_signed_content_does_not_cover_for_another(
    signed: Certificate, keys: tuple[Path, Path]
):
    """What was signed, under an empty key, beside fields that say something else."""
    whole = json.loads(signed.to_json())
    original = copy.deepcopy(whole["content"])
    whole["content"].update({"note": "request 99", "": original})
    found = Certificate.from_json(json.dumps(whole)).verify(keys[1])
    assert not found.valid
    assert "note" in found.changed
    assert ".note" in found.changed
    twice = Certificate({1: "a", "1": "b"}, {}, "")  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="two fields of the certificate have the name '1'"):
        twice.verify(keys[1])


def test_many_changes_are_not_all_listed(signed: Certificate, keys: tuple[Path, Path]):
    whole = json.loads(signed.to_json())
    whole["content"].update({f"{i:03}" + "x" * 10_000: i for i in range(500)})
    found = Certificate.from_json(json.dumps(whole)).verify(keys[1])
    assert len(found.changed) == 500
    assert len(found.reason) < 2000
    assert "and 480 more" in found.reason
    assert module.listing(["a", "b"]) == ["a", "b"]
    assert [len(n) for n in module.listing(["x" * 80, "x" * 81])] == [80, 80]


def test_without_the_extra(
    signed: Certificate, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    key = load_public_key(keys[1])
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for attempt in (
        lambda: create_key(tmp_path / "k.pem"),
        lambda: load_private_key(keys[0]),
        lambda: load_public_key(keys[1]),
        lambda: signed.sign(key),
        lambda: signed.verify(key),
    ):
        with pytest.raises(ImportError, match=r"pip install 'lifelong\[audit\]'"):
            attempt()
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ files


def test_files(signed: Certificate, keys: tuple[Path, Path], tmp_path: Path):
    data, page = signed.save(tmp_path)
    assert Certificate.load(data).verify(keys[1]).valid
    assert page.read_text() == signed.to_html()
    raw = data.read_bytes()
    for cut in (0, 1, len(raw) // 2, len(raw) - 3):
        data.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError, match="truncated or not one"):
            Certificate.load(data)
    with pytest.raises(FileNotFoundError, match="there is no certificate"):
        Certificate.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "[]", "this is not a"),
        (lambda t: t.replace('"version": 1', '"version": 2'), "upgrade lifelong"),
        (lambda t: t.replace("Ed25519", "none"), "unknown signature 'none'"),
        (lambda t: t.replace('"note": ""', '"note": NaN'), "NaN is no number"),
        (lambda t: t.replace('"note": ""', '"note": "", "note": ""'), "a key occurs twice"),
        (lambda t: t.replace('"content": {', '"content": 3, "rest": {'), "the wrong types"),
        (lambda t: "[" * 100_000, "truncated or not one"),
        (lambda t: t.replace('"note": ""', '"note": 1e999'), "1e999 is no number"),
        (lambda t: t.replace('"note": ""', '"note": -1e999'), "-1e999 is no number"),
        (lambda t: t.replace('""', '{"a":' * 900 + "1" + "}" * 900), "in 32 levels at most"),
        (lambda t: t.replace('""', "[" * 900 + "1" + "]" * 900), "in 32 levels at most"),
        (lambda t: "{}", "this is not a"),
    ],
)
def test_what_is_no_certificate(signed: Certificate, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Certificate.from_json(change(signed.to_json()))


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_MOST", 3)
    (tmp_path / "c.json").write_text("long")
    with pytest.raises(CheckpointError, match="larger than a certificate can be"):
        Certificate.load(tmp_path / "c.json")


# ------------------------------------------------------------------ keys


def test_keys(tmp_path: Path):
    private, public = create_key(tmp_path / "k.pem")
    if os.name == "posix":
        assert stat.S_IMODE(private.stat().st_mode) == 0o600
    for path in (private, private.with_name("k2.pem")):
        if path != private:
            path.with_name(path.name + ".pub").write_text("taken")
        with pytest.raises(FileExistsError, match="is there already"):
            create_key(path)
    (tmp_path / "k3.pem").write_text("taken")
    with pytest.raises(FileExistsError, match="choose another name"):
        create_key(tmp_path / "k3.pem")
    with pytest.raises(ValueError, match="is no public key in PEM"):
        load_public_key(private)
    public.chmod(0o600)
    with pytest.raises(ValueError, match="is no private key in PEM"):
        load_private_key(public)
    private.chmod(0o644)
    with pytest.raises(PermissionError, match="can be read by others"):
        Certificate.of({"a": 1}).sign(private)
    with pytest.raises(FileNotFoundError):
        load_public_key(tmp_path / "nothing")


def test_keys_of_another_kind(tmp_path: Path):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    key = X25519PrivateKey.generate().public_key()
    path = tmp_path / "x.pub"
    path.write_bytes(key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(ValueError, match="expected an Ed25519 public key"):
        load_public_key(path)


# ------------------------------------------------------------------ the page


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_strings_are_inert(world: dict[str, Any]):
    plain = Tags()
    plain.feed(certify(**world, ids=list("abcde")).to_html())
    for text in HOSTILE:
        page = certify(**world, ids=[text] * 5, note=text).to_html()
        found = Tags()
        found.feed(page)
        assert found.tags == plain.tags
        assert found.attributes == plain.attributes
        assert not {"script", "img", "iframe", "form", "a"} & found.tags
        assert "49" not in page.split("What was removed")[1][:200]
        for control in "\u202e\u0000\u001b":
            assert control not in page
    # A file from elsewhere can have strings where numbers are expected.
    whole = json.loads(certify(**world).to_json())
    whole["content"]["audit"]["attacks"]["unlearned"]["threshold"]["auc"] = HOSTILE[0]
    whole["signature"] = {"algorithm": "Ed25519", "value": HOSTILE[1]}
    found = Tags()
    found.feed(Certificate.from_json(json.dumps(whole)).to_html())
    assert found.tags == plain.tags


# ------------------------------------------------------------------ the command line


def test_command_line(
    signed: Certificate,
    keys: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    data, _ = signed.save(tmp_path)
    arguments = ["certificate", "verify", str(data), "--key", str(keys[1])]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("VALID.")
    data.write_text(data.read_text().replace('"note": ""', '"note": "\\u001b[2J"'))
    assert main(arguments) == 1
    out = capsys.readouterr().out
    assert out.startswith("NOT VALID.")
    assert "changed: note" in out
    assert main(["certificate", "key", str(tmp_path / "new.pem")]) == 0
    assert "for you alone" in capsys.readouterr().out
    assert main(["certificate", "key", str(tmp_path / "new.pem")]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["certificate", "verify", str(data), "--key", str(tmp_path / "no.pub")]) == 2
    assert f"--key: there is no file {tmp_path / 'no.pub'}" in capsys.readouterr().err
    assert main(["certificate", "burn"]) == 2
    assert "say verify or key" in capsys.readouterr().err
    assert main(["certificate"]) == 2
    assert main(["certificate", "--help"]) == 0
    assert "usage: lifelong certificate" in capsys.readouterr().out
    data.write_text("{")
    assert main(arguments) == 1
    assert "truncated" in capsys.readouterr().err
