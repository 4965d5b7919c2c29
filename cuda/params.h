// What each kernel is given: one struct by value, so a launch passes one pointer.
//
// Plain C, the same bytes for the kernels, the emulator and the Rust launcher that mirrors them.
// Pointers are device pointers of 64 bits, sizes and indices are u64. A field marked "or null" may
// be null; every other pointer must be valid for the lengths named, and aligned as named here or,
// where nothing is named, to its element. kernels.md has the grids.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

// Element types of tensors whose type is not in the kernel's name.
#define DTYPE_F32 0u
#define DTYPE_F16 1u
#define DTYPE_BF16 2u

// Scales of blocks, in the form in which they are stored:
//   plain    absmax                             scale = absmax[block]
//   nested   codes, codebook, nested_absmax,    scale = codebook[codes[block]]
//            offset; absmax is null                     * nested_absmax[block >> log2_nested] + offset
//   E8M0     codes; absmax, codebook are null   scale = 2^(codes[block] - 127)
typedef struct {
    const float *absmax;        // [blocks] or null
    const u8 *codes;            // [blocks] or null
    const float *codebook;      // [256] or null: values of the nested codes
    const float *nested_absmax; // [blocks / 2^log2_nested_blocksize, rounded up] or null
    const float *offset;        // [1] or null
    u32 log2_blocksize;         // elements that share a scale, 32 to 4096
    u32 log2_nested_blocksize;  // scales that share a scale
} Scales;

// dequantize4_{f32,f16,bf16}: out[i] = values[code of element first + i] * scale, i < n.
typedef struct {
    const u8 *packed; // of the whole tensor, two codes a byte, first high; 16-byte aligned
    void *out;        // [n], 16-byte aligned
    u64 first;        // a multiple of 32
    u64 n;
    Scales scales;    // of the whole tensor
    float values[16];
} Dequantize4;

// How the nearest of sixteen values is found: format::cells::Cells and Codebook::order of the
// core, copied.
typedef struct {
    float step;
    float pivots[32];
    u8 below[32];
    float extra[2];
    u8 order[16];
} Encoder4;

#define SCALE_ABSMAX 0u // scales are f32
#define SCALE_E8M0 1u   // scales are exponent bytes

// What becomes of NaN and infinity. They are always noticed; with `zero` they are stored as 0,
// else what is stored for their block has no meaning.
typedef struct {
    u64 *first; // [1] or null: lowered to the index of the first one; the caller sets it to 2^64 - 1
    u32 zero;   // 0 or 1
    u32 padding;
} NonFinite;

// quantize4_{f32,f16,bf16}: whole tensors, Reference::Exact.
typedef struct {
    const void *x; // [n], 16-byte aligned
    u8 *packed;    // [(n + 1) / 2], 16-byte aligned; an odd end is filled with the code of 0.0
    void *scales;  // [blocks] of f32, or of u8 for SCALE_E8M0
    u64 n;
    NonFinite nonfinite;
    u32 log2_blocksize; // 5 to 12
    u32 scale;          // SCALE_ABSMAX or SCALE_E8M0
    Encoder4 encoder;
} Quantize4;

// dequantize8_{f32,f16,bf16}: out[i] = values[codes[i]] * absmax[i >> log2_blocksize] + offset.
typedef struct {
    const u8 *codes;     // [n], 16-byte aligned
    const float *values; // [256]
    const float *absmax; // [blocks]
    const float *offset; // [1] or null: added to every value (scales of nested absmax)
    void *out;           // [n], 16-byte aligned
    u64 n;
    u32 log2_blocksize;  // 5 to 12
    u32 padding;
} Dequantize8;

// quantize8_{f32,f16,bf16}: blockwise with a codebook of 256.
typedef struct {
    const void *x;          // [n], 16-byte aligned
    const float *subtract;  // [1] or null: taken from every value first (offset of nested absmax)
    const float *pivots;    // [256] ascending, the last is infinite: Codebook::pivots
    const u8 *order;        // [256] or null: the code at each sorted position; null: the position
    u8 *codes;              // [n], 16-byte aligned
    float *absmax;          // [blocks]
    u64 n;
    NonFinite nonfinite;
    u32 log2_blocksize;     // 5 to 12
    u32 padding;
} Quantize8;

// mean_f32: out[0] = quant::torch_sum::mean(x), bit for bit: the offset of nested absmax.
typedef struct {
    const float *x; // [n]
    float *out;     // [1]
    u64 n;
} Mean;

// linear4_small{8,16,32}_{f16,bf16}, linear4_mid_{f16,bf16}, linear4_gemv_{f32,f16,bf16}:
// y = x W^T + bias. The first two use tensor cores: K a multiple of 64, above 0, M up to the number in the name.
typedef struct {
    const void *x;    // [M, K], rows contiguous; small and mid: 16-byte aligned
    const u8 *packed; // [N, K] flat, two codes a byte, first high; 16-byte aligned
    const void *bias; // [N] of bias_dtype, or null
    void *y;          // [M, N]
    u64 m, n, k;
    Scales scales;
    float values[16];
    u32 bias_dtype; // DTYPE_*
    // Of a thread block of linear4_mid: a multiple of 16 up to 128, and 128 rows of W; or up to 32, and 64.
    u32 tokens;
    u32 rows;
    u32 padding;
} Linear4;

// linear8_gemv_{f32,f16,bf16}: y = x W^T + bias for a weight of byte codes: of a codebook, with a
// scale a block, or signed bytes times absmax[n] / 127.
typedef struct {
    const void *x;       // [M, K]
    const u8 *codes;     // [N, K]
    const float *values; // [256], or null: signed bytes
    const float *absmax; // [blocks]; signed bytes: [N]
    const void *bias;    // [N] of bias_dtype, or null
    void *y;             // [M, N]
    u64 m, n, k;
    u32 log2_blocksize;  // 5 to 12; of no meaning for signed bytes
    u32 bias_dtype;      // DTYPE_*
} Linear8;

// integer_rows_{f32,f16,bf16}: each group of a row of activations to signed bytes and their factor,
// absmax / 127; NaN for a group in which a value is not finite.
typedef struct {
    const void *x;  // [rows, columns]
    i8 *codes;      // [rows, columns]
    float *factors; // [rows, groups of a row]
    u64 rows, columns;
    u32 log2_group; // elements of a group
    u32 padding;
} IntegerRows;

// integer_linear4_{f32,f16,bf16}: the activations of integer_rows times a weight of four-bit codes
// whose values are integers * step, any M, N, K. src/quant/integer.rs is the definition.
typedef struct {
    const i8 *codes;      // [M, K], 16-byte aligned
    const float *factors; // [M, groups of a row]
    const u8 *packed;     // [N, K] flat, two codes a byte, first high; 16-byte aligned
    const void *bias;     // [N] of bias_dtype, or null
    void *y;              // [M, N]
    u64 m, n, k;
    Scales scales;
    i8 integers[16];
    float step;
    u32 log2_group; // elements with one factor, 32 or more
    u32 bias_dtype; // DTYPE_*
    u32 padding;
} IntegerLinear4;

// What one run of elements adds to quant::stats::Stats.
typedef struct {
    double sums[4]; // squares of the original and of the decoded, products, squared differences
    float max_abs;
    float absmax_min, absmax_max;
    u32 padding;
    u64 outliers;
} RunStats;

// compare_{f32,f16,bf16}: how far decoded values are from what they were quantized from.
typedef struct {
    const void *x;        // [n]
    const float *decoded; // [n]
    RunStats *out;        // [n / run, rounded up]
    u64 first;            // the position of x[0] in the tensor that has the scales
    u64 n;
    u64 run;              // a multiple of block, like `first`
    u64 block;            // elements of a block or row
    Scales scales;        // of the whole tensor
    float outlier_factor;
    u32 padding;
} Compare;

// Columns of activations that are multiplied apart (LLM.int8()).
typedef struct {
    u32 *columns; // [K], ascending; the first `count` of them are meant
    u32 *count;   // [1]
} Outliers;

// int8_flags_{f32,f16,bf16}: flags[column] = 1 where any |x| >= threshold in it; the caller sets
// all flags to 0 first.
typedef struct {
    const void *x; // [rows, columns]
    u8 *flags;     // [columns]
    u64 rows, columns;
    float threshold; // above 0
    u32 padding;
} Int8Flags;

// int8_outliers: lists the columns whose flag is set.
typedef struct {
    const u8 *flags; // [columns]
    u64 columns;     // below 2^32
    Outliers outliers;
} Int8Outliers;

// int8_rows_{f32,f16,bf16}: each row to signed bytes and its absmax; flagged columns count as 0. A row
// in which a value is not finite, in whatever column, has the absmax NaN, and codes of 0.
typedef struct {
    const void *x;   // [rows, columns]
    const u8 *flags; // [columns] or null
    i8 *codes;       // [rows, columns]
    float *absmax;   // [rows]
    u64 rows, columns;
    NonFinite nonfinite; // first: index into x
} Int8Rows;

// int8_dequantize_{f32,f16,bf16}: out[row, column] = codes * absmax[row] * (1 / 127).
typedef struct {
    const i8 *codes; // [rows, columns]
    const float *absmax;
    void *out;
    u64 rows, columns;
} Int8Dequantize;

// int8_linear_small_{f32,f16,bf16}: quantized activations times an int8 weight, any M, N, K.
// int8_finish_{f32,f16,bf16}: the same from integer sums that were made elsewhere.
//   y[m, n] = float(sums[m, n]) * (x_absmax[m] * absmax[n]) / 127^2
//             + sum over outliers of x[m, k] * (weight[n, k] * absmax[n] / 127) + bias[n]
typedef struct {
    const i8 *codes;       // [M, K]: of the activations; finish: null
    const i32 *sums;       // [M, N]: finish only, else null
    const float *x_absmax; // [M]
    const i8 *weight;      // [N, K]
    const float *absmax;   // [N]
    const void *bias;      // [N] of bias_dtype, or null
    void *y;               // [M, N]
    const void *x;         // [M, K]: the activations; null without outliers
    Outliers outliers;     // both null without outliers
    u64 m, n, k;
    u32 bias_dtype; // DTYPE_*
    u32 padding;
} Int8Linear;
