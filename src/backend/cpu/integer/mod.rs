//! Products with activations of signed bytes, for four-bit weights and for LLM.int8().
//!
//! [`crate::quant::integer`] is the definition. Few rows of activations meet the weight as it lies
//! in memory (`rows`); for many, strips or panels of it are turned in the cache (`strips` with four
//! bits, `panels` with eight). With AVX-512 there is a way between (`quads`).

// Without vectors only `general` is used.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code))]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod entry;
mod general;
mod job;
#[cfg(target_arch = "aarch64")]
mod neon;
mod panels;
mod quads;
mod rows;
mod spread;
mod strips;

use job::{Arranged, Eight, Four, Staged};

use super::{Cpu, Isa, Kernels, Lanes};
use crate::error::{Error, Result};
use crate::format::Decode;
use crate::pack::check_len;
use crate::quant::integer::{Integers, MAX_COLUMNS};
use crate::tensor::{QTensor, Scales};

/// The instructions that integer products use.
#[derive(Clone, Copy, Debug)]
enum Unit {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(super::avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(super::avx512::Avx512),
    #[cfg(target_arch = "x86_64")]
    Vnni(super::avx512::Avx512Ext),
    #[cfg(target_arch = "aarch64")]
    Neon(super::neon::Neon),
    #[cfg(target_arch = "aarch64")]
    NeonDot(super::neon::NeonDot),
}

#[cfg(target_arch = "aarch64")]
impl Unit {
    /// With products of bytes where the machine has them: they need not come with BF16.
    fn of_neon(proof: super::neon::Neon) -> Self {
        super::neon::NeonDot::detect(proof).map_or(Self::Neon(proof), Self::NeonDot)
    }
}

/// Integer products on given kernels and threads.
#[derive(Clone, Copy, Debug)]
pub struct Integer {
    cpu: Cpu,
    unit: Unit,
}

/// The shape of a product and its addend.
#[derive(Clone, Copy, Debug)]
pub struct Product<'a> {
    /// Length of a row of the weight and of the activations.
    pub columns: usize,
    /// One number a row of the weight, if any.
    pub bias: Option<&'a [f32]>,
}

impl Integer {
    /// The fastest that the kernels of a [`Cpu`] stand for.
    pub fn new(cpu: Cpu) -> Self {
        let unit = match cpu.isa {
            Isa::Scalar => Unit::Scalar,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(proof) => Unit::Avx2(proof),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon(proof) => Unit::of_neon(proof),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonBf16(proof) => Unit::of_neon(proof.base()),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(proof) => Unit::Avx512(proof),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Ext(proof) => Unit::Vnni(proof),
        };
        Self { cpu, unit }
    }

    /// All that this machine can run, slowest first.
    pub fn available(threads: usize) -> Vec<Self> {
        let mut all = Vec::new();
        for isa in Isa::available() {
            let integer = Self::new(Cpu::with(isa, threads));
            // What an older processor would use runs here too.
            #[cfg(target_arch = "aarch64")]
            if let (Isa::Neon(proof), Unit::NeonDot(_)) = (isa, integer.unit) {
                all.push(Self { unit: Unit::Neon(proof), ..integer });
            }
            all.push(integer);
        }
        all
    }

    /// The name of the instructions in use.
    pub const fn name(&self) -> &'static str {
        match self.unit {
            Unit::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Unit::Vnni(_) => "avx512 vnni",
            #[cfg(target_arch = "aarch64")]
            Unit::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Unit::NeonDot(_) => "neon dotprod",
        }
    }

    /// `x @ weight.T + bias` with activations rounded to integers; see
    /// [`crate::quant::integer`]. int8 weights are multiplied as in [`Self::llm_int8`] without a
    /// threshold.
    ///
    /// `x` is `[tokens, columns]`, `out` `[tokens, rows]`.
    pub fn linear<T: Lanes>(
        &self,
        x: &[T],
        q: &QTensor<'_>,
        product: Product<'_>,
        out: &mut [T],
    ) -> Result<()> {
        let layout = q.layout();
        if matches!(layout.format.spec().decode, Decode::Int8) {
            return self.llm_int8(x, q, 0.0, product, out);
        }
        let integers = Integers::of(layout.format)?;
        let columns = product.columns;
        let (tokens, rows) = shape(q, x.len(), columns, out.len())?;
        let bias = padded(product.bias, rows)?;
        if tokens == 0 || rows == 0 {
            return Ok(());
        }
        if columns == 0 {
            general::bias_only(&bias, out);
            return Ok(());
        }
        let job = Four { q, isa: self.cpu.isa, integers, columns, tokens, x, bias: &bias };
        if columns.is_multiple_of(layout.blocksize) && !matches!(self.unit, Unit::Scalar) {
            self.four(job, out);
        } else {
            let kernels = Kernels::of(self.cpu.isa);
            let x = Arranged::quantize(&kernels, self.cpu.threads, (x, columns), 1, 0, |_, _| ());
            general::four(self.cpu.threads, &job.with(x), out);
        }
        Ok(())
    }

    /// LLM.int8() (arXiv:2208.07339): rows of `x` become signed bytes; columns with a magnitude of
    /// at least `threshold` (if above 0) are multiplied in f32.
    ///
    /// `x` is `[tokens, columns]`, `out` `[tokens, rows]`. Fails if a value is not finite.
    pub fn llm_int8<T: Lanes>(
        &self,
        x: &[T],
        q: &QTensor<'_>,
        threshold: f32,
        product: Product<'_>,
        out: &mut [T],
    ) -> Result<()> {
        let layout = q.layout();
        let (Decode::Int8, Scales::Plain(absmax)) = (layout.format.spec().decode, q.scales())
        else {
            return Err(Error::Unsupported {
                format: layout.format.spec().name,
                what: "rows of signed bytes",
                remedy: "quantize to int8 for LLM.int8()",
            });
        };
        let columns = product.columns;
        let (tokens, rows) = shape(q, x.len(), columns, out.len())?;
        let bias = padded(product.bias, rows)?;
        if tokens == 0 || rows == 0 {
            return Ok(());
        }
        if columns == 0 {
            general::bias_only(&bias, out);
            return Ok(());
        }
        let (mut codes, mut scales) = (vec![0i8; x.len()], vec![0f32; tokens]);
        let outliers =
            self.cpu.quantize_activations(x, columns, threshold, &mut codes, &mut scales)?;
        let apart = outliers.len().next_multiple_of(Eight::PADDING);
        let mut outlying = vec![0f32; tokens * apart];
        if apart > 0 {
            for (outlying, x) in outlying.chunks_exact_mut(apart).zip(x.chunks_exact(columns)) {
                for (outlying, column) in outlying.iter_mut().zip(&outliers) {
                    *outlying = x[*column].to_f32();
                }
            }
        }
        let x = self.arranged(&codes, columns, scales);
        let weight = bytemuck::cast_slice(q.packed());
        let (outliers, outlying) = (outliers.as_slice(), outlying.as_slice());
        let job = Eight { weight, absmax, columns, x, outliers, outlying, apart, bias: &bias };
        self.eight(&job, out);
        Ok(())
    }

    /// Arranges rows of codes of `columns` activations, with their scales, for [`Self::eight`].
    fn arranged(&self, codes: &[i8], columns: usize, scales: Vec<f32>) -> Arranged {
        #[cfg(target_arch = "x86_64")]
        if let Some(d) = self.in_quads(scales.len(), columns) {
            let threads = self.cpu.threads;
            return quads::arranged(d, threads, (codes, columns), scales, |to, token, codes| {
                // SAFETY: `d` exists, so the machine has the features; each call is about another
                // token.
                unsafe { entry::quads_vnni::arrange(d, to, token, codes) }
            });
        }
        let (lanes, bias) = self.lanes();
        Arranged::by_rows((codes, columns), job::stride(columns, 4 * lanes), bias, scales)
    }

    /// Whether tokens of so many columns meet an int8 weight in quads, and with what.
    #[cfg(target_arch = "x86_64")]
    fn in_quads(&self, tokens: usize, columns: usize) -> Option<super::avx512::Avx512Ext> {
        match self.unit {
            Unit::Vnni(d) if quads::pays(tokens, columns) && columns <= MAX_COLUMNS => Some(d),
            _ => None,
        }
    }

    fn lanes(&self) -> (usize, i32) {
        match self.unit {
            Unit::Scalar => (1, 0),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2(_) => of_dot::<super::avx2::Avx2>(),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512(_) => of_dot::<super::avx512::Avx512>(),
            #[cfg(target_arch = "x86_64")]
            Unit::Vnni(_) => of_dot::<super::avx512::Avx512Ext>(),
            #[cfg(target_arch = "aarch64")]
            Unit::Neon(_) => of_dot::<super::neon::Neon>(),
            #[cfg(target_arch = "aarch64")]
            Unit::NeonDot(_) => of_dot::<super::neon::NeonDot>(),
        }
    }

    /// A product with rows of whole blocks.
    fn four<T: Lanes>(&self, job: Four<'_, &[T]>, out: &mut [T]) {
        let threads = self.cpu.threads;
        macro_rules! product {
            ($with:ident, $d:ident) => {{
                let kernels = Kernels::of(self.cpu.isa);
                if job.tokens <= rows::TILE {
                    let x = rows::arranged($d, &kernels, threads, &job);
                    let job = job.with(x);
                    spread::rows(threads, job.cut(), out, |rows, sums| {
                        // SAFETY: `$d` exists, so the machine has the features.
                        unsafe { entry::$with::few_four($d, &job, rows, sums) }
                    })
                } else {
                    let unit = (job.unit(), bias_of($d));
                    let x = Staged::quantize(&kernels, threads, (job.x, job.columns), unit);
                    let job = job.with(x);
                    let parts = (panel_rows($d), strips::TOKENS);
                    spread::panels(threads, job.cut(), parts, out, |strip, first, out| {
                        // SAFETY: `$d` exists, so the machine has the features.
                        unsafe { entry::$with::four($d, &job, strip, first, out) }
                    })
                }
            }};
        }
        match self.unit {
            Unit::Scalar => {}
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2(d) => product!(with_avx2, d),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512(d) => product!(with_avx512, d),
            #[cfg(target_arch = "x86_64")]
            Unit::Vnni(d) => product!(with_vnni, d),
            #[cfg(target_arch = "aarch64")]
            Unit::Neon(d) => product!(with_neon, d),
            #[cfg(target_arch = "aarch64")]
            Unit::NeonDot(d) => product!(with_neon_dot, d),
        }
    }

    fn eight<T: Lanes>(&self, job: &Eight<'_>, out: &mut [T]) {
        if job.columns > MAX_COLUMNS {
            return general::eight(self.cpu.threads, job, out);
        }
        let (threads, cut) = (self.cpu.threads, job.cut());
        #[cfg(target_arch = "x86_64")]
        if let Some(d) = self.in_quads(job.x.tokens, job.columns) {
            let parts = (panel_rows(d), quads::TOKENS);
            return spread::panels(threads, cut, parts, out, |panel, _, out| {
                // SAFETY: `d` exists, so the machine has the features.
                unsafe { entry::quads_vnni::eight(d, job, panel, out) }
            });
        }
        macro_rules! product {
            ($with:ident, $d:ident) => {{
                if job.x.tokens <= rows::TOKENS {
                    spread::rows(threads, cut, out, |rows, sums| {
                        // SAFETY: `$d` exists, so the machine has the features.
                        unsafe { entry::$with::few_eight($d, job, rows, sums) }
                    })
                } else {
                    let parts = (panel_rows($d), panels::TOKENS);
                    spread::panels(threads, cut, parts, out, |panel, first, out| {
                        // SAFETY: `$d` exists, so the machine has the features.
                        unsafe { entry::$with::eight($d, job, panel, first, out) }
                    })
                }
            }};
        }
        match self.unit {
            Unit::Scalar => general::eight(threads, job, out),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx2(d) => product!(with_avx2, d),
            #[cfg(target_arch = "x86_64")]
            Unit::Avx512(d) => product!(with_avx512, d),
            #[cfg(target_arch = "x86_64")]
            Unit::Vnni(d) => product!(with_vnni, d),
            #[cfg(target_arch = "aarch64")]
            Unit::Neon(d) => product!(with_neon, d),
            #[cfg(target_arch = "aarch64")]
            Unit::NeonDot(d) => product!(with_neon_dot, d),
        }
    }
}

/// (rows of x, rows of the weight), from lengths that fit together.
fn shape(q: &QTensor<'_>, x: usize, columns: usize, out: usize) -> Result<(usize, usize)> {
    let layout = q.layout();
    let rows = match (layout.elements.checked_div(columns), layout.format.spec().decode) {
        (Some(rows), _) => rows,
        (None, Decode::Int8) => layout.scales,
        (None, _) => 0,
    };
    check_len("weight", layout.elements, rows * columns)?;
    let tokens = match x.checked_div(columns) {
        Some(tokens) => tokens,
        None => out.checked_div(rows).unwrap_or(0),
    };
    check_len("activations", tokens * columns, x)?;
    check_len("output", tokens.saturating_mul(rows), out)?;
    Ok((tokens, rows))
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn of_dot<D: dot::Dot>() -> (usize, i32) {
    (D::LANES, D::BIAS as i32)
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn panel_rows<D: dot::Dot>(_: D) -> usize {
    2 * D::LANES
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn bias_of<D: dot::Dot>(_: D) -> u8 {
    D::BIAS
}

fn padded(bias: Option<&[f32]>, rows: usize) -> Result<Vec<f32>> {
    match bias {
        None => Ok(vec![0.0; rows]),
        Some(bias) => {
            check_len("bias", rows, bias.len())?;
            Ok(bias.to_vec())
        }
    }
}
