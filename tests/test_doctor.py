"""The self-checks: every operator has one, a healthy installation passes it, a wrong kernel does not."""

import json
import os

import pytest
import torch

from robattr_fast import backends, doctor

pytestmark = pytest.mark.wheel


def test_every_operator_has_a_check():
    assert set(doctor.CHECKS) == set(backends.operators())


@pytest.mark.parametrize("preferred", ["cpu", "reference"])
def test_this_installation_is_healthy(preferred):
    with backends.use(preferred):
        examination = doctor.examine()
    assert [row.check for row in examination.operators] == ["ok"] * len(backends.operators())
    assert all(row.detail == "" for row in examination.operators)
    assert examination.healthy


def spoiled(call):
    """The same implementation, but one element of what it writes into (its second argument) or returns is off a bit."""

    def wrong(*args, **kwargs):
        result = call(*args, **kwargs)
        written = args[1] if isinstance(args[1], torch.Tensor) else result
        written.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        return result

    return wrong


@pytest.mark.parametrize("operator", backends.operators())
def test_one_wrong_bit_is_found(operator, monkeypatch):
    found = backends._registry[operator]["reference"]
    wrong = backends.Implementation(spoiled(found.call), found.can_run)
    monkeypatch.setitem(backends._registry[operator], "reference", wrong)
    with backends.use("reference"):
        examination = doctor.examine()
    assert not examination.healthy
    assert {row.operator for row in examination.operators if row.check == "failed"} == {operator}


def test_a_backend_that_raises_is_a_failed_check(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no kernel image\n" + "stack " * 100)

    broken = backends.Implementation(crash, lambda device, dtype: (True, ""))
    monkeypatch.setitem(backends._registry["noisy_samples"], "reference", broken)
    with backends.use("reference"):
        examination = doctor.examine()
    (row,) = (row for row in examination.operators if row.operator == "noisy_samples")
    assert (row.check, row.detail) == ("failed", "RuntimeError: no kernel image")


def test_report_is_json_and_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_OPTIONAL", (("never-heard-of", "never_heard_of", "cli"),))
    monkeypatch.setattr(doctor, "_LINKS", ("no_such_link",))
    facts = {fact["name"]: fact for fact in json.loads(json.dumps(doctor.examine().to_json()))["facts"]}
    assert facts["never-heard-of"]["value"] == "none"
    assert facts["never-heard-of"]["advice"] == "pip install 'robattr-fast[cli]'"
    assert "ln -s" in facts["robattr_fast/no_such_link"]["advice"]
    assert facts["torch"]["value"] == torch.__version__


def test_an_extension_older_than_its_sources_is_named(monkeypatch, tmp_path):
    library, source = tmp_path / "package" / "_C.abi3.so", tmp_path / "csrc" / "a.cpp"
    for path in (source, library):
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(doctor.build, "installed_library", lambda: library)
    monkeypatch.setattr(doctor.build, "csrc_folder", lambda: source.parent)
    os.utime(source, (1, 1))
    assert doctor._outdated(library) == ""
    os.utime(library, (0, 0))
    assert doctor._outdated(library) == "a.cpp of csrc/ is newer: make install"
    monkeypatch.setattr(doctor.build, "installed_library", lambda: tmp_path / "elsewhere")
    assert doctor._outdated(library) == ""
