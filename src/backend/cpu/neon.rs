//! NEON: a group is eight vectors of four lanes.
//!
//! Nothing here fuses a multiplication with an addition: the definition rounds after each.
//! Vectors are taken apart into bytes, lowest first, so this is for little-endian machines.

// Intrinsics carry their origin in their names.
#![allow(clippy::wildcard_imports)]

use std::arch::{aarch64::*, asm, is_aarch64_feature_detected};
use std::array::from_fn;

use half::{bf16, f16};

use super::simd::{GROUP, HALF, Simd, entry_points, first_four};
use super::{Isa, Kernels, Lanes};
use crate::format::codebook::Codebook;
use crate::quant::blockwise::Blocks;
use crate::quant::stats::Stats;

/// Proof that the machine has NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neon(());

impl Neon {
    /// Asks the machine.
    pub fn detect() -> Option<Self> {
        (cfg!(target_endian = "little") && is_aarch64_feature_detected!("neon")).then_some(Self(()))
    }
}

/// Proof that the machine has BF16 beside NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonBf16(Neon);

impl NeonBf16 {
    /// Asks the machine.
    pub fn detect() -> Option<Self> {
        let found = is_aarch64_feature_detected!("bf16");
        Neon::detect().filter(|_| found).map(Self)
    }

    /// The smaller proof.
    pub const fn base(self) -> Neon {
        self.0
    }
}

/// Proof that the machine has products of bytes (DotProd) beside NEON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeonDot(Neon);

impl NeonDot {
    /// Asks the machine.
    pub fn detect(base: Neon) -> Option<Self> {
        is_aarch64_feature_detected!("dotprod").then_some(Self(base))
    }

    /// The smaller proof.
    pub const fn base(self) -> Neon {
        self.0
    }
}

entry_points!(Neon, "neon");

/// Elements that four lanes of f32 are loaded from and stored to.
pub trait Lanes4: Sized {
    /// Widens.
    fn load4(isa: Neon, x: &[Self; 4]) -> float32x4_t;
    /// Rounds to nearest, ties to even.
    fn store4(isa: Neon, x: float32x4_t, out: &mut [Self; 4]);
}

impl Lanes4 for f32 {
    #[inline(always)]
    fn load4(_: Neon, x: &[Self; 4]) -> float32x4_t {
        // SAFETY: the proof implies NEON; `x` is four readable floats.
        unsafe { vld1q_f32(x.as_ptr()) }
    }
    #[inline(always)]
    fn store4(_: Neon, x: float32x4_t, out: &mut [Self; 4]) {
        // SAFETY: the proof implies NEON; `out` is four writable floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), x) }
    }
}

// The conversions of half precision are part of NEON, but Rust 1.89 has no intrinsics for them.
impl Lanes4 for f16 {
    #[inline(always)]
    fn load4(_: Neon, x: &[Self; 4]) -> float32x4_t {
        let wide: float32x4_t;
        // SAFETY: the proof implies NEON; `x` is eight readable bytes; the instruction touches
        // nothing but its operands.
        unsafe {
            asm!("fcvtl {wide:v}.4s, {half:v}.4h", wide = lateout(vreg) wide,
                half = in(vreg) vld1_u16(x.as_ptr().cast()),
                options(pure, nomem, nostack, preserves_flags));
        }
        wide
    }
    #[inline(always)]
    fn store4(_: Neon, x: float32x4_t, out: &mut [Self; 4]) {
        // SAFETY: the proof implies NEON; `out` is eight writable bytes; the instruction touches
        // nothing but its operands, and rounds as floats are rounded everywhere: ties to even.
        unsafe {
            let half: uint16x4_t;
            asm!("fcvtn {half:v}.4h, {wide:v}.4s", half = lateout(vreg) half,
                wide = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(out.as_mut_ptr().cast(), half);
        }
    }
}

impl Lanes4 for bf16 {
    #[inline(always)]
    fn load4(_: Neon, x: &[Self; 4]) -> float32x4_t {
        // SAFETY: the proof implies NEON; `x` is eight readable bytes.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(x.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn store4(_: Neon, x: float32x4_t, out: &mut [Self; 4]) {
        // SAFETY: the proof implies NEON; `out` is eight writable bytes.
        unsafe {
            // Just below half of the last place, and one more where the last bit is odd; a NaN
            // keeps its upper bits and becomes quiet, as `bf16::from_f32` does.
            let bits = vreinterpretq_u32_f32(x);
            let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
            let rounded = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
            let quiet = vorr_u16(vshrn_n_u32::<16>(bits), vdup_n_u16(0x40));
            let number = vmovn_u32(vceqq_f32(x, x));
            vst1_u16(out.as_mut_ptr().cast(), vbsl_u16(number, rounded, quiet));
        }
    }
}

/// What a search among sixteen values looks at.
#[derive(Clone, Copy)]
pub struct Search {
    tree: [uint8x16x2_t; 2],
    root: [float32x4_t; 8],
    /// The code of each position.
    order: uint8x16_t,
}

impl Simd for Neon {
    type Floats = [float32x4_t; 8];
    type Ints = [int32x4_t; 8];
    /// Nodes 0 to 7, nodes 8 to 15.
    type Tree = [uint8x16x2_t; 2];
    type Search = Search;
    /// The low bytes of all values, the high bytes of all values.
    type Table2 = [uint8x16_t; 2];
    /// The bytes of all values, the lowest first.
    type Table4 = [uint8x16_t; 4];

    #[inline(always)]
    fn load<T: Lanes>(self, x: &[T; GROUP]) -> Self::Floats {
        let x = x.as_chunks().0;
        from_fn(|i| T::load4(self, &x[i]))
    }

    #[inline(always)]
    fn store<T: Lanes>(self, x: Self::Floats, out: &mut [T; GROUP]) {
        for (x, out) in x.into_iter().zip(out.as_chunks_mut().0) {
            T::store4(self, x, out);
        }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::Floats {
        // SAFETY: `self` proves NEON.
        [unsafe { vdupq_n_f32(x) }; 8]
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::Ints {
        // SAFETY: `self` proves NEON.
        [unsafe { vdupq_n_s32(x) }; 8]
    }

    #[inline(always)]
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vaddq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vmulq_f32(a[i], b[i]) })
    }

    #[inline(always)]
    fn max_magnitude(self, largest: Self::Ints, x: Self::Floats) -> Self::Ints {
        // SAFETY: `self` proves NEON.
        from_fn(|i| unsafe { vmaxq_s32(largest[i], vreinterpretq_s32_f32(vabsq_f32(x[i]))) })
    }

    #[inline(always)]
    fn reduce_max(self, [first, rest @ ..]: Self::Ints) -> u32 {
        // SAFETY: `self` proves NEON.
        unsafe {
            let largest = rest.into_iter().fold(first, |a, b| vmaxq_s32(a, b));
            vmaxvq_s32(largest).cast_unsigned()
        }
    }

    #[inline(always)]
    fn round(self, x: Self::Floats) -> Self::Ints {
        // SAFETY: `self` proves NEON.
        x.map(|x| unsafe { vcvtnq_s32_f32(x) })
    }

    #[inline(always)]
    fn tree(self, nodes: &[f32; 16]) -> Self::Tree {
        let [a, b, c, d] = quarters(self, nodes);
        [uint8x16x2_t(a, b), uint8x16x2_t(c, d)]
    }

    #[inline(always)]
    fn upper(self, [upper, _]: Self::Tree, node: Self::Ints) -> Self::Floats {
        // SAFETY: `self` proves NEON.
        node.map(|node| unsafe { vreinterpretq_f32_u8(vqtbl2q_u8(upper, places(self, node, 0))) })
    }

    #[inline(always)]
    fn lower(self, [_, lower]: Self::Tree, node: Self::Ints) -> Self::Floats {
        // SAFETY: `self` proves NEON.
        node.map(|node| unsafe { vreinterpretq_f32_u8(vqtbl2q_u8(lower, places(self, node, 8))) })
    }

    #[inline(always)]
    fn child(self, node: Self::Ints, x: Self::Floats, pivot: Self::Floats) -> Self::Ints {
        from_fn(|i| {
            // SAFETY: `self` proves NEON.
            unsafe {
                // All bits of a true comparison: -1.
                let above = vreinterpretq_s32_u32(vcgtq_f32(x[i], pivot[i]));
                vsubq_s32(vaddq_s32(node[i], node[i]), above)
            }
        })
    }

    #[inline(always)]
    fn last_four(self, nodes: &[f32; 256], node: Self::Ints, x: Self::Floats) -> Self::Ints {
        let [a, b, c, d] = quarters(self, &nodes.as_chunks().0[1]);
        let table = uint8x16x4_t(a, b, c, d);
        let pivot = node.map(|node| {
            // SAFETY: `self` proves NEON.
            unsafe { vreinterpretq_f32_u8(vqtbl4q_u8(table, places(self, node, 16))) }
        });
        let mut node = self.child(node, x, pivot);
        for _ in 0..3 {
            let pivot = node.map(|node| {
                let mut index = [0u32; 4];
                // SAFETY: `self` proves NEON; `index` is four writable integers.
                unsafe { vst1q_u32(index.as_mut_ptr(), vreinterpretq_u32_s32(node)) };
                f32::load4(self, &index.map(|node| nodes[node as usize & 255]))
            });
            node = self.child(node, x, pivot);
        }
        node
    }

    #[inline(always)]
    fn search(self, book: &Codebook<16>) -> Option<Search> {
        // SAFETY: `self` proves NEON; the order is sixteen bytes.
        let order = unsafe { vld1q_u8(book.order.as_ptr()) };
        Some(Search { tree: self.tree(&book.tree), root: self.splat(book.tree[1]), order })
    }

    #[inline(always)]
    fn encode(self, search: Search, x: Self::Floats) -> [u8; HALF] {
        let [first, last] = low_bytes(self, first_four(self, search.tree, search.root, x));
        // SAFETY: `self` proves NEON; the result is sixteen bytes.
        unsafe {
            let low = vdupq_n_u8(15);
            let first = vqtbl1q_u8(search.order, vandq_u8(first, low));
            let last = vqtbl1q_u8(search.order, vandq_u8(last, low));
            let (even, odd) = (vuzp1q_u8(first, last), vuzp2q_u8(first, last));
            let mut out = [0; HALF];
            vst1q_u8(out.as_mut_ptr(), vsliq_n_u8::<4>(odd, even));
            out
        }
    }

    #[inline(always)]
    fn bytes(self, x: Self::Ints) -> [u8; GROUP] {
        let mut out = [0; GROUP];
        for (x, out) in low_bytes(self, x).into_iter().zip(out.as_chunks_mut::<16>().0) {
            // SAFETY: `self` proves NEON; `out` is sixteen writable bytes.
            unsafe { vst1q_u8(out.as_mut_ptr(), x) }
        }
        out
    }

    #[inline(always)]
    fn signed(self, x: &[i8; GROUP]) -> Self::Floats {
        let x = x.as_chunks::<8>().0;
        from_fn(|i| {
            // SAFETY: `self` proves NEON; a chunk is eight readable bytes.
            unsafe {
                let words = vmovl_s8(vld1_s8(x[i / 2].as_ptr()));
                let half = if i % 2 == 0 { vget_low_s16(words) } else { vget_high_s16(words) };
                vcvtq_f32_s32(vmovl_s16(half))
            }
        })
    }

    #[inline(always)]
    fn exponents(self, codes: &[u8; GROUP]) -> Self::Floats {
        let codes = codes.as_chunks::<8>().0;
        from_fn(|i| {
            // SAFETY: `self` proves NEON; a chunk is eight readable bytes.
            unsafe {
                let words = vmovl_u8(vld1_u8(codes[i / 2].as_ptr()));
                let part = if i % 2 == 0 { vget_low_u16(words) } else { vget_high_u16(words) };
                let codes = vmovl_u16(part);
                // The upper half of the mantissa: all of the least number, and what makes a NaN.
                let half = vdupq_n_u32(1 << 22);
                let bits = vmaxq_u32(vshlq_n_u32::<23>(codes), half);
                let nan = vceqq_u32(codes, vdupq_n_u32(255));
                vreinterpretq_f32_u32(vorrq_u32(bits, vandq_u32(nan, half)))
            }
        })
    }

    #[inline(always)]
    fn gather(self, values: &[f32; 256], codes: &[u8; GROUP]) -> Self::Floats {
        let codes = codes.as_chunks::<4>().0;
        from_fn(|i| f32::load4(self, &codes[i].map(|code| values[usize::from(code)])))
    }

    #[inline(always)]
    fn scaled<T: Lanes>(self, values: &[f32; 16], scale: f32) -> [T; 16] {
        let mut out = [T::default(); 16];
        for (values, out) in values.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
            // SAFETY: `self` proves NEON.
            let scaled = unsafe { vmulq_n_f32(f32::load4(self, values), scale) };
            T::store4(self, scaled, out);
        }
        out
    }

    #[inline(always)]
    fn table2(self, values: &[u16; 16]) -> Self::Table2 {
        let [first, last] = halves(self, bytemuck::cast_ref(values));
        // SAFETY: `self` proves NEON.
        unsafe { [vuzp1q_u8(first, last), vuzp2q_u8(first, last)] }
    }

    #[inline(always)]
    fn table4(self, values: &[f32; 16]) -> Self::Table4 {
        let [a, b, c, d] = quarters(self, values);
        // SAFETY: `self` proves NEON.
        unsafe {
            // Bytes 0 and 2 of each value, then bytes 1 and 3.
            let even = [vuzp1q_u8(a, b), vuzp1q_u8(c, d)];
            let odd = [vuzp2q_u8(a, b), vuzp2q_u8(c, d)];
            [
                vuzp1q_u8(even[0], even[1]),
                vuzp1q_u8(odd[0], odd[1]),
                vuzp2q_u8(even[0], even[1]),
                vuzp2q_u8(odd[0], odd[1]),
            ]
        }
    }

    #[inline(always)]
    fn decode2(self, table: Self::Table2, packed: &[u8; HALF], out: &mut [u16; GROUP]) {
        let out: &mut [[u16; 8]] = out.as_chunks_mut().0;
        for (codes, out) in unpacked(self, packed).into_iter().zip(out.as_chunks_mut::<2>().0) {
            // SAFETY: `self` proves NEON; each half of `out` is sixteen writable bytes.
            unsafe {
                let [low, high] = table.map(|table| vqtbl1q_u8(table, codes));
                vst1q_u16(out[0].as_mut_ptr(), vreinterpretq_u16_u8(vzip1q_u8(low, high)));
                vst1q_u16(out[1].as_mut_ptr(), vreinterpretq_u16_u8(vzip2q_u8(low, high)));
            }
        }
    }

    #[inline(always)]
    fn decode4(self, table: Self::Table4, packed: &[u8; HALF], out: &mut [f32; GROUP]) {
        for (codes, out) in unpacked(self, packed).into_iter().zip(out.as_chunks_mut::<16>().0) {
            // SAFETY: `self` proves NEON.
            let values = unsafe {
                let [a, b, c, d] = table.map(|table| vqtbl1q_u8(table, codes));
                let pairs = |a, b| {
                    [vzip1q_u8(a, b), vzip2q_u8(a, b)].map(|pairs| vreinterpretq_u16_u8(pairs))
                };
                let ([low, low_2], [high, high_2]) = (pairs(a, b), pairs(c, d));
                [
                    vzip1q_u16(low, high),
                    vzip2q_u16(low, high),
                    vzip1q_u16(low_2, high_2),
                    vzip2q_u16(low_2, high_2),
                ]
                .map(|value| vreinterpretq_f32_u16(value))
            };
            for (value, out) in values.into_iter().zip(out.as_chunks_mut().0) {
                f32::store4(self, value, out);
            }
        }
    }
}

/// Where the bytes of the pivots of nodes are, in a table that starts with node `first`.
#[inline(always)]
fn places(_: Neon, node: int32x4_t, first: u32) -> uint8x16_t {
    const STEP: u32 = 0x0404_0404;
    let start = 0x0302_0100_u32.wrapping_sub(first * STEP);
    // SAFETY: the proof implies NEON.
    unsafe {
        let node = vreinterpretq_u32_s32(node);
        vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(start), node, vdupq_n_u32(STEP)))
    }
}

/// The lowest byte of each lane, in order.
#[inline(always)]
fn low_bytes(_: Neon, x: [int32x4_t; 8]) -> [uint8x16_t; 2] {
    // SAFETY: the proof implies NEON.
    unsafe {
        let words: [uint16x8_t; 4] = from_fn(|i| {
            vuzp1q_u16(vreinterpretq_u16_s32(x[2 * i]), vreinterpretq_u16_s32(x[2 * i + 1]))
        });
        let [a, b, c, d] = words.map(|words| vreinterpretq_u8_u16(words));
        [vuzp1q_u8(a, b), vuzp1q_u8(c, d)]
    }
}

/// One code a byte, in the order of the elements.
#[inline(always)]
fn unpacked(_: Neon, packed: &[u8; HALF]) -> [uint8x16_t; 2] {
    // SAFETY: the proof implies NEON; `packed` is sixteen bytes.
    unsafe {
        let packed = vld1q_u8(packed.as_ptr());
        let (first, second) = (vshrq_n_u8::<4>(packed), vandq_u8(packed, vdupq_n_u8(15)));
        [vzip1q_u8(first, second), vzip2q_u8(first, second)]
    }
}

/// The bytes of two registers.
#[inline(always)]
fn halves(_: Neon, bytes: &[u8; 32]) -> [uint8x16_t; 2] {
    let bytes = bytes.as_chunks::<16>().0;
    // SAFETY: the proof implies NEON; a chunk is sixteen bytes.
    from_fn(|i| unsafe { vld1q_u8(bytes[i].as_ptr()) })
}

/// The bytes of sixteen values in four registers.
#[inline(always)]
fn quarters(isa: Neon, values: &[f32; 16]) -> [uint8x16_t; 4] {
    let values = values.as_chunks::<8>().0;
    let [a, b] = halves(isa, bytemuck::cast_ref(&values[0]));
    let [c, d] = halves(isa, bytemuck::cast_ref(&values[1]));
    [a, b, c, d]
}
