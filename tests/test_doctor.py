"""The self-checks: every operator has one, a healthy installation passes it, a wrong kernel does not."""

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from robattr_fast import _extension, backends, build
from robattr_fast.cli import app, doctor
from robattr_fast.ops import _selfcheck

pytestmark = pytest.mark.wheel


def test_every_operator_has_a_check():
    assert set(_selfcheck.CHECKS) == set(backends.operators())


@pytest.mark.parametrize("preferred", ["cpu", "reference"])
def test_this_installation_is_healthy(preferred):
    with backends.use(preferred):
        reports = _selfcheck.check_operators()
    assert [row.check for row in reports] == ["ok"] * len(backends.operators())
    assert all(row.detail == "" for row in reports)


def spoiled(call):
    """The same implementation, but one element of its result is off a bit."""

    def wrong(*args, out):
        call(*args, out=out)
        first = out if isinstance(out, torch.Tensor) else out[0]
        first.view(-1)[:1].view(torch.int32).bitwise_xor_(1)

    return wrong


@pytest.mark.parametrize("operator", backends.operators())
def test_one_wrong_bit_is_found(operator, monkeypatch):
    found = backends._registry[operator]["reference"]
    wrong = backends.Implementation(spoiled(found.call), found.can_run)
    monkeypatch.setitem(backends._registry[operator], "reference", wrong)
    with backends.use("reference"):
        reports = _selfcheck.check_operators()
    assert {row.operator for row in reports if row.check == "failed"} == {operator}


def test_a_backend_that_raises_is_a_failed_check(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no kernel image\n" + "stack " * 100)

    broken = backends.Implementation(crash, lambda device, dtype: (True, ""))
    monkeypatch.setitem(backends._registry["noisy_samples"], "reference", broken)
    with backends.use("reference"):
        reports = _selfcheck.check_operators()
    (row,) = (row for row in reports if row.operator == "noisy_samples")
    assert (row.check, row.detail) == ("failed", "RuntimeError: no kernel image")


def test_report_is_json_and_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", (("never-heard-of", "never_heard_of", "cli"),))
    monkeypatch.setattr(doctor, "_LINKS", ("no_such_link",))
    printed = CliRunner().invoke(app.app, ["doctor", "--json"]).stdout
    facts = {fact["name"]: fact for fact in json.loads(printed)["facts"]}
    assert facts["never-heard-of"]["value"] == "none"
    assert facts["never-heard-of"]["advice"] == "pip install 'robattr-fast[cli]'"
    assert "ln -s" in facts["robattr_fast/no_such_link"]["advice"]
    assert facts["torch"]["value"] == torch.__version__


def test_an_extension_older_than_its_sources_is_named(monkeypatch, tmp_path):
    library, source = tmp_path / "package" / "_C.abi3.so", tmp_path / "csrc" / "a.cpp"
    for path in (source, library):
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(build, "installed_library", lambda: library)
    monkeypatch.setattr(build, "csrc_folder", lambda: source.parent)
    os.utime(source, (1, 1))
    assert _extension.outdated(library) == ""
    os.utime(library, (0, 0))
    assert _extension.outdated(library) == "a.cpp of csrc/ is newer: make install"
    monkeypatch.setattr(build, "installed_library", lambda: tmp_path / "elsewhere")
    assert _extension.outdated(library) == ""
