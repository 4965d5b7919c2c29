"""Runs every kernel on memory of exactly the lengths of params.h: `bounds.py LIBRARY`.

Made for the library with AddressSanitizer, which ends the process at the first byte outside. Only
ctypes: a sanitizer sees memory from malloc, and torch is slow to load under it.
"""

from __future__ import annotations

import ctypes
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from params import (
    Compare,
    Dequantize4,
    Dequantize8,
    Emulator,
    Int8Dequantize,
    Int8Flags,
    Int8Linear,
    Int8Outliers,
    Int8Rows,
    IntegerLinear4,
    IntegerRows,
    Linear4,
    Linear8,
    Mean,
    NonFinite,
    Outliers,
    Quantize4,
    Quantize8,
    Scales,
    pieces,
)

SIZES = {"f32": 4, "f16": 2, "bf16": 2}
LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
LIBC.malloc.argtypes = [ctypes.c_size_t]
RANDOM = random.Random(1)


def memory(size: int, content: bytes | None = None) -> int:
    """So many bytes and no more; never freed."""
    address: int = LIBC.malloc(size)
    ctypes.memmove(address, RANDOM.randbytes(size) if content is None else content, size)
    return address


def scales(blocks: int, blocksize: int, kind: str) -> Scales:
    """Scales of one kind."""
    result = Scales(log2_blocksize=blocksize.bit_length() - 1, log2_nested_blocksize=8)
    if kind == "plain":
        result.absmax = memory(4 * blocks)
    else:
        result.codes = memory(blocks)
    if kind == "nested":
        result.codebook, result.offset = memory(1024), memory(4)
        result.nested_absmax = memory(4 * (-(-blocks // 256)))
    return result


def blockwise(run: Any, name: str, size: int) -> None:
    """Kernels over flat tensors, with ends of every kind."""
    for n in (1, 2, 7, 8, 31, 33, 255, 257, 2049):
        for blocksize, kind in ((32, "e8m0"), (64, "nested"), (4096, "plain")):
            log2, blocks = blocksize.bit_length() - 1, -(-n // blocksize)
            first = 32 if n > 32 else 0
            run(
                f"dequantize4_{name}",
                Dequantize4(
                    packed=memory((n + 1) // 2),
                    out=memory(size * (n - first)),
                    first=first,
                    n=n - first,
                    scales=scales(blocks, blocksize, kind),
                ),
                1,
            )
            run(
                f"quantize4_{name}",
                Quantize4(
                    x=memory(size * n),
                    packed=memory((n + 1) // 2),
                    scales=memory(blocks * (1 if kind == "e8m0" else 4)),
                    n=n,
                    log2_blocksize=log2,
                    scale=int(kind == "e8m0"),
                    nonfinite=NonFinite(first=memory(8)),
                ),
                2,
            )
            run(
                f"quantize8_{name}",
                Quantize8(
                    x=memory(size * n),
                    subtract=memory(4),
                    pivots=memory(1024),
                    order=memory(256),
                    codes=memory(n),
                    absmax=memory(4 * blocks),
                    n=n,
                    log2_blocksize=log2,
                ),
                2,
            )
            run(
                f"dequantize8_{name}",
                Dequantize8(
                    codes=memory(n),
                    values=memory(1024),
                    absmax=memory(4 * blocks),
                    offset=memory(4),
                    out=memory(size * n),
                    n=n,
                    log2_blocksize=log2,
                ),
                1,
            )


def linear(run: Any, kernel: str, name: str, size: int) -> None:
    """Four-bit products."""
    sizes = [(1, 1, 64), (5, 17, 192), (8, 33, 448)]
    if "mid" in kernel:
        sizes = [(1, 1, 64), (70, 67, 192), (133, 131, 64)]
    elif "gemv" in kernel:
        sizes = [(1, 1, 1), (5, 9, 77)]
    for m, n, k in sizes:
        for blocksize, kind in ((32, "plain"), (32, "e8m0"), (64, "nested"), (128, "plain")):
            blocks = -(-n * k // blocksize)
            params = Linear4(
                x=memory(size * m * k),
                packed=memory((n * k + 1) // 2),
                bias=memory(2 * n),
                y=memory(size * m * n),
                m=m,
                n=n,
                k=k,
                scales=scales(blocks, blocksize, kind),
                bias_dtype=1,
                tokens={32: 128, 64: 32, 128: 64}[blocksize],
                rows=64 if blocksize == 64 else 128,
            )
            run(f"{kernel}_{name}", params, 2)


def bytes_and_integers(run: Any, name: str, size: int) -> None:
    """Products with byte codes, and of integers with four-bit codes."""
    for m, n, k in ((1, 1, 1), (5, 9, 77), (9, 10, 320)):
        for table in (False, True):
            params = Linear8(
                x=memory(size * m * k),
                codes=memory(n * k),
                values=memory(1024) if table else None,
                absmax=memory(4 * (-(-n * k // 64) if table else n)),
                bias=memory(2 * n),
                y=memory(size * m * n),
                m=m,
                n=n,
                k=k,
                log2_blocksize=6,
                bias_dtype=2,
            )
            run(f"linear8_gemv_{name}", params, 2)
        groups = -(-k // 256)
        rows = IntegerRows(
            x=memory(size * m * k),
            codes=memory(m * k),
            factors=memory(4 * m * groups),
            rows=m,
            columns=k,
            log2_group=8,
        )
        run(f"integer_rows_{name}", rows, 2)
        for blocksize, kind in ((32, "e8m0"), (64, "nested"), (128, "plain")):
            integers = IntegerLinear4(
                codes=rows.codes,
                factors=rows.factors,
                packed=memory((n * k + 1) // 2),
                bias=memory(4 * n),
                y=memory(size * m * n),
                m=m,
                n=n,
                k=k,
                scales=scales(-(-n * k // blocksize), blocksize, kind),
                log2_group=8,
            )
            run(f"integer_linear4_{name}", integers, 2)


def compare(run: Any, name: str, size: int) -> None:
    """Statistics, with short last runs and blocks."""
    for n in (1, 63, 65, 1000):
        for kind in ("e8m0", "nested", "plain"):
            params = Compare(
                x=memory(size * n),
                decoded=memory(4 * n),
                out=memory(56 * -(-n // 192)),
                n=n,
                run=192,
                block=64,
                scales=scales(-(-n // 64), 64, kind),
            )
            run(f"compare_{name}", params, 2)


def int8(run: Any, name: str, size: int) -> None:
    """LLM.int8()."""
    for m, n, k in ((1, 1, 1), (3, 5, 37), (9, 11, 64)):
        x, flags = memory(size * m * k), memory(k, bytes(k))
        found = Outliers(columns=memory(4 * k), count=memory(4))
        run(f"int8_flags_{name}", Int8Flags(x=x, flags=flags, rows=m, columns=k, threshold=1), 1)
        run("int8_outliers", Int8Outliers(flags=flags, columns=k, outliers=found), 1, 1024)
        rows = Int8Rows(
            x=x, flags=flags, codes=memory(m * k), absmax=memory(4 * m), rows=m, columns=k
        )
        run(f"int8_rows_{name}", rows, m)
        run(
            f"int8_dequantize_{name}",
            Int8Dequantize(
                codes=rows.codes, absmax=rows.absmax, out=memory(size * m * k), rows=m, columns=k
            ),
            1,
        )
        for kernel in ("int8_linear_small", "int8_finish"):
            run(
                f"{kernel}_{name}",
                Int8Linear(
                    codes=rows.codes,
                    sums=memory(4 * m * n),
                    x_absmax=rows.absmax,
                    weight=memory(n * k),
                    absmax=memory(4 * n),
                    bias=memory(4 * n),
                    y=memory(size * m * n),
                    x=x,
                    outliers=found,
                    m=m,
                    n=n,
                    k=k,
                ),
                1,
            )


def main() -> None:
    """Run all of them."""
    emulator = Emulator(Path(sys.argv[1]))
    ran = set()

    def run(name: str, params: Any, grid: int, block: int = 256) -> None:
        emulator.launch(name, params, pieces(grid, 1), block)
        ran.add(name)

    for name, size in SIZES.items():
        blockwise(run, name, size)
        int8(run, name, size)
        linear(run, "linear4_gemv", name, size)
        bytes_and_integers(run, name, size)
        compare(run, name, size)
        if name != "f32":
            linear(run, "linear4_mid", name, size)
            for tokens in (8, 16, 32):
                linear(run, f"linear4_small{tokens}", name, size)
    for n in (1, 9, 33, 9000):
        run("mean_f32", Mean(x=memory(4 * n), out=memory(4), n=n), 1, 1024)
    print(len(ran), "kernels ran")


if __name__ == "__main__":
    main()
