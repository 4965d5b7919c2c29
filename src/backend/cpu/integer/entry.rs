//! Functions that enable an instruction set around the kernels.

macro_rules! entry_points {
    ($name:ident, $D:ty, $features:literal) => {
        pub mod $name {
            use std::ops::Range;

            use crate::backend::cpu::Lanes;
            use crate::backend::cpu::integer::job::{Eight, Four, Staged};
            use crate::backend::cpu::integer::{panels, rows, strips};
            use crate::backend::cpu::product::Out;

            #[target_feature(enable = $features)]
            pub fn few_four(d: $D, job: &Four<'_>, rows: Range<usize>, sums: &mut [f32]) {
                rows::four(d, job, rows, sums);
            }

            #[target_feature(enable = $features)]
            pub fn few_eight(d: $D, job: &Eight<'_>, rows: Range<usize>, sums: &mut [f32]) {
                rows::eight(d, job, rows, sums);
            }

            #[target_feature(enable = $features)]
            pub fn four<T: Lanes>(
                d: $D,
                job: &Four<'_, Staged>,
                strip: usize,
                first: usize,
                out: &Out<'_, T>,
            ) {
                strips::four(d, job, strip, first, out);
            }

            #[target_feature(enable = $features)]
            pub fn eight<T: Lanes>(
                d: $D,
                job: &Eight<'_>,
                panel: usize,
                first: usize,
                out: &Out<'_, T>,
            ) {
                panels::eight(d, job, panel, first, out);
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
entry_points!(with_avx2, crate::backend::cpu::avx2::Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
entry_points!(
    with_avx512,
    crate::backend::cpu::avx512::Avx512,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "x86_64")]
entry_points!(
    with_vnni,
    crate::backend::cpu::avx512::Avx512Ext,
    "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "aarch64")]
entry_points!(with_neon, crate::backend::cpu::neon::Neon, "neon");
#[cfg(target_arch = "aarch64")]
entry_points!(with_neon_dot, crate::backend::cpu::neon::NeonDot, "neon,dotprod");

/// [`super::quads`]
#[cfg(target_arch = "x86_64")]
pub mod quads_vnni {
    use crate::backend::cpu::Lanes;
    use crate::backend::cpu::avx512::Avx512Ext;
    use crate::backend::cpu::integer::job::Eight;
    use crate::backend::cpu::integer::quads::{self, Arranging};
    use crate::backend::cpu::product::Out;

    /// # Safety
    /// - No other call is about this token.
    #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub unsafe fn arrange(d: Avx512Ext, to: &Arranging<'_>, token: usize, codes: &[i8]) {
        // SAFETY: the caller's.
        unsafe { to.token(d, token, codes) }
    }

    #[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    pub fn eight<T: Lanes>(d: Avx512Ext, job: &Eight<'_>, panel: usize, out: &Out<'_, T>) {
        quads::eight(d, job, panel, out);
    }
}
