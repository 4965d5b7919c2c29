/* What one thread of this processor multiplies and adds at most: loops of one instruction on
 * registers. The limits that docs/numbers.md holds kernels against.
 *
 *   gcc -O2 -march=cooperlake benches/limits.c -o target/limits && target/limits
 *
 * An operation is a multiplication or an addition. Needs AVX512-BF16 and AVX512-VNNI. */
#include <immintrin.h>
#include <stdio.h>
#include <time.h>

enum { SUMS = 24, ROUNDS = 20 * 1000 * 1000 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* More sums than an instruction has cycles of latency, two of them a cycle. */
#define EACH(x) TWELVE(x, ) TWELVE(x, 1)
#define TWELVE(x, t) \
  x(t##0) x(t##1) x(t##2) x(t##3) x(t##4) x(t##5) x(t##6) x(t##7) x(t##8) x(t##9) x(t##a) x(t##b)

/* Defines a function that returns the operations of a second, in billions, where an instruction
 * does `work` of them. */
#define LOOP(name, vector, instruction, work)                                               \
  static double name(void) {                                                                \
    vector a = {0}, b = {0}, EACH(DECLARE) end = {0};                                       \
    double start = now();                                                                   \
    for (long round = 0; round < ROUNDS; round++) { EACH(STEP_##instruction) }              \
    (void)end;                                                                              \
    return (double)ROUNDS * SUMS * (work) / (now() - start) / 1e9;                          \
  }
#define DECLARE(i) sum##i = {0},
#define STEP(text, i) __asm__ volatile(text " %1, %2, %0" : "+v"(sum##i) : "v"(a), "v"(b));
#define STEP_vfmadd231ps(i) STEP("vfmadd231ps", i)
#define STEP_vdpbf16ps(i) STEP("vdpbf16ps", i)
#define STEP_vpdpbusd(i) STEP("vpdpbusd", i)

LOOP(f32_avx2, __m256, vfmadd231ps, 16)
LOOP(f32_avx512, __m512, vfmadd231ps, 32)
LOOP(bf16_avx512, __m512, vdpbf16ps, 64)
LOOP(int8_avx512, __m512i, vpdpbusd, 128)

int main(void) {
  printf("f32   AVX2          %5.0f GFLOP/s\n", f32_avx2());
  printf("f32   AVX-512       %5.0f GFLOP/s\n", f32_avx512());
  printf("bf16  AVX512-BF16   %5.0f GFLOP/s\n", bf16_avx512());
  printf("int8  AVX512-VNNI   %5.0f GOP/s\n", int8_avx512());
}
