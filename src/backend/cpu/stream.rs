//! Writing large results: past the caches, into memory of large pages.
//!
//! A store that misses the caches first reads the line that it overwrites. A streaming store does
//! not, and leaves the caches to what is read. Memory that was just allocated is mapped page by page
//! as it is touched; with pages of 2 MiB that takes a fraction of the time.

/// Bytes read and written from which on a result is streamed: it would not stay in a cache.
const LARGE: usize = 16 << 20;

/// Elements that are computed in the first-level cache before they are streamed from there.
pub const PIECE: usize = 4096;

/// Whether to stream what is written while reading `read` bytes and writing `written`.
pub const fn is_large(read: usize, written: usize) -> bool {
    read.saturating_add(written) >= LARGE
}

/// Copies bytes past the caches. [`fence`] must follow before another thread may read them.
pub fn copy(from: &[u8], to: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        const LINE: usize = 64;
        const PART: usize = size_of::<__m128i>();
        let head = to.as_ptr().align_offset(LINE).min(to.len()).min(from.len());
        let (from_head, from) = from.split_at(head);
        let (to_head, to) = to.split_at_mut(head);
        to_head.copy_from_slice(from_head);
        let (from, from_tail) = from.as_chunks::<LINE>();
        let (to, to_tail) = to.as_chunks_mut::<LINE>();
        for (from, to) in from.iter().zip(to) {
            for (from, to) in from.as_chunks::<PART>().0.iter().zip(to.as_chunks_mut::<PART>().0) {
                // SAFETY: both are sixteen bytes, and `to` is aligned to sixteen: whole parts
                // behind an address aligned to a line. Every x86-64 has SSE2.
                unsafe {
                    let part = _mm_loadu_si128(from.as_ptr().cast());
                    _mm_stream_si128(to.as_mut_ptr().cast(), part);
                }
            }
        }
        to_tail.copy_from_slice(from_tail);
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// Orders streamed bytes before everything that this thread writes from here on.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has SSE; the instruction touches no memory of its own.
    unsafe {
        std::arch::x86_64::_mm_sfence();
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
        for start in [0, 1, 15, 64, 77] {
            for len in [0, 1, 63, 64, 65, 700] {
                let mut to = vec![9; 1000];
                copy(&from[3..3 + len], &mut to[start..start + len]);
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
