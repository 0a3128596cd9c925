// Products of bf16 rows and packed weights on CPUs with AVX-512.
//
// Weights [out, in] lie packed in blocks of 32 outputs, in the order in which they are read. In bf16 a block is, for
// every 32 inputs, two tiles [16 pairs of inputs][16 outputs]; in int8 it is [in / 4][32 outputs][4 inputs]. Sums are
// fp32, in the order of the inputs, or exact: a row's result does not depend on the other rows or on the number of
// threads.
//
// A product is one of
//   Tiles    matrix tiles (AMX), bf16;
//   Vectors  without them: fp32 multiply-adds of the widened numbers, of which a core does twice as many a cycle as of
//            AVX-512 BF16's (docs/experiments.md has the times);
//   Bytes    weights and inputs rounded to int8 (AVX-512 VNNI), a scale an output and a scale a row.
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
  const void* weight;
  const bf16* bias;      // null: none
  const float* scales;   // [outputs], of int8 weights; null: bf16
  const int32_t* sums;   // [outputs], of int8 weights: 128 times the sum over the inputs
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

// Of so many rows: those that are multiplied at once, so that the last are no few.
inline int64_t even_share(int64_t left, int64_t most) {
  const int64_t times = (left + most - 1) / most;
  return (left + times - 1) / times;
}

#if defined(LENVM_AMX)
struct Tiles {
  static constexpr int64_t kRowsAtOnce = 2 * kTile;
  static constexpr int64_t kRowsOfTask = 512;  // their inputs stay in the second-level cache
  static constexpr int64_t kRight = kTileWords;

  // Rows are read up to a multiple of 32 of them, which therefore must be there.
  struct Inputs {
    const bf16* data;
    int64_t stride;
  };

  static int64_t buffer_size(int64_t, int64_t) { return 0; }
  static Inputs prepare(const Matrix& x, int64_t, float*) { return {x.data, x.stride}; }
  static int64_t next_rows(int64_t left) { return std::min(kRowsAtOnce, left); }
  static int64_t sums_of_row(int64_t r) { return r / kTile * 2 * kTileWords + r % kTile * kTile; }

  static void multiply(const Inputs& x, const Linear& w, int64_t block, int64_t row, int64_t num_rows, float* c) {
    const int64_t num_steps = w.num_inputs / 32;
    const uint32_t* weight = static_cast<const uint32_t*>(w.weight) + block * num_steps * 2 * kTileWords;
    const bf16* rows = x.data + row * x.stride;
    if (num_rows > kTile)
      multiply<2>(rows, x.stride, weight, num_steps, c);
    else
      multiply<1>(rows, x.stride, weight, num_steps, c);
  }

  // c[A][2][16][16] = 16 A rows of x times one block of 32 columns
  template <int A>
  static void multiply(const bf16* x, int64_t stride, const uint32_t* weight, int64_t num_steps, float* c) {
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
};
using Exact = Tiles;

#else
struct Vectors {
  static constexpr int64_t kRowsAtOnce = 12;   // their sums fit the registers
  static constexpr int64_t kRowsOfTask = 256;  // their inputs stay in the second-level cache
  static constexpr int64_t kRight = kTile;
  static constexpr int64_t kAhead = 2 * kTileWords;  // the weight is fetched so many words early

  struct Inputs {
    const float* data;
    int64_t stride;
  };

  static int64_t stride(int64_t num_inputs) { return num_inputs + kTile; }  // no multiple of a page
  static int64_t buffer_size(int64_t rows, int64_t num_inputs) { return rows * stride(num_inputs); }
  static int64_t next_rows(int64_t left) { return even_share(left, kRowsAtOnce); }
  static int64_t sums_of_row(int64_t r) { return r * kColumns; }

  static Inputs prepare(const Matrix& x, int64_t num_inputs, float* wide) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < x.num_rows; ++r)
      for (int64_t i = 0; i < num_inputs; i += 16)
        _mm512_storeu_ps(wide + r * stride(num_inputs) + i, load_bf16(x.data + r * x.stride + i));
    return {wide, stride(num_inputs)};
  }

  template <int R = kRowsAtOnce>
  static void multiply(const Inputs& x, const Linear& w, int64_t block, int64_t row, int64_t num_rows, float* c) {
    if (num_rows == R) {
      const int64_t num_steps = w.num_inputs / 32;
      const uint32_t* weight = static_cast<const uint32_t*>(w.weight) + block * num_steps * 2 * kTileWords;
      return multiply_rows<R>(x.data + row * x.stride, x.stride, weight, num_steps, c);
    }
    if constexpr (R > 1) multiply<R - 1>(x, w, block, row, num_rows, c);
  }

  template <int R>
  static void multiply_rows(const float* x, int64_t stride, const uint32_t* weight, int64_t num_steps, float* c) {
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
};
using Exact = Vectors;
#endif

#if defined(__AVX512VNNI__)
#define LENVM_BYTES 1
struct Bytes {
  static constexpr int64_t kRowsAtOnce = 12;
  static constexpr int64_t kRowsOfTask = 512;
  static constexpr int64_t kRight = kTile;
  static constexpr int64_t kAhead = 32 * kColumns;  // bytes of the weight

  struct Inputs {
    const uint8_t* data;  // rounded to a 127th of the row's greatest, plus 128
    const float* scales;
    int64_t stride;
  };

  static int64_t stride(int64_t num_inputs) { return num_inputs + 64; }
  static int64_t buffer_size(int64_t rows, int64_t num_inputs) { return rows * (1 + stride(num_inputs) / 4); }
  static int64_t next_rows(int64_t left) { return even_share(left, kRowsAtOnce); }
  static int64_t sums_of_row(int64_t r) { return r * kColumns; }

  static Inputs prepare(const Matrix& x, int64_t num_inputs, float* buffer) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(buffer + x.num_rows);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < x.num_rows; ++r)
      buffer[r] = round_row(x.data + r * x.stride, num_inputs, bytes + r * stride(num_inputs));
    return {bytes, buffer, stride(num_inputs)};
  }

  // The scale of the row: NaN if one of it is.
  static float round_row(const bf16* x, int64_t num_inputs, uint8_t* to) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t i = 0; i < num_inputs; i += 16) {
      const __m512 v = load_bf16(x + i);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_abs_ps(v));
    }
    const float greatest = _mm512_reduce_max_ps(most);
    const __m512 inverse = _mm512_set1_ps(greatest > 0 ? 127.0f / greatest : 0.0f);
    const __m512i middle = _mm512_set1_epi32(128);
    for (int64_t i = 0; i < num_inputs; i += 16) {
      const __m512i near = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(x + i), inverse)), middle);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtusepi32_epi8(_mm512_max_epi32(near, _mm512_setzero_si512())));
    }
    return nan ? __builtin_nanf("") : greatest / 127.0f;
  }

  template <int R = kRowsAtOnce>
  static void multiply(const Inputs& x, const Linear& w, int64_t block, int64_t row, int64_t num_rows, float* c) {
    if (num_rows == R) return multiply_rows<R>(x, w, block, row, c);
    if constexpr (R > 1) multiply<R - 1>(x, w, block, row, num_rows, c);
  }

  template <int R>
  static void multiply_rows(const Inputs& x, const Linear& w, int64_t block, int64_t row, float* c) {
    const uint8_t* weight = static_cast<const uint8_t*>(w.weight) + block * w.num_inputs * kColumns;
    const uint8_t* data = x.data + row * x.stride;
    __m512i sums[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < w.num_inputs; i += 4, weight += 4 * kColumns) {
      __builtin_prefetch(weight + kAhead);
      __builtin_prefetch(weight + kAhead + 64);
      const __m512i left = _mm512_loadu_si512(weight), right = _mm512_loadu_si512(weight + 64);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, data + r * x.stride + i, 4);
        const __m512i input = _mm512_set1_epi32(four);
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], input, left);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], input, right);
      }
    }
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t column = block * kColumns + half * kTile;
      const __m512i shift = _mm512_loadu_si512(w.sums + column);
      const __m512 scales = _mm512_loadu_ps(w.scales + column);
      for (int r = 0; r < R; ++r) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][half], shift));
        _mm512_store_ps(c + sums_of_row(r) + half * kRight,
                        _mm512_mul_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[row + r]))));
      }
    }
  }
};
#endif

template <class Product>
float* reserve_inputs(std::vector<float>& buffer, int64_t rows, int64_t num_inputs) {
  const size_t size = static_cast<size_t>(Product::buffer_size(rows, num_inputs));
  if (buffer.size() < size) buffer.resize(size);
  return buffer.data();
}

// Shared by the threads of a region. `write(c, row, column)` gets 16 sums of columns [column, column + 16) and, behind
// kRight, those of the 16 columns after them. `buffer`: of `reserve_inputs`.
template <class Product, class Write>
void linear(const Matrix& x, const Linear& w, float* buffer, Write write) {
  constexpr int64_t kRowsOfTask = Product::kRowsOfTask;
  const int64_t num_blocks = w.num_outputs / kColumns;
  const int64_t num_tasks = (x.num_rows + kRowsOfTask - 1) / kRowsOfTask * num_blocks;
  const typename Product::Inputs inputs = Product::prepare(x, w.num_inputs, buffer);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t block = task % num_blocks, begin = task / num_blocks * kRowsOfTask;
    const int64_t end = std::min(x.num_rows, begin + kRowsOfTask);
    alignas(64) float c[Product::kRowsAtOnce * kColumns];
    for (int64_t row = begin, num_rows; row < end; row += num_rows) {
      num_rows = Product::next_rows(end - row);
      Product::multiply(inputs, w, block, row, num_rows, c);
      for (int64_t r = 0; r < num_rows; ++r) write(c + Product::sums_of_row(r), row + r, block * kColumns);
    }
  }
}

// out[rows, outputs] = x times the weight, plus the bias
template <class Product>
void linear(const Matrix& x, const Linear& w, float* buffer, bf16* out) {
  linear<Product>(x, w, buffer, [&](const float* c, int64_t row, int64_t column) {
    for (int64_t half = 0; half < 2; ++half, c += Product::kRight, column += kTile) {
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
