// Every kernel, one translation unit: a GPU loads one module.
#include "dequantize4.cuh"
#include "quantize4.cuh"

#include "blockwise8.cuh"
#include "mean.cuh"

#include "linear4_gemv.cuh"
#include "linear4_mid.cuh"
#include "linear4_small.cuh"
#include "linear8_gemv.cuh"

#include "int8_linear.cuh"
#include "int8_rows.cuh"

#include "compare.cuh"
#include "integer_linear4.cuh"
