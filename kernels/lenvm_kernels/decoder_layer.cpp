// A linear layer on CPUs with AVX-512, bf16, and a decoder layer: in one call, or in two around its attention:
//   RMS norm, query-key-value projection, rotary embedding;
//   output projection, RMS norm, gated MLP.
// Each half is one parallel region: between its parts the threads meet at a barrier, where separate operators would
// return to Python. At the few rows of a decode step that is what costs most after reading the weights.
//
// A row's result does not depend on the other rows or on the number of threads. Roundings to bf16 are those of the
// separate operators. Weights lie packed as packed_product.h wants them.
//
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include "packed_product.h"
#include "paged_attention.h"

#if defined(LENVM_PRODUCTS)
namespace {

constexpr int64_t kRowsOfScratch = 2048;  // a prefill's intermediate rows take no more memory than these

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

struct Scratch {
  std::vector<bf16> normed, gated, input;
  std::vector<float> buffer;

  // Rows beyond the last are read, and their products dropped.
  template <class Product>
  static bf16* reserve(std::vector<bf16>& rows, int64_t num_rows, int64_t width) {
    const size_t size = static_cast<size_t>(round_up(num_rows, Product::kRowsAtOnce) * width);
    if (rows.size() < size) rows.resize(size);
    return rows.data();
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
  const void *weight, *bias, *scales, *sums;
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

int32_t lenvm_decoder_layer_runs_here() { return products_run_here(); }

int32_t lenvm_decoder_layer_runs_in_int8() {
#if defined(LENVM_BYTES)
  return 1;
#else
  return 0;
#endif
}
}

#if defined(LENVM_PRODUCTS)
namespace {

Linear as_linear(const Projection& p) {
  return {p.weight, static_cast<const bf16*>(p.bias), static_cast<const float*>(p.scales),
          static_cast<const int32_t*>(p.sums), p.num_inputs, p.num_outputs};
}

// Calls `run` with the product of a weight.
template <class Run>
void with_product([[maybe_unused]] const Projection& projection, Run run) {
#if defined(LENVM_BYTES)
  if (projection.scales) return run(Bytes{});
#endif
  run(Exact{});
}

// out[rows, outputs / 2] = silu(gate) * up, where the weight's blocks hold 16 columns of each
template <class Product>
void gated_linear(const Matrix& x, const Linear& w, float* buffer, bf16* out, int64_t stride) {
  linear<Product>(x, w, buffer, [&](const float* c, int64_t row, int64_t column) {
    const __m512 gate = rounded(_mm512_load_ps(c)), up = rounded(_mm512_load_ps(c + Product::kRight));
    const __m512 silu = rounded(gate / (1.0f + exp_clamped(-gate)));
    store_bf16(silu * up, out + row * stride + column / 2);
  });
}

template <class Product>
void run_linear(const bf16* x, bf16* out, int64_t num_rows, const Linear& w, int32_t num_threads) {
  static thread_local Scratch scratch;
  for (int64_t begin = 0; begin < num_rows; begin += kRowsOfScratch) {
    const int64_t rows = std::min(num_rows - begin, kRowsOfScratch);
    bf16* input = Scratch::reserve<Product>(scratch.input, rows, w.num_inputs);
    float* buffer = reserve_inputs<Product>(scratch.buffer, rows, w.num_inputs);
    std::copy_n(x + begin * w.num_inputs, rows * w.num_inputs, input);
#pragma omp parallel num_threads(num_threads)
    {
      const TileScope tiles;
      linear<Product>({input, rows, w.num_inputs}, w, buffer, out + begin * w.num_outputs);
    }
  }
}

template <class Product>
void project_qkv(const bf16* x, bf16* residual, bf16* qkv, int64_t num_rows, const Norm& norm, const Linear& w,
                 const Rotation& rotation, int32_t num_threads) {
  static thread_local Scratch scratch;
  const int64_t dim = w.num_inputs, half = rotation.rotary_dim / 2, width = rotation.head_dim;
  for (int64_t begin = 0; begin < num_rows; begin += kRowsOfScratch) {
    const int64_t rows = std::min(num_rows - begin, kRowsOfScratch);
    const bf16* in = x + begin * dim;
    bf16* sum = residual ? residual + begin * dim : nullptr;
    bf16* out = qkv + begin * w.num_outputs;
    bf16* normed = Scratch::reserve<Product>(scratch.normed, rows, dim);
    float* buffer = reserve_inputs<Product>(scratch.buffer, rows, dim);
#pragma omp parallel num_threads(num_threads)
    {
      const TileScope tiles;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        rms_norm_row(in + r * dim, sum ? sum + r * dim : nullptr, norm.weight, normed + r * dim, dim, norm.eps);
      linear<Product>({normed, rows, dim}, w, buffer, out);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        const bf16* cos = rotation.cos_sin + rotation.positions[begin + r] * rotation.rotary_dim;
        rotate_row(out + r * w.num_outputs, rotation.num_heads + rotation.num_kv_heads, width, cos, cos + half, half);
      }
    }
  }
}

template <class Product>
void project_and_mlp(const bf16* attention, bf16* residual, bf16* x, int64_t num_rows, const Linear& o,
                     const Norm& norm, const Linear& gate_up, const Linear& down, int32_t num_threads) {
  static thread_local Scratch scratch;
  const int64_t dim = o.num_outputs;
  while (num_rows > 0) {
    const int64_t rows = std::min(num_rows, kRowsOfScratch);
    bf16* input = Scratch::reserve<Product>(scratch.input, rows, o.num_inputs);
    bf16* normed = Scratch::reserve<Product>(scratch.normed, rows, dim);
    bf16* gated = Scratch::reserve<Product>(scratch.gated, rows, down.num_inputs);
    const int64_t widest = std::max({dim, o.num_inputs, down.num_inputs});
    float* buffer = reserve_inputs<Product>(scratch.buffer, rows, widest);
#pragma omp parallel num_threads(num_threads)
    {
      const TileScope tiles;
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        std::copy_n(attention + r * o.num_inputs, o.num_inputs, input + r * o.num_inputs);
      linear<Product>({input, rows, o.num_inputs}, o, buffer, x);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r)
        rms_norm_row(x + r * dim, residual + r * dim, norm.weight, normed + r * dim, dim, norm.eps);
      gated_linear<Product>({normed, rows, dim}, gate_up, buffer, gated, down.num_inputs);
      linear<Product>({gated, rows, down.num_inputs}, down, buffer, x);
    }
    attention += rows * o.num_inputs;
    residual += rows * dim;
    x += rows * dim;
    num_rows -= rows;
  }
}

}  // namespace

extern "C" {

// out[rows, outputs] from x[rows, inputs].
void lenvm_linear(const bf16* x, bf16* out, int64_t num_rows, const Projection* projection, int32_t num_threads) {
  with_product(*projection, [&](auto product) {
    run_linear<decltype(product)>(x, out, num_rows, as_linear(*projection), num_threads);
  });
}

// qkv[rows, heads] from x[rows, dim]; residual (or null) becomes residual + x.
void lenvm_project_qkv(const bf16* x, bf16* residual, bf16* qkv, int64_t num_rows, const Norm* norm,
                       const Projection* projection, const Rotation* rotation, int32_t num_threads) {
  with_product(*projection, [&](auto product) {
    project_qkv<decltype(product)>(x, residual, qkv, num_rows, *norm, as_linear(*projection), *rotation, num_threads);
  });
}

// x[rows, dim] from the attention's output[rows, heads]; residual becomes residual + projected attention.
void lenvm_project_and_mlp(const bf16* attention, bf16* residual, bf16* x, int64_t num_rows, const Projection* output,
                           const Norm* norm, const Projection* gate_up, const Projection* down, int32_t num_threads) {
  with_product(*output, [&](auto product) {
    project_and_mlp<decltype(product)>(attention, residual, x, num_rows, as_linear(*output), *norm,
                                       as_linear(*gate_up), as_linear(*down), num_threads);
  });
}

// The whole layer: x[rows, dim] to out[rows, dim]. `problem` lacks q and out; the new keys and values go to its slots.
// Without a residual, x becomes it.
void lenvm_decoder_layer(bf16* x, bf16* residual, bf16* out, int64_t num_rows, const Layer* layer,
                         const Rotation* rotation, const Problem* problem, const int64_t* slots, AttentionKernel attend,
                         int32_t num_threads) {
  static thread_local Scratch scratch;
  const int64_t width = layer->qkv.num_outputs, q_width = problem->num_heads * problem->qk_dim;
  const int64_t kv_width = problem->num_kv_heads * problem->qk_dim;
  bf16* qkv = Scratch::reserve<Exact>(scratch.input, num_rows, width);
  bf16* attended = Scratch::reserve<Exact>(scratch.gated, num_rows, q_width);
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
}
#endif
