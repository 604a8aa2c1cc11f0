"""Benchmarks: the registry and its faces, gates that forbid figures, records, another commit, tables made of them."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import robattr_fast as rf
from benchmarks import render
from robattr_fast import machine
from robattr_fast.bench import base, certificates, records, registry, run
from robattr_fast.bench.context import Base, Context
from robattr_fast.bench.measure import OURS, interleave, limit, ratio, spread
from robattr_fast.bench.process import HERE, Process, SideError
from robattr_fast.bench.table import table
from robattr_fast.bench.worker import load, load_sides
from robattr_fast.cli.app import app
from robattr_fast.inputs import images

pytestmark = pytest.mark.once

SIDES, GATES = load_sides()
CHECKOUT = (HERE / "benchmarks" / "__main__.py").exists() and records.git("rev-parse", "HEAD") is not None
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="git and the files of a checkout are what is tested")

SMALL = registry.Entry(
    name="small",
    title="selection of a few short rows",
    unit="ns per element",
    scale=1e9,
    gate="select",
    spec={"n": 500, "levels": 3, "rows": 2, "calls": 2, "evicted_mib": 1},
    sides=(
        registry.Sided(OURS, "select.ours"),
        registry.Sided("torch", "select.torch"),
        registry.Sided("keyed", "noise.keyed", {"shape": [4], "samples": 2}),
    ),
    targets=(registry.Target("torch", 1e-6), registry.Target(OURS, 1e-9, at_least=False)),
    rounds=3,
    threads=1,
    floor_bytes=4,
)


def test_every_entry_names_sides_and_gates_that_exist():
    assert len({entry.name for entry in registry.ENTRIES}) == len(registry.ENTRIES)
    assert {f"P{number}" for number in range(1, 8)} <= {entry.name.partition(".")[0] for entry in registry.ENTRIES}
    for entry in registry.ENTRIES:
        assert entry.gate in GATES
        assert all(side.side in SIDES for side in entry.sides)
        labels = [side.label for side in entry.sides]
        assert len(set(labels)) == len(labels)
        assert {target.of for target in entry.targets} <= set(labels)
        assert bool(entry.sides) != bool(entry.measure)
        assert not entry.sides or labels[0] == OURS


def test_entries_are_chosen_by_name_and_by_family():
    assert [entry.name for entry in registry.chosen(["P2"])] == ["P2", "P2.levels15", "P2.adversarial"]
    assert [entry.name for entry in registry.chosen(["P2.levels15"])] == ["P2.levels15"]
    assert registry.chosen(None) == list(registry.ENTRIES)
    with pytest.raises(ValueError, match=r"only: got 'P22', takes .*P1, P2"):
        registry.chosen(["P22"])


SMALLER = {
    "noise.": {"shape": [2, 5, 7], "samples": 3},
    "select.": {"n": 300, "rows": 3, "levels": 4, "calls": 2, "evicted_mib": 1},
    "bounds.": {"n": 40, "levels": 3, "samples": 50},
    "gram.": {"rows": 6, "n": 200, "levels": 15},
    "attention.flash": {"batch": 1, "heads": 2, "positions": 20, "width": 6, "causal": False, "order": 1},
    "attention.": {"batch": 1, "heads": 2, "positions": 20, "width": 6, "causal": False},
    "copy": {"mebibytes": 1},
    "mlp.": {"model": "perceptron", "samples": 20},
    "job.published": {"model": "small-cnn", "samples": 4, "batch_sizes": [2, 4]},
    "job.whole": {"model": "small-cnn", "samples": 64},
    "job.evaluation": {"n": 3000, "retain": 40, "samples": 300},
    "job.memory": {"model": "pooled", "samples": 4, "retain": 4},
}


def spec_of(name):
    return next(spec for prefix, spec in SMALLER.items() if name.startswith(prefix))


ON_CUDA = {"select.cuda"}
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU")


@pytest.mark.parametrize(
    ("name", "device"),
    [(name, "cpu") for name in sorted(set(SIDES) - ON_CUDA - {"job.ours", "job.captum"})]
    + [pytest.param(name, "cuda", marks=no_gpu) for name in sorted(ON_CUDA)],
)
def test_every_side_does_its_work(name, device):
    try:
        side = SIDES[name](spec_of(name) | {"device": device})
    except NotImplementedError as error:
        if name not in ("noise.keyed", "attention.fla"):  # peers that some devices, or installations, have
            raise
        pytest.skip(str(error))
    answer = side()
    assert answer["seconds"] > 0
    assert answer["units"] > 0
    json.dumps(answer)


@pytest.mark.slow
def test_peak_memory_is_that_of_the_process_alone():
    held = np.ones(50_000_000)  # 400 MB
    program = f"import runpy; print(runpy.run_path({machine.__file__!r})['peak_memory']())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < machine.peak_memory() - 0.5 * held.nbytes


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("noise", {}),
        ("select", {"levels": 1}),
        ("select", {"levels": 15}),
        ("bounds", {"levels": 3}),
        ("gram", {"levels": 1}),
        ("attention", {}),
        ("attention", {"causal": True}),
        ("mlp", {}),
    ],
)
def test_gates_are_green(family, changed):
    assert GATES[family]({**spec_of(f"{family}."), **changed}) == ""


def test_the_gate_of_jobs_is_green():
    assert GATES["job"]({"model": "small-cnn"}) == ""


def test_gates_are_red_where_something_is_wrong(monkeypatch):
    noise, count, gram, bounds = rf.noisy_samples, rf.count_sparsified_, rf.packed_gram, rf.betting_bounds
    certify, attention = rf.certify, rf.linear_attention

    def one_more(count):
        def add(counts, *arguments, **options):
            result = count(counts, *arguments, **options)
            counts[0, 0, 0] += 1
            return result

        return add

    def tighter(*arguments):
        lower, upper = bounds(*arguments)
        return lower * (1 + 1e-7), upper

    def shifted(*arguments, **options):
        return certify(*arguments, **{**options, "seed": options["seed"] + 1})

    monkeypatch.setattr(rf, "noisy_samples", lambda *a, **k: torch.nextafter(noise(*a, **k), torch.tensor(9.0)))
    monkeypatch.setattr(rf, "count_sparsified_", one_more(count))
    monkeypatch.setattr(rf, "mlp_smoothgrad", one_more(rf.mlp_smoothgrad))
    monkeypatch.setattr(rf, "packed_gram", lambda *a: gram(*a) + 1)
    monkeypatch.setattr(rf, "betting_bounds", tighter)
    monkeypatch.setattr(rf, "linear_attention", lambda q, k, v, **options: attention(q, k * (1 + 1e-5), v, **options))
    monkeypatch.setattr(rf, "certify", shifted)
    assert "not the reference's" in GATES["noise"](spec_of("noise."))
    assert "sorting" in GATES["select"](spec_of("select."))
    assert "not those of the unpacked" in GATES["gram"](spec_of("gram."))
    assert "off the reference" in GATES["bounds"](spec_of("bounds."))
    assert "off the definition" in GATES["attention"](spec_of("attention."))
    assert "1 of 784 counters" in GATES["mlp"](spec_of("mlp."))
    assert "plain loop" in GATES["job"]({"model": "small-cnn"})


@pytest.mark.parametrize("causal", [False, True])
def test_peers_of_attention_compute_the_same_derivatives(causal):
    sides = load("attention_sides")
    spec = {**spec_of("attention."), "causal": causal}
    given = [x.double() for x in sides._attention_given(spec)]
    expected = sides.attention_derivatives(rf.linear_attention, given, causal)
    for peer in (sides.attend_by_pairs,) if causal else (sides.attend_by_pairs, sides.attend_by_sums):
        for got, known in zip(sides.attention_derivatives(peer, given, causal), expected, strict=True):
            torch.testing.assert_close(got, known)
    with pytest.raises(NotImplementedError, match="running sums"):
        sides.attend_by_sums(*given[:3], causal=True)


@pytest.mark.slow
def test_the_pace_of_certify():
    """Slow enough for two reports; cut off on the way; the next round goes on in the stream with the same batches."""
    start = time.perf_counter()
    side = SIDES["job.ours"]({"model": "small-cnn", "samples": 64, "planned": 2**24})
    making = time.perf_counter() - start
    first, again = side(), side()
    for answer in (first, again):
        assert 0 < answer["model_seconds"] < answer["seconds"]
        assert answer["units"] >= 64
        assert (answer["batch_size"], answer["memory_format"]) == (first["batch_size"], "contiguous")
    assert side.first > first["units"] + again["units"]
    assert 0 <= answer["setup"] < making  # an estimate: 0 where the pace was slower than the first batches


def test_the_published_loop_counts_what_the_reference_selects():
    published_batch = load("job_sides").published_batch
    model, x = load("job_sides").model_and_image({"model": "small-cnn"})
    sums = torch.zeros(784)
    published_batch(model, x, 5, 78, sums)
    assert float(sums.sum()) == 5 * 78


def test_spread_ratio_and_limit():
    assert spread([4, 1, 3, 2, 5]) == {"median": 3, "q1": 2, "q3": 4}
    found = ratio([10, 30, 20], [1, 2, 5], of="peer", target=8)
    assert (found["median"], found["met"], found["sense"]) == (10, True, "at least")
    assert ratio([10], [2], of="peer", target=5.1)["met"] is False
    assert ratio([10], [2], of="peer", target=None)["met"] is None
    assert limit([1, 2, 3], of="x", unit="%", target=2)["met"] is True
    assert limit([1, 2.1, 3], of="x", unit="%", target=2)["met"] is False


class Scripted:
    """Stands for a process; ``fails`` in that round."""

    def __init__(self, log, name, fails=-1):
        self.log, self.name, self.left = log, name, fails

    def round(self, key):
        self.log.append(self.name)
        self.left -= 1
        if self.left == -1:
            raise SideError("gone. More words")
        return {"seconds": 1.0, "units": 2}


def test_sides_take_turns_and_one_that_fails_drops_out():
    log = []
    found, errors = interleave({"a": (Scripted(log, "a"), "a"), "b": (Scripted(log, "b", fails=1), "b")}, 3)
    assert log == ["a", "b", "a", "b", "a"]
    assert errors == {"b": "gone"}
    assert len(found["a"]) == 3


@pytest.mark.slow
def test_an_entry_is_measured_and_recorded(tmp_path):
    path = tmp_path / "records" / "cpu.jsonl"
    (result,) = run.run([SMALL], Context(), path)
    assert not result.failed
    assert result.sides[OURS]["rounds"] == 3
    assert result.sides[OURS]["q1"] <= result.sides[OURS]["median"] <= result.sides[OURS]["q3"]
    assert [one["met"] for one in result.ratios] == [True, False]
    assert result.floor["median"] > 0
    (record,) = records.read(path)
    assert record["entry"] == "small"
    assert record["sides"][OURS] == result.sides[OURS]
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__
    assert set(record) >= {"commit", "dirty", "date", "gate", "quick", "base"}


@pytest.mark.slow
def test_records_are_added_to_a_file(tmp_path):
    path = tmp_path / "cpu.jsonl"
    for count in (1, 2):
        list(run.run([SMALL], Context(), path))
        assert len(records.read(path)) == count


@pytest.mark.slow
def test_no_figure_on_a_red_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(Process, "gate", lambda self, gate, spec: "it computes something else")
    monkeypatch.setattr(Process, "prepare", lambda *a: pytest.fail("nothing may be measured"))
    (result,) = run.run([SMALL], Context(), tmp_path / "r.jsonl")
    assert result.failed
    (record,) = records.read(tmp_path / "r.jsonl")
    assert record["gate"] == "it computes something else"
    assert record["sides"] == {}
    assert record["ratios"] == []
    assert records.latest([record], "small") is None


@pytest.mark.slow
def test_the_command_shows_no_figure_on_a_red_gate(monkeypatch):
    monkeypatch.setattr(Process, "gate", lambda self, gate, spec: "it computes something else")
    monkeypatch.setattr(registry, "ENTRIES", (SMALL,))
    answer = CliRunner().invoke(app, ["bench", "--no-record"])
    assert answer.exit_code == 1
    assert "it computes something else" in answer.output
    assert "ns per element" not in answer.output


@pytest.mark.slow
def test_errors_come_from_the_other_process():
    with Process(threads=1) as process:
        with pytest.raises(SideError, match="KeyError"):
            process.prepare("x", "no such side", {})
        with pytest.raises(SideError, match="takes"):
            process.gate("job", {"model": "nothing", "image": "nowhere"})
        assert process.gate("gram", spec_of("gram.")) == ""  # it lives on
        process._process.kill()
        with pytest.raises(SideError, match="ended with status"):
            process.gate("gram", spec_of("gram."))


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--only", "P9"], "only: got 'P9'"), (["--base", "nope"], "base: got")]
)
def test_the_command_refuses(arguments, message):
    answer = CliRunner().invoke(app, ["bench", "--no-record", *arguments])
    assert answer.exit_code == 2
    assert message in answer.output


@pytest.mark.slow
def test_a_tree_is_measured_beside_another(tmp_path):
    """The other tree is this one with a slower operator: the sides measure what they were told to measure."""
    package = tmp_path / "robattr_fast"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import importlib.util, sys, time\n"
        f"real = importlib.util.spec_from_file_location('robattr_fast', {str(HERE / 'robattr_fast' / '__init__.py')!r},"
        f" submodule_search_locations=[{str(HERE / 'robattr_fast')!r}])\n"
        "module = importlib.util.module_from_spec(real)\n"
        "here = __file__\n"
        "sys.modules['robattr_fast'] = module\n"
        "real.loader.exec_module(module)\n"
        "fast = module.count_sparsified_\n"
        "module.count_sparsified_ = lambda *a, **k: (time.sleep(0.02), fast(*a, **k))[1]\n"
        "module.__file__ = here\n"
    )
    result = run.run_entry(SMALL, Context(base=Base("0123456789abcdef", tmp_path)))
    assert list(result.sides) == [OURS, "base 012345678"]
    assert result.base == "0123456789abcdef"
    (found,) = result.ratios
    assert found["median"] > 3
    assert found["target"] is None


@needs_checkout
def test_base_is_checked_out_built_and_removed(monkeypatch):
    trees = []
    monkeypatch.setattr(base, "_build", trees.append)
    with base.built("HEAD") as other:
        assert other.commit == records.git("rev-parse", "HEAD")
        assert trees == [other.tree]
        assert (other.tree / "setup.py").exists()
    assert not other.tree.exists()
    assert str(other.tree) not in (records.git("worktree", "list") or "")


def test_a_base_that_does_not_build_says_why(tmp_path):
    (tmp_path / "setup.py").write_text("import sys\nprint('error: no such header', file=sys.stderr)\nsys.exit(1)\n")
    with pytest.raises(ValueError, match="its extension cannot be built: error: no such header"):
        base._build(tmp_path)


MODEL, IMAGE = (thing for thing in load("job_sides").model_and_image({"model": "small-cnn"}))


@pytest.fixture(scope="module")
def at_looks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificates")
    return folder, certificates.make(folder, "digit", MODEL, IMAGE[0], planned=1024)


@pytest.mark.slow
def test_certificates_at_looks_are_those_of_certify(at_looks):
    folder, made = at_looks
    assert list(made) == certificates.looks(1024)
    assert (min(made), max(made)) == (256, 1024)
    for samples in (256, 1024):
        cert = rf.Certificate.load(folder / f"digit.{samples:05d}.safetensors")
        settings = cert.settings
        same = rf.certify(
            MODEL,
            IMAGE,
            sigma=certificates.SIGMA,
            tau=certificates.TAU,
            samples=samples,
            image_ids=[images.image_id(IMAGE[0])],
            batch_size=settings.batch_size,
            memory_format=settings.memory_format,
        )
        assert torch.equal(same.counts, cert.counts)
        torch.testing.assert_close(same.gram_summary, cert.gram_summary, rtol=1e-9, atol=0)
        assert torch.equal(same.directions, cert.directions)
        assert same.settings == settings
        assert certificates.overlaps(same) == certificates.overlaps(cert)


@pytest.mark.slow
def test_certificates_are_found_again(at_looks, tmp_path):
    folder, made = at_looks
    assert list(certificates.find(folder, MODEL, IMAGE[0])) == list(made)
    with pytest.raises(ValueError, match=r"certificates: got .*512\.safetensors, takes a folder"):
        certificates.find(folder / "digit.00512.safetensors", MODEL, IMAGE[0])
    assert certificates.find(folder, MODEL, IMAGE[0] / 2) == {}
    other = tmp_path / "other"
    other.mkdir()
    for changed in ({"seed": 1}, {"alpha": 0.1}, {"versions": {"torch": "1.0"}}):
        cert = dataclasses.replace(made[512].settings, **changed)
        rf.Certificate(**made[512].tensors, settings=cert).save(other / "digit.00512.safetensors")
        assert certificates.find(other, MODEL, IMAGE[0]) == {}
    assert certificates.find(tmp_path / "nowhere", MODEL, IMAGE[0]) == {}
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    assert certificates.find(tmp_path, MODEL, IMAGE[0]) == {}


def test_needed_samples():
    curve = {100: {"m": 0.1}, 200: {"m": 0.3}, 400: {"m": 0.2}, 800: {"m": 0.5}}
    assert certificates.reached(curve, "m", 0.25) == 200
    assert certificates.reached(curve, "m", 0.4) == 800
    assert certificates.reached(curve, "m", 0.6) is None


def measured(entry="P4", **changed):
    """A record as `run` writes it."""
    side = {"median": 100.0, "q1": 90.0, "q3": 110.0, "rounds": 3}
    record = {
        "entry": entry,
        "title": "a title",
        "unit": "ms per sample",
        "gate": "ok",
        "quick": False,
        "base": None,
        "sides": {OURS: {**side, "batch_size": 4}, "published loop, batch 64": side, "peer": {"error": "absent"}},
        "ratios": [ratio([30.0], [2.0], of="peer", target=10), limit([4.0], of="share", unit="%", target=3)],
        "floor": None,
        "details": {"curves": {"chelsea": [[256, 0.0, 0.1, 0.2], [8192, 0.25, 0.3, 0.5]]}, "setup": 5.0},
        "commit": "c" * 40,
        "dirty": False,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "A CPU", "cores": 2, "isa": "AVX512"},
        "versions": {"torch": "2.13.0", "python": "3.11"},
    }
    return {**record, **changed}


def written(folder, *made):
    for record in made:
        records.append(folder / "cpu.jsonl", record)
    return render.chosen(folder)


def test_tables_say_what_the_records_say(tmp_path):
    found = written(tmp_path, measured(date="2025-01-01T00:00:00+00:00", commit="d" * 40), measured())
    text = render.filled("a\n<!-- bench:targets -->\nold\n<!-- /bench:targets -->\nb\n", found, Path("README.md"))
    assert "old" not in text
    assert "| P4 | a title: peer | 15 times (15 to 15) | at least 10 | yes |" in text
    assert "| P4 | a title: share | 4 % (4 to 4) | at most 3 | **no** |" in text
    assert text.startswith("a\n")
    assert text.endswith("b\n")
    assert render.filled(text, found, Path("README.md")) == text
    assert "ccccccccc" in render.provenance(found)
    assert "ddddddddd" not in render.provenance(found)
    assert "robattr_fast, batch 4" in render.sides(found)
    assert "](docs/certified-overlap.svg)" in render.filled(
        "<!-- bench:plot -->\n<!-- /bench:plot -->", found, Path("README.md")
    )
    with pytest.raises(ValueError, match="bench:speed: unknown"):
        render.filled("<!-- bench:speed -->\n<!-- /bench:speed -->", found, Path("README.md"))


@pytest.mark.parametrize("changed", [{"quick": True}, {"gate": "red"}, {"base": "f" * 40}])
def test_what_fills_no_table(tmp_path, changed):
    later = measured(date="2027-01-01T00:00:00+00:00", commit="e" * 40, **changed)
    assert written(tmp_path, measured(), later)["P4"]["commit"] == "c" * 40


def test_dirty_trees_are_named(tmp_path):
    assert "ccccccccc and changes" in render.provenance(written(tmp_path, measured(dirty=True)))


def test_the_plot_names_its_data(tmp_path):
    found = written(tmp_path, measured())
    render.draw(found, tmp_path / "plot.svg")
    assert render.digest(found) in (tmp_path / "plot.svg").read_text()
    other = {"P4": measured(details={"curves": {"chelsea": [[256, 0.0, 0.1, 0.3]]}, "setup": 5.0})}
    assert render.digest(other) != render.digest(found)


def test_damaged_records_are_named(tmp_path):
    (tmp_path / "cpu.jsonl").write_text(json.dumps(measured()) + "\n{")
    with pytest.raises(ValueError, match=r"cpu\.jsonl, line 2: not a record"):
        records.read(tmp_path)


def test_the_table_shows_a_result(tmp_path):
    from rich.console import Console

    result = run.Result("P4", "a title", "ms per sample")
    for name in ("sides", "ratios", "details"):
        setattr(result, name, measured()[name])
    result.details = {"needed": {"chelsea": None, "coffee": {"share": 0.4, "marginal": None, "second-moment": 512}}}
    console = Console(width=160, record=True, file=(tmp_path / "shown").open("w"))
    console.print(table(result))
    text = console.export_text()
    assert re.search(r"robattr_fast +100 +90 to 110 +ms per sample, batch 4", text)
    assert "absent" in text
    assert "not met (at most 3)" in text
    assert "run without --quick" in text
    assert "never reached by marginal" in text


@needs_checkout
def test_documents_say_what_the_records_say():
    assert render.stale(HERE, render.chosen(HERE / records.RECORDS)) == []


@needs_checkout
@pytest.mark.slow
def test_both_faces_are_one_command():
    answer = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--only", "P99"], cwd=HERE, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 2
    assert "only: got 'P99'" in answer.stderr


@needs_checkout
@pytest.mark.slow
def test_the_documents_are_checked_by_a_command():
    check = subprocess.run([sys.executable, "-m", "benchmarks", "render", "--check"], cwd=HERE, timeout=120)
    assert check.returncode == 0


def test_entries_are_plain_values():
    """Specs travel as JSON."""
    for entry in registry.ENTRIES:
        for side in (None, *entry.sides):
            json.dumps(entry.spec_of(side, quick=True))
        assert dataclasses.replace(entry) == entry
