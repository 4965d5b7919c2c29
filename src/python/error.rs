//! Which Python exception each error becomes. The classes live in `nybble.errors`.

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;

use crate::error::Error;

pyo3::import_exception!(nybble.errors, CheckpointError);
pyo3::import_exception!(nybble.errors, DeviceError);
pyo3::import_exception!(nybble.errors, DtypeError);
pyo3::import_exception!(nybble.errors, FormatError);
pyo3::import_exception!(nybble.errors, OutOfMemoryError);
pyo3::import_exception!(nybble.errors, RowIndexError);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        to_exception(&error, message)
    }
}

/// Chooses the exception. No `_` arm: a new variant does not compile until someone decides.
fn to_exception(error: &Error, message: String) -> PyErr {
    match error {
        Error::Unknown { .. }
        | Error::Blocksize { .. }
        | Error::Unsupported { .. }
        | Error::Length { .. }
        | Error::TooLarge { .. }
        | Error::Shape { .. }
        | Error::NonFinite { .. }
        | Error::Pattern { .. }
        | Error::Argument { .. } => FormatError::new_err(message),
        Error::Row { .. } => RowIndexError::new_err(message),
        Error::Dtype { .. } => DtypeError::new_err(message),
        Error::Checkpoint { .. } => CheckpointError::new_err(message),
        // Python picks the subclass (FileNotFoundError, PermissionError, ...) by the number.
        Error::Io { path, source } => match number(source) {
            Some(number) => {
                let path = path.clone().into_os_string();
                PyOSError::new_err((number, source.to_string(), path))
            }
            None => PyOSError::new_err(message),
        },
        Error::Memory { .. } => OutOfMemoryError::new_err(message),
        Error::Device(_) => DeviceError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        Error::InTensor { source, .. } => to_exception(source, message),
    }
}

/// The number of an error of the system, or of one of ours that Python has a class for.
fn number(error: &std::io::Error) -> Option<i32> {
    error.raw_os_error().or(match error.kind() {
        std::io::ErrorKind::AlreadyExists => Some(rustix::io::Errno::EXIST.raw_os_error()),
        _ => None,
    })
}
