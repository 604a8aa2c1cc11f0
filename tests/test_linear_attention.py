"""`linear_attention` and its derivatives on every backend, against autograd of the definition, a sum over pairs."""

import dataclasses
import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from _larger import larger
from _operators import DTYPES, FAST_MODES, INTERPRETED, at_isa, backend, every_isa, needs_extension

import robattr_fast as rf
from robattr_fast.reference.linear_attention import FEATURE_MAPS, features

__all__ = ["backend"]

# The interpreter takes some 10 ms for every program of a kernel: few heads and few positions in blocks of 16, of which
# there are as many as of 32 elsewhere.
HEADS = 1 if INTERPRETED else 2
NAMES = ("out", "grad_q", "grad_k", "grad_v", "of_grad", "of_q", "of_k", "of_v")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    if INTERPRETED:
        for name, size in {"_ROWS": 16, "_COLUMNS": 16, "_SPAN": 32, "_CAUSAL_SPAN": 32}.items():
            monkeypatch.setattr(f"robattr_fast.kernels.linear_attention.{name}", size)


def away_from_zero(*shape, dtype=torch.float64):
    """Normal numbers that finite differences do not push over the kink of a relu."""
    x = torch.randn(*shape, dtype=torch.float64)
    return (x + 0.1 * x.sign()).to(dtype)


def arguments(batch, heads, queries, keys, width, value_width, dtype=torch.float64):
    """(q, k, v), the gradient of the output, the gradients of the gradients of q, k, v."""
    shapes = [(queries, width), (keys, width), (keys, value_width)]
    tensors = [away_from_zero(batch, heads, *shape, dtype=dtype) for shape in shapes]
    directions = [away_from_zero(batch, heads, *shape, dtype=dtype) for shape in shapes]
    return tensors, away_from_zero(batch, heads, queries, value_width, dtype=dtype), directions


def mask_of(batch, keys):
    """Keeps two keys of three; the last image, and where there are two the first key, nothing."""
    mask = torch.rand(batch, keys) < 2 / 3
    mask[-1] = False
    mask[:, 0] = keys == 1
    mask[-1] = False
    return mask


def everything(function, tensors, grad, directions):
    """Output, first and second derivatives, by name."""
    tensors, grad = [x.detach().requires_grad_() for x in tensors], grad.detach().requires_grad_()
    out = function(*tensors)
    first = torch.autograd.grad(out, tensors, grad, create_graph=True)
    second = torch.autograd.grad(first, (grad, *tensors), directions)
    return {name: x.detach() for name, x in zip(NAMES, (out, *first, *second), strict=True)}


def upcast(tensors, grad, directions):
    return [x.double() for x in tensors], grad.double(), [x.double() for x in directions]


def norm(x):
    return x.double().norm().item()


def check_accuracy(given, **settings):
    """At most twice the error of the definition under autograd in the same dtype, plus one unit in the last place."""
    got = everything(lambda *x: rf.linear_attention(*x, **settings), *given)
    plain = everything(lambda *x: rf.reference.linear_attention(*x, **settings), *given)
    exact = everything(lambda *x: rf.reference.linear_attention(*x, **settings), *upcast(*given))
    dtype = given[1].dtype
    for name in NAMES:
        assert got[name].dtype == dtype
        assert got[name].shape == exact[name].shape
        error, allowed = norm(got[name] - exact[name]), 2 * norm(plain[name] - exact[name])
        # What counts as exact is itself computed in float64, and not all sums are as large as their terms.
        units = 5000 if dtype == torch.float64 else 1
        assert error <= allowed + units * torch.finfo(dtype).eps * norm(exact[name]), (name, error, allowed)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_features_are_derivatives(feature_map):
    x = torch.linspace(-3, 3, 100, dtype=torch.float64).requires_grad_()
    phi, slope, curvature = features(x, feature_map)
    (first,) = torch.autograd.grad(phi.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, first)
    if first.requires_grad and feature_map not in ("relu", "identity"):
        torch.testing.assert_close(curvature, torch.autograd.grad(first.sum(), x)[0])
    else:
        assert not curvature.any()
    assert features(torch.zeros(1), "elu")[1].item() == 1


SETTINGS = list(itertools.product(FEATURE_MAPS, (False, True), (True, False), (False, True)))
if INTERPRETED:
    SETTINGS = [
        ("elu", False, True, True),
        ("relu", True, True, False),
        ("squared_relu", True, False, True),
        ("identity", False, False, False),
    ]


@pytest.mark.parametrize("fast_mode", FAST_MODES)
@pytest.mark.parametrize(
    ("feature_map", "causal", "normalize", "masked"), [SETTINGS[0], *larger(SETTINGS[1])] if INTERPRETED else SETTINGS
)
def test_twice_against_differences(backend, feature_map, causal, normalize, masked, fast_mode):
    (q, k, v), _, _ = arguments(HEADS, 1, 4, 4, 3, 2)
    if feature_map == "identity" and normalize:
        q, k = q.abs(), k.abs()  # the sum of the weights must keep away from 0
    mask = torch.tensor([[False, True, False, True], [False] * 4])[:HEADS] if masked else None

    def attention(q, k, v):
        return rf.linear_attention(
            q, k, v, feature_map=feature_map, causal=causal, normalize=normalize, key_padding_mask=mask, eps=0.1
        )

    tensors = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(attention, tensors, fast_mode=fast_mode)
    torch.autograd.gradgradcheck(attention, tensors, fast_mode=fast_mode)


# N, D, Dv: one row, around the vector, the chunk (32 causal, else 64) and the segment (1024).
SIZES = [
    (1, 1, 1),
    (2, 3, 5),
    (17, 64, 64),
    (31, 16, 33),
    (64, 1, 256),
    (65, 256, 3),
    (197, 64, 64),
    *larger((130, 130, 48)),
    (1025, 20, 33),
]
if INTERPRETED:
    SIZES = [(1, 1, 1), (50, 18, 5)]


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, *larger(torch.float64)])
@pytest.mark.parametrize("causal", [*larger(False, when=INTERPRETED), True])
@pytest.mark.parametrize(("n", "width", "value_width"), SIZES)
def test_sizes(backend, n, width, value_width, causal, dtype):
    # Of few numbers the error of one computation may be small by chance: there are more images where they are small.
    batch = 1 if n > 1000 or INTERPRETED else 2 if n > 2 else 64
    given = arguments(batch, HEADS, n, n, width, value_width, dtype)
    # Rows that see next to nothing are badly conditioned: eps is what their denominators are.
    check_accuracy(given, causal=causal, eps=0.1, key_padding_mask=mask_of(max(batch, 2), n)[:batch])
    check_accuracy(given, causal=causal, normalize=False)


CASES = [(*setting, dtype) for setting in SETTINGS for dtype in DTYPES[:1]]
CASES += larger(*((*setting, dtype) for setting in SETTINGS for dtype in DTYPES[1:]))
if INTERPRETED:
    CASES = [(*setting, dtype) for setting, dtype in zip(SETTINGS, DTYPES, strict=True)]


@pytest.mark.parametrize(("feature_map", "causal", "normalize", "masked", "dtype"), CASES)
def test_settings(backend, feature_map, causal, normalize, masked, dtype):
    n, width, value_width = (20, 8, 8) if INTERPRETED else (70, 24, 20)
    tensors, grad, directions = arguments(2, HEADS, n, n, width, value_width, dtype)
    if feature_map == "identity" and normalize:
        tensors = [tensors[0].abs(), tensors[1].abs(), tensors[2]]
    mask = mask_of(2, n) if masked else None
    settings = {"feature_map": feature_map, "causal": causal, "normalize": normalize, "key_padding_mask": mask}
    check_accuracy((tensors, grad, directions), **settings, eps=0.1)


@pytest.mark.parametrize(
    ("queries", "keys"), [*larger((1, 40)), (40, 1)] if INTERPRETED else [(1, 100), (100, 1), (33, 70), (1030, 5)]
)
def test_more_or_fewer_queries_than_keys(backend, queries, keys):
    # Nearly all of a single key's gradient cancels: of few of them, what is left of either side's rounding is chance.
    images = 9 if keys == 1 else 2
    given = arguments(images, HEADS, queries, keys, 12, 20, torch.float32)
    check_accuracy(given, key_padding_mask=mask_of(images, keys), eps=0.1)


@pytest.mark.parametrize("causal", [True] if INTERPRETED else [False, True])
def test_strides(backend, causal):
    n, batch = (17, 1) if INTERPRETED else (40, 2)
    tensors, grad, directions = arguments(batch, 1 + HEADS, n, n, 8, 8)
    settings = {"causal": causal, "key_padding_mask": mask_of(4, n)[: 2 * batch : 2]}
    expected = everything(lambda *x: rf.linear_attention(*x, **settings), tensors, grad, directions)

    def positions_first(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def width_strided(x):
        storage = torch.full((*x.shape[:3], 3 * x.shape[3]), torch.nan, dtype=x.dtype)
        storage[..., ::3] = x
        return storage[..., ::3]

    for lay_out in (positions_first, width_strided, lambda x: x.mT.contiguous().mT):
        found = everything(
            lambda *x: rf.linear_attention(*x, **settings),
            [lay_out(x) for x in tensors],
            lay_out(grad),
            [lay_out(x) for x in directions],
        )
        for name in NAMES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-12)
    out = rf.linear_attention(*[positions_first(x) for x in tensors])
    assert out.transpose(1, 2).is_contiguous()


def test_expanded_gradient(backend):
    (q, k, v), _, _ = arguments(1, 2, 9, 9, 4, 4)
    for x in (q, k, v):
        x.requires_grad_()
    expanded = torch.autograd.grad(rf.linear_attention(q, k, v).sum(), (q, k, v))
    dense = torch.autograd.grad(rf.linear_attention(q, k, v), (q, k, v), torch.ones(1, 2, 9, 4, dtype=q.dtype))
    for got, expected in zip(expanded, dense, strict=True):
        torch.testing.assert_close(got, expected)


def test_one_tensor_for_all(backend):
    x = away_from_zero(1, 1, 5, 3).requires_grad_()
    torch.autograd.gradcheck(lambda x: rf.linear_attention(x, x, x, causal=True), x, fast_mode=INTERPRETED)
    torch.autograd.gradgradcheck(lambda x: rf.linear_attention(x, x, x, causal=True), x, fast_mode=INTERPRETED)


@pytest.mark.parametrize("fast_mode", FAST_MODES)
def test_higher_derivatives(backend, fast_mode):
    tensors = [away_from_zero(1, 1, 3, 2).requires_grad_() for _ in range(3)]

    def second(q, k, v):
        loss = rf.linear_attention(q, k, v, causal=True, key_padding_mask=torch.tensor([[True, False, True]])).square()
        first = torch.autograd.grad(loss.sum(), (q, k, v), create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v), create_graph=True)

    torch.autograd.gradcheck(second, tensors, fast_mode=fast_mode)
    torch.autograd.gradgradcheck(second, tensors, fast_mode=fast_mode)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("eps", [0.0] if INTERPRETED else [0.0, 1e-6])
@pytest.mark.parametrize("feature_map", ["relu"] if INTERPRETED else ["elu", "relu", "squared_relu"])
def test_rows_that_see_nothing_are_zero(backend, feature_map, eps, causal):
    n = 20 if INTERPRETED else 40
    tensors, grad, directions = arguments(3, HEADS, n, n, 8, 8, torch.float32)
    mask = torch.ones(3, n, dtype=torch.bool)
    mask[0] = False
    mask[1, :5] = False
    if feature_map != "elu":
        tensors[0][2] = -tensors[0][2].abs()  # no feature of any query: every weight is 0
    settings = {"feature_map": feature_map, "causal": causal, "key_padding_mask": mask, "eps": eps}
    found = everything(lambda *x: rf.linear_attention(*x, **settings), tensors, grad, directions)
    for name, x in found.items():
        assert x.isfinite().all(), name
        assert not x[0].any(), name
    if causal:
        assert not found["out"][1, :, :5].any()
    assert found["out"][1, :, 5:].any()
    if feature_map != "elu":
        assert not found["out"][2].any()


@pytest.mark.parametrize("normalize", [False] if INTERPRETED else [True, False])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_influence(backend, causal, normalize):
    n, batch = (20, 1) if INTERPRETED else (50, 2)
    tensors, grad, directions = arguments(batch, HEADS, n, n, 8, 8)
    settings = {"causal": causal, "normalize": normalize}
    mask = (torch.arange(n + 12) < n).expand(batch, n + 12)

    def pad(x, value):
        return torch.cat([x, torch.full((batch, HEADS, 12, 8), value, dtype=x.dtype)], 2)

    short = everything(lambda *x: rf.linear_attention(*x, **settings), tensors, grad, directions)
    padded = [pad(tensors[0], 1.0), pad(tensors[1], torch.nan), pad(tensors[2], torch.inf)]
    long = everything(
        lambda *x: rf.linear_attention(*x, **settings, key_padding_mask=mask),
        padded,
        pad(grad, 0.0),
        [pad(directions[0], 0.0), pad(directions[1], torch.nan), pad(directions[2], torch.nan)],
    )
    for name in NAMES:
        torch.testing.assert_close(long[name][:, :, :n], short[name])
        if name not in ("out", "of_grad"):
            assert not long[name][:, :, n:].any(), name


@pytest.mark.parametrize("normalize", [True, False])
def test_causal_rows_do_not_see_what_follows(backend, normalize):
    (q, k, v), _, _ = arguments(1, HEADS, 100, 100, 8, 8)
    settings = {"causal": True, "normalize": normalize}
    whole = rf.linear_attention(q, k, v, **settings)
    start = rf.linear_attention(q[:, :, :37], k[:, :, :37], v[:, :, :37], **settings)
    torch.testing.assert_close(whole[:, :, :37], start)
    last = rf.linear_attention(q[:, :, -1:], k, v, normalize=normalize)
    torch.testing.assert_close(whole[:, :, -1:], last)


def test_not_normalised_by_hand(backend):
    q, k = torch.tensor([[[[2.0], [1.0]]]]), torch.tensor([[[[1.0], [3.0]]]])
    v = torch.tensor([[[[10.0], [100.0]]]])
    call = {"feature_map": "identity", "normalize": False}
    assert rf.linear_attention(q, k, v, **call).flatten().tolist() == [310, 155]
    assert rf.linear_attention(q, k, v, causal=True, **call).flatten().tolist() == [20, 155]
    mask = torch.tensor([[False, True]])
    assert rf.linear_attention(q, k, v, key_padding_mask=mask, **call).flatten().tolist() == [600, 300]
    assert rf.linear_attention(q, k, v, causal=True, key_padding_mask=mask, **call).flatten().tolist() == [0, 300]


@pytest.mark.parametrize(("x", "expected"), [(-8.0, 1.5), (-80.0, 1.5), (-100.0, 0.0)])
def test_elu_does_not_cancel(backend, x, expected):
    # elu(-8) + 1 is 0 in bfloat16, and in float32 from -17 on. At -100 the sum of the weights has no reciprocal.
    q = torch.full((1, 1, 4, 8), x, dtype=torch.bfloat16)
    k, v = torch.zeros_like(q), torch.arange(4.0).to(torch.bfloat16).view(1, 1, 4, 1)
    assert rf.linear_attention(q, k, v, eps=0.0).flatten().tolist() == [expected] * 4


@pytest.mark.parametrize("feature_map", ["elu"] if INTERPRETED else ["elu", "relu", "squared_relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_float16_sums_do_not_overflow(backend, feature_map, causal):
    n = 40 if INTERPRETED else 300
    q = torch.full((1, 1, n, 16), 200.0, dtype=torch.float16, requires_grad=True)
    v = torch.full((1, 1, n, 4), 3000.0, dtype=torch.float16, requires_grad=True)
    out = rf.linear_attention(q, q, v, feature_map=feature_map, causal=causal)
    assert (out == 3000).all()
    grads = torch.autograd.grad(out, (q, v), torch.ones_like(out), create_graph=True)
    second = torch.autograd.grad([g.float().square().sum() for g in grads], (q, v))
    assert all(x.isfinite().all() for x in (*grads, *second))


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_nan_is_not_hidden(backend, feature_map, place):
    given = dict(zip("qkv", arguments(1, 1, 20, 20, 4, 4)[0], strict=True))
    given[place][0, 0, 7, 2] = torch.nan
    out = rf.linear_attention(**given, feature_map=feature_map)
    assert out[0, 0, 7].isnan().any()
    assert out.isnan().any(dim=-1).all() or place == "q"


def test_autocast(backend):
    (q, k, v), _, _ = arguments(1, 2, 10, 10, 4, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = rf.linear_attention(q, k.bfloat16(), v)
        # Autocast must not reach into the operators.
        given = arguments(1, 1, 9, 9, 4, 4)
        inside = everything(rf.linear_attention, *given)
        assert rf.linear_attention(q.double(), k.double(), v.double()).dtype == torch.float64
    assert torch.equal(out, rf.linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    for name, value in everything(rf.linear_attention, *given).items():
        assert torch.equal(inside[name], value), name


@pytest.mark.skipif(INTERPRETED, reason="threads of the C++ kernels")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [300, 2500])
def test_bits_do_not_depend_on_threads(n, causal):
    needs_extension()
    given = arguments(2, 3, n, n, 20, 12, torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with rf.backends.use("cpu", strict=True):
                found.append(everything(lambda *x: rf.linear_attention(*x, causal=causal), *given))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name in NAMES:
            assert torch.equal(other[name], found[0][name]), name


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    given = arguments(2, 2, 70, 70, 24, 20, dtype)
    for causal in (False, True):
        with at_isa(isa):
            check_accuracy(given, causal=causal, eps=0.1, key_padding_mask=mask_of(2, 70))


_MEMORY_PROGRAM = """
import sys, torch, robattr_fast as rf
from robattr_fast.machine import peak_memory as peak
def run(n):
    tensors = [torch.rand(1, 1, n, 64).requires_grad_() for _ in range(3)]
    out = rf.linear_attention(*tensors, causal=sys.argv[1] == "causal")
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), tensors)
    assert all(x.isfinite().all() for x in second)
with rf.backends.use("cpu", strict=True):
    run(64)
    before = peak()
    run(65536)
print((peak() - before) / (65536 * 64 * 4))
"""


@pytest.mark.skipif(INTERPRETED, reason="memory of the C++ kernels")
@pytest.mark.parametrize("kind", ["causal", *larger("not")])
def test_memory_is_linear(kind):
    needs_extension()
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY_PROGRAM, kind], capture_output=True, text=True, check=True, env=os.environ
    )
    # In units of q. An array [N, N] would be 1024 units, [N, D, Dv] 64; the program itself holds 20 at least.
    assert float(done.stdout) < 40


def second_order_inputs():
    tensors, grad, directions = arguments(1, 2, 6, 6, 3, 4)
    return [x.requires_grad_() for x in tensors], grad.requires_grad_(), [x.requires_grad_() for x in directions]


@pytest.mark.parametrize("turned", [False, *larger(True)])
@pytest.mark.parametrize("causal", [*larger(False), True])
@pytest.mark.parametrize("order", ["", "_backward", "_double_backward"])
def test_opcheck(order, causal, turned):
    tensors, grad, directions = second_order_inputs()
    mask = torch.tensor([[True, False, True, True, True, False]])
    operator = getattr(torch.ops.robattr_fast, f"linear_attention{order}").default
    given = {"": tensors, "_backward": [grad, *tensors], "_double_backward": [*directions, grad, *tensors]}[order]
    if turned:
        given = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in given]
        torch.library.opcheck(operator, (*given, "relu", causal, False, None, 1e-6))
    else:
        torch.library.opcheck(operator, (*given, "elu", causal, True, mask, 1e-6))


def test_compile():
    tensors, _, _ = arguments(1, 2, 6, 6, 3, 4, torch.float32)
    tensors = [x.requires_grad_() for x in tensors]

    def loss(q, k, v):
        return rf.linear_attention(q * 2, k, v, causal=True).pow(3).sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, value in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        torch.testing.assert_close(got, value)


def test_second_derivative_under_compile():
    tensors, _, _ = arguments(1, 2, 6, 6, 3, 4, torch.float32)
    tensors = [x.requires_grad_() for x in tensors]

    def penalty(q, k, v):
        first = torch.autograd.grad(rf.linear_attention(q, k, v).pow(3).sum(), (q, k, v), create_graph=True)
        return sum(x.square().sum() for x in first)

    expected = torch.autograd.grad(penalty(*tensors), tensors)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty, fullgraph=True, backend="aot_eager")
        found = torch.autograd.grad(compiled(*tensors), tensors)
    for got, value in zip(found, expected, strict=True):
        torch.testing.assert_close(got, value)


def test_backward_in_another_thread_keeps_the_backend(monkeypatch):
    """Autograd's threads of CUDA devices do not inherit the context of the caller."""
    ran = []
    for name in ("linear_attention_backward", "linear_attention_double_backward"):
        implementation = rf.backends._registry[name]["reference"]
        recorded = dataclasses.replace(
            implementation,
            call=lambda *args, name=name, call=implementation.call, **out: ran.append(name) or call(*args, **out),
        )
        monkeypatch.setitem(rf.backends._registry[name], "reference", recorded)
    tensors, _, _ = second_order_inputs()
    with rf.backends.use("reference", strict=True):
        total = rf.linear_attention(*tensors).square().sum()

    def penalty():
        first = torch.autograd.grad(total, tensors, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()

    thread = threading.Thread(target=penalty)
    thread.start()
    thread.join()
    assert set(ran) == {"linear_attention_backward", "linear_attention_double_backward"}
    assert tensors[0].grad.count_nonzero() > 0


def test_only_inputs_are_saved():
    tensors, _, _ = second_order_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = rf.linear_attention(*tensors)
        assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in tensors}
        saved.clear()
        grad = torch.ones_like(out)
        torch.autograd.grad(out, tensors, grad, create_graph=True)
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in (grad, *tensors)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q: got list, takes a tensor"),
        ({"k": torch.zeros(2, 3, 5, 4, dtype=torch.int64)}, TypeError, "k: got dtype torch.int64"),
        ({"v": torch.zeros(3, 5, 4)}, ValueError, r"v: got shape \(3, 5, 4\), takes \[B, H, N, width\]"),
        ({"v": torch.zeros(2, 3, 0, 4)}, ValueError, "v: got the empty shape"),
        ({"k": torch.zeros(2, 3, 5, 3)}, ValueError, r"k: got shape \(2, 3, 5, 3\), takes \(2, 3, 5, 4\)"),
        ({"v": torch.zeros(2, 3, 6, 4)}, ValueError, r"v: got shape \(2, 3, 6, 4\), takes \(2, 3, 5, 4\)"),
        ({"v": torch.zeros(2, 1, 5, 4)}, ValueError, r"v: got shape \(2, 1, 5, 4\)"),
        ({"k": torch.zeros(2, 3, 5, 4).double()}, TypeError, "k: got dtype torch.float64, takes that of q"),
        ({"k": torch.zeros(2, 3, 5, 4, device="meta")}, ValueError, "k: got device meta, takes that of q, cpu"),
        ({"v": torch.zeros(2, 3, 5, 257)}, ValueError, r"v.shape\[3\] \(Dv\): got 257"),
        ({"q": torch.zeros(2, 3, 65537, 4)}, ValueError, r"q.shape\[2\] \(Nq\): got 65537"),
        ({"q": torch.zeros(2, 3, 4, 4), "causal": True}, ValueError, "causal: got 4 rows and 5 keys"),
        ({"feature_map": "softmax"}, ValueError, "feature_map: got 'softmax', takes one of elu, relu"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0, takes a finite number >= 0"),
        ({"eps": float("nan")}, ValueError, "eps: got nan"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask: got list"),
        ({"key_padding_mask": torch.zeros(2, 5)}, TypeError, "key_padding_mask: got dtype torch.float32, takes bool"),
        ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"takes \[B, Nk\] = \(2, 5\)"),
    ],
)
def test_errors(changed, error, message):
    good = {name: torch.zeros(2, 3, 5, 4) for name in "qkv"}
    with pytest.raises(error, match=message):
        rf.linear_attention(**(good | changed))
