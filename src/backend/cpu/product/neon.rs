//! NEON: eight f32 a vector, in two registers.
//!
//! Four lanes would leave half of the registers of a tile unused, and would look up four values
//! at a time where sixteen fit.

#![allow(clippy::wildcard_imports)]

use std::arch::{aarch64::*, asm};
use std::array::from_fn;

use super::super::neon::{Neon, NeonBf16, NeonDot};
use super::super::{Lanes, simd};
use super::lanes::{Dot, Vector};

/// The codes of eight words: in pair `j` the low halves of their bytes `j`, then the high halves.
#[derive(Clone, Copy)]
pub struct Codes {
    pairs: [uint8x16_t; 4],
    step: usize,
}

impl Vector for Neon {
    const LANES: usize = 8;
    type F = [float32x4_t; 2];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: `self` proves NEON.
        [unsafe { vdupq_n_f32(x) }; 2]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: `self` proves NEON; the caller vouches for eight numbers.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }
    #[inline(always)]
    unsafe fn store(self, x: Self::F, to: *mut f32) {
        // SAFETY: `self` proves NEON; the caller vouches for eight numbers.
        unsafe {
            vst1q_f32(to, x[0]);
            vst1q_f32(to.add(4), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> Self::F {
        // SAFETY: the caller vouches for eight elements.
        let [first, last] = unsafe { &*from.cast::<[[T; 4]; 2]>() };
        [T::load4(self, first), T::load4(self, last)]
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: Self::F, to: *mut T) {
        // SAFETY: the caller vouches for eight elements.
        let [first, last] = unsafe { &mut *to.cast::<[[T; 4]; 2]>() };
        T::store4(self, x[0], first);
        T::store4(self, x[1], last);
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }
    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        // SAFETY: `self` proves NEON.
        unsafe { vaddvq_f32(vaddq_f32(x[0], x[1])) }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        for (i, j) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
            // SAFETY: the caller vouches for both squares, of which these are the quarters.
            unsafe {
                let (from, to) = (from.add(i * stride + j), to.add(j * to_stride + i));
                transpose4(self, from, stride, to, to_stride);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) address,
                options(readonly, nostack, preserves_flags));
        }
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe {
            asm!("prfm pldl2keep, [{}]", in(reg) address,
                options(readonly, nostack, preserves_flags));
        }
    }
}

/// Vectors as in plain NEON, for a proof of more.
macro_rules! vectors_of_base {
    ($name:ty) => {
        impl Vector for $name {
            const LANES: usize = <Neon as Vector>::LANES;
            type F = <Neon as Vector>::F;

            vectors_of_base! { @
                fn splat(x: f32) -> Self::F;
                unsafe fn load(from: *const f32) -> Self::F;
                unsafe fn store(x: Self::F, to: *mut f32);
                unsafe fn load_as<T: Lanes>(from: *const T) -> Self::F;
                unsafe fn store_as<T: Lanes>(x: Self::F, to: *mut T);
                fn add(a: Self::F, b: Self::F) -> Self::F;
                fn mul(a: Self::F, b: Self::F) -> Self::F;
                fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
                fn sum(x: Self::F) -> f32;
                unsafe fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize);
                fn prefetch(address: *const u8);
                fn prefetch_far(address: *const u8);
            }
        }
    };
    (@) => {};
    (@ fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?; $($rest:tt)*) => {
        #[inline(always)]
        fn $name(self, $($arg: $type),*) $(-> $out)? {
            self.base().$name($($arg),*)
        }
        vectors_of_base! { @ $($rest)* }
    };
    (@ unsafe fn $name:ident $(<$T:ident: $bound:ident>)? ($($arg:ident: $type:ty),*)
        $(-> $out:ty)?; $($rest:tt)*) => {
        #[inline(always)]
        unsafe fn $name $(<$T: $bound>)? (self, $($arg: $type),*) $(-> $out)? {
            // SAFETY: the caller's.
            unsafe { self.base().$name($($arg),*) }
        }
        vectors_of_base! { @ $($rest)* }
    };
}

vectors_of_base!(NeonBf16);
vectors_of_base!(NeonDot);

/// Transposes a square of four by four words.
///
/// # Safety
/// Every word of both squares is inside an allocation, and they do not overlap.
#[inline(always)]
unsafe fn transpose4(_: Neon, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
    // SAFETY: the proof implies NEON; the caller vouches for both squares.
    unsafe {
        let rows: [uint32x4_t; 4] = from_fn(|i| vld1q_u32(from.add(i * stride)));
        let pairs =
            |a, b| [vtrn1q_u32(a, b), vtrn2q_u32(a, b)].map(|pair| vreinterpretq_u64_u32(pair));
        let (top, bottom) = (pairs(rows[0], rows[1]), pairs(rows[2], rows[3]));
        for i in 0..2 {
            let low = vreinterpretq_u32_u64(vtrn1q_u64(top[i], bottom[i]));
            let high = vreinterpretq_u32_u64(vtrn2q_u64(top[i], bottom[i]));
            vst1q_u32(to.add(i * to_stride), low);
            vst1q_u32(to.add((i + 2) * to_stride), high);
        }
    }
}

impl Dot for Neon {
    const STEPS: usize = 8;
    const LATE: bool = false;
    const SHORT: bool = false;
    const TOGETHER: usize = 2;
    type X = f32;
    type Words = Codes;
    /// The bytes of all values, the lowest first.
    type Table = [uint8x16_t; 4];
    type Values = [float32x4_t; 2];

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> Self::Table {
        simd::Simd::table4(self, values)
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> Codes {
        // SAFETY: `self` proves NEON; the caller vouches for thirty-two bytes.
        unsafe {
            let (first, last) = (vld1q_u8(from), vld1q_u8(from.add(16)));
            let mask = vdupq_n_u8(15);
            // Bytes 0 and 2 of each word, then bytes 1 and 3.
            let (even, odd) = (vuzp1q_u8(first, last), vuzp2q_u8(first, last));
            let [even, odd] = [even, odd].map(|x| [vandq_u8(x, mask), vshrq_n_u8::<4>(x)]);
            let pairs = [
                vuzp1q_u8(even[0], even[1]),
                vuzp1q_u8(odd[0], odd[1]),
                vuzp2q_u8(even[0], even[1]),
                vuzp2q_u8(odd[0], odd[1]),
            ];
            Codes { pairs, step: 0 }
        }
    }
    #[inline(always)]
    fn next(self, words: Codes, _: usize) -> Codes {
        Codes { step: words.step + 1, ..words }
    }
    #[inline(always)]
    fn decode(self, table: Self::Table, words: Codes) -> Self::Values {
        // SAFETY: `self` proves NEON.
        unsafe {
            // Both steps of a pair look up the same; the compiler does it once.
            let codes = words.pairs[words.step / 2 % 4];
            let [a, b, c, d] = table.map(|table| vqtbl1q_u8(table, codes));
            let zip = |a, b| {
                vreinterpretq_u16_u8(if words.step.is_multiple_of(2) {
                    vzip1q_u8(a, b)
                } else {
                    vzip2q_u8(a, b)
                })
            };
            let (low, high) = (zip(a, b), zip(c, d));
            [vzip1q_u16(low, high), vzip2q_u16(low, high)].map(|x| vreinterpretq_f32_u16(x))
        }
    }
    #[inline(always)]
    unsafe fn activations(self, from: *const f32) -> Self::Values {
        // SAFETY: the caller's.
        unsafe { self.load(from) }
    }
    #[inline(always)]
    unsafe fn unit(self, from: *const u32) -> Self::Values {
        // SAFETY: the caller vouches for four bytes.
        self.splat(unsafe { from.cast::<f32>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store_values(self, values: Self::Values, to: *mut u32) {
        // SAFETY: the caller's.
        unsafe { self.store(values, to.cast()) }
    }
    #[inline(always)]
    fn scaled(self, values: Self::Values, scales: Self::F) -> Self::Values {
        self.mul(values, scales)
    }
    #[inline(always)]
    fn first(self, a: Self::Values, b: Self::Values) -> Self::F {
        self.mul(a, b)
    }
    #[inline(always)]
    fn dot(self, sum: Self::F, a: Self::Values, b: Self::Values) -> Self::F {
        self.fma(a, b, sum)
    }
    #[inline(always)]
    unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> Self::F {
        // SAFETY: `self` proves NEON; the caller vouches for `BLOCKS` numbers, one or two.
        unsafe { [vdupq_n_f32(*from), vdupq_n_f32(*from.add(BLOCKS / 2))] }
    }
}
