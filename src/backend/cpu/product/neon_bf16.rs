//! NEON with BF16: codebook and activations in bf16, two products a lane, sums in f32.
//!
//! The instruction rounds its sums to odd and takes subnormal numbers for zero; see `bf16.rs` for
//! what a narrow codebook means.

#![allow(clippy::wildcard_imports)]

use std::arch::{aarch64::*, asm};
use std::array::from_fn;

use half::bf16;

use super::super::neon::NeonBf16;
use super::super::simd;
use super::lanes::{Dot, Vector};

/// The codes of eight words: the low halves of bytes 0 and 2, the high halves, then those of
/// bytes 1 and 3.
#[derive(Clone, Copy)]
pub struct Codes {
    steps: [uint8x16_t; 4],
    step: usize,
}

impl Dot for NeonBf16 {
    const STEPS: usize = 4;
    const LATE: bool = true;
    const SHORT: bool = true;
    const TOGETHER: usize = 2;
    type X = bf16;
    type Words = Codes;
    /// The low bytes of all values, the high bytes of all values.
    type Table = [uint8x16_t; 2];
    /// Pairs of bf16 in each lane.
    type Values = [uint16x8_t; 2];

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> Self::Table {
        simd::Simd::table2(self.base(), &values.map(|x| bf16::from_f32(x).to_bits()))
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> Codes {
        // SAFETY: `self` proves NEON; the caller vouches for thirty-two bytes.
        unsafe {
            let (first, last) = (vld1q_u8(from), vld1q_u8(from.add(16)));
            let (even, odd) = (vuzp1q_u8(first, last), vuzp2q_u8(first, last));
            let low = vdupq_n_u8(15);
            let steps = [
                vandq_u8(even, low),
                vshrq_n_u8::<4>(even),
                vandq_u8(odd, low),
                vshrq_n_u8::<4>(odd),
            ];
            Codes { steps, step: 0 }
        }
    }
    #[inline(always)]
    fn next(self, words: Codes, _: usize) -> Codes {
        Codes { step: words.step + 1, ..words }
    }
    #[inline(always)]
    fn decode(self, table: Self::Table, words: Codes) -> Self::Values {
        let codes = words.steps[words.step % 4];
        // SAFETY: `self` proves NEON.
        unsafe {
            let [low, high] = table.map(|table| vqtbl1q_u8(table, codes));
            [vzip1q_u8(low, high), vzip2q_u8(low, high)].map(|x| vreinterpretq_u16_u8(x))
        }
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const bf16) -> Self::Values {
        // SAFETY: `self` proves NEON; the caller vouches for thirty-two bytes.
        from_fn(|i| unsafe { vld1q_u16(from.add(8 * i).cast()) })
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: `self` proves NEON; the caller vouches for four bytes.
        [unsafe { vreinterpretq_u16_u32(vdupq_n_u32(from.read_unaligned())) }; 2]
    }
    #[inline(always)]
    unsafe fn store_values(self, values: Self::Values, to: *mut u32) {
        for (i, values) in values.into_iter().enumerate() {
            // SAFETY: `self` proves NEON; the caller vouches for eight units.
            unsafe { vst1q_u16(to.add(4 * i).cast(), values) };
        }
    }
    #[inline(always)]
    fn scaled(self, values: Self::Values, _: Self::F) -> Self::Values {
        values
    }
    #[inline(always)]
    fn first(self, a: Self::Values, b: Self::Values) -> Self::F {
        self.dot(self.splat(0.0), a, b)
    }
    #[inline(always)]
    fn dot(self, sum: Self::F, a: Self::Values, b: Self::Values) -> Self::F {
        from_fn(|i| {
            let mut sum = sum[i];
            // SAFETY: `self` proves BF16; the instruction touches nothing but its operands. Rust
            // 1.89 has no intrinsic for it.
            unsafe {
                asm!("bfdot {sum:v}.4s, {a:v}.8h, {b:v}.8h", sum = inout(vreg) sum,
                    a = in(vreg) a[i], b = in(vreg) b[i],
                    options(pure, nomem, nostack, preserves_flags));
            }
            sum
        })
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> Self::F {
        // SAFETY: the caller's.
        unsafe { self.base().scales::<BLOCKS>(from) }
    }
}
