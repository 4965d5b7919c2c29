// What kernels are written with: element types, conversions, wide loads and stores, tensor cores.
//
// No header of the toolkit, so that NVRTC needs nothing beside these files, and g++ compiles the
// same kernels with tests/cuda/emulator in place of a GPU. PTX stands in this file only.
#pragma once
#include "params.h"

#ifdef NYBBLE_EMULATOR
#define DEVICE static inline
#define METHOD inline
#define OUTLINED static
#define SHARED(type, name, size)                                                                    \
    static type name[size];                                                                         \
    emulator::fresh(name, sizeof name)
#define SHARED_LARGE(type, name, size) SHARED(type, name, size)
#define KERNEL_LARGE(name, params, threads, shared, ...)                                            \
    static void name(const params &p) { __VA_ARGS__; }                                              \
    static const emulator::Registration registration_##name(                                       \
        #name, [](const void *p) { name(*static_cast<const params *>(p)); }, threads, shared);
#define KERNEL_BLOCKS(name, params, threads, blocks, ...) KERNEL_LARGE(name, params, threads, 0, __VA_ARGS__)
#else
#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define OUTLINED static __device__ __noinline__
#define SHARED(type, name, size) __shared__ type name[size]
#define SHARED_LARGE(type, name, size) extern __shared__ type name[]
#define KERNEL_BLOCKS(name, params, threads, blocks, ...)                                           \
    extern "C" __global__ void __launch_bounds__(threads, blocks)                                   \
        name(const __grid_constant__ params p) {                                                    \
        __VA_ARGS__;                                                                                \
    }
#endif

// A kernel, for thread blocks of so many threads. KERNEL_BLOCKS says how many of these blocks a
// multiprocessor is to hold, which bounds the registers.
#define KERNEL(name, params, threads, ...) KERNEL_BLOCKS(name, params, threads, 1, __VA_ARGS__)

// A kernel that needs more shared memory than the 48 KB that every kernel has: so many bytes, which the
// launch must give it. SHARED_LARGE names them.
#ifndef NYBBLE_EMULATOR
#define KERNEL_LARGE(name, params, threads, shared, ...) KERNEL_BLOCKS(name, params, threads, 1, __VA_ARGS__)
#endif

// One kernel for each element type.
#define KERNELS(name, params, threads, function)                                                    \
    KERNEL(name##_f32, params, threads, function<float>(p))                                         \
    KERNEL(name##_f16, params, threads, function<f16>(p))                                           \
    KERNEL(name##_bf16, params, threads, function<bf16>(p))

static constexpr u32 FULL = 0xffffffffu; // a whole warp: the only mask in use
static constexpr u32 WARP = 32;

struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

struct alignas(8) Words2 {
    u32 word[2];
};
struct alignas(16) Words4 {
    u32 word[4];
};

// --- conversions: exact when widening, to nearest with ties to even when narrowing --------------

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE float widen(f16 x) {
#ifdef NYBBLE_EMULATOR
    return emulator::half_to_float(x.bits);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#endif
}

template <class T> struct As; // names the type that `narrow` makes
template <> struct As<float> {
    DEVICE float narrow(float x) { return x; }
};
template <> struct As<f16> {
    DEVICE f16 narrow(float x) {
#ifdef NYBBLE_EMULATOR
        return f16{emulator::float_to_half(x)};
#else
        f16 half;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
        return half;
#endif
    }
    DEVICE u32 pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        u32 word; // one instruction for both
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
        return word;
#else
        return u32(narrow(first).bits) | u32(narrow(second).bits) << 16;
#endif
    }
};
template <> struct As<bf16> {
    DEVICE bf16 narrow(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        bf16 half;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
        return half;
#else
        // 7.5 has no such instruction.
        const u32 bits = __float_as_uint(x);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
        return bf16{u16((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
#endif
    }
    DEVICE u32 pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        u32 word; // one instruction for both
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
        return word;
#else
        return u32(narrow(first).bits) | u32(narrow(second).bits) << 16;
#endif
    }
};

template <class T> DEVICE T narrow(float x) { return As<T>::narrow(x); }

// Two elements in a word, the first in the low half.
template <class T> DEVICE u32 pair(float first, float second) {
    return As<T>::pair(first, second);
}

// A number of the type that the launcher names.
DEVICE float load_as(const void *address, u64 i, u32 dtype) {
    if (dtype == DTYPE_F32) return static_cast<const float *>(address)[i];
    if (dtype == DTYPE_F16) return widen(static_cast<const f16 *>(address)[i]);
    return widen(static_cast<const bf16 *>(address)[i]);
}

// --- wide accesses -------------------------------------------------------------------------------

template <class T> DEVICE T load(const void *address) {
#ifdef NYBBLE_EMULATOR
    return emulator::load_aligned<T>(address);
#else
    return *static_cast<const T *>(address);
#endif
}

// The address, with what the compiler sometimes loses track of: that it is in global memory.
template <class T> DEVICE const T *global(const void *address) {
#ifndef NYBBLE_EMULATOR
    __builtin_assume(__isGlobal(address));
#endif
    return static_cast<const T *>(address);
}

// Reads what nobody writes and nobody reads again soon: past the first-level cache, which keeps
// its lines for activations and scales.
DEVICE Words2 load_once2(const void *address) {
#ifdef NYBBLE_EMULATOR
    return emulator::load_aligned<Words2>(address);
#else
    Words2 w;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(w.word[0]), "=r"(w.word[1])
        : "l"(address));
    return w;
#endif
}

DEVICE Words4 load_once4(const void *address) {
#ifdef NYBBLE_EMULATOR
    return emulator::load_aligned<Words4>(address);
#else
    Words4 w;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
        : "l"(address));
    return w;
#endif
}

template <class T> DEVICE void store(void *address, const T &value) {
#ifdef NYBBLE_EMULATOR
    emulator::store_aligned(address, value);
#else
    *static_cast<T *>(address) = value;
#endif
}

// Sixteen bytes from global to shared memory, which the hardware copies while the thread goes on. They are
// there after `copies_done`, for the thread that asked for them; a barrier shows them to others. 7.5 has no
// such copies, and the thread makes them itself.
DEVICE void copy16(void *shared, const void *address) {
#ifdef NYBBLE_EMULATOR
    emulator::copy_later(shared, address);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(shared))), "l"(address)
                 : "memory");
#else
    store(shared, load<Words4>(address));
#endif
}

DEVICE void copies_done() {
#ifdef NYBBLE_EMULATOR
    emulator::copies_done();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// The same number, of which the compiler knows nothing: what follows from it is computed where it is
// needed instead of being kept in registers through a loop.
DEVICE u32 opaque(u32 x) {
#ifndef NYBBLE_EMULATOR
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// (x & mask) | bits in one instruction, which the compiler does not find by itself.
DEVICE u32 masked_or(u32 x, u32 mask, u32 bits) {
#ifdef NYBBLE_EMULATOR
    return (x & mask) | bits;
#else
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
    return result;
#endif
}

// --- warps and tensor cores ----------------------------------------------------------------------

DEVICE u32 lane_of_warp() { return threadIdx.x % WARP; }
DEVICE u32 warp_of_block() { return threadIdx.x / WARP; }

// The sum over all lanes, in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (u32 bits = WARP / 2; bits; bits /= 2) x += __shfl_xor_sync(FULL, x, bits);
    return x;
}

DEVICE i32 warp_sum(i32 x) {
#pragma unroll
    for (u32 bits = WARP / 2; bits; bits /= 2) x += __shfl_xor_sync(FULL, x, bits);
    return x;
}

// c += a b with a 16 x 16 and b 16 x 8, f32 sums. Lane 4 g + t holds rows g and g + 8 of a, column
// g of b, and columns 2 t and 2 t + 1 of c. m16n8k16 is the largest product that every generation
// from 8.0 on has; 7.5 does half of it at a time, and f16 only.
DEVICE void mma(f16, float c[4], const u32 a[4], const u32 b[2]) {
#ifdef NYBBLE_EMULATOR
    emulator::mma(c, a, b, emulator::half_to_float, __LINE__);
#elif __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (u32 half = 0; half < 2; ++half)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

#if defined(NYBBLE_EMULATOR) || __CUDA_ARCH__ >= 800
#define HAS_BF16_TENSOR_CORES
DEVICE void mma(bf16, float c[4], const u32 a[4], const u32 b[2]) {
#ifdef NYBBLE_EMULATOR
    emulator::mma(c, a, b, [](u32 bits) { return __uint_as_float(bits << 16); }, __LINE__);
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
#endif
