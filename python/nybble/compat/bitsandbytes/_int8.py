"""LLM.int8() (arXiv:2208.07339) by its steps: row-wise codes, integer product, scaling."""

from __future__ import annotations

import torch

from nybble import ops
from nybble.compat.bitsandbytes._blockwise import deliver
from nybble.errors import FormatError

_INT8_MAX = 127.0


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise FormatError(f"{name} should be {dtype}, got {tensor.dtype}")


def _codes(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """round(x * 127 / absmax), half to even; 0 where the scale is 0 or not finite."""
    factor = _INT8_MAX / absmax
    usable = torch.isfinite(factor) & torch.isfinite(absmax)
    scaled = x.float() * torch.where(usable, factor, 0.0)
    return torch.where(usable, torch.round(scaled), 0.0).to(torch.int8)


def _without_outliers(
    flat: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows with outlying elements set to 0, and the columns that have any (None: not asked)."""
    if threshold <= 0.0:
        return flat, None
    outlier = flat.abs() >= threshold
    columns = torch.nonzero(outlier.any(dim=0)).flatten()
    return flat.masked_fill(outlier, 0.0), columns


def int8_vectorwise_quant(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize each row to int8 by its largest magnitude.

    Args:
        A: Floating point [..., columns].
        threshold: Above 0: elements with at least this magnitude are outliers. They do not
            count for the scale, and their columns become 0 (with one row: only they do).

    Returns:
        int8 codes of the shape of `A`, float32 scales [rows], and the int64 numbers of the
        columns with outliers (None if threshold is 0).
    """
    if not A.is_floating_point() or A.dim() == 0:
        raise FormatError(f"rows of floating point are needed, got {tuple(A.shape)} of {A.dtype}")
    flat = A.detach().reshape(-1, A.shape[-1])
    inliers, columns = _without_outliers(flat, threshold)
    absmax = inliers.abs().amax(dim=1).float() if flat.shape[1] else flat.new_zeros(len(flat))
    codes = _codes(inliers, absmax.float()[:, None])
    if columns is not None and len(flat) > 1:
        codes[:, columns] = 0
    return codes.reshape(A.shape), absmax.float(), columns


def int8_double_quant(
    A: torch.Tensor,
    col_stats: torch.Tensor | None = None,
    row_stats: torch.Tensor | None = None,
    out_col: torch.Tensor | None = None,
    out_row: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize by rows and, apart from that, by columns.

    Args:
        A: Floating point [rows, columns].
        col_stats: None; memory for results cannot be passed. So for the next three.
        row_stats: None.
        out_col: None.
        out_row: None.
        threshold: As in `int8_vectorwise_quant`.

    Returns:
        Codes by rows, codes by columns, row scales, column scales, and columns with outliers.

    Raises:
        FormatError: Memory for a result was passed.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    passed = [name for name, value in given.items() if value is not None]
    if passed:
        raise FormatError(f"int8_double_quant allocates its results; {passed} must be None")
    by_row, row_scales, columns = int8_vectorwise_quant(A, threshold)
    flat = A.detach().reshape(-1, A.shape[-1])
    inliers, _ = _without_outliers(flat, threshold)
    column_scales = inliers.abs().amax(dim=0).float()
    by_column = _codes(inliers, column_scales).reshape(A.shape)
    return by_row, by_column, row_scales, column_scales, columns


def int8_vectorwise_dequant(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Decode rows: `A * stats / 127` in float32.

    Args:
        A: int8 [..., columns].
        stats: float32, one scale a row.
    """
    _check("A", A, torch.int8)
    columns = A.shape[-1] if A.dim() else 1
    scales = stats.to(A.device, torch.float32).reshape(-1)
    rows = A.numel() // columns if columns else scales.numel()
    if scales.numel() != rows:
        raise FormatError(f"{rows} rows need as many scales, got {scales.numel()}")
    how = ("int8", columns, list(A.shape), torch.float32)
    return ops.dequantize(A.detach().contiguous(), scales, None, None, *how)


def int8_linear_matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    dtype: torch.dtype = torch.int32,
) -> torch.Tensor:
    """The exact integer product `A @ B.T`.

    Args:
        A: int8 [..., columns].
        B: int8 [rows, columns].
        out: Takes the result if given.
        dtype: Dtype of the result.

    Returns:
        [..., rows] of `dtype`.
    """
    _check("A", A, torch.int8)
    _check("B", B, torch.int8)
    if B.dim() != 2 or A.dim() == 0 or A.shape[-1] != B.shape[1]:
        raise FormatError(
            f"A [..., columns] and B [rows, columns] should agree, got {tuple(A.shape)} and"
            f" {tuple(B.shape)}"
        )
    flat = A.reshape(-1, A.shape[-1])
    # float64 is exact up to 2^53, and has fast products where int32 has none.
    product = (flat.double() @ B.double().T).to(torch.int32)
    return deliver(product.reshape(*A.shape[:-1], B.shape[0]).to(dtype), out)


def int8_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scale an integer product: `A * row_stats * col_stats / 127² + bias`, as float16.

    Args:
        A: int32 [..., columns].
        row_stats: float32, one scale a row of the left factor.
        col_stats: float32, one scale a column of the result.
        out: Takes the result if given; of any floating point type.
        bias: [columns], or None.
    """
    _check("A", A, torch.int32)
    _check("row_stats", row_stats, torch.float32)
    _check("col_stats", col_stats, torch.float32)
    flat = A.reshape(-1, A.shape[-1])
    scales = row_stats.reshape(-1, 1) * col_stats.reshape(1, -1)
    values = flat * scales * (1 / _INT8_MAX**2)
    if bias is not None:
        values = values + bias
    return deliver(values.to(torch.float16).reshape(A.shape), out, cast=True)
