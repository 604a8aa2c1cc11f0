"""`make gpu-check` without a GPU: its stages imitated, its entries on a CPU, its report on records made up."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _operators import moved

import robattr_fast as rf
from benchmarks.gpu_entries import ENTRIES
from benchmarks.render import chosen
from robattr_fast.bench import records
from robattr_fast.bench.context import Context
from robattr_fast.bench.measure import OURS
from robattr_fast.bench.run import run_entry
from robattr_fast.bench.worker import load_sides

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent

if not (ROOT / "benchmarks").is_dir():
    pytest.skip("gpu-check belongs to a checkout, and there is none beside the tests", allow_module_level=True)

from benchmarks import gpu_check  # noqa: E402
from benchmarks.gpu_check import StageError  # noqa: E402

SIDES, GATES = load_sides()


@pytest.fixture
def said():
    return []


@pytest.fixture
def machine(tmp_path, said):
    key = {"commit": "c" * 40, "trees": {"kernels": "k", "csrc": "s"}, "gpu": {"name": "GPU 1"}, "versions": {}}
    return gpu_check.Machine(tmp_path, "GPU 1", key, False, None, said.append)


@pytest.fixture
def stages(monkeypatch):
    """What ran; "correct" fails while ``broken`` holds it."""
    ran, broken = [], []

    def stage(name):
        def run(machine):
            ran.append(name)
            if name in broken:
                raise StageError("as made to")
            return "fine"

        return run

    monkeypatch.setattr(gpu_check, "STAGES", {name: stage(name) for name in gpu_check.STAGES})
    return ran, broken


def test_without_a_gpu_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gpu-check needs a GPU, and there is none here: torch ")
    assert printed.err.count("\n") == 1
    with pytest.raises(SystemExit):
        gpu_check.main(["speed"])
    assert "stage: got speed, takes build, correct, sanitize, bench" in capsys.readouterr().err


def test_stages_stop_at_a_failure_and_go_on_from_there(machine, stages, said):
    ran, broken = stages
    broken.append("correct")
    assert not gpu_check.check(machine, list(gpu_check.STAGES))
    assert ran == ["build", "correct"]
    assert said[-1] == "correct: FAILED: as made to"
    broken.clear()
    assert gpu_check.check(machine, list(gpu_check.STAGES))
    assert ran == ["build", "correct", "correct", "sanitize", "bench"]
    ran.clear()
    assert gpu_check.check(machine, ["correct", "build"])
    assert ran == []
    other = dataclasses.replace(machine, key=machine.key | {"commit": "d" * 40})
    assert gpu_check.check(other, ["correct", "build"])
    assert ran == ["build", "correct"]
    ran.clear()
    assert gpu_check.check(dataclasses.replace(machine, dirty=True), ["build"])
    assert gpu_check.check(dataclasses.replace(machine, dirty=True), ["build"])
    assert ran == ["build", "build"]


def test_nothing_is_measured_before_the_tests_have_passed(machine):
    with pytest.raises(StageError, match="before the stage `correct` has passed"):
        gpu_check.bench_stage(machine)


def test_commands_that_fail_or_take_too_long(machine):
    machine.finishes("build", [sys.executable, "-c", "import os; print(os.environ['HUE'])"], HUE="teal")
    assert (machine.folder / "build.log").read_text() == "teal\n"
    with pytest.raises(StageError, match=r"(?s)ended with 3: .*build.log.*last words"):
        machine.finishes("build", [sys.executable, "-c", "print('last words'); exit(3)"])
    with pytest.raises(StageError, match="not done after 1 seconds"):
        machine.finishes("build", [sys.executable, "-c", "import time; time.sleep(30)"], seconds=1)


def test_correct_means_that_something_ran(machine, monkeypatch):
    for last, fails in (("12 passed in 1s", False), ("3 skipped in 1s", True)):

        def finishes(self, stage, command, last=last, **options):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "correct.log").write_text(f"...\n{last}\n")

        monkeypatch.setattr(gpu_check.Machine, "finishes", finishes)
        if fails:
            with pytest.raises(StageError, match="no test has run: 3 skipped"):
                gpu_check.correct_stage(machine)
        else:
            assert gpu_check.correct_stage(machine) == last


SMALL = {"shape": (2, 5, 7), "samples": 3, "evicted_mib": 1, "calls": 2}
SIZES = {"select": {"n": 300, "rows": 3}, "bounds": {"n": 40}, "gram": {"n": 200, "rows": 6}}
SIZES["attention"] = {"batch": 2, "heads": 2, "positions": 70}


def on_cpu(entry):
    """The entry, small and on a CPU."""
    spec = entry.spec | {"device": "cpu"} | {k: v for k, v in SMALL.items() if k in entry.spec}
    spec |= SIZES.get(entry.gate, {}) | ({"model": "small-cnn"} if entry.gate == "job" else {})
    return dataclasses.replace(entry, spec=spec, rounds=1)


@pytest.mark.parametrize("entry", [on_cpu(e) for e in ENTRIES if not e.apart], ids=lambda entry: entry.name)
def test_every_entry_is_green_and_every_side_works(entry):
    assert GATES[entry.gate](entry.spec) == ""
    for side in entry.sides:
        try:
            answer = SIDES[side.side](entry.spec_of(side, quick=False))()
        except NotImplementedError:
            continue  # torch's own generator, which not every torch has
        assert answer["seconds"] > 0
        assert answer["units"] > 0


def test_entries_are_plain_and_their_targets_have_sides():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        json.dumps(entry.spec)
        assert entry.spec["device"] == "cuda"
        assert entry.sides[0].label == OURS
        labels = {side.label for side in entry.sides} | ({"floor"} if entry.floor_bytes else set())
        assert {target.of for target in entry.targets} <= labels


@pytest.mark.slow
def test_records_are_added_once_and_reported(machine, monkeypatch):
    """The whole stage, with entries on a CPU."""
    entries = tuple(on_cpu(entry) for entry in ENTRIES if entry.name in ("G1", "G3.784.levels1"))
    monkeypatch.setattr(gpu_check, "ENTRIES", entries)
    machine.set_done("correct", True)
    assert gpu_check.bench_stage(machine).startswith("2 entries added")
    assert gpu_check.bench_stage(machine).startswith("0 entries added")
    (path,) = (machine.root / records.RECORDS).glob("*.jsonl")
    assert path.name == "gpu-1.jsonl"
    first, second = records.read(path)
    assert [first["entry"], second["entry"]] == ["G1", "G3.784.levels1"]
    assert first["gate"] == "ok"
    assert first["trees"] == {"kernels": "k", "csrc": "s"}
    # Nobody takes them for those of a CPU.
    assert chosen(path.parent) == {}


@pytest.mark.slow
def test_the_share_of_the_floor_is_held_against_its_target():
    entry = on_cpu(next(entry for entry in ENTRIES if entry.name == "G1"))
    result = run_entry(dataclasses.replace(entry, sides=entry.sides[:1]), Context())
    (share,) = (one for one in result.ratios if one["of"] == "floor")
    assert share["target"] == 0.4
    assert share["median"] == pytest.approx(result.floor["median"] / result.sides[OURS]["median"])


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit of both trees."""

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init", "-q")
    for name in gpu_check.TREES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("1")
    git("add", ".")
    git("commit", "-qm", "1")
    return tmp_path, git


def test_the_report_says_how_old_the_newest_record_is(checkout):
    root, git = checkout
    assert gpu_check.report(root) == "GPU records: none; kernels/ and csrc/ have never been measured on a GPU"
    path = root / records.RECORDS / "gpu-1.jsonl"
    record = {"date": "2026-11-21", "gpu": {"name": "GPU 1"}, "commit": "c" * 40, "dirty": False}
    records.append(path, record | {"trees": gpu_check.trees(root)})
    what = "GPU records: the newest is of 2026-11-21, GPU 1, commit ccccccccc"
    assert gpu_check.report(root) == f"{what}, of these very kernels/ and csrc/"
    (root / "kernels" / "file").write_text("2")
    git("commit", "-qam", "2")
    assert gpu_check.report(root) == f"{what}; kernels/ changed since"
    records.append(path, record | {"trees": gpu_check.trees(root), "dirty": True, "date": "2026-11-22"})
    assert gpu_check.report(root) == f"{what}; kernels/ changed since"


def test_here_the_report_never_fails(capsys):
    assert gpu_check.main(["--report"]) == 0
    assert capsys.readouterr().out.startswith("GPU records: ")


def test_tensors_move_with_strides_and_come_back():
    """How the operators' cases reach a GPU, with a copy in place of one."""
    row = torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(0))
    scores, counts, expected = row.repeat(1, 1, 2)[..., ::2], torch.zeros(1, 40, 2, dtype=torch.int32), None
    expected = counts.clone()
    rf.reference.count_sparsified_(expected, scores, 0.3)
    seen = []

    def count(counts, scores, *, tau):
        seen.append((scores.stride(), scores.data_ptr(), counts.data_ptr()))
        return rf.reference.count_sparsified_(counts, scores, tau)

    invalid = moved(count, "cpu")(counts, scores, tau=0.3)
    assert torch.equal(counts, expected)
    assert invalid.tolist() == [0]
    ((strides, *places),) = seen
    assert strides == scores.stride()
    assert not {scores.data_ptr(), counts.data_ptr()} & set(places)
