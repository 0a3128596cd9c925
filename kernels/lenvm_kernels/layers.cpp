// The elementwise parts of a decoder layer on CPUs, each one pass over its rows.
//
// Rows are handled whole by one thread each: a row's result depends on that row alone.
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include "layer_rows.h"

namespace {

constexpr int64_t kRowsForThreads = 4;  // fewer rows are not worth waking the other threads

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
    rms_norm_row(x + r * x_stride, residual ? residual + r * residual_stride : nullptr, weight, out + r * dim, dim, eps);
  });
}

template <class T>
void silu_and_mul(const T* x, T* out, int64_t num_rows, int64_t dim, int64_t x_stride, int32_t num_threads) {
  for_rows(num_rows, num_threads,
           [=](int64_t r) { silu_and_mul_row(x + r * x_stride, x + r * x_stride + dim, out + r * dim, dim); });
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

// Rows of `num_bytes` to the slots of a buffer; strides in bytes.
void lenvm_store_rows(const char* rows, char* buffer, const int64_t* slots, int64_t num_rows, int64_t num_bytes,
                      int64_t row_stride, int64_t slot_stride) {
  for (int64_t r = 0; r < num_rows; ++r)
    std::memcpy(buffer + slots[r] * slot_stride, rows + r * row_stride, num_bytes);
}

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
