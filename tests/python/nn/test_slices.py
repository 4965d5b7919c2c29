"""Rows that are taken out of a quantized tensor decode as they did inside it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import nybble as nb
from nybble.nn.slices import rows
from strategies import for_format, seeds, settings_of, tensor


@given(
    how=settings_of(),
    parts=st.integers(1, 5),
    blocks=st.sampled_from([1, 2, 3, 256]),
    seed=seeds,
)
def test_any_part_decodes_as_inside_the_whole(how, parts, blocks, seed):
    columns = how["blocksize"] or 32
    height = min(blocks, (1 << 15) // columns)
    x = tensor((parts, height, columns), torch.float32, seed)
    q = nb.quantize(for_format(x, how["format"]), **how)
    whole = q.dequantize()
    for part in range(parts):
        piece = rows(q, part * height, (part + 1) * height)
        assert tuple(piece.shape) == (height, columns)
        assert torch.equal(piece.dequantize(), whole[part])
        again = nb.QTensor.from_state_dict(piece.state_dict())
        assert torch.equal(again.dequantize(torch.float32), whole[part])


def test_scales_stay_quantized_where_groups_of_256_blocks_are_whole():
    q = nb.quantize(torch.randn(4, 256, 64), "nf4", nested=True)
    assert rows(q, 256, 512).nested
    assert rows(q, 256, 512).nbytes * 4 == q.nbytes - 4 + 4 * 4  # one mean each, not one for all
    plain = rows(q, 256, 300)
    assert not plain.nested
    assert torch.equal(plain.dequantize(), q.dequantize()[1, :44])


def test_a_block_across_the_border_is_refused():
    q = nb.quantize(torch.randn(2, 3, 32), "nf4")  # three rows are a block and a half
    with pytest.raises(nb.FormatError, match=r"begin and end with a block of 64 elements"):
        rows(q, 0, 3)
    q8 = nb.quantize(torch.randn(2, 3, 32), "int8")  # has a scale for each row
    assert torch.equal(rows(q8, 3, 6).dequantize(), q8.dequantize()[1])
