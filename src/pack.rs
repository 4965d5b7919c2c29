//! Two four-bit codes in a byte: the orders in use, and conversion between them.

use crate::error::{Error, Result};

/// Which element of a pair of codes lies where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NibbleOrder {
    /// The first element in the high half, as bitsandbytes stores them:
    ///
    /// ```text
    /// element   0     1     2     3
    /// byte     [0 hi][0 lo][1 hi][1 lo]
    /// ```
    HighFirst,
    /// The first element in the low half, as MXFP4 files of Hugging Face have it.
    LowFirst,
    /// Runs of 32 in 16 bytes: low halves are elements 0 to 15, high halves 16 to 31, as in GGUF.
    Planar32,
}

impl NibbleOrder {
    const NAMES: [(&'static str, NibbleOrder); 3] = [
        ("high_first", NibbleOrder::HighFirst),
        ("low_first", NibbleOrder::LowFirst),
        ("planar32", NibbleOrder::Planar32),
    ];

    /// Finds an order by name: `high_first`, `low_first` or `planar32`.
    pub fn parse(name: &str) -> Result<Self> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, order)| *order)
            .ok_or_else(|| Error::unknown("nibble order", name, Self::NAMES.map(|(n, _)| n)))
    }

    /// Where element `i` lies: the byte, and how far to shift it right.
    #[inline]
    fn place(self, i: usize) -> (usize, u32) {
        match self {
            NibbleOrder::HighFirst => (i / 2, if i.is_multiple_of(2) { 4 } else { 0 }),
            NibbleOrder::LowFirst => (i / 2, if i.is_multiple_of(2) { 0 } else { 4 }),
            NibbleOrder::Planar32 => {
                let (run, within) = (i / 32, i % 32);
                (run * 16 + within % 16, if within < 16 { 0 } else { 4 })
            }
        }
    }

    /// Bytes that hold `n` codes.
    pub fn packed_len(self, n: usize) -> usize {
        match self {
            NibbleOrder::HighFirst | NibbleOrder::LowFirst => n.div_ceil(2),
            NibbleOrder::Planar32 => n.div_ceil(32) * 16,
        }
    }
}

/// Packs codes 0 to 15; unused halves at the end become 0.
///
/// ```
/// use nybble::pack::{pack, unpack, NibbleOrder::HighFirst};
/// let mut packed = [0; 2];
/// pack(&[1, 2, 3], HighFirst, &mut packed).unwrap();
/// assert_eq!(packed, [0x12, 0x30]);
/// let mut codes = [0; 3];
/// unpack(&packed, HighFirst, &mut codes).unwrap();
/// assert_eq!(codes, [1, 2, 3]);
/// ```
pub fn pack(codes: &[u8], order: NibbleOrder, packed: &mut [u8]) -> Result<()> {
    check_len("packed", order.packed_len(codes.len()), packed.len())?;
    if let Some(code) = codes.iter().find(|code| **code > 15) {
        return Err(Error::Argument {
            what: "a four-bit code",
            got: code.to_string(),
            expected: "codes are 0 to 15".to_owned(),
        });
    }
    packed.fill(0);
    for (i, code) in codes.iter().enumerate() {
        let (byte, shift) = order.place(i);
        packed[byte] |= code << shift;
    }
    Ok(())
}

/// Unpacks as many codes as `codes` holds.
pub fn unpack(packed: &[u8], order: NibbleOrder, codes: &mut [u8]) -> Result<()> {
    check_len("packed", order.packed_len(codes.len()), packed.len())?;
    for (i, code) in codes.iter_mut().enumerate() {
        let (byte, shift) = order.place(i);
        *code = (packed[byte] >> shift) & 15;
    }
    Ok(())
}

/// Fails unless a buffer has the length that its shape demands.
pub(crate) fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got { Ok(()) } else { Err(Error::Length { what, expected, got }) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn unpack_undoes_pack(codes in prop::collection::vec(0u8..16, 0..130)) {
            for (_, order) in NibbleOrder::NAMES {
                let mut packed = vec![0xff; order.packed_len(codes.len())];
                pack(&codes, order, &mut packed).unwrap();
                let mut again = vec![0; codes.len()];
                unpack(&packed, order, &mut again).unwrap();
                prop_assert_eq!(&again, &codes);
            }
        }
    }

    #[test]
    fn a_code_above_fifteen_is_refused() {
        assert!(pack(&[16], NibbleOrder::HighFirst, &mut [0]).is_err());
    }
}
