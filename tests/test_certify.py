"""The engine: counts that do not depend on batches, order or splits; stopping, resuming, refusing."""

import contextlib
import dataclasses
import functools
import os
import shutil
import signal
import threading

import pytest
import torch
from models import Elementwise, small_cnn
from torch import nn

import robattr_fast as rf
from robattr_fast.certificates import Overlap
from robattr_fast.certificates.certificate import files
from robattr_fast.certificates.engine import plan, run
from robattr_fast.certificates.moments.concentration import GramSummary, summarize_gram
from robattr_fast.sampling import sampler as sampling

pytestmark = pytest.mark.wheel


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(3))


MODEL = Elementwise(1, 12, 12).eval()
COMMON = {"sigma": 0.3, "tau": 0.2, "samples": 50}


def counts_by_hand(model, x, *, sigma, tau, samples, levels=1, gamma=None, first_sample=0, target=None, seed=0):
    """Counts of design by the reference operators, sample by sample."""
    n = x[0].numel()
    noisy = rf.reference.noisy_samples(x, sigma, samples, seed=seed, first_sample=first_sample)
    counts = torch.zeros(x.shape[0], n, levels, dtype=torch.int32)
    votes = torch.zeros(x.shape[0], 2, dtype=torch.int32)
    for image in range(x.shape[0]):
        for z in noisy[image]:
            z = z.clone().requires_grad_()
            logits = model(z[None])[0]
            label = int(logits.argmax())
            votes[image, label] += 1
            (gradient,) = torch.autograd.grad(logits[label if target is None else target], z)
            h = rf.reference.sparsify(gradient.abs().flatten(), tau, gamma, levels=levels)
            level = (h * levels).round().long()
            for i in range(1, levels + 1):
                counts[image, level == i, i - 1] += 1
    return counts, votes


@pytest.mark.parametrize(("levels", "gamma"), [(1, None), (15, 0.05), (4, None)])
def test_counts_are_those_of_the_definition(levels, gamma):
    x = images()
    counts, votes = counts_by_hand(MODEL, x, **COMMON, levels=levels, gamma=gamma)
    certificate = rf.certify(MODEL, x, **COMMON, levels=levels, gamma=gamma, batch_size=8)
    assert torch.equal(certificate.counts, counts)
    assert torch.equal(certificate.class_counts, votes)
    assert certificate.samples.tolist() == [50, 50]


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64, 200, "auto"])
def test_any_batch_size_gives_the_same_counts(batch_size):
    x = images(3)
    expected = rf.certify(MODEL, x, **COMMON, batch_size=16)
    got = rf.certify(MODEL, x, **COMMON, batch_size=batch_size)
    assert torch.equal(got.counts, expected.counts)
    assert torch.equal(got.class_counts, expected.class_counts)


def test_splits_merge_to_the_whole():
    x = images()
    whole = rf.certify(MODEL, x, **COMMON, batch_size=8)
    late = rf.certify(MODEL, x, **(COMMON | {"samples": 21}), first_sample=29, batch_size=5)
    early = rf.certify(MODEL, x, **(COMMON | {"samples": 29}), batch_size=9)
    merged = late.merge(early)
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.class_counts, whole.class_counts)


def test_image_ids_follow_the_image():
    x = images(3)
    whole = rf.certify(MODEL, x, **COMMON, image_ids=[5, 2**32 - 1, 9], batch_size=8)
    swapped = rf.certify(MODEL, x[[2, 0]], **COMMON, image_ids=[9, 5], batch_size=8)
    assert torch.equal(swapped.counts, whole.counts[[2, 0]])


def test_levels_none_keeps_sums():
    x = images(1)
    certificate = rf.certify(MODEL, x, **COMMON, levels=None, batch_size=8)
    noisy = rf.reference.noisy_samples(x, COMMON["sigma"], 50)[0]
    total = torch.zeros(144, dtype=torch.float64)
    for z in noisy:
        z = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(MODEL(z[None]).max(), z)
        total += rf.reference.sparsify(gradient.abs().flatten(), 0.2, levels=None).double()
    assert certificate.settings.bound == "kl"
    torch.testing.assert_close(certificate.sums[0], total, rtol=1e-12, atol=0)


def test_channel_sum_and_target():
    model = Elementwise(3, 6, 6).eval()
    x = torch.rand(1, 3, 6, 6)
    certificate = rf.certify(model, x, **COMMON, channel_sum=True, target=1, batch_size=8)
    assert certificate.map.shape == (1, 6, 6)
    noisy = rf.reference.noisy_samples(x, 0.3, 50)[0]
    scores = (2 * model.weight * noisy).abs().detach().sum(dim=1).flatten(1)
    assert torch.equal(certificate.counts[0, :, 0], rf.reference.sparsify(scores, 0.2).sum(0).int())


def test_a_callable_explanation():
    x = images()

    def times_input(model, batch, target):
        leaf = batch.detach().requires_grad_()
        picked = model(leaf).gather(1, target[:, None]).sum()
        return torch.autograd.grad(picked, leaf)[0].mul(batch).abs()

    expected = rf.certify(MODEL, x, **COMMON, explain="input_x_gradient", batch_size=8)
    got = rf.certify(MODEL, x, **COMMON, explain=times_input, batch_size=8)
    assert torch.equal(got.counts, expected.counts)
    assert got.settings.explain.startswith("callable:")
    assert "times_input" in got.settings.explain


def test_a_callable_never_passes_for_a_builtin_method():
    """Its name is its own, its signed scores stay signed, and one that cannot be identified makes no checkpoint."""

    def gradient(model, batch, target):
        return -torch.ones_like(batch)

    certificate = rf.certify(MODEL, images(), **COMMON, explain=gradient, batch_size=8)
    assert certificate.settings.explain != "gradient"
    assert int(certificate.counts.sum()) == 0
    with pytest.raises(rf.MergeError, match="cannot be told"):
        certificate.merge(rf.certify(MODEL, images(), **COMMON, explain=gradient, first_sample=50, batch_size=8))


def test_a_callable_with_a_checkpoint_must_be_identified(tmp_path):
    with pytest.raises(ValueError, match="cannot be told from another callable"):
        rf.certify(MODEL, images(), **COMMON, explain=lambda m, b, t: b, checkpoint=tmp_path / "c")


def test_a_random_callable_is_refused():
    with pytest.raises(rf.ModelError, match="different scores from call to call"):
        rf.certify(MODEL, images(), **COMMON, explain=lambda m, b, t: torch.rand_like(b), batch_size=8)


def test_a_callable_sees_the_noise_even_if_the_model_writes_into_its_input():
    class InPlace(Elementwise):
        def forward(self, z):
            return super().forward(z.sub_(0.5))

    seen = []

    def identity(model, batch, target):
        seen.append(batch.clone())
        return batch

    rf.certify(InPlace(1, 12, 12).eval(), images(1), **COMMON, explain=identity, batch_size=50)
    expected = rf.reference.noisy_samples(images(1), COMMON["sigma"], 50)[0]
    assert any(torch.equal(one, expected) for one in seen)


def test_a_checkpoint_of_other_samples_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    rf.certify(MODEL, images(), **COMMON, checkpoint=path)
    with pytest.raises(ValueError, match="holds samples from 0 on, got first_sample=50"):
        rf.certify(MODEL, images(), **COMMON, first_sample=50, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_does_not_cost_the_run(tmp_path, caplog):
    path = tmp_path / "removed" / "run.safetensors"
    with pytest.raises(ValueError, match=r"checkpoint: got .*run\.safetensors, takes a file in a folder that exists"):
        rf.certify(MODEL, images(), **COMMON, checkpoint=path)
    path.parent.mkdir()

    def removed(event):
        shutil.rmtree(path.parent, ignore_errors=True)

    certificate = rf.certify(MODEL, images(), **COMMON, checkpoint=path, batch_size=8, progress=removed)
    assert torch.equal(certificate.counts, rf.certify(MODEL, images(), **COMMON, batch_size=8).counts)
    assert "cannot be written" in caplog.text


def test_the_checkpoint_of_a_stopped_run_holds_its_second_moments(tmp_path, monkeypatch):
    monkeypatch.setattr(rf.Certificate, "overlap", lambda *_: Overlap(torch.ones(1), None))
    path = tmp_path / "run.safetensors"
    stop = rf.StopWhen(k=20, radius=0.2, overlap=0.5)
    looks = {"sigma": 0.3, "tau": 0.2, "samples": 2048, "batch_size": 8, "stop": stop}
    monkeypatch.setattr(plan, "FIRST_LOOK", 512)
    stopped = rf.certify(MODEL, images(1), **looks, checkpoint=path)
    assert int(stopped.samples) == 512
    assert torch.equal(rf.Certificate.load(path).distance(0.1), stopped.distance(0.1))


def test_stop_ends_each_image_at_its_own_time():
    x = images(1) * torch.tensor([1.0, 0.8])[:, None, None, None]
    stop = rf.StopWhen(k=20, radius=0.02, overlap=0.5)
    certificate = rf.certify(MODEL, x, sigma=0.3, tau=0.2, samples=5000, stop=stop, batch_size=8)
    assert (certificate.samples < 5000).all()
    assert certificate.samples[0] != certificate.samples[1]
    assert (certificate.overlap(20, 0.02).share >= 0.5).all()
    full = rf.certify(MODEL, x, sigma=0.3, tau=0.2, samples=int(certificate.samples[0]), batch_size=8)
    assert torch.equal(full.counts[0], certificate.counts[0])
    with pytest.raises(ValueError, match="early stopping takes bound='betting'"):
        rf.certify(MODEL, x, sigma=0.3, stop=stop, bound="kl")


@pytest.mark.parametrize("on_nonfinite", ["raise", "zero", "abstain"])
def test_nonfinite_samples(on_nonfinite):
    class Sometimes(Elementwise):
        def forward(self, z):
            logits = super().forward(z)
            return torch.where(z.flatten(1)[:, :1] > 0.5, torch.nan, 1.0) * logits

    model = Sometimes(1, 12, 12).eval()
    x = images(1)
    first = rf.reference.noisy_samples(x, 0.3, 50)[0, :, 0, 0, 0] > 0.5
    assert 1 < first.sum() < 50
    if on_nonfinite == "raise":
        with pytest.raises(rf.NonFiniteError, match=f"sample {int(first.int().argmax())} of image 0"):
            rf.certify(model, x, **COMMON, batch_size=8)
        return
    certificate = rf.certify(model, x, **COMMON, batch_size=8, on_nonfinite=on_nonfinite, retain=16)
    assert certificate.invalid.tolist() == [int(first.sum())]
    assert int(certificate.gram_summary[0, 0]) == 48  # four blocks of twelve
    assert int(certificate.gram_summary[0, -1]) == int(first[:48].sum())
    assert int(certificate.class_counts.sum()) == 50 - int(first.sum())
    counts, _ = counts_by_hand(MODEL, x, **COMMON)
    assert (certificate.counts <= counts).all()


def test_interrupt_leaves_a_valid_certificate(tmp_path):
    calls = []

    def interrupt(event):
        calls.append(event)
        os.kill(os.getpid(), signal.SIGINT)

    path = tmp_path / "run.safetensors"
    x = images()
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 4000, "batch_size": 8}
    with pytest.raises(KeyboardInterrupt) as caught:
        rf.certify(MODEL, x, **settings, progress=interrupt, checkpoint=path)
    partial = caught.value.certificate
    assert 0 < int(partial.samples.sum()) < 8000
    assert torch.equal(rf.Certificate.load(path).counts, partial.counts)
    resumed = rf.certify(MODEL, x, **settings, checkpoint=path)
    assert torch.equal(resumed.counts, rf.certify(MODEL, x, **settings).counts)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Crash(Exception):
    pass


@contextlib.contextmanager
def crashing_after(saves):
    """Runs end with a Crash once they have written so many checkpoints."""
    original, written = run.Run._save, 0

    def save_then_crash(self, *, final=False):
        nonlocal written
        original(self, final=final)
        written += 1
        if written == saves:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "_save", save_then_crash)
        yield


@pytest.mark.parametrize("batch_size", [16, 24])
@pytest.mark.parametrize("stop", [None, rf.StopWhen(k=20, radius=0.03, overlap=0.6)])
def test_resumed_runs_are_identical(tmp_path, monkeypatch, stop, batch_size):
    x = images(3)
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 700, "batch_size": batch_size, "stop": stop}
    whole = rf.certify(MODEL, x, **settings)
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    for crash_after in (1, 3, 20, 44, 50):
        with crashing_after(crash_after), contextlib.suppress(Crash):
            rf.certify(MODEL, x, **settings, checkpoint=path)
    resumed = rf.certify(MODEL, x, **settings, checkpoint=path)
    assert torch.equal(resumed.counts, whole.counts)
    assert resumed.samples.tolist() == whole.samples.tolist()


def test_a_run_that_goes_on_elsewhere_names_both_places(tmp_path):
    path = tmp_path / "run.safetensors"
    first = rf.certify(MODEL, images(), **COMMON, batch_size=8, checkpoint=path)
    older = dataclasses.replace(first.settings, versions=first.settings.versions | {"torch": "1.0"})
    tensors, _ = files.load(path)
    files.save(path, tensors, older.to_json())
    again = rf.certify(MODEL, images(), **COMMON, batch_size=8, checkpoint=path)
    assert again.settings.versions["torch"] == f"1.0 + {torch.__version__}"
    assert again.settings.versions["numpy"] == first.settings.versions["numpy"]


def test_a_certificate_is_no_checkpoint(tmp_path):
    path = tmp_path / "run.safetensors"
    rf.certify(MODEL, images(), **COMMON).save(path)
    with pytest.raises(ValueError, match="is a certificate, from which no run can go on"):
        rf.certify(MODEL, images(), **COMMON, checkpoint=path)


def test_a_run_that_goes_on_without_folding_says_so(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    model, x = small_cnn(), images()[:, :1]
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    with crashing_after(2), pytest.raises(Crash):
        rf.certify(model, x, **COMMON, batch_size=8, checkpoint=path)
    assert rf.Certificate.load(path).settings.folded is True
    monkeypatch.setattr(sampling, "fold_batchnorm", lambda model, batch: (model, False))
    assert rf.certify(model, x, **COMMON, batch_size=8, checkpoint=path).settings.folded is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    rf.certify(MODEL, images(), **COMMON, checkpoint=path)
    with pytest.raises(ValueError, match=r"holds another run \(differs in sigma\)"):
        rf.certify(MODEL, images(), **(COMMON | {"sigma": 0.31}), checkpoint=path)
    with pytest.raises(ValueError, match="input_hashes"):
        rf.certify(MODEL, images() * 0.5, **COMMON, checkpoint=path)


def test_progress_reaches_the_end():
    events = []
    rf.certify(MODEL, images(), **COMMON, batch_size=8, progress=events.append)
    assert events[-1].samples == events[-1].total == 50
    assert events[-1].image + 1 == events[-1].images == 2
    assert int(events[-1].certificate().samples) == 50


def test_certify_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(rf.certify(MODEL, images(), **COMMON, batch_size=8)))
    thread.start()
    thread.join()
    assert torch.equal(results[0].counts, rf.certify(MODEL, images(), **COMMON, batch_size=8).counts)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma: got 0.0"),
        ({"sigma": -1.0}, ValueError, "sigma"),
        ({"sigma": float("nan")}, ValueError, "sigma"),
        ({"tau": 0.0}, ValueError, "tau: got 0.0"),
        ({"tau": 1.1}, ValueError, "tau"),
        ({"gamma": 0.5, "tau": 0.2}, ValueError, "gamma: got 0.5"),
        ({"levels": 16}, ValueError, "levels: got 16"),
        ({"levels": 1.0}, TypeError, "levels"),
        ({"samples": 0}, ValueError, "samples: got 0"),
        ({"samples": True}, TypeError, "samples"),
        ({"first_sample": -1}, ValueError, "first_sample"),
        ({"first_sample": 2**32 - 1}, ValueError, "first_sample"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": -1}, ValueError, "seed"),
        ({"alpha": 0.0}, ValueError, "alpha"),
        ({"alpha": 1.0}, ValueError, "alpha"),
        ({"bound": "wilson"}, ValueError, "bound"),
        ({"bound": "clopper-pearson", "levels": 4}, ValueError, "clopper-pearson"),
        ({"bound": "betting", "levels": None}, ValueError, "betting"),
        ({"slack": -1}, ValueError, "slack"),
        ({"target": 2}, ValueError, r"target: got .* expected classes in \[0, 2\)"),
        ({"target": [0, 1, 0]}, ValueError, "target: got 3 classes"),
        ({"target": 0.5}, TypeError, "target"),
        ({"image_ids": [1]}, ValueError, "image_ids"),
        ({"image_ids": [1, 2**32]}, ValueError, "image_ids"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": "large"}, ValueError, "batch_size"),
        ({"explain": "lime"}, ValueError, "explain: got 'lime'"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"samples": 1, "stop": rf.StopWhen(k=73, radius=0.1, overlap=0.5)}, ValueError, "stop.k: got 73"),
        ({"stop": rf.StopWhen(k=73, radius=0.1, overlap=0.5)}, ValueError, "stop.k: got 73"),
        ({"x": torch.zeros(2, 1, 12, 12, dtype=torch.uint8)}, TypeError, "x: got dtype torch.uint8"),
        ({"x": torch.zeros(0, 1, 12, 12)}, ValueError, "x: got the empty shape"),
        ({"x": torch.zeros(144)}, ValueError, "x: got shape"),
        ({"x": torch.full((2, 1, 12, 12), torch.nan)}, ValueError, "x: got NaN"),
        ({"x": [[0.0]]}, TypeError, "x: got list"),
        ({"x": torch.zeros(2, 144), "channel_sum": True}, ValueError, "channel_sum"),
    ],
)
def test_bad_input_names_the_argument(arguments, error, message):
    arguments = {"x": images(), "model": MODEL, **COMMON} | arguments
    with pytest.raises(error, match=message):
        rf.certify(arguments.pop("model"), arguments.pop("x"), **arguments)


@pytest.mark.parametrize("k", [0, 73, 144])
def test_k_out_of_range(k):
    certificate = rf.certify(MODEL, images(), **COMMON, batch_size=8)
    with pytest.raises(ValueError, match=r"k: got \d+, takes an integer in \[1, 72\]"):
        certificate.overlap(k, 0.1)


def test_memory_layout_of_the_input_does_not_matter():
    model = small_cnn(3)
    x = torch.rand(2, 3, 12, 12)
    strided = x.to(memory_format=torch.channels_last)
    a = rf.certify(model, x, **COMMON, batch_size=8)
    b = rf.certify(model, strided, **COMMON, batch_size=8)
    assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_in_other_dtypes_get_noise_of_their_dtype(dtype):
    """Every sample has the same gradient, the row of weights of its class, whose largest elements count always."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 2)).eval().to(dtype)
    seen = []

    class Told(nn.Sequential):
        def forward(self, z):
            seen.append(z.dtype)
            return super().forward(z)

    certificate = rf.certify(Told(model).eval(), images().to(dtype), **COMMON, target=0, batch_size=8)
    weights = model[1].weight[0].detach().abs().float()
    expected = rf.reference.sparsify(weights, COMMON["tau"]).view(certificate.map.shape[1:]).double()
    assert set(seen) == {dtype}
    assert all(torch.equal(one, expected) for one in certificate.map)


def levels_by_hand(x, *, sigma, tau, samples, levels=1, gamma=None):
    """Levels of every sample by the reference operators, uint8 [B, q, n]."""
    noisy = rf.reference.noisy_samples(x, sigma, samples)
    rows = []
    for z in noisy.flatten(0, 1):
        z = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(MODEL(z[None]).max(), z)
        rows.append(rf.reference.sparsify(gradient.abs().flatten(), tau, gamma, levels=levels) * levels)
    return torch.stack(rows).round().to(torch.uint8).unflatten(0, noisy.shape[:2])


@pytest.mark.parametrize(("levels", "gamma"), [(1, None), (15, 0.05)])
@pytest.mark.parametrize(("retain", "block", "blocks"), [(16, 13, 3), (33, 20, 2), (64, 40, 1)])
def test_second_moments_come_from_equal_blocks(levels, gamma, retain, block, blocks):
    x = images()
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 40, "levels": levels, "gamma": gamma}
    certificate = rf.certify(MODEL, x, **settings, retain=retain, batch_size=8)
    packed = rf.reference.pack_levels(levels_by_hand(x, **settings), levels)
    for image in range(2):
        parts = packed[image, : block * blocks].split(block)
        grams = [summarize_gram(rf.reference.packed_gram(part, levels), levels) for part in parts]
        expected = functools.reduce(GramSummary.joined, grams).to_array()
        assert certificate.gram_summary[image, : len(expected)].tolist() == expected.tolist()
        assert certificate.gram_summary[image, :2].tolist() == [block * blocks, blocks]
        assert certificate.gram_summary[image, -1] == 0
        # A quarter of all samples, or the first of three blocks, chooses the directions.
        rest = block - 10 if blocks < 3 else 0
        assert certificate.gram_summary[image, len(expected)] == rest + block * (blocks - 1)
    assert (certificate.distance(0.01) > 0).all()


@pytest.mark.parametrize(("levels", "gamma"), [(1, None), (15, 0.05)])
def test_directions_come_from_the_first_quarter(levels, gamma):
    x = images()
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 160, "levels": levels, "gamma": gamma}
    certificate = rf.certify(MODEL, x, **settings, retain=80, batch_size=8)
    rows = levels_by_hand(x, **settings).double() / levels
    for image in range(2):
        pilots, rest = rows[image, :40], (rows[image, 40:80], rows[image, 80:])
        centred = pilots - pilots.mean(0)
        _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
        found = torch.linalg.qr(certificate.directions[image].double().T).Q.T
        # Rounded to 8 bits, the plane is nearly that of the top eigenvectors.
        assert torch.linalg.svdvals(found @ vectors[:2].T).min() > 0.999
        squares = certificate.gram_summary[image, -3:-1]
        torch.testing.assert_close(squares, values[2] ** 2 / values[:2] ** 2)
        shrink = torch.eye(rows.shape[2], dtype=torch.float64) - found.T @ (1 - squares.sqrt()).diag() @ found
        tops = [torch.linalg.eigvalsh(torch.cov((part @ shrink).T, correction=0))[-1] for part in rest]
        expected = (tops[0] * 40 + tops[1] * 80) / 120
        numbers = certificate.gram_summary[image, 8:13]
        assert numbers[:3].tolist() == [120, 2, 40]
        assert float(numbers[3]) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize(("levels", "gamma"), [(1, None), (15, 0.05)])
def test_samples_are_kept_on_request(levels, gamma, tmp_path):
    x = images()
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 40, "levels": levels, "gamma": gamma}
    certificate = rf.certify(MODEL, x, **settings, retain=16, keep_samples=True, batch_size=8)
    expected = rf.reference.pack_levels(levels_by_hand(x, **settings)[:, :39], levels)
    assert torch.equal(certificate.packed, expected)
    certificate.save(tmp_path / "kept.safetensors")
    assert torch.equal(rf.Certificate.load(tmp_path / "kept.safetensors")[1].packed, expected[1:])
    assert rf.certify(MODEL, x, **settings, retain=16, batch_size=8).packed is None
    apart = rf.certify(MODEL, x, **{**settings, "samples": 8}, first_sample=40, batch_size=8)
    assert certificate.merge(apart).packed is None
    with pytest.raises(ValueError, match="keep_samples: got True without second moments"):
        rf.certify(MODEL, x, **settings, second_moment=False, keep_samples=True)


@pytest.mark.parametrize(("retain", "blocks"), [(1200, 1), (600, 2)])
def test_second_moments_of_a_later_look_do_not_depend_on_earlier_ones(retain, blocks):
    """A Gram matrix grows between looks inside a block, and starts anew in the next one."""
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 1100, "retain": retain, "batch_size": 50}
    once = rf.certify(MODEL, images(1), **settings)
    looked = rf.certify(MODEL, images(1), **settings, stop=rf.StopWhen(k=20, radius=10.0, overlap=1.0))
    assert torch.equal(looked.gram_summary, once.gram_summary)
    assert torch.equal(looked.directions, once.directions)
    assert looked.gram_summary[0, :2].tolist() == [1100, blocks]


def test_second_moments_cost_nothing_when_declined():
    certificate = rf.certify(MODEL, images(), **COMMON, second_moment=False, batch_size=8)
    assert certificate.gram_summary is None
    assert certificate.settings.ledger.moment == 0
    with pytest.raises(ValueError, match="second_moment=False"):
        certificate.cosine(0.1)


def test_a_run_that_ends_off_its_looks_has_no_second_moments(monkeypatch):
    monkeypatch.setattr(run, "REPORT_SECONDS", 0.0)

    def interrupt(event):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(rf.CertifyInterrupted) as caught:
        rf.certify(MODEL, images(1), sigma=0.3, tau=0.2, samples=4000, batch_size=8, progress=interrupt)
    partial = caught.value.certificate
    with pytest.raises(ValueError, match="it was planned to look at 512, 1024, 2048, 4000 samples, and there are"):
        partial.distance(0.1)
    assert partial.overlap(20, 0.01).method[0] == "marginal"


@pytest.mark.parametrize(("retain", "keep"), [(100, False), (100, True), (600, False)])
def test_retained_rows_survive_a_crash(tmp_path, monkeypatch, retain, keep):
    """Killed once while rows are still being retained, once after: the same second moments as without."""
    x = images(2)
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 700, "batch_size": 16, "retain": retain, "keep_samples": keep}
    whole = rf.certify(MODEL, x, **settings)
    path = tmp_path / "run.safetensors"
    monkeypatch.setattr(run, "CHECKPOINT_SECONDS", 0.0)
    for crash_after in (2, 20, 30):
        with crashing_after(crash_after), pytest.raises(Crash):
            rf.certify(MODEL, x, **settings, checkpoint=path)
    resumed = rf.certify(MODEL, x, **settings, checkpoint=path)
    assert torch.equal(resumed.gram_summary, whole.gram_summary)
    assert torch.equal(resumed.directions, whole.directions)
    assert torch.equal(resumed.counts, whole.counts)
    assert torch.equal(resumed.packed, whole.packed) if keep else resumed.packed is None


def test_a_checkpoint_without_samples_cannot_go_on_keeping_them(tmp_path):
    path = tmp_path / "run.safetensors"
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 64, "batch_size": 16, "checkpoint": path}
    rf.certify(MODEL, images(1), **settings)
    with pytest.raises(ValueError, match="checkpoint: it was written without keep_samples"):
        rf.certify(MODEL, images(1), **settings, keep_samples=True)


def test_kept_samples_of_images_whose_turn_has_not_come(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "REPORT_SECONDS", 0.0)
    settings = {"sigma": 0.3, "tau": 0.2, "samples": 64, "batch_size": 16, "keep_samples": True}
    path = tmp_path / "run.safetensors"
    with pytest.raises(rf.CertifyInterrupted) as interrupted:
        rf.certify(
            MODEL,
            images(2),
            **settings,
            checkpoint=path,
            progress=lambda event: signal.raise_signal(signal.SIGINT),
        )
    assert interrupted.value.certificate.samples.tolist() == [16, 0]
    assert interrupted.value.certificate.packed.shape[:2] == (2, 16)
    resumed = rf.certify(MODEL, images(2), **settings, checkpoint=path)
    assert torch.equal(resumed.packed, rf.certify(MODEL, images(2), **settings).packed)


def test_a_stop_may_come_from_second_moments(monkeypatch):
    """They hold at scheduled looks only, so the run hits those exactly, whatever the batch size."""
    looks = []

    def overlap(self, k, radius, method="best"):
        looks.append((int(self.samples), self.gram_summary is not None))
        return Overlap(torch.tensor([1.0 if int(self.samples) == 1024 else 0.0]), None)

    monkeypatch.setattr(rf.Certificate, "overlap", overlap)
    stop = rf.StopWhen(k=20, radius=0.2, overlap=0.5)
    stopped = rf.certify(MODEL, images(1), sigma=0.3, tau=0.2, samples=4096, batch_size=24, retain=512, stop=stop)
    assert int(stopped.samples) == 1024
    assert [samples for samples, moments in looks if moments] == [512, 1024]
    assert stopped.distance(0.1) > 0
