import pytest
import torch
from _operators import INTERPRETED, LONG_ROW, at_isa, backend, every_isa

from robattr_fast import backends
from robattr_fast.certificates.moments.summary import grow_gram
from robattr_fast.ops import packed_gram
from robattr_fast.reference._pack_levels import pack_levels, packed_row_bytes, unpack_levels

__all__ = ["backend"]

SIZES = [1, 513, 1025] if INTERPRETED else [1, 7, 512, 513, 1000, 40000]


def random_levels(shape: tuple[int, ...], num_levels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_levels + 1, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("num_levels", [1, 2, 15])
@pytest.mark.parametrize("n", SIZES)
def test_pack_round_trip(n: int, num_levels: int) -> None:
    levels = random_levels((2, 3, n), num_levels)
    rows = pack_levels(levels, num_levels)
    assert rows.shape == (2, 3, packed_row_bytes(n, num_levels))
    assert rows.shape[-1] % 64 == 0
    torch.testing.assert_close(unpack_levels(rows, num_levels, n), levels, rtol=0, atol=0)
    assert not unpack_levels(rows, num_levels)[..., n:].any()


def test_layout_is_little_endian() -> None:
    bits = torch.zeros(600, dtype=torch.uint8)
    bits[[0, 9, 513]] = 1
    packed = pack_levels(bits, 1)
    assert packed[[0, 1, 64]].tolist() == [1, 2, 2]
    assert int(packed.sum()) == 5
    nibbles = torch.tensor([3, 15, 0, 9], dtype=torch.uint8)
    assert pack_levels(nibbles, 15)[:3].tolist() == [3 + 16 * 15, 16 * 9, 0]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("num_levels", [1, 2, 15])
@pytest.mark.parametrize("n", SIZES)
def test_gram_is_the_dense_product(n: int, num_levels: int) -> None:
    first, second = random_levels((9, n), num_levels, 1), random_levels((4, n), num_levels, 2)
    weights = random_levels((n,), 1, 3)
    full = 1 if num_levels == 1 else 15
    mask = pack_levels(weights * full, full)
    a, b = first.to(torch.int64), second.to(torch.int64)
    rows, other = pack_levels(first, num_levels), pack_levels(second, num_levels)
    assert torch.equal(packed_gram(rows, num_levels), a @ a.T)
    assert torch.equal(packed_gram(rows, num_levels, other), a @ b.T)
    assert torch.equal(packed_gram(rows, num_levels, mask=mask), a * weights @ a.T)
    assert torch.equal(packed_gram(rows, num_levels, other, mask), a * weights @ b.T)


@pytest.mark.usefixtures("backend")
def test_gram_of_the_largest_values_is_exact() -> None:
    rows = pack_levels(torch.full((2, LONG_ROW), 15, dtype=torch.uint8), 15)
    assert packed_gram(rows, 15).unique().tolist() == [225 * LONG_ROW]


@pytest.mark.usefixtures("backend")
def test_gram_grows_by_new_rows() -> None:
    rows = pack_levels(random_levels((150, 777), 15), 15)
    gram = None
    for size in (1, 70, 70, 150):
        gram = grow_gram(gram, rows[:size], 15)
        assert torch.equal(gram, packed_gram(rows[:size], 15))


@every_isa
@pytest.mark.parametrize(("levels", "width"), [(1, 4992), (15, 20032)])
def test_every_instruction_set_gives_the_same_integers(isa: str, levels: int, width: int) -> None:
    rows = torch.randint(0, 256, (71, width), dtype=torch.uint8)
    arguments = levels, rows[5:14], torch.randint(0, 2, (width,), dtype=torch.uint8) * 255
    with at_isa(isa):
        found = packed_gram(rows, *arguments), packed_gram(rows, levels)
    with backends.use("reference", strict=True):
        assert torch.equal(found[0], packed_gram(rows, *arguments))
        assert torch.equal(found[1], packed_gram(rows, levels))


def test_operator_passes_opcheck() -> None:
    rows = pack_levels(random_levels((5, 100), 15), 15)
    torch.library.opcheck(torch.ops.robattr_fast.packed_gram, (rows, 15, rows[:2], rows[0]))


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, r"num_levels: got 16, takes an integer in \[1, 15\]", {"num_levels": 16}),
        (TypeError, "rows must be uint8", {"rows": torch.zeros(2, 64)}),
        (ValueError, "rows must have 2", {"rows": torch.zeros(64, dtype=torch.uint8)}),
        (ValueError, "multiple of 64", {"rows": torch.zeros(2, 63, dtype=torch.uint8)}),
        (ValueError, "other must have rows of 64", {"other": torch.zeros(2, 128, dtype=torch.uint8)}),
        (ValueError, "mask must have 1", {"mask": torch.zeros(1, 64, dtype=torch.uint8)}),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, arguments: dict) -> None:
    good = {"rows": torch.zeros(2, 64, dtype=torch.uint8), "num_levels": 1}
    with pytest.raises(error, match=match):
        packed_gram(**(good | arguments))


def test_pack_refuses_levels_above_the_largest() -> None:
    with pytest.raises(ValueError, match="must not exceed num_levels = 2, got 3"):
        pack_levels(torch.tensor([3], dtype=torch.uint8), 2)
    with pytest.raises(TypeError, match="levels must be uint8"):
        pack_levels(torch.zeros(3), 1)
