//! Parts of a job, handed out to threads as they become free.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::cpu::threads::pool;

/// Runs `work(part)` for each of `parts` on this thread and up to `threads - 1` of the pool's.
/// Threads that come late, or never, cost nothing: whoever is free takes the next part.
pub fn share(threads: usize, parts: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts {
                return;
            }
            work(part);
        }
    };
    let helpers = threads.min(parts).saturating_sub(1);
    if helpers == 0 || rayon::current_thread_index().is_some() {
        return take();
    }
    let Some(pool) = pool(threads) else { return take() };
    pool.in_place_scope(|scope| {
        for _ in 0..helpers {
            scope.spawn(|_| take());
        }
        take();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once() {
        for (threads, parts) in [(1, 5), (2, 1), (3, 100), (2, 0)] {
            let done: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
            share(threads, parts, |part| {
                done[part].fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|done| done.load(Ordering::Relaxed) == 1));
        }
    }
}
