"""Public functions on tensors of a GPU: dispatch, autograd, compilation, captured batches.

The cases of single operators run there too, by the fixture `_operators.backend`.
"""

import logging

import pytest
import torch
from _tape import CASES, COMMON
from models import Elementwise, small_cnn

import robattr_fast as rf
from robattr_fast import backends
from robattr_fast.certificates.engine.counting import Captured
from robattr_fast.certificates.engine.retained import Retained
from robattr_fast.certificates.engine.state import State
from robattr_fast.nn import KernelAttention
from robattr_fast.ops import _selfcheck
from robattr_fast.sampling import sampler as sampling
from robattr_fast.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no GPU")


@pytest.fixture
def x():
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(3)).cuda()


def test_the_self_check_of_every_operator():
    found = [row for row in _selfcheck.check_operators() if row.device == "cuda"]
    assert {row.operator for row in found} == set(backends.operators())
    assert [(row.operator, row.backend, row.detail) for row in found if row.check != "ok"] == []


def on_both(function, *tensors):
    """What the function gives on the CPU and on the GPU, with the gradients of its sum in all tensors."""
    results = []
    for device in ("cpu", "cuda"):
        leaves = [tensor.detach().to(device).requires_grad_() for tensor in tensors]
        value = function(*leaves)
        weight = torch.linspace(-1, 1, value.numel(), dtype=value.dtype, device=device).view_as(value)
        gradients = torch.autograd.grad((weight * value).sum(), leaves)
        results.append([tensor.detach().cpu() for tensor in (value, *gradients)])
    return zip(*results, strict=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: rf.noisy_samples(x, 0.3, 3, channels_last=True),
        lambda x: rf.sparsify(x.flatten(1), 0.3, 0.1, levels=None),
        lambda x: rf.topk_threshold(x.flatten(1), 17),
        lambda x: rf.soft_topk(x.flatten(1), 17, 0.1),
        lambda x: rf.linear_attention(*(x.view(2, 3, 16, 9) * s for s in (1, 2, 3))),
    ],
    ids=["noisy_samples", "sparsify", "topk_threshold", "soft_topk", "linear_attention"],
)
def test_values_and_gradients_are_those_of_the_cpu(x, function):
    for cpu, cuda in on_both(function, x.double()):
        torch.testing.assert_close(cuda, cpu, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch.cuda.device_count() < 2: no device but the current")
def test_tensors_of_a_device_that_is_not_the_current_one(x):
    elsewhere = x.to("cuda:1")
    assert torch.cuda.current_device() == 0
    assert torch.equal(rf.noisy_samples(elsewhere, 0.3, 3).to(x.device), rf.noisy_samples(x, 0.3, 3))
    rows = x.flatten(1)
    assert torch.equal(rf.topk_threshold(elsewhere.flatten(1), 17).to(x.device), rf.topk_threshold(rows, 17))


def test_opcheck(x):
    ops, scores = torch.ops.robattr_fast, x.flatten(1).requires_grad_()
    torch.library.opcheck(ops.noisy_samples.default, (x, 0.5, 3, -1, 2, None, torch.tensor([9]).cuda(), None, True))
    torch.library.opcheck(ops.sparsify.default, (scores, 0.3, 0.1, None))
    torch.library.opcheck(ops.topk_threshold.default, (scores, 5))
    torch.library.opcheck(ops.soft_topk.default, (scores, 5, 0.1))
    counts = torch.zeros(1, 432, 3, dtype=torch.int32, device="cuda")
    torch.library.opcheck(ops.count_sparsified_.default, (counts, scores.detach()[None], 0.3, 0.1, None))


def test_compile(x):
    def loss(x):
        return rf.sparsify(rf.noisy_samples(x, 0.5, 3).flatten(2), 0.2, levels=None).square().sum()

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), loss(x))


def test_attention_with_a_float_mask_is_captured():
    attention = KernelAttention(12, 3, batch_first=True).cuda().eval()
    q, mask = torch.rand(2, 5, 12, device="cuda"), torch.zeros(2, 5, device="cuda")
    mask[1, 3:] = -torch.inf
    with torch.no_grad():
        expected = attention(q, q, q, key_padding_mask=mask)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(q, q, q, key_padding_mask=mask)[0]
        graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("target", [None, [1, 0]])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_captured_batches_give_what_eager_ones_give(x, monkeypatch, caplog, target, memory_format):
    arguments = COMMON | {"target": target, "memory_format": memory_format, "first_sample": 7, "image_ids": [5, 9]}
    model = Elementwise(3, 12, 12).cuda().eval()
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        captured = rf.certify(model, x, **arguments)
    assert not [record for record in caplog.records if "eagerly" in record.getMessage()]
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    eager = rf.certify(model, x, **arguments)
    assert_same(captured, eager)


def assert_same(captured, eager):
    assert captured.tensors.keys() == eager.tensors.keys()
    for name, tensor in eager.tensors.items():
        # Sums of float64 are added in another order.
        torch.testing.assert_close(captured.tensors[name], tensor, rtol=1e-12 if name == "sums" else 0, atol=0)


@pytest.mark.parametrize("arguments", CASES, ids="-".join)
@pytest.mark.parametrize("images", [1, 2])
def test_everything_counted_is_what_eager_batches_count(x, monkeypatch, caplog, images, arguments):
    arguments, model = COMMON | arguments, Elementwise(3, 12, 12).cuda().eval()
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        captured = rf.certify(model, x[:images], **arguments)
    assert "eagerly" not in caplog.text
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    assert_same(captured, rf.certify(model, x[:images], **arguments))


class Synchronising(Elementwise):
    def forward(self, z):
        return super().forward(z * (1 + float(z.sum().isnan())))


def test_a_model_that_waits_for_the_device_runs_eagerly(x, caplog):
    model = Elementwise(3, 12, 12).cuda().eval()
    with caplog.at_level(logging.INFO, logger="robattr_fast"):
        certificate = rf.certify(Synchronising(3, 12, 12).cuda().eval(), x, **COMMON)
    assert len([record for record in caplog.records if "eagerly" in record.getMessage()]) == 1
    assert torch.equal(certificate.counts, rf.certify(model, x, **COMMON).counts)


def test_batches_do_not_wait_for_the_device(x, monkeypatch):
    calls = {"run": 0, "add": 0, "_replayed": 0}

    def watched(method):
        def run(self, *arguments):
            calls[method.__name__] += 1
            # The first ones compile, allocate and capture.
            torch.cuda.set_sync_debug_mode("error" if calls[method.__name__] > 4 else "default")
            try:
                return method(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(Sampler, "run", watched(Sampler.run))
    monkeypatch.setattr(State, "add", watched(State.add))
    monkeypatch.setattr(Captured, "_replayed", watched(Captured._replayed))
    arguments = COMMON | {"samples": 320, "second_moment": False}
    rf.certify(small_cnn(3).cuda(), x[:1], **arguments)
    assert calls == {"run": 0, "add": 0, "_replayed": 10}
    rf.certify(small_cnn(3).cuda(), x.repeat(20, 1, 1, 1), **arguments | {"samples": 6})
    assert calls["run"] == 8
    monkeypatch.setattr(sampling, "can_capture", lambda device: False)
    rf.certify(small_cnn(3).cuda(), x[:1], **arguments)
    assert calls["run"] == 8 + 10


def test_samples_are_retained_without_waiting_for_the_device(x, monkeypatch):
    written = []

    def watched(self, count, invalid):
        # The last rows complete the block: for its second moments the host waits.
        torch.cuda.set_sync_debug_mode("error" if 0 < len(written) < 9 else "default")
        try:
            return method(self, count, invalid)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            written.append(count)

    method = Retained.written
    monkeypatch.setattr(Retained, "written", watched)
    rf.certify(small_cnn(3).cuda(), x[:1], **COMMON | {"samples": 320})
    assert written == [32] * 10


def test_selections_are_those_of_the_cpu(x):
    """But for those that rounding turns: the models' convolutions round differently."""
    certificates = [
        rf.certify(small_cnn(3).to(device), x.to(device), **COMMON, second_moment=False) for device in ("cpu", "cuda")
    ]
    cpu, cuda = (certificate.counts.long() for certificate in certificates)
    assert int((cpu - cuda).abs().sum()) <= 0.02 * int(cpu.sum())
    assert torch.equal(cpu.sum(dim=(1, 2)), cuda.sum(dim=(1, 2)))


@pytest.mark.parametrize("kind", ["plain", "vargrad", "scaled", "sparsified"])
def test_smoothgrad(x, kind):
    cpu, cuda = (
        rf.smoothgrad(Elementwise(3, 12, 12).to(device).eval(), x.to(device), kind=kind, sigma=0.3, samples=48).cpu()
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(cuda, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_sanitized(x, backend):
    """Every kernel, at sizes that end inside a block: what compute-sanitizer watches."""
    with backends.use(backend):
        scores = rf.noisy_samples(x, 0.3, 3, channels_last=True).abs().reshape(2, 3, -1)
        long = torch.rand(1, 3, 20_001, device="cuda")
        for rows in (scores, long):
            for levels in (1, 3):
                counts = torch.zeros(rows.shape[0], rows.shape[2], levels, dtype=torch.int32, device="cuda")
                packed = rf.reference.pack_levels(torch.zeros_like(rows, dtype=torch.uint8), levels)
                assert not bool(rf.count_sparsified_(counts, rows, 0.1, 0.05, packed=packed).any())
                rf.packed_gram(packed[0].contiguous(), levels)
                rf.betting_bounds(counts, torch.full((rows.shape[0],), 3, device="cuda"), 1e-4)
            assert bool((rf.topk_threshold(rows, 7) >= rows.amin(-1)).all())
            assert bool(rf.sparsify(rows, 0.1, levels=None).isfinite().all())
            assert bool(rf.soft_topk(rows, 7, 0.1).isfinite().all())
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sanitized_in_other_dtypes(dtype):
    row = torch.rand(1, 433, device="cuda").to(dtype)
    assert bool(rf.noisy_samples(row, 0.3, 2, fast=True).isfinite().all())
    assert bool((rf.topk_threshold(row, 7) <= row.amax(-1)).all())
    assert bool(rf.sparsify(row, 0.1, levels=3).isfinite().all())
    assert bool(rf.soft_topk(row, 7, 0.1).isfinite().all())
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("dtype", "causal"),
    [(torch.float32, False), (torch.float32, True), (torch.float64, True), (torch.bfloat16, False)],
)
def test_sanitized_attention(dtype, causal):
    """Twice differentiated: more than one part, and neither positions nor widths that a block divides."""
    positions = 70 if causal else 530
    shapes = [(1, 2, positions, 70), (1, 2, positions, 70), (1, 2, positions, 33)]
    tensors = [torch.randn(shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    keep = torch.arange(positions, device="cuda")[None] % 3 > 0
    out = rf.linear_attention(*tensors, causal=causal, key_padding_mask=keep)
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)
    assert all(bool(result.isfinite().all()) for result in (out, *first, *second))
    torch.cuda.synchronize()
