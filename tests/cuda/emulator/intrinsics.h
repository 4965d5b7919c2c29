// CUDA's own functions, as far as the kernels use them. The default argument is the line of the
// call: lanes that meet must have come to the same one.
#pragma once

inline void __syncthreads() { emulator::sync_threads(); }

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    emulator::whole_warp(mask);
    emulator::publish(0, line);
}

template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, int line = __builtin_LINE()) {
    emulator::whole_warp(mask);
    const unsigned set = emulator::publish(value, line);
    return emulator::shown<T>(set, emulator::lane() ^ bits);
}

template <class T> inline T __shfl_sync(unsigned mask, T value, int from, int = 32, int line = __builtin_LINE()) {
    emulator::whole_warp(mask);
    const unsigned set = emulator::publish(value, line);
    return emulator::shown<T>(set, from);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    emulator::whole_warp(mask);
    const unsigned set = emulator::publish(predicate != 0, line);
    unsigned bits = 0;
    for (unsigned i = 0; i < emulator::WARP; ++i) bits |= unsigned(emulator::shown<bool>(set, i)) << i;
    return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline unsigned long long atomicMin(unsigned long long *address, unsigned long long value) {
    const unsigned long long before = *address;
    if (value < before) *address = value;
    return before;
}

inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += int(static_cast<signed char>(a >> 8 * i)) * static_cast<signed char>(b >> 8 * i);
    return sum;
}

// Four bytes of the eight in a and b, each by a number of three bits in the selector.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        if (selector >> 4 * i & 8) emulator::fail("a selector of __byte_perm with a sign");
        result |= unsigned(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    }
    return result;
}

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

namespace emulator {

inline float half_to_float(unsigned short half) {
    const unsigned sign = unsigned(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = std::ldexp(float(mantissa), -24);
    return sign ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even.
inline unsigned short float_to_half(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    const float magnitude = std::fabs(x);
    if (x != x) return sign | 0x7e00;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    if (magnitude < 0x1p-14f) return sign | unsigned(std::nearbyint(std::ldexp(magnitude, 24)));
    const unsigned rest = (bits & 0x7fffffffu) - (112u << 23);
    return sign | (rest + 0xfff + (rest >> 13 & 1)) >> 13;
}

// mma.sync.m16n8k16, row.col, f32 accumulators: lane 4 * g + t holds rows g and g + 8 of A, column
// g of B, and columns 2 t and 2 t + 1 of the result. The sum is made in f64 and rounded once:
// hardware rounds more often, which bounds of products allow for.
template <class Widen> inline void mma(float c[4], const unsigned a[4], const unsigned b[2], Widen widen, int line) {
    struct Fragment {
        unsigned a[4], b[2];
    } mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const unsigned set = publish(mine, line), group = lane() >> 2, pair = lane() & 3;
    double sums[4] = {c[0], c[1], c[2], c[3]};
    for (unsigned k = 0; k < 16; ++k) {
        const unsigned from = k % 8 / 2, high = k / 8;
        const auto half = [&](unsigned word) { return widen(k & 1 ? word >> 16 : word & 0xffff); };
        const Fragment row = shown<Fragment>(set, group * 4 + from);
        for (unsigned i = 0; i < 2; ++i) {
            const Fragment column = shown<Fragment>(set, (2 * pair + i) * 4 + from);
            const double x = half(column.b[high]);
            sums[i] += double(half(row.a[2 * high])) * x;
            sums[2 + i] += double(half(row.a[2 * high + 1])) * x;
        }
    }
    for (int i = 0; i < 4; ++i) c[i] = float(sums[i]);
}

} // namespace emulator
