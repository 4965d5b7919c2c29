//! What is wrong with a checkpoint, as something to show and to act on.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file, or the directory where no single file is at fault.
    pub file: PathBuf,
    /// The tensor, where the trouble is with one.
    pub tensor: Option<String>,
    /// What was expected and what was found.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// What to do about most damage.
pub(crate) const COPY_AGAIN: &str = "copy or write the checkpoint again";

impl Problem {
    /// Trouble with one tensor.
    pub(crate) fn tensor(file: &Path, tensor: &str, problem: String, remedy: &str) -> Self {
        let (file, tensor) = (file.to_owned(), Some(tensor.to_owned()));
        Self { file, tensor, problem, remedy: remedy.to_owned() }
    }

    /// An error that arose while checking.
    pub(crate) fn from_error(file: &Path, tensor: Option<&str>, error: Error) -> Self {
        let remedy = COPY_AGAIN.to_owned();
        match error {
            Error::Checkpoint { path, tensor: inner, problem } => {
                let tensor = inner.or_else(|| tensor.map(str::to_owned));
                Self { file: path, tensor, problem, remedy }
            }
            error => Self {
                file: file.to_owned(),
                tensor: tensor.map(str::to_owned),
                problem: error.to_string(),
                remedy,
            },
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.file.display())?;
        if let Some(tensor) = &self.tensor {
            write!(f, "tensor '{tensor}': ")?;
        }
        write!(f, "{}; {}", self.problem, self.remedy)
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        let Problem { file, tensor, problem, remedy } = problem;
        Error::Checkpoint { path: file, tensor, problem: format!("{problem}; {remedy}") }
    }
}
