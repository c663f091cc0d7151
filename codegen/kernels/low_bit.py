"""Read tiles of packed low-bit weights; `runtime/schemes/packing.py` says how they lie.

A word of 4 bytes holds a few columns of one row, and the words of a panel's 16 rows lie side by
side: a thread reads those of 4 rows at once. `Packed` (`codegen/triton_packed.py`) is baked in.
Codes become floats by placing their bits, since a GPU converts at a quarter of the rate of adding:

    integers   in the mantissa of a float32 between 1 and 2; scale and zero are made to fit
    e4m3       its exponent and mantissa in those of a float16, 2^8 times too small
    e2m1       likewise, 2^14 times too small
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(matrix_ptr, n, start, PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the codes of rows n [N], columns start..start + BLOCK_K: uint32 [BLOCK_K, N].

    4-bit codes lie at bit 16 of the result, 8-bit ones at bit 15, and other bits around them.
    """
    WORDS: tl.constexpr = BLOCK_K * PACKED.bits // 32
    LAST: tl.constexpr = PACKED.columns * PACKED.bits // 32
    word = start * PACKED.bits // 32 + tl.arange(0, WORDS)
    at = (n // 16).to(tl.int64) * (PACKED.panel // 4) + n % 16
    at = at[None, :] + (PACKED.scales // 4 + word * 16)[:, None]
    mask = (n < PACKED.rows)[None, :]
    if LAST % WORDS != 0:
        mask &= (word < LAST)[:, None]
    words_ptr = tl.multiple_of(matrix_ptr, 16).to(tl.pointer_type(tl.uint32))
    words = tl.load(words_ptr + at, mask=mask, other=0)
    # Bytes in order, low halves before high ones.
    words = tl.join(words << 16, words)
    if PACKED.bits == 4:
        words = tl.join(words, words >> 8)
        words = tl.permute(tl.join(words, words >> 4), (0, 4, 2, 3, 1))
    else:
        words = tl.permute(tl.join(words >> 1, words >> 9), (0, 2, 3, 1))
    return tl.reshape(words, (BLOCK_K, n.shape[0]))


@triton.jit
def load_scales(
    matrix_ptr, n, start, KIND: tl.constexpr, PACKED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Load the scales (KIND 0) or zeros (KIND 1) of a tile's groups: [groups, N]."""
    GROUPS: tl.constexpr = max(BLOCK_K // PACKED.group, 1)
    group = start // PACKED.group + tl.arange(0, GROUPS)
    if PACKED.shared_scales:
        at = group[:, None] + tl.zeros_like(n)[None, :]
    else:
        at = (group * PACKED.kinds + KIND)[:, None] * 16 + (n % 16)[None, :]
    matrix_ptr = matrix_ptr + (n // 16).to(tl.int64)[None, :] * PACKED.panel
    mask = (n < PACKED.rows)[None, :] & (group * PACKED.group < PACKED.columns)[:, None]
    if PACKED.name == "mxfp4":
        exponents = tl.load(matrix_ptr + at, mask=mask, other=0).to(tl.int32)
        scales = (exponents << 23).to(tl.float32, bitcast=True)
    else:
        if PACKED.name == "int4":
            scales_ptr = matrix_ptr.to(tl.pointer_type(tl.float16))
        else:
            scales_ptr = matrix_ptr.to(tl.pointer_type(tl.float32))
        scales = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return scales


@triton.jit
def from_minifloat(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """Convert float codes of `load_codes` to float32; their bias is that of float16 then."""
    PLACE: tl.constexpr = 16 if BITS == 4 else 15
    VALUE: tl.constexpr = ((1 << (BITS - 1)) - 1) << (10 - MANTISSA)
    half = (codes >> (PLACE + MANTISSA - 10)) & VALUE
    half |= (codes >> (PLACE + BITS - 16)) & 0x8000
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_packed(matrix_ptr, n, start, PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load what the weights of rows n [N] stand for: float32 [BLOCK_K, N]; rows beyond are 0."""
    codes = load_codes(matrix_ptr, n, start, PACKED, BLOCK_K)
    scales = load_scales(matrix_ptr, n, start, 0, PACKED, BLOCK_K)
    GROUPS: tl.constexpr = scales.shape[0]
    if PACKED.name == "fp8":
        values, scales = from_minifloat(codes, 8, 3), scales * 256.0
    elif PACKED.name == "mxfp4":
        values, scales = from_minifloat(codes, 4, 1), scales * 16384.0
    else:
        # 1 + code / ONE, and ONE + half is what stands for 0. The float16 scales of int4 are short
        # enough for exact products.
        ONE: tl.constexpr = 128.0 if PACKED.bits == 4 else 256.0
        MASK: tl.constexpr = 0xF0000 if PACKED.bits == 4 else 0x7F8000
        if PACKED.kinds == 2:
            zeros = load_scales(matrix_ptr, n, start, 1, PACKED, BLOCK_K) - ONE * scales
        elif PACKED.bits == 4:
            zeros = -(ONE + 8) * scales
        else:
            codes ^= 0x400000  # int8 is signed: from its smallest upwards
            zeros = -(ONE + 128) * scales
        values = ((codes & MASK) | 0x3F800000).to(tl.float32, bitcast=True)
        scales = ONE * scales
    values = tl.reshape(values, (GROUPS, BLOCK_K // GROUPS, n.shape[0])) * scales[:, None, :]
    if PACKED.name == "int4" or PACKED.name == "int8":
        values += zeros[:, None, :]
    return tl.reshape(values, (BLOCK_K, n.shape[0]))


@triton.jit
def dot_packed(matrix_ptr, x, n, start, PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Multiply x [BLOCK_K] by a tile and add up within words: float32 [N, BLOCK_K * bits / 32].

    The columns of a word are in one thread, and so few sums are kept from step to step.
    """
    WORDS: tl.constexpr = BLOCK_K * PACKED.bits // 32
    product = load_packed(matrix_ptr, n, start, PACKED, BLOCK_K) * x[:, None]
    product = tl.reshape(product, (WORDS, BLOCK_K // WORDS, n.shape[0]))
    return tl.trans(tl.sum(product, axis=1))
