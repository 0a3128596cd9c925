// The elementwise parts of a decoder layer on CPUs, each one pass over its rows: RMS norm (with the residual sum),
// SiLU gate, rotary embedding. Roundings to bf16 are those of the torch expressions that they replace.
//
// Rows are handled whole by one thread each: a row's result depends on that row alone.
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t bf16;
constexpr int64_t kRowsForThreads = 4;  // fewer rows are not worth waking the other threads

inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(float x) { return x; }

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class T>
inline float rounded(float x) {
  T narrowed;
  narrow(x, &narrowed);
  return widen(narrowed);
}

// exp(x) with a relative error below 2e-7 for |x| <= 87, clamped beyond.
inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : (x > 87.0f ? 87.0f : x);
  const float magic = 12582912.0f;
  float scaled = x * 1.44269504f;
  float shifted = scaled + magic;
  float whole = shifted - magic;
  float r = x - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, 4);
  exponent = (exponent - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return p * power;
}

template <class F>
void for_rows(int64_t num_rows, int32_t num_threads, F row) {
  if (num_rows < kRowsForThreads || num_threads == 1) {
    for (int64_t r = 0; r < num_rows; ++r) row(r);
    return;
  }
#pragma omp parallel for num_threads(num_threads) schedule(static)
  for (int64_t r = 0; r < num_rows; ++r) row(r);
}

template <class T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t num_rows, int64_t dim, int64_t x_stride,
              int64_t residual_stride, float eps, int32_t num_threads) {
  for_rows(num_rows, num_threads, [=](int64_t r) {
    const T* in = x + r * x_stride;
    T* to = out + r * dim;
    T* sum = residual ? residual + r * residual_stride : nullptr;
    float squares[32] = {};
    int64_t i = 0;
    auto value = [=](int64_t at) { return sum ? widen(in[at]) + widen(sum[at]) : widen(in[at]); };
    for (; i + 32 <= dim; i += 32)
      for (int j = 0; j < 32; ++j) {
        float v = value(i + j);
        squares[j] += v * v;
      }
    float total = 0.0f;
    for (; i < dim; ++i) total += value(i) * value(i);
    for (int width = 16; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) squares[j] += squares[j + width];
    total += squares[0];
    const float inverse = 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
    if (sum)
      for (int64_t j = 0; j < dim; ++j) {
        float v = widen(in[j]) + widen(sum[j]);
        narrow(v, &sum[j]);
        narrow(v * inverse * widen(weight[j]), &to[j]);
      }
    else
      for (int64_t j = 0; j < dim; ++j) narrow(widen(in[j]) * inverse * widen(weight[j]), &to[j]);
  });
}

template <class T>
void silu_and_mul(const T* x, T* out, int64_t num_rows, int64_t dim, int64_t x_stride, int32_t num_threads) {
  for_rows(num_rows, num_threads, [=](int64_t r) {
    const T *gate = x + r * x_stride, *up = gate + dim;
    T* to = out + r * dim;
    for (int64_t j = 0; j < dim; ++j) {
      float g = widen(gate[j]);
      narrow(rounded<T>(g / (1.0f + exp_clamped(-g))) * widen(up[j]), &to[j]);
    }
  });
}

// Rotates pairs (j, j + half) of the first 2 * half elements of each head, in place.
template <class T>
void rotate_row(T* heads, int64_t num_heads, int64_t head_dim, const T* cos, const T* sin, int64_t half) {
  for (int64_t h = 0; h < num_heads; ++h) {
    T *first = heads + h * head_dim, *second = first + half;
    for (int64_t j = 0; j < half; ++j) {
      float a = widen(first[j]), b = widen(second[j]), c = widen(cos[j]), s = widen(sin[j]);
      narrow(rounded<T>(a * c) - rounded<T>(b * s), &first[j]);
      narrow(rounded<T>(b * c) + rounded<T>(a * s), &second[j]);
    }
  }
}

template <class T>
void rotate(const int64_t* positions, T* q, T* k, const T* cos_sin, int64_t num_rows, int64_t num_heads,
            int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, int64_t q_stride, int64_t k_stride,
            int32_t num_threads) {
  const int64_t half = rotary_dim / 2;
  for_rows(num_rows, num_threads, [=](int64_t r) {
    const T* cos = cos_sin + positions[r] * rotary_dim;
    rotate_row(q + r * q_stride, num_heads, head_dim, cos, cos + half, half);
    rotate_row(k + r * k_stride, num_kv_heads, head_dim, cos, cos + half, half);
  });
}

}  // namespace

extern "C" {

void lenvm_rms_norm(const void* x, void* residual, const void* weight, void* out, int64_t num_rows, int64_t dim,
                    int64_t x_stride, int64_t residual_stride, float eps, int32_t is_bf16, int32_t num_threads) {
  if (is_bf16)
    rms_norm(static_cast<const bf16*>(x), static_cast<bf16*>(residual), static_cast<const bf16*>(weight),
             static_cast<bf16*>(out), num_rows, dim, x_stride, residual_stride, eps, num_threads);
  else
    rms_norm(static_cast<const float*>(x), static_cast<float*>(residual), static_cast<const float*>(weight),
             static_cast<float*>(out), num_rows, dim, x_stride, residual_stride, eps, num_threads);
}

void lenvm_silu_and_mul(const void* x, void* out, int64_t num_rows, int64_t dim, int64_t x_stride, int32_t is_bf16,
                        int32_t num_threads) {
  if (is_bf16)
    silu_and_mul(static_cast<const bf16*>(x), static_cast<bf16*>(out), num_rows, dim, x_stride, num_threads);
  else
    silu_and_mul(static_cast<const float*>(x), static_cast<float*>(out), num_rows, dim, x_stride, num_threads);
}

void lenvm_rotate(const int64_t* positions, void* q, void* k, const void* cos_sin, int64_t num_rows,
                  int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t rotary_dim, int64_t q_stride,
                  int64_t k_stride, int32_t is_bf16, int32_t num_threads) {
  if (is_bf16)
    rotate(positions, static_cast<bf16*>(q), static_cast<bf16*>(k), static_cast<const bf16*>(cos_sin), num_rows,
           num_heads, num_kv_heads, head_dim, rotary_dim, q_stride, k_stride, num_threads);
  else
    rotate(positions, static_cast<float*>(q), static_cast<float*>(k), static_cast<const float*>(cos_sin), num_rows,
           num_heads, num_kv_heads, head_dim, rotary_dim, q_stride, k_stride, num_threads);
}
}
