//! Rounds the elements of a file to another type, as torch does: through f32.

use ::safetensors::Dtype as FileDtype;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::backend::cpu::threads;
use crate::dtype::{Dtype, Element};
use crate::error::{Error, Result};

/// Elements that one thread converts at a time.
const RUN: usize = 64 * 1024;

/// Elements that are f32 between the two types; they fit in the first-level cache.
const PIECE: usize = 1024;

/// Fills `out` from the bytes of a file; returns how many finite values became infinite.
pub(crate) fn convert<T: Element>(
    threads: usize,
    dtype: FileDtype,
    bytes: &[u8],
    out: &mut [T],
) -> Result<u64> {
    let widen = match dtype {
        FileDtype::F64 => |bytes: &[u8], out: &mut [f32]| {
            each(bytes, out, |bytes| f64::from_le_bytes(bytes) as f32);
        },
        FileDtype::F32 => |bytes: &[u8], out: &mut [f32]| each(bytes, out, f32::from_le_bytes),
        FileDtype::BF16 => |bytes: &[u8], out: &mut [f32]| {
            each(bytes, out, |bytes| f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16));
        },
        FileDtype::F16 => |bytes: &[u8], out: &mut [f32]| {
            let mut halves = [f16::ZERO; PIECE];
            let halves = &mut halves[..out.len()];
            each(bytes, halves, f16::from_le_bytes);
            halves.convert_to_f32_slice(out);
        },
        other => {
            return Err(Error::Dtype {
                what: "a cast",
                got: other.to_string(),
                allowed: "F64, F32, F16, BF16",
            });
        }
    };
    let size = dtype.bitsize() / 8;
    let run = |bytes: &[u8], out: &mut [T]| {
        let mut wide = [0f32; PIECE];
        let mut overflowed = 0;
        for (bytes, out) in bytes.chunks(PIECE * size).zip(out.chunks_mut(PIECE)) {
            let wide = &mut wide[..out.len()];
            widen(bytes, wide);
            overflowed += narrow(wide, out);
        }
        overflowed
    };
    if out.len() <= RUN {
        return Ok(run(bytes, out));
    }
    Ok(threads::spread(threads, || {
        let runs = bytes.par_chunks(RUN * size).zip(out.par_chunks_mut(RUN));
        runs.map(|(bytes, out)| run(bytes, out)).sum()
    }))
}

fn each<U, const N: usize>(bytes: &[u8], out: &mut [U], read: impl Fn([u8; N]) -> U) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = read(*bytes);
    }
}

/// Rounds to nearest, ties to even.
fn narrow<T: Element>(wide: &[f32], out: &mut [T]) -> u64 {
    match (T::DTYPE, bytemuck::try_cast_slice_mut::<T, f16>(out)) {
        // The crate's conversion of a whole slice uses the instructions for it.
        (Dtype::F16, Ok(out)) => out.convert_from_f32_slice(wide),
        _ => {
            for (out, x) in out.iter_mut().zip(wide) {
                *out = T::from_f32(*x);
            }
        }
    }
    let limit = overflow(T::DTYPE);
    wide.iter().filter(|x| x.abs() >= limit && x.is_finite()).count() as u64
}

/// The least magnitude that rounds to infinity: half a step above the largest number.
const fn overflow(dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::INFINITY,
        Dtype::F16 => 65_520.0,
        Dtype::BF16 => f32::from_bits(0x7F7F_8000),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const ODD: [f32; 12] = [
        0.0,
        -0.0,
        1.0,
        -1.5e-8,
        65_519.996,
        65_520.0,
        -1e30,
        f32::MAX,
        f32::INFINITY,
        f32::NAN,
        1e-45,
        0.1,
    ];

    fn cast<T: Element>(dtype: FileDtype, bytes: &[u8], n: usize) -> (Vec<T>, u64) {
        let mut out = vec![T::default(); n];
        let overflowed = convert(3, dtype, bytes, &mut out).unwrap();
        (out, overflowed)
    }

    fn agrees<T: Element>(x: &[f32]) {
        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (found, overflowed) = cast::<T>(FileDtype::F32, &bytes, x.len());
        let mut infinite = 0;
        for (x, found) in x.iter().zip(&found) {
            let want = T::from_f32(*x);
            assert!(*found == want || x.is_nan(), "{x} {found:?}");
            infinite += u64::from(x.is_finite() && !want.to_f32().is_finite());
        }
        assert_eq!(overflowed, infinite, "{}", T::DTYPE);
    }

    #[test]
    fn slices_are_cast_as_single_values_are() {
        let mut x: Vec<f32> = (0..70_000u32).map(|i| f32::from_bits(i * 61_357)).collect();
        x.extend(ODD);
        agrees::<f32>(&x);
        agrees::<f16>(&x);
        agrees::<bf16>(&x);
    }

    #[test]
    fn every_half_widens_to_itself() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let (same, _) = cast::<f32>(FileDtype::F16, &bytes, 1 << 16);
        let (brain, _) = cast::<f32>(FileDtype::BF16, &bytes, 1 << 16);
        for i in 0..=u16::MAX {
            let (half, brain) = (same[usize::from(i)], brain[usize::from(i)]);
            assert!(half == f16::from_bits(i).to_f32() || half.is_nan());
            assert!(brain == bf16::from_bits(i).to_f32() || brain.is_nan());
        }
    }

    #[test]
    fn doubles_go_through_f32_and_integers_do_not_go() {
        let bytes: Vec<u8> = [0.1f64, 1e300].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(cast::<f32>(FileDtype::F64, &bytes, 2).0, [0.1, f32::INFINITY]);
        assert!(convert::<f32>(1, FileDtype::I64, &bytes, &mut [0.0; 2]).is_err());
    }
}
