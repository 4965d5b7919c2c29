//! Integer products with NEON: DotProd's products of bytes, or two steps through words.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::{aarch64::*, asm};
use std::array::from_fn;

use super::dot::Dot;
use crate::backend::cpu::neon::{Neon, NeonDot};

/// Evaluates an expression of intrinsics.
macro_rules! isa {
    ($body:expr) => {{
        // SAFETY: `self` proves NEON; the caller of a method with a pointer guarantees its memory.
        unsafe { $body }
    }};
}

macro_rules! dot {
    ($name:ty, $dot:item) => {
        impl Dot for $name {
            type Ints = [int32x4_t; 2];
            const TILE: usize = 4;
            const HIGH: usize = 4;
            const BIAS: u8 = 0;

            #[inline(always)]
            unsafe fn ints(self, at: *const u8) -> Self::Ints {
                isa!([vld1q_u8(at), vld1q_u8(at.add(16))].map(|x| vreinterpretq_s32_u8(x)))
            }
            #[inline(always)]
            unsafe fn store_ints(self, x: Self::Ints, at: *mut u8) {
                isa!({
                    vst1q_u8(at, vreinterpretq_u8_s32(x[0]));
                    vst1q_u8(at.add(16), vreinterpretq_u8_s32(x[1]));
                });
            }
            #[inline(always)]
            unsafe fn broadcast(self, at: *const i8) -> Self::Ints {
                isa!([vdupq_n_s32(at.cast::<i32>().read_unaligned()); 2])
            }
            #[inline(always)]
            unsafe fn spread<const BLOCKS: usize>(self, at: *const f32) -> [float32x4_t; 2] {
                isa!(match BLOCKS {
                    1 => [vdupq_n_f32(*at); 2],
                    2 => [vdupq_n_f32(*at), vdupq_n_f32(*at.add(1))],
                    _ => {
                        let four = vld1q_f32(at);
                        [vzip1q_f32(four, four), vzip2q_f32(four, four)]
                    }
                })
            }
            #[inline(always)]
            fn splat_int(self, x: i32) -> Self::Ints {
                isa!([vdupq_n_s32(x); 2])
            }
            #[inline(always)]
            fn to_floats(self, x: Self::Ints) -> [float32x4_t; 2] {
                isa!(x.map(|x| vcvtq_f32_s32(x)))
            }
            #[inline(always)]
            fn sum_ints(self, x: Self::Ints) -> i32 {
                isa!(vaddvq_s32(vaddq_s32(x[0], x[1])))
            }
            #[inline(always)]
            $dot
            #[inline(always)]
            fn biased(self, x: Self::Ints) -> Self::Ints {
                x
            }
            #[inline(always)]
            fn table(self, values: &[i8; 16]) -> Self::Ints {
                isa!([vreinterpretq_s32_s8(vld1q_s8(values.as_ptr())); 2])
            }
            #[inline(always)]
            fn lookup(self, table: Self::Ints, packed: Self::Ints) -> [Self::Ints; 2] {
                isa!({
                    let table = vreinterpretq_s8_s32(table[0]);
                    let find = |codes| vreinterpretq_s32_s8(vqtbl1q_s8(table, codes));
                    let packed = packed.map(|x| vreinterpretq_u8_s32(x));
                    [
                        packed.map(|x| find(vshrq_n_u8::<4>(x))),
                        packed.map(|x| find(vandq_u8(x, vdupq_n_u8(15)))),
                    ]
                })
            }
            #[inline(always)]
            unsafe fn columns(self, rows: *const u8, stride: usize) -> [Self::Ints; 4] {
                let row = |r: usize| isa!(vreinterpretq_s32_u8(vld1q_u8(rows.add(r * stride))));
                let upper = isa!(transposed(from_fn(|i| row(i))));
                let lower = isa!(transposed(from_fn(|i| row(4 + i))));
                from_fn(|i| [upper[i], lower[i]])
            }
            #[inline(always)]
            fn exchange(self, rows: &mut [Self::Ints; 16]) {
                let from = *rows;
                for half in 0..2 {
                    // The columns 4 * half and the next three, of the upper and the lower rows.
                    let upper = isa!(transposed(from_fn(|i| from[i][half])));
                    let lower = isa!(transposed(from_fn(|i| from[4 + i][half])));
                    for i in 0..4 {
                        rows[4 * half + i] = [upper[i], lower[i]];
                    }
                }
            }
        }
    };
}

dot!(
    NeonDot,
    fn dot(self, mut sum: Self::Ints, weights: Self::Ints, x: Self::Ints) -> Self::Ints {
        // No closure: it could stay a function of its own, without the instruction.
        for i in 0..2 {
            // SAFETY: `self` proves DotProd; the instruction touches nothing but its operands.
            // Rust 1.89 has no intrinsic for it.
            unsafe {
                asm!("sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b", sum = inout(vreg) sum[i],
                    a = in(vreg) weights[i], b = in(vreg) x[i],
                    options(pure, nomem, nostack, preserves_flags));
            }
        }
        sum
    }
);

// A weight's magnitude is at most 128 and an activation's at most 127, so a pair's sum is at most
// 2 * 128 * 127 = 32,512: it fits in a word.
dot!(
    Neon,
    fn dot(self, sum: Self::Ints, weights: Self::Ints, x: Self::Ints) -> Self::Ints {
        from_fn(|i| {
            isa!({
                let (w, x) = (vreinterpretq_s8_s32(weights[i]), vreinterpretq_s8_s32(x[i]));
                let first = vmull_s8(vget_low_s8(w), vget_low_s8(x));
                let pairs = vpaddq_s16(first, vmull_high_s8(w, x));
                vpadalq_s16(sum[i], pairs)
            })
        })
    }
);

/// Lane j of vector i becomes lane i of vector j.
///
/// # Safety
/// - The machine has NEON.
#[inline(always)]
unsafe fn transposed(rows: [int32x4_t; 4]) -> [int32x4_t; 4] {
    // SAFETY: the caller's guarantee; registers only.
    unsafe {
        let pairs =
            |a, b| [vtrn1q_s32(a, b), vtrn2q_s32(a, b)].map(|pair| vreinterpretq_s64_s32(pair));
        let (top, bottom) = (pairs(rows[0], rows[1]), pairs(rows[2], rows[3]));
        [
            vtrn1q_s64(top[0], bottom[0]),
            vtrn1q_s64(top[1], bottom[1]),
            vtrn2q_s64(top[0], bottom[0]),
            vtrn2q_s64(top[1], bottom[1]),
        ]
        .map(|row| vreinterpretq_s32_s64(row))
    }
}
