//! AVX-512 VBMI, which looks up 128 bytes at a time: eight-bit codebooks, 64 elements a step.
//!
//! A table of 256 floats is kept as four tables of bytes. A group of 64 floats is four vectors, a
//! to d. Packing their lanes to bytes interleaves them by parts of four: each quarter of the
//! bytes holds four elements of a, of b, of c and of d. Unpacking bytes to floats undoes that.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::avx512::{self, Avx512};
use super::simd::{self, GROUP, Simd, encode8, find_scales};
use super::{Kernels, Lanes};
use crate::format::cells::Octaves;
use crate::format::codebook::{Codebook, DYNAMIC};
use crate::quant::blockwise::{Blocks, Divisor};

/// Proof that the machine has AVX-512 VBMI beside everything of [`Avx512`].
#[derive(Clone, Copy, Debug)]
pub struct Vbmi(Avx512);

impl Vbmi {
    /// Asks the machine.
    pub fn detect(proof: Avx512) -> Option<Self> {
        is_x86_feature_detected!("avx512vbmi").then_some(Self(proof))
    }
}

/// The kernels of AVX-512, and those that VBMI makes faster.
pub const fn kernels<T: Lanes>(Vbmi(proof): Vbmi) -> Kernels<T> {
    Kernels {
        // SAFETY: this table is only had by a proof of the features.
        quantize8: |book, how, x, codes, scales| unsafe { quantize8(book, how, x, codes, scales) },
        // SAFETY: as above.
        dequantize8: |values, blocksize, codes, scales, out| unsafe {
            dequantize8(values, blocksize, codes, scales, out);
        },
        // SAFETY: as above.
        decode_nested: |codes, absmax, offset, out| unsafe {
            decode_nested(codes, absmax, offset, out);
        },
        ..avx512::kernels(proof)
    }
}

/// Elements of a step.
const STEP: usize = 2 * GROUP;

/// Floats by the byte: the first index is the place of the byte, the second the quarter of a table.
type Planes = [[__m512i; 4]; 4];

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn load(bytes: &[u8; 64]) -> __m512i {
    // SAFETY: the array is as long as the vector.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn quarters(bytes: &[u8; 256]) -> [__m512i; 4] {
    let quarters = bytes.as_chunks().0;
    [load(&quarters[0]), load(&quarters[1]), load(&quarters[2]), load(&quarters[3])]
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn planes(values: &[f32; 256]) -> Planes {
    let mut bytes = [[0u8; 256]; 4];
    for (i, values) in values.as_chunks::<16>().0.iter().enumerate() {
        // SAFETY: the array is as long as the vector.
        let values = unsafe { _mm512_loadu_si512(values.as_ptr().cast()) };
        let places = [
            values,
            _mm512_srli_epi32::<8>(values),
            _mm512_srli_epi32::<16>(values),
            _mm512_srli_epi32::<24>(values),
        ];
        for (bytes, values) in bytes.iter_mut().zip(places) {
            let part: &mut [u8; 16] = &mut bytes.as_chunks_mut().0[i];
            // SAFETY: the array is as long as the vector.
            unsafe {
                _mm_storeu_si128(part.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(values));
            }
        }
    }
    [quarters(&bytes[0]), quarters(&bytes[1]), quarters(&bytes[2]), quarters(&bytes[3])]
}

/// `table[index]` for 64 indices.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn bytes_at(table: &[__m512i; 4], index: __m512i) -> __m512i {
    let low = _mm512_permutex2var_epi8(table[0], index, table[1]);
    let high = _mm512_permutex2var_epi8(table[2], index, table[3]);
    _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high)
}

/// `table[index]` for 64 interleaved indices, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn floats_at(table: &Planes, index: __m512i) -> [__m512; 4] {
    let bytes = [
        bytes_at(&table[0], index),
        bytes_at(&table[1], index),
        bytes_at(&table[2], index),
        bytes_at(&table[3], index),
    ];
    let (low_ab, low_cd) =
        (_mm512_unpacklo_epi8(bytes[0], bytes[1]), _mm512_unpackhi_epi8(bytes[0], bytes[1]));
    let (high_ab, high_cd) =
        (_mm512_unpacklo_epi8(bytes[2], bytes[3]), _mm512_unpackhi_epi8(bytes[2], bytes[3]));
    [
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_ab, high_ab)),
        _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_ab, high_ab)),
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(low_cd, high_cd)),
        _mm512_castsi512_ps(_mm512_unpackhi_epi16(low_cd, high_cd)),
    ]
}

/// Between interleaved bytes and bytes in order, either way: a transposition of dwords.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn transposed(bytes: __m512i) -> __m512i {
    let places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_permutexvar_epi32(places, bytes)
}

/// What a search in an eight-bit codebook looks at.
struct Search {
    shift: [__m512i; 2],
    offset: [__m512i; 2],
    below: [[__m512i; 4]; 2],
    pivots: Planes,
}

impl Search {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    fn new(octaves: &Octaves, pivots: &[f32; 256]) -> Self {
        let (shift, offset): (&[u8; 128], &[u8; 128]) =
            (bytemuck::cast_ref(&octaves.shift), bytemuck::cast_ref(&octaves.offset));
        let (shift, offset) = (shift.as_chunks().0, offset.as_chunks().0);
        Self {
            shift: [load(&shift[0]), load(&shift[1])],
            offset: [load(&offset[0]), load(&offset[1])],
            below: [quarters(&octaves.below[0]), quarters(&octaves.below[1])],
            pivots: planes(pivots),
        }
    }

    /// The cell of each number.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    fn cells(&self, x: __m512) -> __m512i {
        let bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
        let bits = _mm512_max_epi32(bits, _mm512_set1_epi32(Octaves::SMALLEST.cast_signed()));
        // The lookups read five bits of the exponent.
        let octave = _mm512_srli_epi32::<23>(bits);
        let shift = _mm512_permutex2var_epi32(self.shift[0], octave, self.shift[1]);
        let offset = _mm512_permutex2var_epi32(self.offset[0], octave, self.offset[1]);
        _mm512_add_epi32(_mm512_srlv_epi32(bits, shift), offset)
    }

    /// [`Octaves::position`] of 64 numbers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
    fn positions(&self, x: [__m512; 4]) -> __m512i {
        let cells = _mm512_packus_epi16(
            _mm512_packus_epi32(self.cells(x[0]), self.cells(x[1])),
            _mm512_packus_epi32(self.cells(x[2]), self.cells(x[3])),
        );
        // Saturation keeps the sign.
        let signs = _mm512_packs_epi16(
            _mm512_packs_epi32(_mm512_castps_si512(x[0]), _mm512_castps_si512(x[1])),
            _mm512_packs_epi32(_mm512_castps_si512(x[2]), _mm512_castps_si512(x[3])),
        );
        let below = _mm512_mask_blend_epi8(
            _mm512_movepi8_mask(signs),
            bytes_at(&self.below[0], cells),
            bytes_at(&self.below[1], cells),
        );
        let pivots = floats_at(&self.pivots, below);
        let mut above = 0;
        for (i, (x, pivot)) in x.into_iter().zip(pivots).enumerate() {
            above |= u64::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, pivot)) << (16 * i);
        }
        let below = transposed(below);
        _mm512_mask_add_epi8(below, above, below, _mm512_set1_epi8(1))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
fn quantize8<T: Lanes>(
    book: &Codebook<256>,
    how: Blocks,
    x: &[T],
    codes: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let proof = avx512::inside();
    let Some(octaves) = book.octaves.as_ref().filter(|_| book.is_sorted()) else {
        return simd::quantize8(proof, book, how, x, codes, scales);
    };
    let search = Search::new(octaves, &book.pivots);
    let blocks = (simd::BATCH / how.blocksize).max(1);
    let run = blocks * how.blocksize;
    let mut finite = true;
    let batches = x.chunks(run).zip(codes.chunks_mut(run)).zip(scales.chunks_mut(blocks));
    for ((x, codes), scales) in batches {
        finite &= find_scales(proof, how, x, scales);
        let blocks = x.chunks(how.blocksize).zip(codes.chunks_mut(how.blocksize));
        for ((x, codes), scale) in blocks.zip(scales) {
            let divisor = how.divisor(*scale);
            let Divisor::Times(factor) = divisor else {
                encode8(book, divisor, x, codes);
                continue;
            };
            let factor = _mm512_set1_ps(factor);
            let encode = |x: &[T; STEP], codes: &mut [u8; STEP]| {
                let x: [[T; GROUP]; 2] = bytemuck::cast(*x);
                let ([a, b], [c, d]) = (proof.load(&x[0]), proof.load(&x[1]));
                let found = search.positions([
                    _mm512_mul_ps(a, factor),
                    _mm512_mul_ps(b, factor),
                    _mm512_mul_ps(c, factor),
                    _mm512_mul_ps(d, factor),
                ]);
                // SAFETY: the array is as long as the vector.
                unsafe { _mm512_storeu_si512(codes.as_mut_ptr().cast(), found) };
            };
            let (steps, rest) = x.as_chunks::<STEP>();
            let (codes, codes_rest) = codes.as_chunks_mut::<STEP>();
            for (x, codes) in steps.iter().zip(codes) {
                encode(x, codes);
            }
            if !rest.is_empty() {
                let (mut padded, mut found) = ([T::default(); STEP], [0; STEP]);
                padded[..rest.len()].copy_from_slice(rest);
                encode(&padded, &mut found);
                codes_rest.copy_from_slice(&found[..rest.len()]);
            }
        }
    }
    finite
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
fn dequantize8<T: Lanes>(
    values: &[f32; 256],
    blocksize: usize,
    codes: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    let proof = avx512::inside();
    let table = planes(values);
    for ((out, codes), scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize)).zip(scales)
    {
        let scale = _mm512_set1_ps(*scale);
        let decode = |codes: &[u8; STEP], out: &mut [T; STEP]| {
            let [a, b, c, d] = floats_at(&table, transposed(load(codes)));
            let out: &mut [[T; GROUP]] = out.as_chunks_mut().0;
            proof.store([_mm512_mul_ps(a, scale), _mm512_mul_ps(b, scale)], &mut out[0]);
            proof.store([_mm512_mul_ps(c, scale), _mm512_mul_ps(d, scale)], &mut out[1]);
        };
        let (steps, rest) = out.as_chunks_mut::<STEP>();
        let (codes, codes_rest) = codes.as_chunks::<STEP>();
        for (out, codes) in steps.iter_mut().zip(codes) {
            decode(codes, out);
        }
        if !rest.is_empty() {
            let (mut padded, mut decoded) = ([0; STEP], [T::default(); STEP]);
            padded[..codes_rest.len()].copy_from_slice(codes_rest);
            decode(&padded, &mut decoded);
            rest.copy_from_slice(&decoded[..rest.len()]);
        }
    }
}

/// The bytes of a table of floats, a plane for each place of a byte.
#[repr(align(64))]
struct Bytes([[u8; 256]; 4]);

impl Bytes {
    const fn new(values: &[f32; 256]) -> Self {
        let mut planes = [[0; 256]; 4];
        let mut i = 0;
        while i < 256 {
            let bytes = values[i].to_le_bytes();
            let mut place = 0;
            while place < 4 {
                planes[place][i] = bytes[place];
                place += 1;
            }
            i += 1;
        }
        Self(planes)
    }
}

/// What the codes of nested scales stand for. There are few scales at a time: to make these
/// anew would take as long as to use them.
static NESTED: Bytes = Bytes::new(&DYNAMIC.values);

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")]
fn decode_nested(codes: &[u8], nested_absmax: f32, offset: f32, out: &mut [f32]) {
    let [a, b, c, d] = &NESTED.0;
    let table = [quarters(a), quarters(b), quarters(c), quarters(d)];
    let (scale, shift) = (_mm512_set1_ps(nested_absmax), _mm512_set1_ps(offset));
    let decode = |codes: &[u8; STEP], out: &mut [f32; STEP]| {
        let values = floats_at(&table, transposed(load(codes)));
        for (values, out) in values.into_iter().zip(out.as_chunks_mut::<16>().0) {
            let scales = _mm512_add_ps(_mm512_mul_ps(values, scale), shift);
            // SAFETY: the array is as long as the vector.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), scales) };
        }
    };
    let (steps, rest) = out.as_chunks_mut::<STEP>();
    let (codes, codes_rest) = codes.as_chunks::<STEP>();
    for (out, codes) in steps.iter_mut().zip(codes) {
        decode(codes, out);
    }
    if !rest.is_empty() {
        let (mut padded, mut decoded) = ([0; STEP], [0.0; STEP]);
        let length = rest.len().min(codes_rest.len());
        padded[..length].copy_from_slice(&codes_rest[..length]);
        decode(&padded, &mut decoded);
        rest[..length].copy_from_slice(&decoded[..length]);
    }
}
