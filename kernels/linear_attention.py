"""Kernel attention and its first two derivatives; definition and letters: robattr_fast/reference/linear_attention.py.

Rows and keys mirror each other. A side has features f, values y and a weight c per position, and each of them its
derivative in the direction of a double backward, written f', y', c':

    rows   f = a, f' = a.    y = w, y' = w. = -rho w    c = e, c' = e.
    keys   f = b, f' = b.    y = v, y' = v.             c = 1, c' = 0

The state of a side is M = sum f y^T with m = sum c f, and of the second order also
M' = sum f' y^T + f y'^T with m' = sum c f' + c' f. All that is wanted of one side comes from the state of the other:

    M^T f                 n of rows, grad v of keys          M'^T f + M^T f'            n. and (grad v).
    M y + c m             grad a of rows, grad b of keys     M' y + M y' + c m' + c' m  (grad a). and (grad b).

so four passes do: `sum_parts` sums the states of parts of a side, `scan_parts` adds the parts up, `apply_features` and
`apply_values` multiply with them. Causal, the state of a part becomes that of all parts before it (rows look back at
keys) or behind it (keys look ahead to rows), and pairs within a part are multiplied as such.
Sums are formed in the same order whatever the device and the batch. Nothing of N x N exists.
"""

import torch
import triton

from robattr_fast.kernels._attention_passes import apply_features, apply_values, scan_parts, sum_parts
from robattr_fast.kernels._attention_tiles import Array, Side

# Rows and columns of a product of float32. From 64 rows on Triton 3.7 hands it to the tensor cores of sm_100, which
# round to tf32, whatever precision is asked for.
_ROWS, _COLUMNS = 32, 64
_WIDE = 16  # rows and columns of one of float64
STAGES = (3, 3, 1)  # of the software pipeline, by the order of the derivative
# Positions of a part: causal, pairs within it are multiplied as such.
_SPAN, _CAUSAL_SPAN = 512, 64


def _array(x: torch.Tensor) -> Array:
    x = x if x.stride(3) == 1 else x.contiguous()
    return Array(x, *x.stride()[:3])


class _Problem:
    """The sizes and settings of one call, and its launches."""

    def __init__(
        self,
        order: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        feature_map: str,
        causal: bool,
        normalize: bool,
        mask: torch.Tensor | None,
        eps: float,
    ) -> None:
        batch, self.heads, rows, width = q.shape
        keys, value_width = v.shape[2:]
        self.width, self.value_width = width, value_width
        self.device, self.eps, self.batch_heads = q.device, eps, batch * self.heads
        self.positions = {True: rows, False: keys}  # by ROWS
        self.causal, self.normalize, self.order = causal, normalize, order
        wide = q.dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        most_rows, columns = (_WIDE, _WIDE) if wide else (_ROWS, _COLUMNS)
        self.block, self.block_d, self.block_v = (
            max(16, min(most, triton.next_power_of_2(size)))
            for most, size in ((most_rows, max(rows, keys)), (columns, width), (columns, value_width))
        )
        # Loads ahead of the products of the second order would take more registers than there are.
        self.options = {"D": width, "DV": value_width, "MAP": feature_map, "ORDER": order, "num_stages": STAGES[order]}
        self.span = _CAUSAL_SPAN if causal else _SPAN
        self.size = (2 if order == 2 else 1) * width * (value_width + 1)
        self.scalars = self._empty(self.batch_heads, 4, rows) if order else self._empty(1)
        self.visible = self.scalars if normalize else self._visible(batch, rows, keys)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _visible(self, batch: int, rows: int, keys: int) -> torch.Tensor:
        """How many keys each row sees, [B, rows]."""
        if self.mask is None:
            counts = torch.arange(1, keys + 1, device=self.device).expand(batch, keys)
        else:
            counts = self.mask.cumsum(1)
        counts = counts if self.causal else counts[:, -1:].expand(batch, rows)
        return counts.to(self.dtype).contiguous()

    def parts(self, of_rows: bool) -> int:
        return triton.cdiv(self.positions[of_rows], self.span)

    def state(self, side: Side, of_rows: bool) -> torch.Tensor:
        """The scanned state of a side, [B H, parts, ORDERS, D (DV + 1)]."""
        parts, positions = self.parts(of_rows), self.positions[of_rows]
        states = self._empty(self.batch_heads, parts, self.size)
        block_d = min(_ROWS, self.block_d)
        tiles = triton.cdiv(self.width, block_d) * triton.cdiv(self.value_width, self.block_v)
        sum_parts[(self.batch_heads * parts * tiles,)](
            side,
            self.mask,
            self.scalars,
            states,
            positions,
            self.heads,
            parts,
            self.span,
            ROWS=of_rows,
            BLOCK_D=block_d,
            BLOCK_V=self.block_v,
            **self.options,
        )
        if parts > 1 or self.causal:
            scan_parts[(self.batch_heads, triton.cdiv(self.size, 256))](
                states, parts, self.size, CAUSAL=self.causal, BACKWARD=of_rows, BLOCK=256
            )
        return states

    def apply_features(self, side: Side, other: Side, states: torch.Tensor, out: torch.Tensor, of_rows: bool) -> None:
        positions = self.positions[of_rows]
        blocks = triton.cdiv(positions, self.block)
        apply_features[(self.batch_heads * blocks,)](
            side,
            other,
            self.mask,
            self.scalars,
            states,
            self.visible,
            _array(out),
            self.eps,
            positions,
            self.heads,
            self.parts(not of_rows),
            self.span,
            blocks,
            ROWS=of_rows,
            CAUSAL=self.causal,
            NORMALIZE=self.normalize,
            BLOCK=self.block,
            BLOCK_V=self.block_v,
            **self.options,
        )

    def apply_values(self, side: Side, other: Side, states: torch.Tensor, out: torch.Tensor, of_rows: bool) -> None:
        positions = self.positions[of_rows]
        blocks = triton.cdiv(positions, self.block)
        apply_values[(self.batch_heads * blocks * triton.cdiv(self.width, self.block_d),)](
            side,
            other,
            self.mask,
            self.scalars,
            states,
            _array(out),
            positions,
            self.heads,
            self.parts(not of_rows),
            self.span,
            blocks,
            ROWS=of_rows,
            CAUSAL=self.causal,
            BLOCK=self.block,
            BLOCK_D=self.block_d,
            **self.options,
        )

    def derivatives(
        self, rows: Side, keys: Side, of_grad: torch.Tensor, of_q: torch.Tensor, of_k: torch.Tensor, of_v: torch.Tensor
    ) -> None:
        """Of the order of the problem. Of the first, ``of_grad`` is not written."""
        of_keys = self.state(keys, False)
        self.apply_features(rows, keys, of_keys, of_grad, True)
        of_rows = self.state(rows, True)
        self.apply_values(rows, keys, of_keys, of_q, True)
        self.apply_values(keys, rows, of_rows, of_k, False)
        self.apply_features(keys, rows, of_rows, of_v, False)


def linear_attention(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings) -> None:
    """Fill out [B, H, Nq, Dv]. settings: feature map, causal, normalize, mask bool [B, Nk] or None, eps."""
    problem = _Problem(0, q, k, v, *settings)
    x, key, value = _array(q), _array(k), _array(v)
    keys = Side(key, key, value, value)
    problem.apply_features(Side(x, x, x, x), keys, problem.state(keys, False), out, True)


def linear_attention_backward(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *settings,
) -> None:
    """Fill the gradients of q, k and v from that of the output; settings as of `linear_attention`."""
    rows, keys = (Side(x, x, y, y) for x, y in ((_array(q), _array(grad)), (_array(k), _array(v))))
    _Problem(1, q, k, v, *settings).derivatives(rows, keys, grad_v, grad_q, grad_k, grad_v)


def linear_attention_double_backward(
    of_grad: torch.Tensor,
    of_q: torch.Tensor,
    of_k: torch.Tensor,
    of_v: torch.Tensor,
    u_q: torch.Tensor,
    u_k: torch.Tensor,
    u_v: torch.Tensor,
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *settings,
) -> None:
    """Fill the gradients of grad, q, k and v from those of the gradients; settings as of `linear_attention`."""
    g = _array(grad)
    rows, keys = Side(_array(q), _array(u_q), g, g), Side(_array(k), _array(u_k), _array(v), _array(u_v))
    _Problem(2, q, k, v, *settings).derivatives(rows, keys, of_grad, of_q, of_k, of_v)
