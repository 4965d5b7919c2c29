//! The archive of compiled kernels, `cuda/kernels.bin`; `cuda/archive.md` describes it.

use std::io::Read;

use lzma_rust2::Lzma2Reader;

const MAGIC: &[u8; 8] = b"NYBCUDA2";
const HEADER: usize = 48;
const ENTRY: usize = 32;
/// The dictionary that images are packed with.
const DICTIONARY: u32 = 1 << 20;
/// The largest image that is unpacked; real ones have less than a hundredth of it.
const MAX_IMAGE: u64 = 1 << 27;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Machine code for one architecture, and later ones of the same generation.
    Cubin,
    /// Text that the driver compiles, for this architecture and all later ones.
    Ptx,
}

/// A compiled form of all kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Machine code or text.
    pub kind: Kind,
    /// 90 for compute capability 9.0.
    pub arch: u32,
    offset: u64,
    stored: u64,
    unpacked: u64,
}

#[cfg(test)]
impl Entry {
    /// An entry without an image.
    pub(super) fn at(kind: Kind, arch: u32) -> Self {
        Self { kind, arch, offset: 0, stored: 0, unpacked: 0 }
    }
}

/// A checked archive.
#[derive(Debug)]
pub struct Archive<'a> {
    bytes: &'a [u8],
    entries: Vec<Entry>,
}

impl<'a> Archive<'a> {
    /// Reads the table of contents.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err("the archive of kernels does not begin as one".to_owned());
        }
        let count = u32_at(bytes, 40)? as usize;
        let end = count.checked_mul(ENTRY).and_then(|table| table.checked_add(HEADER));
        let table = end.and_then(|end| bytes.get(HEADER..end)).ok_or("its table is cut off")?;
        let entries = table.chunks_exact(ENTRY).map(entry).collect::<Result<_, _>>()?;
        Ok(Self { bytes, entries })
    }

    /// Its images.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// An image as the driver takes it: text ends in NUL.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn unpack(&self, entry: Entry) -> Result<Vec<u8>, String> {
        if entry.unpacked > MAX_IMAGE {
            return Err(format!("an image of {} bytes is too large", entry.unpacked));
        }
        let end = entry.offset.checked_add(entry.stored).ok_or("an image is out of range")?;
        let (start, end) = (usize::try_from(entry.offset), usize::try_from(end));
        let stored = match (start, end) {
            (Ok(start), Ok(end)) => self.bytes.get(start..end),
            _ => None,
        };
        let stored = stored.ok_or("an image is out of range")?;
        let mut image = Vec::new();
        Lzma2Reader::new(stored, DICTIONARY, None)
            .take(entry.unpacked + 1)
            .read_to_end(&mut image)
            .map_err(|error| format!("an image cannot be unpacked: {error}"))?;
        if image.len() as u64 != entry.unpacked {
            return Err(format!("an image is not {} bytes long", entry.unpacked));
        }
        if entry.kind == Kind::Ptx {
            image.push(0);
        }
        Ok(image)
    }
}

fn entry(row: &[u8]) -> Result<Entry, String> {
    let kind = match u32_at(row, 0)? {
        0 => Kind::Cubin,
        1 => Kind::Ptx,
        other => return Err(format!("an image is of the unknown kind {other}")),
    };
    let [offset, stored, unpacked] = [8, 16, 24].map(|at| u64_at(row, at));
    Ok(Entry { kind, arch: u32_at(row, 4)?, offset: offset?, stored: stored?, unpacked: unpacked? })
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, String> {
    let number = bytes.get(at..).and_then(|rest| rest.first_chunk());
    Ok(u32::from_le_bytes(*number.ok_or("it is cut off")?))
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, String> {
    let number = bytes.get(at..).and_then(|rest| rest.first_chunk());
    Ok(u64::from_le_bytes(*number.ok_or("it is cut off")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image as LZMA2 that compresses nothing: chunks of up to 64 KiB after their lengths.
    fn packed(image: &[u8]) -> Vec<u8> {
        let mut stored = Vec::new();
        for (i, chunk) in image.chunks(1 << 16).enumerate() {
            stored.push(if i == 0 { 1 } else { 2 });
            stored.extend((chunk.len() as u16).wrapping_sub(1).to_be_bytes());
            stored.extend(chunk);
        }
        stored.push(0);
        stored
    }

    /// An archive of these images, as `build_kernels.py` writes it.
    fn archive(images: &[(u32, u32, &[u8])]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([7; 32]);
        bytes.extend((images.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        let mut body = Vec::new();
        for (kind, arch, image) in images {
            let stored = packed(image);
            let offset = HEADER + images.len() * ENTRY + body.len();
            bytes.extend(kind.to_le_bytes());
            bytes.extend(arch.to_le_bytes());
            for number in [offset, stored.len(), image.len()] {
                bytes.extend((number as u64).to_le_bytes());
            }
            body.extend(stored);
        }
        bytes.extend(body);
        bytes
    }

    #[test]
    fn images_come_back_and_text_ends_in_nul() {
        let bytes = archive(&[(0, 80, b"code"), (1, 120, b"text")]);
        let archive = Archive::parse(&bytes).unwrap();
        let images: Vec<_> =
            archive.entries().iter().map(|e| archive.unpack(*e).unwrap()).collect();
        assert_eq!(images, [b"code".to_vec(), b"text\0".to_vec()]);
        assert_eq!(archive.entries()[1].arch, 120);
    }

    /// "mov add mov mul " forty times, as `build_kernels.py` packs it.
    const PACKED: [u8; 31] = [
        224, 2, 127, 0, 23, 207, 0, 54, 155, 202, 194, 3, 9, 147, 4, 17, 11, 54, 158, 34, 120, 192,
        247, 86, 95, 44, 176, 89, 192, 0, 0,
    ];

    /// An archive whose one image has these bytes and this length.
    fn stored(packed: &[u8], unpacked: u64) -> Vec<u8> {
        let mut bytes = archive(&[(0, 80, b"")]);
        bytes.truncate(HEADER + ENTRY);
        bytes[HEADER + 16..HEADER + 24].copy_from_slice(&(packed.len() as u64).to_le_bytes());
        bytes[HEADER + 24..].copy_from_slice(&unpacked.to_le_bytes());
        [bytes, packed.to_vec()].concat()
    }

    #[test]
    fn what_python_packs_comes_back_or_is_an_error_where_it_is_damaged() {
        let unpack = |bytes: &[u8]| {
            Archive::parse(bytes).and_then(|archive| archive.unpack(archive.entries()[0]))
        };
        assert_eq!(unpack(&stored(&PACKED, 640)).unwrap(), b"mov add mov mul ".repeat(40));
        assert!(unpack(&stored(&PACKED, 639)).is_err());
        assert!(unpack(&stored(&PACKED, 641)).is_err());
        for at in 0..PACKED.len() {
            assert!(unpack(&stored(&PACKED[..at], 640)).is_err(), "cut at {at}");
            for bit in 0..8 {
                let mut damaged = PACKED;
                damaged[at] ^= 1 << bit;
                // There is no sum to check: other bytes of the right length may come out.
                assert!(unpack(&stored(&damaged, 640)).map_or(true, |image| image.len() == 640));
            }
        }
    }

    #[test]
    fn damaged_archives_are_errors_wherever_the_damage_is() {
        let bytes = archive(&[(0, 80, &[3; 5000]), (1, 80, b"text")]);
        for cut in 0..bytes.len() {
            let whole = Archive::parse(&bytes[..cut]).and_then(|archive| {
                archive.entries().iter().try_for_each(|e| archive.unpack(*e).map(drop))
            });
            assert!(whole.is_err(), "cut at {cut}");
        }
        for at in HEADER - 8..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            // Whatever was hit, it ends in an error or in an image of the length that is named.
            let Ok(archive) = Archive::parse(&bytes) else { continue };
            for entry in archive.entries() {
                let _ = archive.unpack(*entry);
            }
        }
    }
}
