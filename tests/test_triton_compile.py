"""Triton kernels compile offline for the GPUs that we mean to run on, within budgets. No GPU is needed."""

import functools
import os
import re
import shutil
import subprocess

import pytest
import torch
from _larger import larger
from _operators import INTERPRETED

triton = pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from robattr_fast.kernels import (  # noqa: E402
    _attention_passes,
    _select,
    betting_bounds,
    count_sparsified,
    linear_attention,
    mlp_smoothgrad,
    noisy_samples,
    packed_gram,
    soft_topk,
    sparsify,
)
from robattr_fast.kernels._attention_tiles import Array, Side  # noqa: E402

pytestmark = pytest.mark.once

ARCHITECTURES = [90, *larger(80, 100)]
INTEGERS = ("n", "k_tau", "k_gamma", "passes", "span", "samples", "samples_per_program", "row_bytes", "m", "m2", "rows")
INTEGERS += ("positions", "heads", "parts", "blocks", "size")


def _of(newer: int, triton_36: int) -> int:
    """A budget of Triton 3.7 and later, and what 3.6 needs."""
    return triton_36 if triton.__version__.startswith("3.6.") else newer


def _cuobjdump(argument: str, path) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    assert shutil.which(tool), f"triton ships no cuobjdump at {tool}"
    return subprocess.run([tool, argument, path], capture_output=True, text=True, check=True).stdout


def _aligned(kind, path):
    """Places of pointers in an argument, and of all that is in a tuple: arrays have aligned rows."""
    if isinstance(kind, tuple):
        for index, part in enumerate(kind):
            yield from _aligned(part, (*path, index))
    elif kind.startswith("*") or len(path) > 1:
        yield path


class Compiled:
    """A kernel as a GPU would get it: PTX, SASS instructions, and what it needs."""

    def __init__(self, kernel, signature, constants, architecture, folder, *, num_warps=4, aligned=(), **options):
        names = kernel.arg_names
        types = dict.fromkeys(INTEGERS, "i32") | {"row_stride": "i64"} | signature
        types |= dict.fromkeys(constants, "constexpr")
        # What the launcher sees at run time: allocations are aligned, and so are some sizes.
        places = [(i,) for i, name in enumerate(names) if name in aligned]
        places += [place for i, name in enumerate(names) for place in _aligned(types[name], (i,))]
        compiled = triton.compile(
            ASTSource(
                fn=kernel,
                signature={name: types[name] for name in names},
                constexprs=constants,
                attrs={place: [["tt.divisibility", 16]] for place in places},
            ),
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": num_warps, **options},
        )
        self.ptx = compiled.asm["ptx"]
        self.shared = compiled.metadata.shared
        path = folder / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("--dump-resource-usage", path)))
        self.registers, self.stack = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        self._cubin = path

    @functools.cached_property
    def sass(self):
        listing = _cuobjdump("--dump-sass", self._cubin)
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", listing, re.MULTILINE)
        return [line for line in lines if line != "NOP"]

    def assert_within(self, registers: int, shared: int, stack: int = 0):
        assert self.registers <= registers
        assert self.shared <= shared
        assert self.stack <= stack, "registers spill"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def _noise(pointer, channels_last, fast, architecture, folder):
    """The kernel, and its instructions per normal: all of them, rarely taken paths included, over those of a thread."""
    blocks = 512
    compiled = Compiled(
        noisy_samples._noisy_samples,
        {
            "x": pointer,
            "out": pointer,
            "image_ids": "*i64",
            "sigma": "fp64",
            "seed_low": "i64",
            "seed_high": "i64",
            "first_sample": "i64",
            "sample_offset": "*i64",
            **dict.fromkeys(("num_samples", "plane", "channels"), "i32"),
        },
        {
            "CHANNELS_LAST": channels_last,
            "DOUBLE": pointer == "*fp64",
            "OFFSET": True,
            "FAST": fast,
            "BLOCKS": blocks,
        },
        architecture,
        folder,
        enable_fp_fusion=fast,
    )
    return compiled, len(compiled.sass) / (4 * blocks / 128)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pointer", "channels_last", "per_normal"),
    [("*fp32", False, 65), *larger(("*fp32", True, 86)), ("*bf16", True, 90), *larger(("*fp64", False, 66))],
)
def test_noisy_samples(architecture, pointer, channels_last, per_normal, tmp_path):
    compiled, instructions = _noise(pointer, channels_last, False, architecture, tmp_path)
    # Arguments that equal 1 must stay arguments: as constants they would have no type to convert.
    assert {"seed_low", "seed_high"} <= set(noisy_samples._noisy_samples.do_not_specialize)
    assert "fma.rn.f32" not in compiled.ptx, "a contracted multiply-add breaks the promise of equal bits"
    assert "sqrt.rn.f32" in compiled.ptx
    assert "sqrt.approx" not in compiled.ptx
    compiled.assert_within(registers=64, shared=0)
    assert instructions <= per_normal
    assert ("cvt.rn.bf16" in compiled.ptx) == (pointer == "*bf16"), "rounded to nearest even, NaN kept"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pointer", "channels_last", "per_normal"),
    [*larger(("*fp32", False, 35), ("*fp32", True, 55)), ("*bf16", True, 60), *larger(("*fp64", False, 36))],
)
def test_fast_noise(architecture, pointer, channels_last, per_normal, tmp_path):
    compiled, instructions = _noise(pointer, channels_last, True, architecture, tmp_path)
    assert {"lg2", "sqrt", "sin", "cos"} <= set(re.findall(r"(\w+)\.approx\.ftz\.f32", compiled.ptx))
    compiled.assert_within(registers=48, shared=0)
    assert instructions <= per_normal


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pointer", "block", "registers", "shared"),
    [("*fp32", 16384, 120, 64), *larger(("*bf16", 1024, 120, 0), ("*fp64", 16384, 128, 128))],
)
def test_select_in_one_block(architecture, pointer, block, registers, shared, tmp_path):
    wide = pointer == "*fp64"
    out = pointer if wide else "*fp32"
    compiled = Compiled(
        _select.select_in_one_block,
        {"scores": pointer, "least": out, "g": out},
        {"SUPPORT": True, "RANKS": 2, "WIDE": wide, "BLOCK": block},
        architecture,
        tmp_path,
        num_warps=block // 1024,
    )
    compiled.assert_within(registers, shared)
    assert ".ftz" not in compiled.ptx, "denormals are flushed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("wide", [False, *larger(True)])
def test_select_by_histograms(architecture, wide, tmp_path):
    pointer = "*fp64" if wide else "*fp32"
    types = {"scores": pointer, "histograms": "*i32", "nonfinite": "*i32", "least": pointer, "g": pointer}
    constants = {"SUPPORT": True, "RANKS": 2, "WIDE": wide}
    counted = Compiled(
        _select.count_digits, types, constants | {"BLOCK": _select._PART}, architecture, tmp_path, aligned=["span"]
    )
    counted.assert_within(registers=255 if architecture == 80 else 168, shared=1024)
    assert any(line.startswith("VOTE") for line in counted.sass), "digits are counted by warp votes"
    Compiled(_select.read_histograms, types, constants, architecture, tmp_path).assert_within(registers=40, shared=16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("levels", "pack", "registers", "shared"), [(1, True, 40, 256), (15, True, 168, 1024)])
def test_count_sparsified(architecture, levels, pack, registers, shared, tmp_path):
    compiled = Compiled(
        count_sparsified.count_levels,
        {"counts": "*i32", "scores": "*fp32", "least": "*fp32", "g": "*fp32", "packed": "*u8"},
        {"LEVELS": levels, "PADDED": levels + levels // 15, "PACK": pack, "SPLIT": True, "BLOCK": 512},
        architecture,
        tmp_path,
        aligned=["row_bytes"],
    )
    compiled.assert_within(registers, shared)
    assert "div.full" not in compiled.ptx, "float32 division is approximate"
    assert ".ftz" not in compiled.ptx, "denormals are flushed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("levels", "registers"), [(0, 48), (15, 56)])
def test_sparsify(architecture, levels, registers, tmp_path):
    compiled = Compiled(
        sparsify.sparsify_rows,
        dict.fromkeys(("scores", "out", "least", "g"), "*fp32"),
        {"LEVELS": levels, "BLOCK": 1024},
        architecture,
        tmp_path,
    )
    compiled.assert_within(registers, 0)
    assert ".ftz" not in compiled.ptx, "denormals are flushed"
    assert "div.rn.f32" in compiled.ptx
    assert "div.full" not in compiled.ptx, "float32 division is approximate"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_betting_bounds(architecture, tmp_path):
    compiled = Compiled(
        betting_bounds.lower_bounds,
        {"counts": "*i32", "target": "fp64", "log_shares": "fp64", **dict.fromkeys(("shares", "bounds"), "*fp64")},
        {"LEVELS": 15, "SHARES": 32, "MAX_STEPS": 100, "BLOCK": 16},
        architecture,
        tmp_path,
    )
    compiled.assert_within(registers=112, shared=128)
    assert "lg2.approx" not in compiled.ptx, "a logarithm is approximate"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [4, *larger(1)])
def test_packed_gram(architecture, bits, tmp_path):
    tile, width = packed_gram._TILE, packed_gram._BYTES
    compiled = Compiled(
        packed_gram.gram_tile,
        {"out": "*i64", **dict.fromkeys(("other", "mask"), "*u8"), "rows": "*u8"},
        {"BITS": bits, "MASKED": True, "SYMMETRIC": True, "TILE": tile, "BYTES": width},
        architecture,
        tmp_path,
        aligned=["row_bytes", "span"],
    )
    compiled.assert_within(registers=248, shared=16384)
    tensor_core = {80: "IMMA", 90: "IGMMA", 100: "IMMA"}[architecture]
    assert any(line.split()[0].startswith(tensor_core) for line in compiled.sass), "tensor cores are not used"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pointer", "registers", "shared"),
    [("*fp32", _of(96, 128), 64), *larger(("*bf16", _of(96, 128), 64), ("*fp64", _of(192, 200), 64))],
)
def test_soft_topk(architecture, pointer, registers, shared, tmp_path):
    out = "*fp64" if pointer == "*fp64" else "*fp32"
    numbers = ("shrink", "factor0", "factor1", "lowest", "highest", "settled", "resolution")
    compiled = Compiled(
        soft_topk.soft_topk_rows,
        {"scores": pointer, "out": out, "pivots": out, "offsets": "*fp64", "k": "i32"} | dict.fromkeys(numbers, "fp64"),
        {"BLOCK": soft_topk._BLOCK},
        architecture,
        tmp_path,
    )
    compiled.assert_within(registers, shared)
    # exp looks at high words so, log starts the reciprocal of 1 + its mantissa so: neither loses anything.
    flushed = set(re.findall(r"\w+\S*\.ftz\S*", compiled.ptx))
    assert flushed <= {"abs.ftz.f32", "rcp.approx.ftz.f64"}


def _gradients(widths, activation, architecture, folder):
    """The kernel from noise to gradients, for layers of these widths."""
    constants = {"LAYERS": len(widths), "ACTIVATION": activation, "TARGETED": True, "OFFSET": True}
    blocks = [max(16, triton.next_power_of_2(width)) for width in widths]
    for i in range(3):
        constants |= {f"WIDTH{i + 1}": (*widths, 1, 1)[i], f"BLOCK{i + 1}": (*blocks, 16, 16)[i]}
    constants |= {"WIDTH": max(blocks), "ROWS": mlp_smoothgrad.ROWS, "COLUMNS": mlp_smoothgrad.COLUMNS}
    types = {f"{kind}{i}": "*fp32" for kind in ("weight", "bias") for i in (1, 2, 3)}
    types |= dict.fromkeys(("x", "scores", "exchange"), "*fp32")
    types |= dict.fromkeys(("target", "image_ids", "classes", "sample_offset"), "*i64")
    types |= dict.fromkeys(("seed_low", "seed_high", "first_sample"), "i64") | {"sigma": "fp64"}
    compiled = Compiled(
        mlp_smoothgrad.noisy_gradients,
        types,
        constants,
        architecture,
        folder,
        num_warps=mlp_smoothgrad.WARPS,
        num_stages=mlp_smoothgrad.STAGES,
        enable_fp_fusion=False,
    )
    assert "tf32" not in compiled.ptx, "products of float32 are rounded"
    assert "div.full" not in compiled.ptx, "float32 division is approximate"
    assert "ld.global.nc" not in compiled.ptx, "what other threads have just stored may be read from a stale cache"
    return compiled, blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_smoothgrad(architecture, tmp_path):
    compiled, blocks = _gradients((256, 256, 10), "relu", architecture, tmp_path)
    compiled.assert_within(registers=_of(216, 232), shared=67840)
    assert ".ftz" not in compiled.ptx, "denormals are flushed"
    # A slice of 16 columns of each product, and nothing else: contracted, the noise would have other bits.
    products = [4 * blocks[0], *blocks[1:], blocks[0], mlp_smoothgrad.COLUMNS]
    fused = len(re.findall(r"fma\.rn\.f32(?!x2)", compiled.ptx)) + 2 * compiled.ptx.count("fma.rn.f32x2")
    assert fused == sum(products) * mlp_smoothgrad.ROWS * 16 // (32 * mlp_smoothgrad.WARPS)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_smoothgrad_of_two_layers(architecture, tmp_path):
    _gradients((64, 10), "gelu", architecture, tmp_path)[0].assert_within(_of(176, 200), shared=18688)


@pytest.mark.parametrize("activation", ["silu", *larger("tanh", "softplus", "elu")])
def test_mlp_smoothgrad_of_other_activations(activation, tmp_path):
    compiled, _ = _gradients((16, 10), activation, 90, tmp_path)
    compiled.assert_within(registers=176, shared=18688, stack=_of(0, 8) if activation == "silu" else 0)
    functions = set(re.findall(r"\b(?:sqrt|lg2|tanh|sin|cos)\.approx\S*", compiled.ptx))
    assert not functions, "an approximate function"


def _attention_pass(kernel, pointer, order, causal, rows, architecture, folder):
    """A pass over heads of D = Dv = 64."""
    array = Array(pointer, "i32", "i32", "i32")
    side = Side(array, array, array, array)
    compute = "*fp64" if pointer == "*fp64" else "*fp32"
    constants = {"D": 64, "DV": 64, "MAP": "elu", "ROWS": rows, "CAUSAL": causal, "NORMALIZE": True, "ORDER": order}
    rows_of_product, columns = (16, 16) if pointer == "*fp64" else (32, 64)
    constants |= {"BLOCK": rows_of_product, "BLOCK_V": columns}
    constants["BLOCK_D"] = rows_of_product if kernel is _attention_passes.sum_parts else columns
    types = dict.fromkeys(("scalars", "states", "visible"), compute) | {"side": side, "other": side, "out": array}
    types |= {"mask": "*u8", "eps": "fp64"}
    compiled = Compiled(
        kernel,
        types,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        architecture,
        folder,
        num_stages=linear_attention.STAGES[order],
    )
    assert "tf32" not in compiled.ptx, "products of float32 are rounded"
    assert "div.full" not in compiled.ptx, "float32 division is approximate"
    if kernel is not _attention_passes.sum_parts:
        assert ("cvt.rn.bf16" in compiled.ptx) == (pointer == "*bf16"), "rounded to nearest even, NaN kept"
    return compiled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "order", "causal", "registers", "shared"),
    [
        ("sum_parts", 2, False, 216, 12288),
        ("apply_features", 0, False, 80, 14336),
        ("apply_values", 2, True, 248, 10240),
        *larger(
            ("sum_parts", 0, False, 80, 14336),
            ("apply_features", 2, False, 240, 10240),
            ("apply_features", 2, True, 240, 10240),
            ("apply_values", 2, False, 208, 8192),
        ),
    ],
)
def test_linear_attention(architecture, kernel, order, causal, registers, shared, tmp_path):
    passes = getattr(_attention_passes, kernel)
    rows = kernel != "sum_parts" or order > 0
    _attention_pass(passes, "*fp32", order, causal, rows, architecture, tmp_path).assert_within(registers, shared)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "pointer", "registers", "shared"),
    [
        ("apply_values", "*bf16", 248, 10240),
        *larger(
            ("sum_parts", "*fp64", 224, 8192),
            ("apply_features", "*fp64", 232, 8192),
            ("apply_values", "*fp64", 232, 8192),
        ),
    ],
)
def test_linear_attention_of_other_dtypes(architecture, kernel, pointer, registers, shared, tmp_path):
    passes = getattr(_attention_passes, kernel)
    _attention_pass(passes, pointer, 2, True, False, architecture, tmp_path).assert_within(registers, shared)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_linear_attention_scan(architecture, tmp_path):
    constants = {"CAUSAL": True, "BACKWARD": True, "BLOCK": 256}
    compiled = Compiled(_attention_passes.scan_parts, {"states": "*fp32"}, constants, architecture, tmp_path)
    compiled.assert_within(registers=40, shared=0)


@pytest.fixture
def grids(monkeypatch):
    """The grids of launches that are asked for in place of what runs on a GPU, by the kernel's name."""
    asked = {}

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            asked.setdefault(self.name, []).append(grid)
            return lambda *arguments, **options: None

    for module, *names in (
        (count_sparsified, "count_levels"),
        (sparsify, "sparsify_rows"),
        (linear_attention, "sum_parts", "scan_parts", "apply_features", "apply_values"),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Launcher(name))
    for module in (count_sparsified, sparsify):
        monkeypatch.setattr(module, "support", lambda rows, *ranks: rows.new_empty(2, rows.shape[0]))
    return asked


def meta(*shape, **options):
    return torch.empty(shape, device="meta", **options)


def test_any_number_of_images_and_elements_fits_a_grid(grids):
    """Only axis 0 holds more than 65535 programs."""
    count_sparsified.count_sparsified(meta(70_000, 600, 1, dtype=torch.int32), meta(70_000, 3, 600), 9, 9, None)
    assert grids["count_levels"] == [(2, 32_768, 1), (2, 32_768, 1), (2, 4_464, 1)]
    sparsify.sparsify(meta(3, 70_000_000), meta(3, 70_000_000), 9, 9, 1)
    assert grids["sparsify_rows"] == [(3 * 68_360,)]


def test_tiles_of_attention_that_read_the_same_are_neighbours(grids):
    """Programs along axis 0 start one after another: tiles on another axis would start when all heads are done."""
    q, v = meta(2, 3, 600, 100), meta(2, 3, 600, 70)
    linear_attention.linear_attention_backward(q, q, v, v, q, q, v, "elu", False, True, None, 0.0)
    # 2 parts of 512 positions; 4 tiles of 32 columns of D by 2 of 64 of Dv. 19 blocks of 32 positions; 2 tiles of 64.
    assert grids["sum_parts"] == [(6 * 2 * 4 * 2,)] * 2
    assert grids["apply_values"] == [(6 * 19 * 2,)] * 2
