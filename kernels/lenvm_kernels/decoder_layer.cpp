// A decoder layer on CPUs with matrix tiles (AMX), bf16: in one call, or in two around its attention:
//   RMS norm, query-key-value projection, rotary embedding;
//   output projection, RMS norm, gated MLP.
// Each half is one parallel region: between its parts the threads meet at a barrier, where separate operators would
// return to Python. At the few rows of a decode step that is what costs most after reading the weights.
//
// A weight [out, in] lies packed as tiles in the order in which they are read: per 32 outputs and 32 inputs two tiles
// [16 pairs of inputs][16 outputs]. Sums are fp32, in the order of the inputs: a row's result does not depend on the
// other rows or on the number of threads. Roundings to bf16 are those of the separate operators.
//
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include <algorithm>
#include <vector>

#include "layer_rows.h"
#include "matrix_tiles.h"
#include "paged_attention.h"

#if defined(LENVM_AMX)
namespace {

constexpr int64_t kTile = 16, kTileWords = kTile * kTile, kColumns = 2 * kTile;
constexpr int64_t kRowsAtOnce = 2 * kTile;
constexpr int64_t kRowsOfTask = 512;  // their inputs stay in the second-level cache
constexpr int64_t kRowsOfScratch = 4 * kRowsOfTask;  // a prefill's intermediate rows take no more memory than these

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Linear {
  const uint32_t* weight;
  const bf16* bias;  // null: none
  int64_t num_inputs, num_outputs;
};

struct Matrix {
  const bf16* data;  // rows up to a multiple of 16 may be read
  int64_t num_rows, stride;
};

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

// Shared by the threads of a region. `write(c, row, column)` gets 16 sums of columns [column, column + 16) and, behind
// kTileWords, those of the 16 columns after them.
template <class Write>
void linear(const Matrix& x, const Linear& w, Write write) {
  const int64_t num_steps = w.num_inputs / 32, num_blocks = w.num_outputs / kColumns;
  const int64_t num_tasks = (x.num_rows + kRowsOfTask - 1) / kRowsOfTask * num_blocks;
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    const int64_t block = task % num_blocks, begin = task / num_blocks * kRowsOfTask;
    const int64_t end = std::min(x.num_rows, begin + kRowsOfTask);
    const uint32_t* weight = w.weight + block * num_steps * 2 * kTileWords;
    alignas(64) float c[2 * 2 * kTileWords];
    for (int64_t row = begin; row < end; row += kRowsAtOnce) {
      const bf16* rows = x.data + row * x.stride;
      if (end - row > kTile)
        multiply<2>(rows, x.stride, weight, num_steps, c);
      else
        multiply<1>(rows, x.stride, weight, num_steps, c);
      for (int64_t r = 0; r < std::min(kRowsAtOnce, end - row); ++r)
        write(c + r / kTile * 2 * kTileWords + r % kTile * kTile, row + r, block * kColumns);
    }
  }
}

inline __m256i to_bf16(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
inline __m512 to_float(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m512 rounded(__m512 x) { return to_float(to_bf16(x)); }
inline __m512 add_bias(__m512 sums, const bf16* bias, int64_t column) {
  if (!bias) return sums;
  return _mm512_add_ps(sums, to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias + column))));
}

// As `exp_clamped` of layer_rows.h.
inline __m512 exp_clamped(__m512 x) {
  x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(87.0f)), _mm512_set1_ps(-87.0f));
  const __m512 whole = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return _mm512_scalef_ps(p, whole);
}

// out[rows, outputs] = x times the weight
void linear(const Matrix& x, const Linear& w, bf16* out, int64_t stride) {
  linear(x, w, [&](const float* c, int64_t row, int64_t column) {
    for (int64_t half = 0; half < 2; ++half, c += kTileWords, column += kTile)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * stride + column),
                          to_bf16(add_bias(_mm512_load_ps(c), w.bias, column)));
  });
}

// out[rows, outputs / 2] = silu(gate) * up, where the weight's blocks hold 16 columns of each
void gated_linear(const Matrix& x, const Linear& w, bf16* out, int64_t stride) {
  linear(x, w, [&](const float* c, int64_t row, int64_t column) {
    const __m512 gate = rounded(_mm512_load_ps(c)), up = rounded(_mm512_load_ps(c + kTileWords));
    const __m512 silu = rounded(gate / (1.0f + exp_clamped(-gate)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row * stride + column / 2), to_bf16(silu * up));
  });
}

struct Scratch {
  std::vector<bf16> normed, gated, input;

  // Rows beyond the last are read, and their products dropped.
  static bf16* reserve(std::vector<bf16>& buffer, int64_t rows, int64_t width) {
    const size_t size = static_cast<size_t>(round_up(rows, kRowsAtOnce) * width);
    if (buffer.size() < size) buffer.resize(size);
    return buffer.data();
  }
};

}  // namespace
#endif

extern "C" {

struct Norm {
  const bf16* weight;
  float eps;
};

struct Projection {  // mirror of `_Projection` in decoder_layer.py
  const void *weight, *bias;
  int64_t num_inputs, num_outputs;
};

struct Rotation {
  const int64_t* positions;
  const bf16* cos_sin;
  int64_t rotary_dim, head_dim, num_heads, num_kv_heads;
};

struct Layer {  // mirror of `_Layer` in decoder_layer.py
  Norm norm, mlp_norm;
  Projection qkv, output, gate_up, down;
};

typedef void (*AttentionKernel)(const Problem* problem, int32_t is_bf16, int32_t num_threads);

int32_t lenvm_decoder_layer_runs_here() {
#if defined(LENVM_AMX)
  return tiles_granted();
#else
  return 0;
#endif
}

#if defined(LENVM_AMX)
static Linear as_linear(const Projection& p) {
  return {static_cast<const uint32_t*>(p.weight), static_cast<const bf16*>(p.bias), p.num_inputs, p.num_outputs};
}

// qkv[rows, heads] from x[rows, dim]; residual (or null) becomes residual + x.
void lenvm_project_qkv(const bf16* x, bf16* residual, bf16* qkv, int64_t num_rows, const Norm* norm,
                       const Projection* projection, const Rotation* rotation, int32_t num_threads) {
  static thread_local Scratch scratch;
  const Linear w = as_linear(*projection);
  const int64_t dim = w.num_inputs, half = rotation->rotary_dim / 2, width = rotation->head_dim;
  bf16* normed = Scratch::reserve(scratch.normed, num_rows, dim);
#pragma omp parallel num_threads(num_threads)
  {
    const TileScope tiles;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r)
      rms_norm_row(x + r * dim, residual ? residual + r * dim : nullptr, norm->weight, normed + r * dim, dim, norm->eps);
    linear({normed, num_rows, dim}, w, qkv, w.num_outputs);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < num_rows; ++r) {
      const bf16* cos = rotation->cos_sin + rotation->positions[r] * rotation->rotary_dim;
      rotate_row(qkv + r * w.num_outputs, rotation->num_heads + rotation->num_kv_heads, width, cos, cos + half, half);
    }
  }
}

// x[rows, dim] from the attention's output[rows, heads]; residual becomes residual + projected attention.
void lenvm_project_and_mlp(const bf16* attention, bf16* residual, bf16* x, int64_t num_rows, const Projection* output,
                           const Norm* norm, const Projection* gate_up, const Projection* down, int32_t num_threads) {
  static thread_local Scratch scratch;
  const Linear o = as_linear(*output), gu = as_linear(*gate_up), d = as_linear(*down);
  const int64_t dim = o.num_outputs;
  while (num_rows > 0) {
    const int64_t rows = std::min(num_rows, kRowsOfScratch);
    bf16* input = Scratch::reserve(scratch.input, rows, o.num_inputs);
    bf16* normed = Scratch::reserve(scratch.normed, rows, dim);
    bf16* gated = Scratch::reserve(scratch.gated, rows, d.num_inputs);
#pragma omp parallel num_threads(num_threads)
    {
      const TileScope tiles;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(attention + r * o.num_inputs, o.num_inputs, input + r * o.num_inputs);
      linear({input, rows, o.num_inputs}, o, x, dim);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        rms_norm_row(x + r * dim, residual + r * dim, norm->weight, normed + r * dim, dim, norm->eps);
      gated_linear({normed, rows, dim}, gu, gated, d.num_inputs);
      linear({gated, rows, d.num_inputs}, d, x, dim);
    }
    attention += rows * o.num_inputs;
    residual += rows * dim;
    x += rows * dim;
    num_rows -= rows;
  }
}

// The whole layer: x[rows, dim] to out[rows, dim]. `problem` lacks q and out; the new keys and values go to its slots.
// Without a residual, x becomes it.
void lenvm_decoder_layer(bf16* x, bf16* residual, bf16* out, int64_t num_rows, const Layer* layer,
                         const Rotation* rotation, const Problem* problem, const int64_t* slots, AttentionKernel attend,
                         int32_t num_threads) {
  static thread_local Scratch scratch;
  const int64_t width = layer->qkv.num_outputs, q_width = problem->num_heads * problem->qk_dim;
  const int64_t kv_width = problem->num_kv_heads * problem->qk_dim;
  bf16* qkv = Scratch::reserve(scratch.input, num_rows, width);
  bf16* attended = Scratch::reserve(scratch.gated, num_rows, q_width);
  lenvm_project_qkv(x, residual, qkv, num_rows, &layer->norm, &layer->qkv, rotation, num_threads);
  bf16* keys = static_cast<bf16*>(const_cast<void*>(problem->k));
  bf16* values = static_cast<bf16*>(const_cast<void*>(problem->v));
  for (int64_t r = 0; r < num_rows; ++r) {
    const bf16* row = qkv + r * width + q_width;
    std::copy_n(row, kv_width, keys + slots[r] * problem->k_stride);
    std::copy_n(row + kv_width, kv_width, values + slots[r] * problem->v_stride);
  }
  Problem own = *problem;
  own.q = qkv;
  own.q_stride = width;
  own.out = attended;
  own.out_stride = q_width;
  attend(&own, true, num_threads);
  lenvm_project_and_mlp(attended, residual ? residual : x, out, num_rows, &layer->output,
                        &layer->mlp_norm, &layer->gate_up, &layer->down, num_threads);
}
#endif
}
