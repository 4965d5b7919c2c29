//! The kernels, written once for every instruction set that has vectors.
//!
//! An instruction set implements [`Simd`]: a handful of operations on groups of 32 elements, which
//! is the smallest block, so that whole blocks are whole groups. What remains of a short last
//! block goes to the scalar definition. Arithmetic is that of the definition, operation for
//! operation, so results are equal to the last bit.
//!
//! Every function here is inlined into an entry point that enables the instruction set
//! (see `entry_points!`); none may become a function of its own.

use super::Lanes;
use crate::format::codebook::{Codebook, DYNAMIC};
use crate::quant::blockwise::{self, Blocks, Divisor};
use crate::quant::stats::{Stats, Sums};
use crate::quant::{nested, rowwise};

/// Elements of a group.
pub const GROUP: usize = 32;

/// Bytes of a group of four-bit codes.
pub const HALF: usize = GROUP / 2;

/// What an instruction set does with a group of elements. A value of the implementing type
/// proves that the machine has the instructions.
pub trait Simd: Copy {
    /// A group of f32.
    type Floats: Copy;
    /// A group of i32.
    type Ints: Copy;
    /// What a search among sixteen values looks at.
    type Search: Copy;
    /// Nodes 1 to 15 of a search tree.
    type Tree: Copy;
    /// Sixteen 16-bit values.
    type Table2: Copy;
    /// Sixteen f32.
    type Table4: Copy;

    /// Widens to f32.
    fn load<T: Lanes>(self, x: &[T; GROUP]) -> Self::Floats;
    /// Rounds to `T`: to nearest, ties to even.
    fn store<T: Lanes>(self, x: Self::Floats, out: &mut [T; GROUP]);
    /// The same number in every lane.
    fn splat(self, x: f32) -> Self::Floats;
    /// The same number in every lane.
    fn splat_int(self, x: i32) -> Self::Ints;
    /// Sums.
    fn add(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// Products.
    fn mul(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// The larger of `largest` and the bits of |x|, as integers.
    fn max_magnitude(self, largest: Self::Ints, x: Self::Floats) -> Self::Ints;
    /// The largest of all lanes, none of which is negative.
    fn reduce_max(self, x: Self::Ints) -> u32;
    /// Nearest integers, ties to even.
    fn round(self, x: Self::Floats) -> Self::Ints;

    /// Takes the tree of a codebook, or the top of a larger one.
    fn tree(self, nodes: &[f32; 16]) -> Self::Tree;
    /// The pivots at nodes below 8.
    fn upper(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats;
    /// The pivots at nodes 8 to 15.
    fn lower(self, tree: Self::Tree, node: Self::Ints) -> Self::Floats;
    /// The child of a node: `2 * node + (x > pivot)`.
    fn child(self, node: Self::Ints, x: Self::Floats, pivot: Self::Floats) -> Self::Ints;
    /// The last four steps down a tree of 256 nodes, from nodes 16 to 31 on.
    fn last_four(self, nodes: &[f32; 256], node: Self::Ints, x: Self::Floats) -> Self::Ints;

    /// Prepares a search; none where the codebook has nothing to start from.
    fn search(self, book: &Codebook<16>) -> Option<Self::Search>;
    /// The codes of the values nearest to `x`, packed in pairs, first one high.
    fn encode(self, search: Self::Search, x: Self::Floats) -> [u8; HALF];
    /// The lowest byte of each lane; lanes are within ±32767.
    fn bytes(self, x: Self::Ints) -> [u8; GROUP];
    /// Signed bytes as f32.
    fn signed(self, x: &[i8; GROUP]) -> Self::Floats;
    /// [`blockwise::e8m0_decode`]
    fn exponents(self, codes: &[u8; GROUP]) -> Self::Floats;
    /// `values[code]`.
    fn gather(self, values: &[f32; 256], codes: &[u8; GROUP]) -> Self::Floats;

    /// `values * scale`, each rounded to `T`.
    fn scaled<T: Lanes>(self, values: &[f32; 16], scale: f32) -> [T; 16];
    /// Takes a table.
    fn table2(self, values: &[u16; 16]) -> Self::Table2;
    /// Takes a table.
    fn table4(self, values: &[f32; 16]) -> Self::Table4;
    /// Looks up packed codes, the first of a pair in the high half.
    fn decode2(self, table: Self::Table2, packed: &[u8; HALF], out: &mut [u16; GROUP]);
    /// Looks up packed codes, the first of a pair in the high half.
    fn decode4(self, table: Self::Table4, packed: &[u8; HALF], out: &mut [f32; GROUP]);

    /// [`Sums::add`]
    #[inline(always)]
    fn add_sums(self, sums: &mut Sums, x: &[f32; GROUP], decoded: &[f32; GROUP]) {
        sums.add(x, decoded);
    }
}

/// Elements whose scales are found before the first of them is encoded: the chain from the
/// values of a block to its scale to its codes is long, and a processor works on several blocks at
/// once only where they do not wait for each other. They stay in the first-level cache.
pub const BATCH: usize = 2048;

/// [`blockwise::absmax`]
#[inline(always)]
fn absmax<S: Simd, T: Lanes>(simd: S, x: &[T]) -> f32 {
    let (groups, rest) = x.as_chunks::<GROUP>();
    let mut largest = simd.splat_int(0);
    for x in groups {
        largest = simd.max_magnitude(largest, simd.load(x));
    }
    let largest = f32::from_bits(simd.reduce_max(largest));
    if rest.is_empty() { largest } else { larger(largest, rest) }
}

/// Writes the scale of each block; returns whether all values were finite.
#[inline(always)]
pub fn find_scales<S: Simd, T: Lanes>(simd: S, how: Blocks, x: &[T], scales: &mut [f32]) -> bool {
    let mut finite = true;
    for (x, scale) in x.chunks(how.blocksize).zip(scales) {
        let absmax = absmax(simd, x);
        finite &= absmax.is_finite();
        *scale = how.scale(absmax);
    }
    finite
}

/// The first four steps down a tree.
#[inline(always)]
pub fn first_four<S: Simd>(simd: S, tree: S::Tree, root: S::Floats, x: S::Floats) -> S::Ints {
    let node = simd.child(simd.splat_int(1), x, root);
    let node = simd.child(node, x, simd.upper(tree, node));
    let node = simd.child(node, x, simd.upper(tree, node));
    simd.child(node, x, simd.lower(tree, node))
}

/// [`blockwise::quantize4`]
#[inline(always)]
pub fn quantize4<S: Simd, T: Lanes>(
    simd: S,
    book: &Codebook<16>,
    how: Blocks,
    x: &[T],
    packed: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let Some(search) = simd.search(book) else {
        return blockwise::quantize4(book, how, x, packed, scales);
    };
    let blocks = (BATCH / how.blocksize).max(1);
    let run = blocks * how.blocksize;
    let mut finite = true;
    let batches = x.chunks(run).zip(packed.chunks_mut(run / 2));
    for ((x, packed), scales) in batches.zip(scales.chunks_mut(blocks)) {
        finite &= find_scales(simd, how, x, scales);
        let bytes = packed.chunks_mut(how.blocksize / 2);
        for ((x, packed), scale) in x.chunks(how.blocksize).zip(bytes).zip(scales) {
            let divisor = how.divisor(*scale);
            let Divisor::Times(factor) = divisor else {
                encode4(book, divisor, x, packed);
                continue;
            };
            let factor = simd.splat(factor);
            let (groups, rest) = x.as_chunks::<GROUP>();
            let (packed, packed_rest) = packed.split_at_mut(groups.len() * HALF);
            for (x, packed) in groups.iter().zip(packed.as_chunks_mut::<HALF>().0) {
                *packed = simd.encode(search, simd.mul(simd.load(x), factor));
            }
            if !rest.is_empty() {
                encode4(book, divisor, rest, packed_rest);
            }
        }
    }
    finite
}

/// [`blockwise::quantize8`]
#[inline(always)]
pub fn quantize8<S: Simd, T: Lanes>(
    simd: S,
    book: &Codebook<256>,
    how: Blocks,
    x: &[T],
    codes: &mut [u8],
    scales: &mut [f32],
) -> bool {
    let Some(top) = book.tree.first_chunk() else { return false };
    let (tree, root, sorted) = (simd.tree(top), simd.splat(top[1]), book.is_sorted());
    let finite = find_scales(simd, how, x, scales);
    let blocks = x.chunks(how.blocksize).zip(codes.chunks_mut(how.blocksize));
    for ((x, codes), scale) in blocks.zip(scales) {
        let divisor = how.divisor(*scale);
        let Divisor::Times(factor) = divisor else {
            encode8(book, divisor, x, codes);
            continue;
        };
        let factor = simd.splat(factor);
        let (groups, rest) = x.as_chunks::<GROUP>();
        let (codes, codes_rest) = codes.as_chunks_mut::<GROUP>();
        for (x, codes) in groups.iter().zip(codes) {
            let x = simd.mul(simd.load(x), factor);
            let node = first_four(simd, tree, root, x);
            *codes = simd.bytes(simd.last_four(&book.tree, node, x));
            if !sorted {
                for code in codes {
                    *code = book.order[usize::from(*code)];
                }
            }
        }
        if !rest.is_empty() {
            encode8(book, divisor, rest, codes_rest);
        }
    }
    finite
}

/// [`blockwise::dequantize4`]
#[inline(always)]
pub fn dequantize4<S: Simd, T: Lanes>(
    simd: S,
    values: &[f32; 16],
    blocksize: usize,
    packed: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    for ((out, packed), scale) in
        out.chunks_mut(blocksize).zip(packed.chunks(blocksize / 2)).zip(scales)
    {
        let (groups, rest) = out.as_chunks_mut::<GROUP>();
        let (packed, packed_rest) = packed.split_at(groups.len() * HALF);
        let packed = packed.as_chunks::<HALF>().0;
        // A block has more elements than codes: scale and round each code once.
        let table: [T; 16] = simd.scaled(values, *scale);
        if size_of::<T>() == size_of::<u16>() {
            let table = simd.table2(bytemuck::cast_ref(&table));
            for (out, packed) in groups.iter_mut().zip(packed) {
                simd.decode2(table, packed, bytemuck::cast_mut(out));
            }
        } else {
            let table = simd.table4(bytemuck::cast_ref(&table));
            for (out, packed) in groups.iter_mut().zip(packed) {
                simd.decode4(table, packed, bytemuck::cast_mut(out));
            }
        }
        if !rest.is_empty() {
            decode4(values, *scale, packed_rest, rest);
        }
    }
}

/// [`blockwise::dequantize8`]
#[inline(always)]
pub fn dequantize8<S: Simd, T: Lanes>(
    simd: S,
    values: &[f32; 256],
    blocksize: usize,
    codes: &[u8],
    scales: &[f32],
    out: &mut [T],
) {
    for ((out, codes), scale) in out.chunks_mut(blocksize).zip(codes.chunks(blocksize)).zip(scales)
    {
        let factor = simd.splat(*scale);
        let (groups, rest) = out.as_chunks_mut::<GROUP>();
        let (codes, codes_rest) = codes.as_chunks::<GROUP>();
        for (out, codes) in groups.iter_mut().zip(codes) {
            simd.store(simd.mul(simd.gather(values, codes), factor), out);
        }
        if !rest.is_empty() {
            decode8(values, *scale, codes_rest, rest);
        }
    }
}

/// [`rowwise::quantize_row`]
#[inline(always)]
pub fn quantize_row<S: Simd, T: Lanes>(simd: S, x: &[T], codes: &mut [i8]) -> f32 {
    let absmax = absmax(simd, x);
    let factor = rowwise::row_factor(absmax);
    let (groups, rest) = x.as_chunks::<GROUP>();
    // A row too small for a factor is divided, element by element.
    let (groups, rest) = if factor.is_finite() { (groups, rest) } else { (&[][..], x) };
    let (codes, codes_rest) = codes.split_at_mut(groups.len() * GROUP);
    let lanes_factor = simd.splat(factor);
    for (x, codes) in groups.iter().zip(codes.as_chunks_mut::<GROUP>().0) {
        let rounded = simd.round(simd.mul(simd.load(x), lanes_factor));
        *codes = bytemuck::cast(simd.bytes(rounded));
    }
    if !rest.is_empty() {
        encode_row(rest, absmax, codes_rest);
    }
    absmax
}

/// [`rowwise::dequantize_row`]
#[inline(always)]
pub fn dequantize_row<S: Simd, T: Lanes>(simd: S, codes: &[i8], absmax: f32, out: &mut [T]) {
    let (scale, inverse) = (simd.splat(absmax), simd.splat(rowwise::INVERSE_QMAX));
    let (groups, rest) = out.as_chunks_mut::<GROUP>();
    let (codes, codes_rest) = codes.as_chunks::<GROUP>();
    for (out, codes) in groups.iter_mut().zip(codes) {
        simd.store(simd.mul(simd.mul(simd.signed(codes), scale), inverse), out);
    }
    if !rest.is_empty() {
        decode_row(codes_rest, absmax, rest);
    }
}

/// [`nested::decode_block`]
#[inline(always)]
pub fn decode_nested<S: Simd>(
    simd: S,
    codes: &[u8],
    nested_absmax: f32,
    offset: f32,
    out: &mut [f32],
) {
    let (scale, shift) = (simd.splat(nested_absmax), simd.splat(offset));
    let (groups, rest) = out.as_chunks_mut::<GROUP>();
    let (codes, codes_rest) = codes.as_chunks::<GROUP>();
    for (out, codes) in groups.iter_mut().zip(codes) {
        let values = simd.gather(&DYNAMIC.values, codes);
        simd.store(simd.add(simd.mul(values, scale), shift), out);
    }
    nested::decode_block(codes_rest, nested_absmax, offset, rest);
}

/// [`blockwise::e8m0_decode_all`]
#[inline(always)]
pub fn decode_e8m0<S: Simd>(simd: S, codes: &[u8], out: &mut [f32]) {
    let (groups, rest) = out.as_chunks_mut::<GROUP>();
    let (codes, codes_rest) = codes.as_chunks::<GROUP>();
    for (out, codes) in groups.iter_mut().zip(codes) {
        simd.store(simd.exponents(codes), out);
    }
    blockwise::e8m0_decode_all(codes_rest, rest);
}

/// [`crate::quant::stats::compare`]
#[inline(always)]
pub fn compare<S: Simd, T: Lanes>(
    simd: S,
    x: &[T],
    decoded: &[f32],
    block: usize,
    scales: &[f32],
    total: &mut Stats,
) {
    let mut wide = vec![0f32; block.min(x.len())];
    for ((x, decoded), scale) in x.chunks(block).zip(decoded.chunks(block)).zip(scales) {
        let wide = &mut wide[..x.len()];
        let (groups, rest) = x.as_chunks::<GROUP>();
        let (to, to_rest) = wide.as_chunks_mut::<GROUP>();
        let (values, values_rest) = decoded.as_chunks::<GROUP>();
        let mut sums = Sums::default();
        for ((x, to), decoded) in groups.iter().zip(to).zip(values) {
            simd.store(simd.load(x), to);
            simd.add_sums(&mut sums, to, decoded);
        }
        if !rest.is_empty() {
            widen(rest, to_rest);
            sums.add(to_rest, values_rest);
        }
        total.add_sums(&sums, wide, *scale);
    }
}

// The definition for what is not a whole group, as functions of their own: inlined, they would
// outweigh the kernels.

#[inline(never)]
fn widen<T: Lanes>(x: &[T], wide: &mut [f32]) {
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.to_f32();
    }
}

#[inline(never)]
fn larger<T: Lanes>(largest: f32, x: &[T]) -> f32 {
    f32::from_bits(blockwise::absmax(x).to_bits().max(largest.to_bits()))
}

#[inline(never)]
fn encode4<T: Lanes>(book: &Codebook<16>, divisor: Divisor, x: &[T], packed: &mut [u8]) {
    blockwise::encode4(book, divisor, x, packed);
}

#[inline(never)]
pub fn encode8<T: Lanes>(book: &Codebook<256>, divisor: Divisor, x: &[T], codes: &mut [u8]) {
    blockwise::encode8(book, divisor, x, codes);
}

#[inline(never)]
fn decode4<T: Lanes>(values: &[f32; 16], scale: f32, packed: &[u8], out: &mut [T]) {
    blockwise::decode4(values, scale, packed, out);
}

#[inline(never)]
fn decode8<T: Lanes>(values: &[f32; 256], scale: f32, codes: &[u8], out: &mut [T]) {
    blockwise::dequantize8(values, GROUP, codes, &[scale], out);
}

#[inline(never)]
fn encode_row<T: Lanes>(x: &[T], absmax: f32, codes: &mut [i8]) {
    let factor = rowwise::row_factor(absmax);
    for (code, x) in codes.iter_mut().zip(x) {
        *code = rowwise::row_code(x.to_f32(), absmax, factor);
    }
}

#[inline(never)]
fn decode_row<T: Lanes>(codes: &[i8], absmax: f32, out: &mut [T]) {
    rowwise::dequantize_row(codes, absmax, out);
}

/// The entry points of an instruction set: functions that enable `$features` around the bodies
/// above, and the table that a proof `$isa` unlocks.
macro_rules! entry_points {
    ($isa:ident, $features:literal, { $( fn $name:ident($($arg:ident: $type:ty),+) $(-> $out:ty)?; )+ }) => {
        $(
            #[target_feature(enable = $features)]
            fn $name<T: Lanes>($($arg: $type),+) $(-> $out)? {
                crate::backend::cpu::simd::$name($isa(()), $($arg),+)
            }
        )+

        /// The kernels of this instruction set.
        pub const fn kernels<T: Lanes>(proof: $isa) -> Kernels<T> {
            Kernels {
                isa: Isa::$isa(proof),
                $(
                    // SAFETY: `proof` exists, so the machine has the features.
                    $name: |$($arg),+| unsafe { $name::<T>($($arg),+) },
                )+
            }
        }
    };
    ($isa:ident, $features:literal) => {
        $crate::backend::cpu::simd::entry_points!($isa, $features, {
            fn quantize4(book: &Codebook<16>, how: Blocks, x: &[T], packed: &mut [u8], scales: &mut [f32]) -> bool;
            fn quantize8(book: &Codebook<256>, how: Blocks, x: &[T], codes: &mut [u8], scales: &mut [f32]) -> bool;
            fn dequantize4(values: &[f32; 16], blocksize: usize, packed: &[u8], scales: &[f32], out: &mut [T]);
            fn dequantize8(values: &[f32; 256], blocksize: usize, codes: &[u8], scales: &[f32], out: &mut [T]);
            fn quantize_row(x: &[T], codes: &mut [i8]) -> f32;
            fn dequantize_row(codes: &[i8], absmax: f32, out: &mut [T]);
            fn decode_nested(codes: &[u8], nested_absmax: f32, offset: f32, out: &mut [f32]);
            fn decode_e8m0(codes: &[u8], out: &mut [f32]);
            fn compare(x: &[T], decoded: &[f32], block: usize, scales: &[f32], total: &mut Stats);
        });
    };
}
pub(super) use entry_points;
