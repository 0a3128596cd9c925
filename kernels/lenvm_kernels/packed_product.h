// Products of bf16 rows and packed weights on CPUs with AVX-512.
//
// A weight [out, in] lies packed as tiles in the order in which they are read: per 32 outputs and 32 inputs two tiles
// [16 pairs of inputs][16 outputs]. Sums are fp32, in the order of the inputs: a row's result does not depend on the
// other rows or on the number of threads.
//
// Products are those of matrix tiles (AMX); without them fp32 multiply-adds of the widened numbers, of which a core
// does twice as many a cycle as of AVX-512 BF16's (docs/experiments.md has the times).
#pragma once
#include "layer_rows.h"
#include "matrix_tiles.h"

#if defined(__AVX512F__)
#define LENVM_PRODUCTS 1
#include <immintrin.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kTile = 16, kTileWords = kTile * kTile, kColumns = 2 * kTile;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Linear {
  const uint32_t* weight;
  const bf16* bias;  // null: none
  int64_t num_inputs, num_outputs;
};

struct Matrix {
  const bf16* data;
  int64_t num_rows, stride;
};

inline __m512 to_float(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load_bf16(const bf16* at) { return to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))); }

// To the nearest, ties to even; NaN stays NaN.
inline __m256i to_bf16(__m512 x) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(_mm512_srli_epi32(near, 16), nan, 0x7fc0));
#endif
}
inline __m512 rounded(__m512 x) { return to_float(to_bf16(x)); }
inline void store_bf16(__m512 x, bf16* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(x)); }

#if defined(LENVM_AMX)
constexpr int64_t kRowsAtOnce = 2 * kTile;
constexpr int64_t kRowsOfTask = 512;  // their inputs stay in the second-level cache
constexpr int64_t kRight = kTileWords;

// Rows as a product reads them: up to a multiple of 32 of them, which therefore must be there.
struct Inputs {
  const bf16* data;
  int64_t stride;
};

// Memory for the inputs of a product, beyond the rows themselves.
inline float* reserve_inputs(std::vector<float>&, int64_t, int64_t) { return nullptr; }
inline Inputs prepare(const Matrix& x, int64_t, float*) { return {x.data, x.stride}; }

// c[A][2][16][16] = 16 A rows of x times one block of 32 columns
template <int A>
inline void multiply(const bf16* x, int64_t stride, const uint32_t* weight, int64_t num_steps, float* c) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (A == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < num_steps; ++step, x += 32, weight += 2 * kTileWords) {
    _tile_loadd(4, x, stride * 2);
    _tile_loadd(6, weight, 64);
    _tile_loadd(7, weight + kTileWords, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (A == 2) {
      _tile_loadd(5, x + kTile * stride, stride * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + kTileWords, 64);
  if constexpr (A == 2) {
    _tile_stored(2, c + 2 * kTileWords, 64);
    _tile_stored(3, c + 3 * kTileWords, 64);
  }
}

inline int64_t next_rows(int64_t left) { return std::min(kRowsAtOnce, left); }
inline int64_t sums_of_row(int64_t r) { return r / kTile * 2 * kTileWords + r % kTile * kTile; }

// `num_rows` <= kRowsAtOnce rows from `row` on, times one block of 32 columns
inline void multiply(const Inputs& x, int64_t row, int64_t num_rows, const uint32_t* weight, int64_t num_steps,
                     float* c) {
  const bf16* rows = x.data + row * x.stride;
  if (num_rows > kTile)
    multiply<2>(rows, x.stride, weight, num_steps, c);
  else
    multiply<1>(rows, x.stride, weight, num_steps, c);
}

#else
constexpr int64_t kRowsAtOnce = 12;   // their sums fit the registers
constexpr int64_t kRowsOfTask = 256;  // their inputs stay in the second-level cache
constexpr int64_t kRight = kTile;
constexpr int64_t kAhead = 2 * kTileWords;  // the weight is fetched so many words early

// Rows as a product reads them: widened.
struct Inputs {
  const float* data;
  int64_t stride;
};

inline int64_t input_stride(int64_t num_inputs) { return num_inputs + kTile; }  // no multiple of a page

inline float* reserve_inputs(std::vector<float>& buffer, int64_t rows, int64_t num_inputs) {
  const size_t size = static_cast<size_t>(rows * input_stride(num_inputs));
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

inline Inputs prepare(const Matrix& x, int64_t num_inputs, float* wide) {
  const int64_t stride = input_stride(num_inputs);
#pragma omp for schedule(static)
  for (int64_t r = 0; r < x.num_rows; ++r)
    for (int64_t i = 0; i < num_inputs; i += 16)
      _mm512_storeu_ps(wide + r * stride + i, load_bf16(x.data + r * x.stride + i));
  return {wide, stride};
}

// Of so many rows: those that are multiplied at once, so that the last are no few.
inline int64_t next_rows(int64_t left) {
  const int64_t times = (left + kRowsAtOnce - 1) / kRowsAtOnce;
  return (left + times - 1) / times;
}
inline int64_t sums_of_row(int64_t r) { return r * kColumns; }

template <int R>
inline void multiply_rows(const float* x, int64_t stride, const uint32_t* weight, int64_t num_steps, float* c) {
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
  __m512 sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int64_t step = 0; step < num_steps; ++step, weight += 2 * kTileWords)
    for (int64_t pair = 0; pair < kTile; ++pair, x += 2) {
      __builtin_prefetch(weight + pair * kTile + kAhead);
      __builtin_prefetch(weight + pair * kTile + kAhead + kTileWords);
      const __m512i left = _mm512_loadu_si512(weight + pair * kTile);
      const __m512i right = _mm512_loadu_si512(weight + kTileWords + pair * kTile);
      const auto add = [&](__m512i a, __m512i b, int64_t i) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const __m512 input = _mm512_set1_ps(x[r * stride + i]);
          sums[r][0] = _mm512_fmadd_ps(input, _mm512_castsi512_ps(a), sums[r][0]);
          sums[r][1] = _mm512_fmadd_ps(input, _mm512_castsi512_ps(b), sums[r][1]);
        }
      };
      add(_mm512_slli_epi32(left, 16), _mm512_slli_epi32(right, 16), 0);
      add(_mm512_and_si512(left, high), _mm512_and_si512(right, high), 1);
    }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_store_ps(c + sums_of_row(r), sums[r][0]);
    _mm512_store_ps(c + sums_of_row(r) + kRight, sums[r][1]);
  }
}

// `num_rows` <= R rows from `row` on, times one block of 32 columns
template <int R = kRowsAtOnce>
inline void multiply(const Inputs& x, int64_t row, int64_t num_rows, const uint32_t* weight, int64_t num_steps,
                     float* c) {
  if (num_rows == R) return multiply_rows<R>(x.data + row * x.stride, x.stride, weight, num_steps, c);
  if constexpr (R > 1) multiply<R - 1>(x, row, num_rows, weight, num_steps, c);
}
#endif

// Shared by the threads of a region. `write(c, row, column)` gets 16 sums of columns [column, column + 16) and, behind
// kRight, those of the 16 columns after them. `wide`: of `reserve_inputs`.
template <class Write>
void linear(const Matrix& x, const Linear& w, float* wide, Write write) {
  const int64_t num_steps = w.num_inputs / 32, num_blocks = w.num_outputs / kColumns;
  const int64_t num_tasks = (x.num_rows + kRowsOfTask - 1) / kRowsOfTask * num_blocks;
  const Inputs inputs = prepare(x, w.num_inputs, wide);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t block = task % num_blocks, begin = task / num_blocks * kRowsOfTask;
    const int64_t end = std::min(x.num_rows, begin + kRowsOfTask);
    const uint32_t* weight = w.weight + block * num_steps * 2 * kTileWords;
    alignas(64) float c[kRowsAtOnce * kColumns];
    for (int64_t row = begin, num_rows; row < end; row += num_rows) {
      num_rows = next_rows(end - row);
      multiply(inputs, row, num_rows, weight, num_steps, c);
      for (int64_t r = 0; r < num_rows; ++r) write(c + sums_of_row(r), row + r, block * kColumns);
    }
  }
}

// out[rows, outputs] = x times the weight, plus the bias
inline void linear(const Matrix& x, const Linear& w, float* wide, bf16* out) {
  linear(x, w, wide, [&](const float* c, int64_t row, int64_t column) {
    for (int64_t half = 0; half < 2; ++half, c += kRight, column += kTile) {
      const __m512 sums = _mm512_load_ps(c);
      store_bf16(w.bias ? _mm512_add_ps(sums, load_bf16(w.bias + column)) : sums, out + row * w.num_outputs + column);
    }
  });
}

}  // namespace
#endif

namespace {

// Whether this build has products, and this machine lets them run.
inline bool products_run_here() {
#if defined(LENVM_AMX)
  return tiles_granted();
#elif defined(LENVM_PRODUCTS)
  return true;
#else
  return false;
#endif
}

}  // namespace
