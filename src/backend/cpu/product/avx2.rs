//! AVX2 with FMA: eight f32 a vector.

#![allow(clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::super::Lanes;
use super::super::avx2::{Avx2, Lanes8};
use super::lanes::{Dot, Vector};

/// AVX2 with codebooks that are numbers of bf16: half as many bytes to look up.
#[derive(Clone, Copy)]
pub struct Avx2Short(Avx2);

impl From<Avx2> for Avx2Short {
    fn from(proof: Avx2) -> Self {
        Self(proof)
    }
}

impl Vector for Avx2 {
    const LANES: usize = 8;
    type F = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        // SAFETY: the proof implies AVX; the caller vouches for eight numbers.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, x: __m256, to: *mut f32) {
        // SAFETY: the proof implies AVX; the caller vouches for eight numbers.
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn load_as<T: Lanes>(self, from: *const T) -> __m256 {
        // SAFETY: the caller vouches for eight elements.
        <T as Lanes8>::load8(self, unsafe { &*from.cast() })
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const i8) -> __m256 {
        // SAFETY: the proof implies AVX2; the caller vouches for eight bytes.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_as<T: Lanes>(self, x: __m256, to: *mut T) {
        // SAFETY: the caller vouches for eight elements.
        <T as Lanes8>::store8(self, x, unsafe { &mut *to.cast() });
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: the proof implies AVX.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: the proof implies FMA.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        // SAFETY: the proof implies AVX.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        // SAFETY: the proof implies AVX2; the caller vouches for both squares.
        unsafe {
            let zero = _mm256_setzero_si256();
            let (mut a, mut b) = ([zero; 8], [zero; 8]);
            for (i, row) in b.iter_mut().enumerate() {
                *row = _mm256_loadu_si256(from.add(i * stride).cast());
            }
            for i in 0..4 {
                a[2 * i] = _mm256_unpacklo_epi32(b[2 * i], b[2 * i + 1]);
                a[2 * i + 1] = _mm256_unpackhi_epi32(b[2 * i], b[2 * i + 1]);
            }
            for i in 0..2 {
                b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
                b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
                b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
                b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
            }
            for j in 0..4 {
                let low = _mm256_permute2x128_si256::<0x20>(b[j], b[4 + j]);
                let high = _mm256_permute2x128_si256::<0x31>(b[j], b[4 + j]);
                _mm256_storeu_si256(to.add(j * to_stride).cast(), low);
                _mm256_storeu_si256(to.add((4 + j) * to_stride).cast(), high);
            }
        }
    }
    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(self, address: *const u8) {
        // SAFETY: a prefetch reads nothing; any address will do.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
}

/// Vectors as they are.
macro_rules! as_base {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)?;)+) => {
        $(#[inline(always)] fn $name(self, $($arg: $type),*) $(-> $out)? {
            self.0.$name($($arg),*)
        })+
    };
    (unsafe $(fn $name:ident $(<$T:ident>)? ($($arg:ident: $type:ty),*) $(-> $out:ty)?;)+) => {
        $(#[inline(always)]
        unsafe fn $name $(<$T: Lanes>)? (self, $($arg: $type),*) $(-> $out)? {
            // SAFETY: the caller's.
            unsafe { self.0.$name($($arg),*) }
        })+
    };
}

impl Vector for Avx2Short {
    const LANES: usize = 8;
    type F = __m256;

    as_base! {
        fn splat(x: f32) -> __m256;
        fn add(a: __m256, b: __m256) -> __m256;
        fn mul(a: __m256, b: __m256) -> __m256;
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256;
        fn sum(x: __m256) -> f32;
        fn prefetch(address: *const u8);
        fn prefetch_far(address: *const u8);
    }
    as_base! {
        unsafe
        fn load(from: *const f32) -> __m256;
        fn store(x: __m256, to: *mut f32);
        fn load_as<T>(from: *const T) -> __m256;
        fn store_as<T>(x: __m256, to: *mut T);
        fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize);
    }
}

/// Codes of a chunk on their way to values.
#[derive(Clone, Copy)]
pub struct Codes {
    /// The low halves of all bytes, their high halves; in an order that suits the step.
    halves: [__m256i; 2],
    step: usize,
}

/// Where the bytes of four words go within 128 bits: the first byte of all words, their second
/// bytes and so on.
const BYTES_APART: [u8; 16] = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15];

/// Codes, one a byte.
#[inline(always)]
fn codes(_: Avx2, bytes: __m256i) -> Codes {
    // SAFETY: the proof implies AVX2.
    unsafe {
        let (half, high) = (_mm256_set1_epi8(15), _mm256_srli_epi16::<4>(bytes));
        Codes { halves: [_mm256_and_si256(bytes, half), _mm256_and_si256(high, half)], step: 0 }
    }
}

impl Codes {
    /// Where the codes of this step are: in which halves of bytes, at which byte of a word.
    #[inline(always)]
    fn place(self) -> (__m256i, usize) {
        (self.halves[self.step % 2], self.step / 2)
    }
    #[inline(always)]
    fn next(self) -> Self {
        Self { step: self.step + 1, ..self }
    }
}

/// Byte `i` of all values, twice.
#[inline(always)]
fn bytes(_: Avx2, values: &[f32; 16], i: usize) -> __m256i {
    let mut bytes = [0u8; 16];
    for (byte, value) in bytes.iter_mut().zip(values) {
        *byte = value.to_bits().to_le_bytes()[i];
    }
    // SAFETY: the proof implies AVX2; `bytes` is sixteen bytes.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())) }
}

/// What is the same for values of four bytes and of two.
macro_rules! dot_of_f32 {
    () => {
        const STEPS: usize = 8;
        const LATE: bool = false;
        type X = f32;
        type Words = Codes;
        type Values = __m256;

        #[inline(always)]
        fn next(self, words: Codes, _: usize) -> Codes {
            words.next()
        }
        #[inline(always)]
        unsafe fn activations(self, from: *const f32) -> __m256 {
            // SAFETY: the caller's.
            unsafe { self.load(from) }
        }
        #[inline(always)]
        unsafe fn unit(self, from: *const u32) -> __m256 {
            // SAFETY: the caller vouches for four bytes.
            self.splat(unsafe { from.cast::<f32>().read_unaligned() })
        }
        #[inline(always)]
        unsafe fn store_values(self, values: __m256, to: *mut u32) {
            // SAFETY: the caller's.
            unsafe { self.store(values, to.cast()) }
        }
        #[inline(always)]
        fn scaled(self, values: __m256, scales: __m256) -> __m256 {
            self.mul(values, scales)
        }
        #[inline(always)]
        fn first(self, a: __m256, b: __m256) -> __m256 {
            self.mul(a, b)
        }
        #[inline(always)]
        fn dot(self, sum: __m256, a: __m256, b: __m256) -> __m256 {
            self.fma(a, b, sum)
        }
        #[inline(always)]
        unsafe fn scales<const BLOCKS: usize>(self, from: *const f32) -> __m256 {
            // SAFETY: every engine here proves AVX; the caller vouches for `BLOCKS` numbers, one or
            // two.
            unsafe {
                let first = _mm256_set1_ps(*from);
                if BLOCKS == 1 {
                    return first;
                }
                _mm256_blend_ps::<0xf0>(first, _mm256_set1_ps(*from.add(1)))
            }
        }
    };
}

impl Dot for Avx2 {
    dot_of_f32!();
    const SHORT: bool = false;
    /// The bytes of all values, the lowest first.
    type Table = [__m256i; 4];

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> [__m256i; 4] {
        [
            bytes(self, values, 0),
            bytes(self, values, 1),
            bytes(self, values, 2),
            bytes(self, values, 3),
        ]
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> Codes {
        // SAFETY: the proof implies AVX2; the caller vouches for thirty-two bytes.
        unsafe {
            let order = _mm_loadu_si128(BYTES_APART.as_ptr().cast());
            let order = _mm256_broadcastsi128_si256(order);
            codes(self, _mm256_shuffle_epi8(_mm256_loadu_si256(from.cast()), order))
        }
    }
    #[inline(always)]
    fn decode(self, table: [__m256i; 4], words: Codes) -> __m256 {
        let (codes, byte) = words.place();
        // SAFETY: the proof implies AVX2. A permutation of f32 would be slower on many processors;
        // what several steps look up, the compiler looks up once.
        unsafe {
            let (a, b) =
                (_mm256_shuffle_epi8(table[0], codes), _mm256_shuffle_epi8(table[1], codes));
            let (c, d) =
                (_mm256_shuffle_epi8(table[2], codes), _mm256_shuffle_epi8(table[3], codes));
            let (low, high) = if byte < 2 {
                (_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d))
            } else {
                (_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d))
            };
            _mm256_castsi256_ps(if byte.is_multiple_of(2) {
                _mm256_unpacklo_epi16(low, high)
            } else {
                _mm256_unpackhi_epi16(low, high)
            })
        }
    }
}

impl Dot for Avx2Short {
    dot_of_f32!();
    const SHORT: bool = true;
    const TOGETHER: usize = 2;
    /// The third and the fourth bytes of all values; the others are zero.
    type Table = [__m256i; 2];

    /// Bytes stay where they are: those next to one another make a pair of halves of a lane.
    #[inline(always)]
    fn arrange(x: &[f32], out: &mut [f32]) {
        // Halves of a vector, of which a step takes four bytes of eight; every other one of these
        // in the same half of a lane; and the high half of a byte comes first.
        for (half, x) in x.chunks_exact(32).enumerate() {
            for (i, x) in x.iter().enumerate() {
                let (byte, second) = (i / 2, i % 2);
                let step = byte / 8 * 4 + byte % 2 * 2 + (1 - second);
                out[step * 8 + half * 4 + byte % 8 / 2] = *x;
            }
        }
    }

    #[inline(always)]
    fn table(self, values: &[f32; 16]) -> [__m256i; 2] {
        [bytes(self.0, values, 2), bytes(self.0, values, 3)]
    }
    #[inline(always)]
    unsafe fn words(self, from: *const u8) -> Codes {
        // SAFETY: the proof implies AVX2; the caller vouches for thirty-two bytes.
        codes(self.0, unsafe { _mm256_loadu_si256(from.cast()) })
    }
    #[inline(always)]
    fn decode(self, table: [__m256i; 2], words: Codes) -> __m256 {
        let (codes, byte) = words.place();
        // SAFETY: the proof implies AVX2.
        unsafe {
            let (low, high) =
                (_mm256_shuffle_epi8(table[0], codes), _mm256_shuffle_epi8(table[1], codes));
            let pairs = if byte < 2 {
                _mm256_unpacklo_epi8(low, high)
            } else {
                _mm256_unpackhi_epi8(low, high)
            };
            _mm256_castsi256_ps(if byte.is_multiple_of(2) {
                _mm256_slli_epi32::<16>(pairs)
            } else {
                _mm256_and_si256(pairs, _mm256_set1_epi32(-0x1_0000))
            })
        }
    }
}
