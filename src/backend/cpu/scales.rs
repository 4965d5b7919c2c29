//! Scales as kernels take them: one f32 a block.

use std::ops::Range;

use super::kernels::{Isa, Kernels};
use crate::tensor::Scales;

/// [`Scales::decode`]
pub fn decode(isa: Isa, scales: Scales<'_>, first: usize, out: &mut [f32]) {
    let kernels = Kernels::<f32>::of(isa);
    scales.decode_by(kernels.decode_nested, kernels.decode_e8m0, first, out);
}

/// The scales of these blocks, where they lie or decoded.
pub fn of_blocks<'a>(
    isa: Isa,
    scales: Scales<'a>,
    blocks: Range<usize>,
    decoded: &'a mut Vec<f32>,
) -> &'a [f32] {
    match scales {
        Scales::Plain(scales) => &scales[blocks],
        quantized => {
            decoded.resize(blocks.len(), 0.0);
            decode(isa, quantized, blocks.start, decoded);
            decoded
        }
    }
}
