//! The sum of a float vector in torch's order.
//!
//! The offset of double quantization is `absmax.mean()`, and its last bit depends on the order
//! of additions. torch's CPU kernel (`ATen/native/cpu/SumKernel.cpp`, cascade sum) adds 32
//! interleaved columns, 8 lanes of 4 vectors, in four levels of partial sums.

const LANES: usize = 8;
const VECTORS: usize = 4;
const COLUMNS: usize = LANES * VECTORS;
const LEVELS: usize = 4;

/// The sum that `torch.sum` gives for a contiguous f32 vector on a CPU.
pub fn sum(x: &[f32]) -> f32 {
    if x.len() < LANES {
        return few(x);
    }
    let (rows, rest) = x.as_chunks::<COLUMNS>();
    let mut columns = cascade(rows);
    // Whole vectors that do not fill a row go to the first vector.
    let (vectors, tail) = rest.as_chunks::<LANES>();
    for vector in vectors {
        for (sum, x) in columns.iter_mut().zip(vector) {
            *sum += x;
        }
    }
    let (first, others) = columns.split_at_mut(LANES);
    for vector in others.as_chunks::<LANES>().0 {
        for (sum, x) in first.iter_mut().zip(vector) {
            *sum += x;
        }
    }
    let total = tail.iter().fold(0.0, |sum, x| sum + x);
    first.iter().fold(total, |sum, x| sum + x)
}

/// Fewer values than lanes: four at a time, what remains goes to the first of the four.
fn few(x: &[f32]) -> f32 {
    let (fours, rest) = x.as_chunks::<VECTORS>();
    let mut sums = [0.0; VECTORS];
    for four in fours {
        for (sum, x) in sums.iter_mut().zip(four) {
            *sum += x;
        }
    }
    let [first, others @ ..] = sums;
    let first = rest.iter().fold(first, |sum, x| sum + x);
    others.iter().fold(first, |sum, x| sum + x)
}

/// The mean that `torch.mean` gives: the sum divided by the count, both in f32. NaN for none.
pub fn mean(x: &[f32]) -> f32 {
    sum(x) / x.len() as f32
}

/// Column sums with four levels of accumulators: a level is added to the next after every
/// `2^power` additions.
fn cascade(rows: &[[f32; COLUMNS]]) -> [f32; COLUMNS] {
    let power = (ceil_log2(rows.len()) / LEVELS as u32).max(4);
    let step = 1usize << power;
    let mut levels = [[0f32; COLUMNS]; LEVELS];
    let whole = rows.len() / step * step;
    let mut done = 0;
    while done < whole {
        for row in &rows[done..done + step] {
            add(&mut levels[0], row);
        }
        done += step;
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut levels[level - 1], [0.0; COLUMNS]);
            add(&mut levels[level], &lower);
            if done & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    for row in &rows[whole..] {
        add(&mut levels[0], row);
    }
    let [mut total, upper @ ..] = levels;
    for level in &upper {
        add(&mut total, level);
    }
    total
}

#[inline(always)]
fn add(sums: &mut [f32; COLUMNS], row: &[f32; COLUMNS]) {
    for (sum, x) in sums.iter_mut().zip(row) {
        *sum += x;
    }
}

fn ceil_log2(n: usize) -> u32 {
    if n <= 2 { 1 } else { (n - 1).ilog2() + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_add_up() {
        for n in [0, 1, 7, 8, 31, 32, 33, 511, 512, 513, 5_000, 70_001] {
            let x: Vec<f32> = (0..n).map(|i| (i % 5) as f32).collect();
            let want: usize = (0..n).map(|i| i % 5).sum();
            assert_eq!(sum(&x), want as f32, "{n}");
        }
    }
}
