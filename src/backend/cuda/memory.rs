//! Device memory: an address that only kernels follow. A type of its own, so that it cannot be
//! passed for host memory.

use std::marker::PhantomData;

use crate::error::{DeviceProblem, Result};

/// Bytes to which wide loads are aligned.
pub const ALIGNMENT: u64 = 16;

/// Elements in the memory of a device.
#[derive(Debug)]
pub struct DeviceSlice<T> {
    address: u64,
    len: usize,
    element: PhantomData<*const T>,
}

impl<T> Clone for DeviceSlice<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DeviceSlice<T> {}

// SAFETY: it is a number to this process; what follows it are kernels.
unsafe impl<T> Send for DeviceSlice<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for DeviceSlice<T> {}

impl<T> DeviceSlice<T> {
    /// Memory at an address that the driver gave out.
    ///
    /// # Safety
    /// - `len` elements of `T` are allocated there, on the device whose kernels are given this.
    /// - They stay allocated until the work on the stream of the launch is done.
    /// - Memory that a kernel writes is not in use by other streams meanwhile.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, element: PhantomData }
    }

    /// Its number of elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it has no elements.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Where it is, for kernels that read an element at a time.
    pub fn address(self, what: &'static str) -> Result<u64> {
        self.aligned(what, align_of::<T>() as u64)
    }

    /// Where it is, for kernels that read 16 bytes at a time.
    pub fn wide(self, what: &'static str) -> Result<u64> {
        self.aligned(what, ALIGNMENT)
    }

    /// What follows the first `count` elements.
    #[must_use]
    pub fn skip(self, count: usize) -> Self {
        let count = count.min(self.len);
        // The slice exists, so its length in bytes is within the address space.
        let address = self.address + (count * size_of::<T>()) as u64;
        Self { address, len: self.len - count, element: PhantomData }
    }

    fn aligned(self, what: &'static str, alignment: u64) -> Result<u64> {
        // An empty tensor may have no memory; no kernel is launched for it.
        let usable = self.address != 0 && self.address.is_multiple_of(alignment);
        if self.len > 0 && !usable {
            return Err(DeviceProblem::Misaligned { what, address: self.address, alignment }.into());
        }
        Ok(self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice<T>(address: u64, len: usize) -> DeviceSlice<T> {
        // SAFETY: nothing follows the address in these tests.
        unsafe { DeviceSlice::from_raw(address, len) }
    }

    #[test]
    fn null_and_misaligned_memory_is_refused_unless_it_is_empty() {
        assert!(slice::<f32>(0x1002, 1).address("x").is_err());
        assert!(slice::<f32>(0x1004, 1).address("x").is_ok());
        let error = slice::<f32>(0x1004, 1).wide("x").unwrap_err().to_string();
        assert!(error.contains("0x1004") && error.contains("16 bytes"), "{error}");
        assert!(slice::<u8>(0, 1).address("x").is_err());
        assert!(slice::<u8>(0, 0).wide("x").is_ok());
        assert_eq!(slice::<u16>(0x1000, 9).skip(8).wide("x").ok(), Some(0x1010));
        assert_eq!(slice::<u16>(0x1000, 9).skip(80).len(), 0);
    }
}
