//! Everything that can go wrong, one variant each.
//!
//! A message says what was asked, what was found and what to do. The Python module turns each
//! variant into an exception with one exhaustive match (`src/python/error.rs`).

mod device;

use std::path::{Path, PathBuf};

pub use device::DeviceProblem;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A name that is in no table; `hint` carries the closest known name.
    #[error("unknown {what} '{name}'{hint}; known: {known}", hint = did_you_mean(close.as_deref()))]
    Unknown {
        /// The kind of thing that was named, for example `format`.
        what: &'static str,
        /// The name as given.
        name: String,
        /// The known name that is nearest to it, if one is near.
        close: Option<String>,
        /// All known names, separated by spaces.
        known: String,
    },
    /// A block size that the format does not have.
    #[error("blocksize {got} is not offered by {format}; use one of {allowed:?}")]
    Blocksize {
        /// The block size as given.
        got: usize,
        /// The format that was asked for.
        format: &'static str,
        /// What the format offers.
        allowed: &'static [usize],
    },
    /// An operation that a format does not have.
    #[error("{format} has no {what}; {remedy}")]
    Unsupported {
        /// The format that was asked for.
        format: &'static str,
        /// The operation or option.
        what: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// A buffer whose length disagrees with what it should hold.
    #[error("{what} has {got} elements, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// The length that follows from shape and format.
        expected: usize,
        /// The length found.
        got: usize,
    },
    /// A shape whose number of elements does not fit in an index.
    #[error("shape {shape:?} has more elements than an index can count")]
    TooLarge {
        /// The shape.
        shape: Vec<usize>,
    },
    /// A shape that the operation cannot take.
    #[error("{what} needs {expected}, got shape {shape:?}")]
    Shape {
        /// The operation or tensor.
        what: &'static str,
        /// What it takes.
        expected: &'static str,
        /// The shape given.
        shape: Vec<usize>,
    },
    /// NaN or infinity among the values to quantize.
    #[error(
        "value {value} at flat position {index} cannot be quantized; \
         repair the tensor, or pass nonfinite=\"zero\" to store such values as 0"
    )]
    NonFinite {
        /// Flat, row-major position of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// An element type that cannot be quantized or decoded to.
    #[error("dtype {got} is not supported for {what}; use one of {allowed}")]
    Dtype {
        /// The operation or tensor.
        what: &'static str,
        /// The dtype found.
        got: String,
        /// The dtypes it takes.
        allowed: &'static str,
    },
    /// A row that a table does not have.
    #[error("row {index} is not in a table of {rows} rows")]
    Row {
        /// The index as given.
        index: i64,
        /// The rows of the table; indices start at 0.
        rows: usize,
    },
    /// A pattern that is no valid regular expression.
    #[error("pattern '{pattern}' is not a valid regular expression: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What the regex engine says.
        reason: String,
    },
    /// An option or argument with a value that it cannot have.
    #[error("{what} cannot be '{got}'; {expected}")]
    Argument {
        /// The option.
        what: &'static str,
        /// The value found.
        got: String,
        /// What it takes.
        expected: String,
    },
    /// A checkpoint file that is damaged, odd or hostile.
    #[error("{}: {}{problem}", path.display(), tensor_prefix(tensor.as_deref()))]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// The tensor, where the trouble is with one.
        tensor: Option<String>,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A file that the operating system would not open, read or write.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A budget that the work does not fit in.
    #[error("{what} needs {needed} bytes but {available} are available; {remedy}")]
    Memory {
        /// What needs the memory or disk.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes available or allowed.
        available: u64,
        /// What to do.
        remedy: &'static str,
    },
    /// A CUDA device that is not there or cannot do what was asked.
    #[error(transparent)]
    Device(#[from] DeviceProblem),
    /// The caller asked to stop.
    #[error("interrupted; nothing was written under the final name, run the command again")]
    Interrupted,
    /// An error inside another one: the name of the tensor and what happened to it.
    #[error("{tensor}: {source}")]
    InTensor {
        /// The tensor.
        tensor: String,
        /// What happened.
        source: Box<Error>,
    },
}

impl Error {
    /// Trouble with a file as a whole.
    pub fn checkpoint(path: &Path, problem: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_owned(), tensor: None, problem: problem.into() }
    }

    /// Trouble with one tensor of a file.
    pub fn tensor(path: &Path, tensor: &str, problem: impl Into<String>) -> Self {
        Self::Checkpoint {
            path: path.to_owned(),
            tensor: Some(tensor.to_owned()),
            problem: problem.into(),
        }
    }

    /// Attaches a path to an error of the operating system.
    pub fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_owned(), source }
    }

    /// Names the tensor that was worked on when the error arose.
    #[must_use]
    pub fn in_tensor(self, tensor: &str) -> Self {
        Self::InTensor { tensor: tensor.to_owned(), source: Box::new(self) }
    }

    /// A name that is not among `known`, with the nearest known name as a hint.
    pub fn unknown<'a>(
        what: &'static str,
        name: &str,
        known: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        Self::Unknown {
            what,
            name: name.to_owned(),
            close: nearest(name, &known).map(str::to_owned),
            known: known.join(" "),
        }
    }
}

fn did_you_mean(close: Option<&str>) -> String {
    close.map_or_else(String::new, |close| format!(", did you mean '{close}'?"))
}

fn tensor_prefix(tensor: Option<&str>) -> String {
    tensor.map_or_else(String::new, |tensor| format!("tensor '{tensor}': "))
}

/// The known name with the fewest edits from `name`, if fewer than half of it must change.
fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let name = name.to_lowercase();
    known
        .iter()
        .map(|candidate| (edit_distance(&name, candidate), *candidate))
        .filter(|(distance, candidate)| *distance * 2 <= candidate.len().max(2))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let best = (diagonal + usize::from(x != *y)).min(*cell + 1).min(left + 1);
            diagonal = *cell;
            *cell = best;
            left = best;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typo_gets_the_nearest_name_and_nonsense_gets_none() {
        let error = Error::unknown("format", "nf5", ["nf4", "fp4", "int8"]).to_string();
        assert_eq!(error, "unknown format 'nf5', did you mean 'nf4'?; known: nf4 fp4 int8");
        let error = Error::unknown("format", "banana", ["nf4", "fp4"]).to_string();
        assert_eq!(error, "unknown format 'banana'; known: nf4 fp4");
    }

    #[test]
    fn edit_distance_counts_edits() {
        assert_eq!(edit_distance("kitten", "sitting"), 3);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", "abc"), 0);
    }
}
