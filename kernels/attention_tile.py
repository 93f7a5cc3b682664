"""Parts that the attention kernels share: the rows of a tile and what they see, where keys are in the cache, and logits.

The query heads of a kv head are packed with the rows, so that a tile has no row to spare however few there are: packed row m is
head ``m % GROUP`` of row ``m // GROUP``. Logits are in base 2: with log2(e) in the scale, `exp2` serves for `exp`.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Sizes of an attention kernel that change from call to call, which are not specialised on.
SIZES = [
    "num_packed",
    "num_keys",
    "num_splits",
    "num_slots",
    "block_size",
    "window",
    "stride_slots",
    "stride_positions",
]


@triton.jit
def packed_rows(
    positions_ptr, start, num_packed, num_keys, window,
    GROUP: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Place among the packed rows, row, head in its group, first and last position that each sees; the last is -1 for none.

    A tile that is not full repeats the last packed row, and computes and stores the same for it: nothing needs a mask of rows.
    """
    o_m = tl.minimum(start + tl.arange(0, BLOCK_M), num_packed - 1)
    position = tl.load(positions_ptr + o_m // GROUP)
    last = tl.maximum(tl.minimum(position, num_keys - 1), -1).to(tl.int32)
    first = tl.zeros_like(last)
    if HAS_WINDOW:
        first = tl.minimum(tl.maximum(position - window + 1, 0), num_keys).to(tl.int32)
    return o_m.to(tl.int64), o_m // GROUP, o_m % GROUP, first, last


@triton.jit
def seen_range(first, last, num_keys):
    """The first position that any of the rows sees, and the one behind the last."""
    return tl.min(tl.where(last >= 0, first, num_keys), axis=0), tl.max(last, axis=0) + 1


@triton.jit
def split_range(first, last, num_keys, split, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The part of that in one split of the keys, from the start of a block of them."""
    begin, end = seen_range(first, last, num_keys)
    return tl.maximum(begin // BLOCK_N * BLOCK_N, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)


@triton.jit
def query_ptrs(ptr, o_n, o_g, head, stride_n, stride_h, o_d):
    """Pointers to rows of Q, or of what comes of them, [BLOCK_M, BLOCK_D]; `head` is the first of the group."""
    return ptr + (o_n.to(tl.int64) * stride_n + (head + o_g).to(tl.int64) * stride_h)[:, None] + o_d[None, :]


@triton.jit
def key_rows(key_slots_ptr, o_j, num_keys, num_slots, block_size):
    """Block and row in the cache of the key at each position, and the position from which on rows see it.

    That is the largest integer for keys that the cache does not hold: one comparison with a row's last serves for both.
    """
    slot = tl.load(key_slots_ptr + tl.minimum(o_j, num_keys - 1))
    held = (o_j < num_keys) & (slot.to(tl.uint64) < num_slots.to(tl.uint64))  # a negative slot is a large one
    seen_from = tl.where(held, o_j, 0x7FFFFFFF)
    slot = tl.where(held, slot, 0).to(tl.uint32)  # a division in 64 bits would take longer than the products
    block = slot // block_size.to(tl.uint32)
    return block.to(tl.int64), (slot - block * block_size.to(tl.uint32)).to(tl.int64), seen_from


@triton.jit
def logits_of(products, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in base 2. `scale` and `softcap` are as `base_2` gives them."""
    x = products * scale
    if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), which saturates at both ends
        x = softcap * (1.0 - 2.0 / (tl.exp2(x) + 1.0))
    return x


@triton.jit
def seen_logits(b_q, b_k, seen_from, first, last, scale, softcap, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits [BLOCK_M, BLOCK_N] of rows and keys; -inf where a row does not see a key."""
    b_s = logits_of(tl.dot(b_q, tl.trans(b_k), input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    seen = seen_from[None, :] <= last[:, None]
    if HAS_WINDOW:
        seen &= seen_from[None, :] >= first[:, None]
    return tl.where(seen, b_s, float("-inf"))


@triton.jit
def add_to_lse(largest, total, values):
    """Add `values` [M, N], in base 2, to sums [M] that are kept as ``total * 2 ** largest``; -inf adds nothing.

    Gives largest and total, by what the old total was scaled, and the summands as scaled.
    """
    new = tl.maximum(largest, tl.max(values, axis=1))
    finite = tl.where(new == float("-inf"), 0.0, new)
    scaled = tl.exp2(values - finite[:, None])
    factor = tl.exp2(largest - finite)
    return new, total * factor + tl.sum(scaled, axis=1), factor, scaled


LOG2_E = 1.4426950408889634


def base_2(scale: float, softcap: float | None) -> tuple[float, float]:
    """Return scale and softcap as `logits_of` takes them."""
    if softcap is None:
        return scale * LOG2_E, 0.0
    return 2 * scale / softcap * LOG2_E, softcap * LOG2_E
