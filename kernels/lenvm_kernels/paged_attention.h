// The problem that the kernel of paged_attention.cpp solves; mirrored by `Problem` in paged_attention_cpp.py.
#pragma once
#include <algorithm>
#include <cstdint>

constexpr int64_t kPad = 16;  // rows of Q, K and V are padded to this many 32-bit elements

struct Problem {
  const void *q, *k, *v, *k_new, *v_new;  // k_new, v_new: null unless the rows are candidates
  void* out;
  const int32_t* req_to_token;
  const int64_t *req_pool_indices, *kv_lens, *q_starts;
  int64_t num_reqs, num_heads, num_kv_heads, qk_dim, v_dim;
  int64_t req_stride, q_stride, out_stride, k_stride, v_stride, k_new_stride, v_new_stride;  // in elements
  int64_t window;  // keys before the query's own; negative: no limit
  float scale, logit_cap;
  int32_t causal;

  int64_t v_pad() const { return (v_dim + kPad - 1) / kPad * kPad; }
  int64_t group() const { return num_heads / num_kv_heads; }
  // whether query `i` of a request brings a key of its own
  bool has_new_key(int64_t i) const { return k_new && i > 0; }
  // position of query `i` of request `r` among its keys
  int64_t position(int64_t r, int64_t i) const {
    return k_new ? kv_lens[r] - !has_new_key(i) : kv_lens[r] - (q_starts[r + 1] - q_starts[r]) + i;
  }
  int64_t first_key(int64_t position) const { return window < 0 ? 0 : std::max<int64_t>(0, position - window); }
  int64_t last_key(int64_t r, int64_t position) const { return causal ? position + 1 : kv_lens[r]; }
};
