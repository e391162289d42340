"""Thresholding of levels to bits, 64 pixels at a time.

`at_least` compares 64 consecutive pixels with a few vector instructions (SSE, AVX2, AVX-512 or NEON, as LLVM
selects) and returns one 64-bit word, the first pixel in the lowest bit. For a map in RLE order, runs are found in these
words directly. For a map in C order, `pack` stores the words and `transpose` transposes the bits, which take 1/8
(uint8) or 1/32 (float32) of the memory of the map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numpy.typing import NDArray

from cloudrt.kernels.jit import intrinsic, kernel

BITS = 64
ONE = np.uint64(1)

index = np.uint64
"""Type of array indices: for signed indices, numba tests at each access whether they are negative."""


def _data(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """Return the address of the first element of the array that is the first argument."""
    proxy: Any = cgutils.create_struct_proxy
    return proxy(signature.args[0])(context, builder, value=arguments[0]).data


@intrinsic
def at_least(_context: Any, array: Any, _index: Any, _least: Any) -> Any:
    """`at_least(array, i, least)`: a word whose bit k is `array.flat[i + k] >= least`; reads 64 elements."""
    integer = isinstance(array.dtype, types.Integer)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature, arguments)
        vector = ir.VectorType(context.get_data_type(array.dtype), BITS)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), vector.as_pointer())
        values = builder.load(address, align=array.dtype.bitwidth // 8)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[2], ir.IntType(32)(0))
        spread = ir.Constant(ir.VectorType(ir.IntType(32), BITS), [0] * BITS)
        least = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), spread)
        compare = builder.icmp_unsigned if integer else builder.fcmp_ordered  # ordered: NaN is never on
        return builder.bitcast(compare(">=", values, least), ir.IntType(BITS))

    return types.uint64(array, types.intp, array.dtype), generate


@intrinsic
def trailing_zeros(_context: Any, _word: Any) -> Any:
    """`trailing_zeros(word)`: the position of the lowest set bit of a word that is not zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


@intrinsic
def leading_zeros(_context: Any, _word: Any) -> Any:
    """`leading_zeros(word)`: 63 minus the position of the highest set bit of a word that is not zero."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.uint64), generate


@intrinsic
def bit_count(_context: Any, _word: Any) -> Any:
    """`bit_count(word)`: the number of set bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    """`pointer(address)`: a pointer to a memory address, for `numba.carray`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def store_word(_context: Any, text: Any, _at: Any, _word: Any) -> Any:
    """`store_word(text, at, word)`: write the 8 bytes of `word` to `text[at : at + 8]`, lowest byte first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = _data(context, builder, signature, arguments)
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        builder.store(arguments[2], address, align=1)
        return context.get_dummy_value()

    return types.void(text, types.intp, types.uint64), generate


@kernel
def word_at(flat: NDArray[Any], begin: int, count: int, least: Any) -> np.uint64:
    """Return a word whose bit k is `flat[begin + k] >= least`, for k < `count` <= 64; does not read past the end."""
    if begin + BITS <= flat.size:
        word: np.uint64 = at_least(flat, begin, least)
        return word if count == BITS else word & ((ONE << np.uint64(count)) - ONE)
    word = np.uint64(0)
    for k in range(count):
        if flat[begin + k] >= least:
            word |= ONE << np.uint64(k)
    return word


@kernel
def pack(lines: NDArray[Any], least: Any, words: NDArray[np.uint64]) -> None:
    """Threshold `lines`, (lines, length), at `least`; `words` is (lines, ceil(length / 64)), padded with zero bits."""
    count, length = lines.shape
    flat = lines.reshape(lines.size)
    last = words.shape[1] - 1
    for line in range(count):
        begin = line * length
        for w in range(last):
            words[line, w] = at_least(flat, begin + BITS * w, least)
        words[line, last] = word_at(flat, begin + BITS * last, length - BITS * last, least)


@kernel
def transpose(rows: NDArray[np.uint64], height: int, width: int, columns: NDArray[np.uint64]) -> None:
    """Transpose the bits of `rows`, (height, ceil(width / 64)), to `columns`, (width, ceil(height / 64)).

    Blocks of 64x64 bits are transposed by swapping quarters recursively (Warren, Hacker's Delight, 2nd edition,
    section 7-3).
    """
    block = np.empty(BITS, np.uint64)
    for tall in range(columns.shape[1]):
        top = BITS * tall
        filled = min(BITS, height - top)
        for wide in range(rows.shape[1]):
            some = np.uint64(0)
            for k in range(filled):
                block[k] = rows[top + k, wide]
                some |= block[k]
            block[filled:] = 0
            if some:
                _transpose_block(block)
            left = BITS * wide
            for k in range(min(BITS, width - left)):
                columns[left + k, tall] = block[k]


@kernel
def _transpose_block(block: NDArray[np.uint64]) -> None:
    half = 32
    low = np.uint64(0x00000000FFFFFFFF)
    while half:
        shift = np.uint64(half)
        for begin in range(0, BITS, 2 * half):
            for k in range(begin, begin + half):
                swapped = ((block[k] >> shift) ^ block[k + half]) & low
                block[k + half] ^= swapped
                block[k] ^= swapped << shift
        half >>= 1
        low ^= low << np.uint64(half)
