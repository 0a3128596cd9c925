// One row of the elementwise parts of a decoder layer: RMS norm (with the residual sum), SiLU gate, rotary embedding.
// fp32 inside; roundings to bf16 are those of the torch expressions that they replace.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

typedef uint16_t bf16;
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

template <class T>
inline void rms_norm_row(const T* in, T* sum, const T* weight, T* to, int64_t dim, float eps) {
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
}

template <class T>
inline void silu_and_mul_row(const T* gate, const T* up, T* to, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) {
    float g = widen(gate[j]);
    narrow(rounded<T>(g / (1.0f + exp_clamped(-g))) * widen(up[j]), &to[j]);
  }
}

// Rotates pairs (j, j + half) of the first 2 * half elements of each head, in place.
template <class T>
inline void rotate_row(T* heads, int64_t num_heads, int64_t head_dim, const T* cos, const T* sin, int64_t half) {
  for (int64_t h = 0; h < num_heads; ++h) {
    T *first = heads + h * head_dim, *second = first + half;
    for (int64_t j = 0; j < half; ++j) {
      float a = widen(first[j]), b = widen(second[j]), c = widen(cos[j]), s = widen(sin[j]);
      narrow(rounded<T>(a * c) - rounded<T>(b * s), &first[j]);
      narrow(rounded<T>(b * c) + rounded<T>(a * s), &second[j]);
    }
  }
}

}  // namespace
