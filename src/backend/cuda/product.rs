//! Products with few rows of activations, in the precision of the activations.
//!
//! Many rows are multiplied by torch with chunks of the decoded weight; see `nybble/cuda`.

use super::blocks::{dense, multiple};
use super::device::Cuda;
use super::launch::{
    Family, Grid, LINEAR4_GEMV, LINEAR4_MID, LINEAR4_SMALL8, LINEAR4_SMALL16, LINEAR4_SMALL32,
    LINEAR8_GEMV,
};
use super::memory::DeviceSlice;
use super::params;
use super::tensor::DeviceTensor;
use crate::dtype::{Dtype, Element};
use crate::error::Result;
use crate::format::{Decode, Format};
use crate::pack::check_len;

/// Kernels on tensor cores whose blocks of threads have all rows of activations, and how many those
/// may be. [`LINEAR4_MID`] shares more out.
static SMALL: [(u64, &Family<params::Linear4>); 3] =
    [(8, &LINEAR4_SMALL8), (16, &LINEAR4_SMALL16), (32, &LINEAR4_SMALL32)];
/// Rows of the weight of a block of threads of these.
const SMALL_EACH: u64 = 16;

/// The most rows of activations for which reading the packed weight is worth it where there are tensor
/// cores. With more, decoding it for a dense product takes fewer instructions: `cuda/kernels.md` counts
/// them. [`Cuda::linear`] itself takes any number, so that both can be timed.
const MID_MOST: u64 = 256;

/// The most rows for which a kernel without tensor cores is worth it: it reads the weight again for
/// every four.
const GEMV_ROWS: u64 = 8;

/// How [`LINEAR4_MID`] can be shared out.
#[derive(Clone, Copy)]
struct MidBlocks {
    /// Rows of the weight of a block of threads.
    rows: u64,
    /// The most rows of activations of it.
    tokens: u64,
    /// In how many parts its warps share out a row of the weight.
    shares: u64,
    /// How many halves its rows of activations are shared out in.
    halves: u64,
}

/// The first decodes least, the last gives the most blocks.
const MID_BLOCKS: [MidBlocks; 3] = [
    MidBlocks { rows: 128, tokens: 128, shares: 1, halves: 2 },
    MidBlocks { rows: 128, tokens: 64, shares: 2, halves: 1 },
    MidBlocks { rows: 64, tokens: 32, shares: 4, halves: 1 },
];
/// Rows of activations come in tiles of eight, two tiles at a time.
const MID_MULTIPLE: u64 = 16;
/// Instructions of a warp for each pair of tiles, and for all of them together: nf4 on 9.0.
const MID_COST: (u64, u64) = (38, 228);

/// Rows of the weight, and rows of activations, of a block of [`LINEAR4_MID`]: what takes the fewest
/// instructions one after another, when each multiprocessor has a block at a time.
fn mid_block(m: u64, n: u64, multiprocessors: u32) -> (u64, u64) {
    let cost = |block: &MidBlocks| {
        let parts = m.div_ceil(block.tokens);
        // A block of 65 to 128 has two halves; of fewer rows, which take others, it has one.
        let each = m.div_ceil(parts).next_multiple_of(MID_MULTIPLE);
        let pairs = each.div_ceil(block.halves).div_ceil(MID_MULTIPLE);
        let blocks = n.div_ceil(block.rows).saturating_mul(parts);
        let waves = blocks.div_ceil(u64::from(multiprocessors.max(1)));
        waves.saturating_mul((MID_COST.0 * pairs + MID_COST.1) * 4 / block.shares)
    };
    let fits = |block: &&MidBlocks| block.halves == 1 || m > block.tokens / 2;
    let best = MID_BLOCKS.iter().filter(fits).min_by_key(|block| cost(block));
    let best = best.unwrap_or(&MID_BLOCKS[1]);
    let tokens = m.div_ceil(m.div_ceil(best.tokens)).next_multiple_of(MID_MULTIPLE);
    (best.rows, tokens)
}
const GEMV_EACH: u64 = 8;
const GEMV_ROWS_EACH: u64 = 4;

/// Capability from which tensor cores multiply bf16.
const BF16_CAPABILITY: u32 = 80;

/// A bias of any element type.
#[derive(Clone, Copy, Debug)]
pub enum Bias {
    /// f32
    F32(DeviceSlice<f32>),
    /// f16
    F16(DeviceSlice<half::f16>),
    /// bf16
    BF16(DeviceSlice<half::bf16>),
}

impl Bias {
    /// Address and dtype as kernels take them, for `n` elements.
    pub(super) fn params(bias: Option<Self>, n: usize) -> Result<(u64, u32)> {
        let (address, len, dtype) = match bias {
            None => return Ok((0, 0)),
            Some(Bias::F32(bias)) => (bias.address("bias")?, bias.len(), Dtype::F32),
            Some(Bias::F16(bias)) => (bias.address("bias")?, bias.len(), Dtype::F16),
            Some(Bias::BF16(bias)) => (bias.address("bias")?, bias.len(), Dtype::BF16),
        };
        check_len("bias", n, len)?;
        Ok((address, params::dtype_number(dtype)))
    }
}

/// The kernel on tensor cores for `m` rows of activations, if one fits.
fn small(
    m: u64,
    k: u64,
    dtype: Dtype,
    capability: u32,
) -> Option<&'static Family<params::Linear4>> {
    let fits = match dtype {
        Dtype::F32 => false,
        Dtype::F16 => true,
        Dtype::BF16 => capability >= BF16_CAPABILITY,
    };
    let found = SMALL.iter().find(|(most, _)| m <= *most).map_or(&LINEAR4_MID, |(_, found)| *found);
    (fits && k > 0 && k.is_multiple_of(64)).then_some(found)
}

/// The most rows of activations that one kernel multiplies, for a weight with rows of `k`
/// elements; 0 where there is no kernel for the format.
pub fn most_rows(format: Format, k: usize, dtype: Dtype, capability: u32) -> u64 {
    match format.spec().decode {
        Decode::Codebook4(_) => {
            let found = small(MID_MOST, k as u64, dtype, capability);
            found.map_or(GEMV_ROWS, |_| MID_MOST)
        }
        Decode::Codebook8(_) | Decode::Int8 => GEMV_ROWS,
        Decode::Dense(_) => 0,
    }
}

impl Cuda {
    /// `y = x @ q.T + bias` for the rows that `x` has; `shape` is that of the weight.
    pub fn linear<T: Element>(
        &self,
        q: &DeviceTensor,
        shape: [usize; 2],
        x: DeviceSlice<T>,
        bias: Option<Bias>,
        y: DeviceSlice<T>,
    ) -> Result<()> {
        let [n, k] = shape;
        check_len("weight", q.layout().elements, n.saturating_mul(k))?;
        let (bias, bias_dtype) = Bias::params(bias, n)?;
        if y.is_empty() {
            return Ok(());
        }
        multiple("number of results", y.len(), n)?;
        let m = y.len() / n;
        check_len("x", m.saturating_mul(k), x.len())?;
        let (x_at, y, m, n, k) = (x.address("x")?, y.address("y")?, m as u64, n as u64, k as u64);
        let grid = Grid::plane((n, GEMV_EACH), (m, GEMV_ROWS_EACH));
        let book = match q.layout().format.spec().decode {
            Decode::Codebook4(book) => book,
            Decode::Codebook8(_) | Decode::Int8 => {
                let params = Bytes::of(q)?.params([x_at, bias, y], [m, n, k], bias_dtype);
                return self.launch(&LINEAR8_GEMV, Some(T::DTYPE), grid, params);
            }
            Decode::Dense(_) => return Err(dense(q.layout().format)),
        };
        let (rows, tokens) = mid_block(m, n, self.multiprocessors());
        let params = params::Linear4 {
            x: x_at,
            packed: q.packed().wide("packed")?,
            bias,
            y,
            m,
            n,
            k,
            scales: q.scales_of_blocks()?,
            values: book.values,
            bias_dtype,
            tokens: tokens as u32,
            rows: rows as u32,
            padding: 0,
        };
        let small = small(m, k, T::DTYPE, self.capability());
        if let Some(family) = small.filter(|_| x.wide("x").is_ok()) {
            let alone = SMALL.iter().any(|(most, _)| m <= *most);
            let grid =
                if alone { Grid::line(n, SMALL_EACH) } else { Grid::plane((n, rows), (m, tokens)) };
            return self.launch(family, Some(T::DTYPE), grid, params);
        }
        self.launch(&LINEAR4_GEMV, Some(T::DTYPE), grid, params)
    }
}

/// A weight of byte codes as its kernel takes it.
struct Bytes {
    codes: u64,
    values: u64,
    absmax: u64,
    log2_blocksize: u32,
}

impl Bytes {
    fn of(q: &DeviceTensor) -> Result<Self> {
        let (values, log2_blocksize) = match q.layout().format.spec().decode {
            Decode::Int8 => (0, 0),
            _ => (q.tables()?.values.address("values of the codebook")?, q.log2_blocksize()?),
        };
        let absmax = q.plain_scales()?.address("absmax")?;
        Ok(Self { codes: q.packed().address("packed")?, values, absmax, log2_blocksize })
    }

    fn params(self, at: [u64; 3], [m, n, k]: [u64; 3], bias_dtype: u32) -> params::Linear8 {
        let Self { codes, values, absmax, log2_blocksize } = self;
        let [x, bias, y] = at;
        params::Linear8 { x, codes, values, absmax, bias, y, m, n, k, log2_blocksize, bias_dtype }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensor_cores_take_whole_tiles_of_what_they_multiply() {
        let most = |k, dtype, capability| most_rows(Format::Nf4, k, dtype, capability);
        assert_eq!(most(4096, Dtype::BF16, 90), MID_MOST);
        assert_eq!(most(4096, Dtype::BF16, 75), GEMV_ROWS);
        assert_eq!(most(4096, Dtype::F16, 75), MID_MOST);
        assert_eq!(most(4096, Dtype::F32, 90), GEMV_ROWS);
        assert_eq!(most(4100, Dtype::F16, 90), GEMV_ROWS);
        assert_eq!(most_rows(Format::Int8, 64, Dtype::F16, 90), GEMV_ROWS);
        assert_eq!(most_rows(Format::Bf16, 64, Dtype::F16, 90), 0);
    }

    #[test]
    fn blocks_are_chosen_so_that_multiprocessors_are_busy() {
        let of_132 = |m, n| mid_block(m, n, 132);
        assert_eq!(of_132(128, 14_336), (128, 128));
        assert_eq!(of_132(256, 14_336), (128, 128));
        assert_eq!(of_132(64, 14_336), (128, 64));
        assert_eq!(of_132(33, 14_336), (128, 48));
        assert_eq!(of_132(256, 4096), (128, 64));
        assert_eq!(of_132(64, 4096), (64, 32));
        assert_eq!(of_132(33, 1024), (64, 32));
        assert_eq!(mid_block(64, 4096, 16), (128, 64));
    }

    #[test]
    fn blocks_are_what_the_kernel_takes() {
        for m in 33..=600 {
            for n in [1, 64, 1000, 4096, 14_336, 128_256, u64::MAX / 600] {
                let (rows, tokens) = mid_block(m, n, 132);
                assert!(tokens > 0 && tokens.is_multiple_of(16), "{m} {n}: {tokens}");
                assert!(tokens <= if rows == 64 { 32 } else { 128 }, "{m} {n}: {rows}, {tokens}");
            }
        }
    }
}
