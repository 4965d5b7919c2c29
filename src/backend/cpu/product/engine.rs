//! The product kernels of each instruction set, behind functions that enable it.

use super::super::Lanes;
#[cfg(target_arch = "aarch64")]
use super::super::neon::{Neon, NeonBf16};
#[cfg(target_arch = "x86_64")]
use super::super::{
    avx2::Avx2,
    avx512::{Avx512, Avx512Ext},
};
use super::ahead::Ahead;
#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2Short;
use super::bytes::{self, Bytes};
use super::down::Down;
use super::few::Few;
use super::lanes::Dot;
use super::many::{Many, Scratch};
use super::out::Out;
use super::portable::Portable;
use super::stretch::{self, Gradients, Run, Stretch};
use super::tiles::{self, Panel, To};
use super::{dense, few, many};

/// Products with few rows of activations.
pub trait Rows: Dot + Send + Sync {
    /// [`few::rows`]
    fn rows(self, few: &Few<'_, Self::X>, first: usize, scales: &[f32], out: &mut [f32]);
}

/// What the driver calls; each is documented at the function of the same name.
pub trait Engine: Rows + Down {
    /// What multiplies few rows of activations that are bf16.
    type Short: Rows<X = Self::X>;
    /// See [`Engine::Short`].
    fn short(self) -> Self::Short;
    /// [`many::strips`]
    fn strips(
        self,
        many: &Many<'_, Self::X>,
        first: usize,
        count: usize,
        to: &mut Scratch<Self::X>,
    );
    /// [`tiles::tiles`]
    fn tiles(self, panel: &Panel<'_>, x: &[Self::X], stride: usize, m: usize, to: To<'_>);
    /// [`stretch::few`]
    fn few_columns(
        self,
        stretch: &Stretch<'_>,
        run: &Run<'_>,
        gradients: Gradients<'_, Self::X>,
        sums: &mut [f32],
    );
    /// [`stretch::panels`]
    fn panels(self, stretch: &Stretch<'_>, run: &Run<'_>, chunk: usize, panels: &mut [u32]);
    /// [`bytes::rows`]
    fn byte_rows(self, bytes: &Bytes<'_>, first: usize, out: &mut [f32]);
    /// [`dense::row`]
    fn dense_row(self, weights: &[f32], x: &[f32], out: &mut [f32]);
    /// [`dense::finish`]
    fn finish<T: Lanes>(self, sums: &[f32], bias: Option<&[f32]>, out: &mut [T]);
    /// [`dense::finish_rows`]
    ///
    /// # Safety
    /// Its own.
    unsafe fn finish_rows<T: Lanes>(
        self,
        sums: (&[f32], usize),
        bias: Option<&[f32]>,
        out: &Out<'_, T>,
        place: (usize, usize, usize),
    );
    /// [`few::prepare`] for single words
    fn prepare(self, row: &[Self::X], out: &mut [Self::X]);
    /// [`dense::widen`]
    fn widen<T: Lanes>(self, x: &[T], out: &mut [f32]);
}

macro_rules! rows {
    ($isa:ident, $(#[$enable:meta],)? $call:ident) => {
        impl Rows for $isa {
            fn rows(self, few: &Few<'_, Self::X>, first: usize, scales: &[f32], out: &mut [f32]) {
                $(#[$enable])?
                fn inner(
                    d: $isa,
                    few: &Few<'_, <$isa as Dot>::X>,
                    first: usize,
                    scales: &[f32],
                    out: &mut [f32],
                ) {
                    few::rows(d, few, first, scales, out);
                }
                $call!(inner(self, few, first, scales, out));
            }
        }
    };
}

macro_rules! engine {
    ($isa:ident, $short:ident, $(#[$enable:meta],)? $call:ident) => {
        rows!($isa, $(#[$enable],)? $call);
        impl Engine for $isa {
            type Short = $short;
            fn short(self) -> $short {
                self.into()
            }
            fn strips(
                self,
                many: &Many<'_, Self::X>,
                first: usize,
                count: usize,
                to: &mut Scratch<Self::X>,
            ) {
                $(#[$enable])?
                fn inner(
                    d: $isa,
                    many: &Many<'_, <$isa as Dot>::X>,
                    first: usize,
                    count: usize,
                    to: &mut Scratch<<$isa as Dot>::X>,
                ) {
                    many::strips(d, many, first, count, to);
                }
                $call!(inner(self, many, first, count, to));
            }
            fn tiles(
                self,
                panel: &Panel<'_>,
                x: &[Self::X],
                stride: usize,
                m: usize,
                to: To<'_>,
            ) {
                $(#[$enable])?
                fn inner(
                    d: $isa,
                    panel: &Panel<'_>,
                    x: &[<$isa as Dot>::X],
                    stride: usize,
                    m: usize,
                    to: To<'_>,
                ) {
                    tiles::tiles(d, panel, x, stride, m, Ahead::NOTHING, to);
                }
                $call!(inner(self, panel, x, stride, m, to));
            }
            fn few_columns(
                self,
                stretch: &Stretch<'_>,
                run: &Run<'_>,
                gradients: Gradients<'_, Self::X>,
                sums: &mut [f32],
            ) {
                $(#[$enable])?
                fn inner(
                    d: $isa,
                    stretch: &Stretch<'_>,
                    run: &Run<'_>,
                    gradients: Gradients<'_, <$isa as Dot>::X>,
                    sums: &mut [f32],
                ) {
                    stretch::few(d, stretch, run, gradients, sums);
                }
                $call!(inner(self, stretch, run, gradients, sums));
            }
            fn panels(
                self,
                stretch: &Stretch<'_>,
                run: &Run<'_>,
                chunk: usize,
                panels: &mut [u32],
            ) {
                $(#[$enable])?
                fn inner(
                    d: $isa,
                    stretch: &Stretch<'_>,
                    run: &Run<'_>,
                    chunk: usize,
                    panels: &mut [u32],
                ) {
                    stretch::panels(d, stretch, run, chunk, panels);
                }
                $call!(inner(self, stretch, run, chunk, panels));
            }
            fn byte_rows(self, bytes: &Bytes<'_>, first: usize, out: &mut [f32]) {
                $(#[$enable])?
                fn inner(d: $isa, bytes: &Bytes<'_>, first: usize, out: &mut [f32]) {
                    bytes::rows(d, bytes, first, out);
                }
                $call!(inner(self, bytes, first, out));
            }
            fn dense_row(self, weights: &[f32], x: &[f32], out: &mut [f32]) {
                $(#[$enable])?
                fn inner(d: $isa, weights: &[f32], x: &[f32], out: &mut [f32]) {
                    dense::row(d, weights, x, out);
                }
                $call!(inner(self, weights, x, out));
            }
            fn finish<T: Lanes>(self, sums: &[f32], bias: Option<&[f32]>, out: &mut [T]) {
                $(#[$enable])?
                fn inner<T: Lanes>(d: $isa, sums: &[f32], bias: Option<&[f32]>, out: &mut [T]) {
                    dense::finish(d, sums, bias, out);
                }
                $call!(inner(self, sums, bias, out));
            }
            unsafe fn finish_rows<T: Lanes>(
                self,
                sums: (&[f32], usize),
                bias: Option<&[f32]>,
                out: &Out<'_, T>,
                place: (usize, usize, usize),
            ) {
                $(#[$enable])?
                unsafe fn inner<T: Lanes>(
                    d: $isa,
                    sums: (&[f32], usize),
                    bias: Option<&[f32]>,
                    out: &Out<'_, T>,
                    place: (usize, usize, usize),
                ) {
                    // SAFETY: the caller's.
                    unsafe { dense::finish_rows(d, sums, bias, out, place) };
                }
                // SAFETY: the caller's; `self` exists, so the machine has the features.
                unsafe { inner(self, sums, bias, out, place) };
            }
            fn prepare(self, row: &[Self::X], out: &mut [Self::X]) {
                $(#[$enable])?
                fn inner(_: $isa, row: &[<$isa as Dot>::X], out: &mut [<$isa as Dot>::X]) {
                    few::prepare::<$isa>(row, 1, out);
                }
                $call!(inner(self, row, out));
            }
            fn widen<T: Lanes>(self, x: &[T], out: &mut [f32]) {
                $(#[$enable])?
                fn inner<T: Lanes>(d: $isa, x: &[T], out: &mut [f32]) {
                    dense::widen(d, x, out);
                }
                $call!(inner(self, x, out));
            }
        }
    };
}

macro_rules! plain {
    ($call:expr) => {
        $call
    };
}
engine!(Portable, Portable, plain);

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod vectors {
    use super::{
        Ahead, Bytes, Dot, Engine, Few, Gradients, Lanes, Many, Out, Panel, Rows, Run, Scratch,
        Stretch, To, bytes, dense, few, many, stretch, tiles,
    };
    #[cfg(target_arch = "x86_64")]
    use super::{Avx2, Avx2Short, Avx512, Avx512Ext};
    #[cfg(target_arch = "aarch64")]
    use super::{Neon, NeonBf16};

    macro_rules! proven {
        ($call:expr) => {
            // SAFETY: `self` exists, so the machine has the features.
            unsafe { $call }
        };
    }
    #[cfg(target_arch = "aarch64")]
    engine!(Neon, Neon, #[target_feature(enable = "neon")], proven);
    #[cfg(target_arch = "aarch64")]
    engine!(NeonBf16, NeonBf16, #[target_feature(enable = "neon,bf16")], proven);
    #[cfg(target_arch = "x86_64")]
    engine!(Avx2, Avx2Short, #[target_feature(enable = "avx2,fma,f16c")], proven);
    #[cfg(target_arch = "x86_64")]
    rows!(Avx2Short, #[target_feature(enable = "avx2,fma,f16c")], proven);
    #[cfg(target_arch = "x86_64")]
    engine!(
        Avx512, Avx512, #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")],
        proven
    );
    #[cfg(target_arch = "x86_64")]
    engine!(
        Avx512Ext, Avx512Ext,
        #[target_feature(
            enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi,avx2,fma,f16c"
        )],
        proven
    );
}
