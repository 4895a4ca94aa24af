"""A row [D] in the registers of a program: cut into pieces whose widths are powers of two, which Triton's tensors need.

1152 columns are pieces of 1024 and 128, so no lane is idle; one tensor of 2048 would leave 44 % of them so. Where D is
not the sum of two powers of two, the last piece has columns beyond D. A row in registers is a tuple with a tensor for
each piece.
"""

import triton
import triton.language as tl

LANE = 80  # bytes that a lane holds of each tensor at most; of a row of 1152 in bfloat16 each lane of a warp has 72


def pieces(width: int) -> tuple[tuple[int, int], ...]:
    """First column and width of each piece: the largest power of two that fits, and one that holds the rest."""
    head = 1 << (width.bit_length() - 1)
    return ((0, head),) if head == width else ((0, head), (head, triton.next_power_of_2(width - head)))


def warps(bytes: int) -> int:
    """Of a program that holds so many bytes. Where one warp holds a row, its sums need no barrier."""
    return min(16, triton.next_power_of_2(triton.cdiv(bytes, 32 * LANE)))


def divisor(by: int) -> tuple[int, int]:
    """The numbers with which `divide` divides by `by`, 1 to 2^31 - 1, without a division.

    With s = ⌈log2 by⌉ these are ⌈2^(31+s) / by⌉ and 31 + s (Granlund and Montgomery, 1994, theorem 4.2).
    """
    bits = 31 + (by - 1).bit_length()
    return -(-(1 << bits) // by), bits


@triton.jit
def divide(number, multiplier, bits):
    """number // by as int64, number from 0 to 2^31 - 1, with the two numbers of `divisor`."""
    return ((number.to(tl.uint64) * multiplier.to(tl.uint32).to(tl.uint64)) >> bits.to(tl.uint64)).to(tl.int64)


@triton.jit
def load_row(row, there, other, EVICT: tl.constexpr, PIECES: tl.constexpr, D: tl.constexpr):
    """The row that begins at the pointer `row`; `other` where the condition `there` does not hold (None: it does)."""
    parts = ()
    for i in tl.static_range(len(PIECES)):
        col = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = there
        if PIECES[i][0] + PIECES[i][1] > D:
            mask = col < D if there is None else col < tl.where(there, D, 0)
        parts = parts + (tl.load(row + col, mask, other=None if mask is None else other, eviction_policy=EVICT),)
    return parts


@triton.jit
def store_row(row, parts, there, PIECES: tl.constexpr, D: tl.constexpr):
    """Writes a row to where the pointer `row` shows, in its storage type, if the condition `there` holds."""
    for i in tl.static_range(len(PIECES)):
        col = PIECES[i][0] + tl.arange(0, PIECES[i][1])
        mask = there
        if PIECES[i][0] + PIECES[i][1] > D:
            mask = col < D if there is None else col < tl.where(there, D, 0)
        tl.store(row + col, parts[i].to(row.dtype.element_ty), mask)


@triton.jit
def cast(parts, ACC: tl.constexpr, PIECES: tl.constexpr):
    """The row in the type of the accumulators."""
    row = ()
    for i in tl.static_range(len(PIECES)):
        row = row + (parts[i].to(ACC),)
    return row


@triton.jit
def modulate(sum, scale, shift, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, PIECES: tl.constexpr,
             D: tl.constexpr):
    """LN(sum)·(1 + scale) + shift, the LN without affine and only if NORM; scale, shift: rows, or None for 0."""
    mean, factor = 0.0, 1.0
    if NORM:
        total = 0.0
        for i in tl.static_range(len(PIECES)):
            total += tl.sum(sum[i], 0)  # columns beyond D are 0
        mean = total / D
        squares = 0.0
        for i in tl.static_range(len(PIECES)):
            part = sum[i] - mean
            if PIECES[i][0] + PIECES[i][1] > D:
                part = tl.where(PIECES[i][0] + tl.arange(0, PIECES[i][1]) < D, part, 0.0)
            squares += tl.sum(part * part, 0)
        factor = tl.rsqrt(squares / D + EPS)
    row = ()
    for i in tl.static_range(len(PIECES)):
        y = sum[i]
        if NORM:
            y = (y - mean) * factor
        if scale is not None:
            y *= 1 + scale[i].to(ACC)
        if shift is not None:
            y += shift[i].to(ACC)
        row = row + (y,)
    return row
