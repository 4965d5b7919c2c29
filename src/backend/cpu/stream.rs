//! Writing large results: past the caches, into memory of large pages.
//!
//! A store that misses the caches first reads the line that it overwrites. A streaming store does
//! not, and leaves the caches to what is read. Memory that was just allocated is mapped page by page
//! as it is touched; with pages of 2 MiB that takes a fraction of the time.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
};

use super::Isa;

/// Bytes read and written from which on a result is streamed: it would not stay in a cache.
const LARGE: usize = 16 << 20;

/// Elements that can be computed in the first-level cache before they are streamed from there; as
/// many as the largest block has.
pub const PIECE: usize = crate::format::MAX_BLOCKSIZE;

/// Elements after which computing and streaming take turns where that costs nothing: the next ones
/// are computed while the last are still on their way.
pub const STEP: usize = 512;

/// Whether to stream what is written while reading `read` bytes and writing `written`.
pub const fn is_large(read: usize, written: usize) -> bool {
    read.saturating_add(written) >= LARGE
}

/// Copies bytes past the caches, if the instruction set has stores for it. [`fence`] must follow
/// before another thread may read them.
///
/// A whole line at once is best: parts of one may be written apart if something comes between them.
pub fn copy(isa: Isa, from: &[u8], to: &mut [u8]) {
    match isa {
        Isa::Scalar => to.copy_from_slice(from),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon(_) | Isa::NeonBf16(_) => to.copy_from_slice(from),
        // SAFETY: the value proves AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2(_) => unsafe { copy_avx2(from, to) },
        // SAFETY: the value proves AVX-512 F.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512(_) | Isa::Avx512Ext(_) => unsafe { copy_avx512(from, to) },
    }
}

/// Bytes of a line of the cache.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Copies what is before and after whole lines of `to`; hands out those.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn lines<'a>(from: &'a [u8], to: &'a mut [u8]) -> (&'a [[u8; LINE]], &'a mut [[u8; LINE]]) {
    let head = to.as_ptr().align_offset(LINE).min(to.len()).min(from.len());
    let (from_head, from) = from.split_at(head);
    let (to_head, to) = to.split_at_mut(head);
    to_head.copy_from_slice(from_head);
    let (from, from_tail) = from.as_chunks();
    let (to, to_tail) = to.as_chunks_mut();
    to_tail.copy_from_slice(from_tail);
    (from, to)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn copy_avx512(from: &[u8], to: &mut [u8]) {
    let (from, to) = lines(from, to);
    for (from, to) in from.iter().zip(to) {
        // SAFETY: both are one line, and `to` is aligned to it.
        unsafe {
            _mm512_stream_si512(to.as_mut_ptr().cast(), _mm512_loadu_si512(from.as_ptr().cast()));
        };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn copy_avx2(from: &[u8], to: &mut [u8]) {
    let (from, to) = lines(from, to);
    for (from, to) in from.iter().zip(to) {
        let parts = from.as_chunks::<32>().0.iter().zip(to.as_chunks_mut::<32>().0);
        for (from, to) in parts {
            // SAFETY: both are one vector, and `to` is half of a line that it is aligned to.
            unsafe {
                let part = _mm256_loadu_si256(from.as_ptr().cast());
                _mm256_stream_si256(to.as_mut_ptr().cast(), part);
            }
        }
    }
}

/// Orders streamed bytes before everything that this thread writes from here on.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE; the instruction touches no memory of its own.
    unsafe {
        _mm_sfence();
    }
}

/// Asks for large pages under memory that was just allocated and not touched yet. Only a hint:
/// what the memory holds, and whether it works, does not change.
pub fn prefer_huge_pages(fresh: &mut [u8]) {
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};
        /// A large page: whole pages of any size that a kernel has.
        const PAGE: usize = 2 << 20;
        let head = fresh.as_ptr().align_offset(PAGE);
        let Some(inside) = fresh.get_mut(head..) else { return };
        let whole = inside.len() / PAGE * PAGE;
        if whole == 0 {
            return;
        }
        // SAFETY: the range is whole pages inside a slice that is borrowed for writing; the advice
        // changes the size of its pages, not their content.
        let advised = unsafe { madvise(inside.as_mut_ptr().cast(), whole, Advice::LinuxHugepage) };
        // A kernel without large pages refuses, which costs time and nothing else.
        let _ = advised;
    }
    #[cfg(not(target_os = "linux"))]
    let _ = fresh;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_streamed_copy_is_a_copy_at_any_alignment() {
        let from: Vec<u8> = (0..1000u32).map(|i| (i * 7) as u8).collect();
        let lengths = [0, 1, 63, 64, 65, 700];
        for (isa, len) in Isa::available().into_iter().flat_map(|isa| lengths.map(|len| (isa, len)))
        {
            for start in [0, 1, 15, 64, 77] {
                let mut to = vec![9; 1000];
                copy(isa, &from[3..3 + len], &mut to[start..start + len]);
                fence();
                assert_eq!(to[start..start + len], from[3..3 + len]);
                assert!(to[..start].iter().chain(&to[start + len..]).all(|byte| *byte == 9));
            }
        }
    }

    #[test]
    fn advice_changes_no_content() {
        let mut memory = vec![5u8; 9 << 20];
        prefer_huge_pages(&mut memory);
        prefer_huge_pages(&mut memory[..100]);
        assert!(memory.iter().all(|byte| *byte == 5));
    }
}
