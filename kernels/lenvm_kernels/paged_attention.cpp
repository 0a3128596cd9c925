// Attention over a paged KV cache on CPUs: decode and extend with one algorithm.
//
// A work item is (request, block of queries, split of the keys, range of KV heads). It walks its keys in
// blocks of 64 tokens; a block of K is transposed so that tokens lie in vector lanes, which makes the scores
// of all query heads of a group plain multiply-adds without horizontal sums, and V is widened to fp32 once
// for all of them. So every byte of K and V is read once per block of queries. The softmax is online, in fp32.
//
// The split of the keys depends on the request's own lengths only: a row's result does not depend on its
// neighbours in the batch or on the number of threads.
//
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileVectors = 4, kTileRows = 6;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileVectors = 2, kTileRows = 4;
#else
constexpr int kLanes = 4, kTileVectors = 2, kTileRows = 4;
#endif
constexpr int kBlock = 64;            // tokens of K and V handled at once
constexpr int64_t kSplit = 256;       // keys of one split
constexpr int64_t kTargetRows = 64;   // query rows (queries x heads of a group) of one item
constexpr int64_t kPad = 16;          // V rows are padded to this many floats
constexpr float kMasked = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;

typedef float vf __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint16_t bf16;

#if defined(__AVX512BF16__)
constexpr bool kPairDot = true;  // bf16 pairs are multiplied without widening
#else
constexpr bool kPairDot = false;
#endif

inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
inline void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
inline vf splat(float x) { return vf{} + x; }

inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(float x) { return x; }

inline vf widen_vector(const bf16* p) {
  vi wide = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vi) << 16;
  return reinterpret_cast<vf&>(wide);
}
inline vf widen_vector(const float* p) { return load(p); }

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0, relative error below 2e-7; zero below 2^-126.
inline vf exp2_vector(vf x) {
  x = x < -126.0f ? splat(-127.0f) : x;
  const vf magic = splat(12582912.0f);
  vf shifted = x + magic;
  vf f = x - (shifted - magic);  // [-0.5, 0.5]
  vf p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  vi exponent = (reinterpret_cast<vi&>(shifted) - reinterpret_cast<const vi&>(magic) + 127) << 23;
  return p * reinterpret_cast<vf&>(exponent);
}

inline vf tanh_vector(vf x) {  // through 2^-2|x|log2e
  vf magnitude = x < 0.0f ? -x : x;
  vf e = exp2_vector(magnitude * (-2.0f * kLog2e));
  vf t = (1.0f - e) / (1.0f + e);
  return x < 0.0f ? -t : t;
}

inline float reduce_max(vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = std::max(m, v[i]);
  return m;
}
inline float reduce_sum(vf v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}

struct Problem {
  const void *q, *k, *v;
  void* out;
  const int32_t* req_to_token;
  const int64_t *req_pool_indices, *kv_lens, *q_starts;
  int64_t num_reqs, num_heads, num_kv_heads, qk_dim, v_dim;
  int64_t req_stride, q_stride, out_stride, k_stride, v_stride;  // in elements
  int64_t window;                                                // keys before the query's own; negative: no limit
  float scale, logit_cap;
  int32_t causal;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t v_pad() const { return (v_dim + kPad - 1) / kPad * kPad; }
  // position of query `i` of request `r` among its keys
  int64_t position(int64_t r, int64_t i) const { return kv_lens[r] - (q_starts[r + 1] - q_starts[r]) + i; }
  int64_t first_key(int64_t position) const { return window < 0 ? 0 : std::max<int64_t>(0, position - window); }
  int64_t last_key(int64_t r, int64_t position) const { return causal ? position + 1 : kv_lens[r]; }
};

struct Item {
  int64_t req, q_begin, q_end;    // queries, relative to the request's first new token
  int64_t kv_begin, kv_end;       // keys of this item
  int64_t head_begin, head_end;   // KV heads
  int64_t partial;                // row of the partial results of this split; -1: the only split
};

struct Merge {  // one query whose keys were split
  int64_t token, partial, num_splits;
};

struct Partials {  // per row (split, query head): max, sum, unnormalised output
  std::vector<float> max, sum, out;
};

// ---- packing ------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// 16 rows of 16 dwords -> 16 columns; `out` rows are kBlock dwords apart.
inline void transpose_16x16(const __m512i* rows, uint32_t* out, int num_columns) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
  }
  __m512i columns[16];
  for (int i = 0; i < 4; ++i) {
    columns[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
    columns[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
    columns[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
    columns[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
  }
  for (int c = 0; c < num_columns; ++c) _mm512_storeu_si512(out + c * kBlock, columns[c]);
}
#endif

// rows: kBlock pointers to num_dwords dwords each -> out[num_dwords][kBlock]
inline void transpose_dwords(const uint32_t* const* rows, int64_t num_dwords, uint32_t* out) {
#if defined(__AVX512F__)
  for (int t = 0; t < kBlock; t += 16) {
    for (int64_t d = 0; d < num_dwords; d += 16) {
      int width = static_cast<int>(std::min<int64_t>(16, num_dwords - d));
      __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = _mm512_maskz_loadu_epi32(mask, rows[t + i] + d);
      transpose_16x16(block, out + d * kBlock + t, width);
    }
  }
#else
  for (int64_t d = 0; d < num_dwords; ++d)
    for (int t = 0; t < kBlock; ++t) std::memcpy(out + d * kBlock + t, rows[t] + d, 4);
#endif
}

template <class T>
inline void widen_row(const T* in, int64_t n, int64_t padded, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(out + d, widen_vector(in + d));
  for (; d < n; ++d) out[d] = widen(in[d]);
  for (; d < padded; ++d) out[d] = 0;
}

// How a row of Q or K becomes dwords that dot_tile multiplies.
template <class T>
struct DotFormat {
  static constexpr bool pairs = false;
  static int64_t num_dwords(int64_t dim) { return dim; }
};
template <>
struct DotFormat<bf16> {
  static constexpr bool pairs = kPairDot;
  static int64_t num_dwords(int64_t dim) { return kPairDot ? dim / 2 : dim; }
};

template <class T>
inline void pack_query(const T* in, int64_t dim, uint32_t* out) {
  if constexpr (DotFormat<T>::pairs)
    std::memcpy(out, in, dim * sizeof(T));
  else
    widen_row(in, dim, dim, reinterpret_cast<float*>(out));
}

template <class T>
inline void pack_keys(const T* const* rows, int64_t dim, float* widened, uint32_t* out) {
  const uint32_t* dwords[kBlock];
  constexpr bool raw = DotFormat<T>::pairs || sizeof(T) == 4;
  for (int t = 0; t < kBlock; ++t) {
    if constexpr (raw) {
      dwords[t] = reinterpret_cast<const uint32_t*>(rows[t]);
    } else {
      widen_row(rows[t], dim, dim, widened + t * dim);
      dwords[t] = reinterpret_cast<const uint32_t*>(widened + t * dim);
    }
  }
  transpose_dwords(dwords, DotFormat<T>::num_dwords(dim), out);
}

// ---- the two products -----------------------------------------------------------------------------------

template <class T>
inline vf multiply_add(uint32_t q, const uint32_t* k, vf acc) {
#if defined(__AVX512BF16__)
  if constexpr (DotFormat<T>::pairs)
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                 reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(q))),
                                                 reinterpret_cast<__m512bh>(_mm512_loadu_si512(k))));
#endif
  float x;
  std::memcpy(&x, &q, 4);
  return acc + x * load(reinterpret_cast<const float*>(k));
}

// scores[r][t] = q[r] . k[t] for R rows and all kBlock tokens
template <class T, int R>
void dot_tile(const uint32_t* q, int64_t num_dwords, const uint32_t* k, float* scores) {
  for (int t = 0; t < kBlock; t += kTileVectors * kLanes) {
    vf acc[R][kTileVectors] = {};
    for (int64_t d = 0; d < num_dwords; ++d)
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kTileVectors; ++i)
          acc[r][i] = multiply_add<T>(q[r * num_dwords + d], k + d * kBlock + t + i * kLanes, acc[r][i]);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kTileVectors; ++i) store(scores + r * kBlock + t + i * kLanes, acc[r][i]);
  }
}

// out[r] = out[r] * rescale[r] + sum_t weights[r][t] * v[t], for R rows and columns [d, d + N * kLanes)
template <int R, int N>
inline void accumulate_columns(const float* weights, int num_tokens, const float* v, int64_t v_pad, int64_t d,
                               const float* rescale, float* out) {
  vf acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) acc[r][i] = load(out + r * v_pad + d + i * kLanes) * rescale[r];
  for (int t = 0; t < num_tokens; ++t)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) acc[r][i] += weights[r * kBlock + t] * load(v + t * v_pad + d + i * kLanes);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) store(out + r * v_pad + d + i * kLanes, acc[r][i]);
}

template <int R>
void accumulate_tile(const float* weights, int num_tokens, const float* v, int64_t v_pad, const float* rescale,
                     float* out) {
  int64_t d = 0;
  for (; d + kTileVectors * kLanes <= v_pad; d += kTileVectors * kLanes)
    accumulate_columns<R, kTileVectors>(weights, num_tokens, v, v_pad, d, rescale, out);
  for (; d < v_pad; d += kLanes) accumulate_columns<R, 1>(weights, num_tokens, v, v_pad, d, rescale, out);
}

// Calls f with std::integral_constant<int, R> for tiles of at most kTileRows rows.
template <int R = kTileRows, class F>
inline void for_tiles(int64_t row, int64_t num_rows, F f) {
  for (; row + R <= num_rows; row += R) f(row, std::integral_constant<int, R>());
  if constexpr (R > 1) for_tiles<R - 1>(row, num_rows, f);
}

// ---- one work item ---------------------------------------------------------------------------------------

struct Rows {  // the state of the online softmax of one KV head
  std::vector<uint32_t> q;
  std::vector<float> max, sum, out;

  void reset(int64_t num_rows, int64_t num_dwords, int64_t v_pad) {
    q.resize(num_rows * num_dwords);
    max.assign(num_rows, kMasked);
    sum.assign(num_rows, 0.0f);
    out.assign(num_rows * v_pad, 0.0f);
  }
};

struct Scratch {  // reused by one thread
  std::vector<Rows> heads;
  std::vector<uint32_t> k;
  std::vector<float> k_wide, v, scores, rescale;
  std::vector<int64_t> first, last;  // keys each row sees, [first, last)
};

// scores -> weights 2^(score - max) of one row, updating max and sum; returns what old results are scaled by
inline float soften_row(const Problem& p, float* scores, int64_t first, int64_t last, float& max, float& sum) {
  const bool partial = first > 0 || last < kBlock;
  vf best = splat(kMasked);
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int t = 0; t < kBlock; t += kLanes) {
    vf s = load(scores + t) * p.scale;
    if (p.logit_cap > 0) s = tanh_vector(s / p.logit_cap) * p.logit_cap;
    s *= kLog2e;
    if (partial) {
      vi index = lane + t;
      s = (index >= static_cast<int32_t>(first)) & (index < static_cast<int32_t>(last)) ? s : splat(kMasked);
    }
    store(scores + t, s);
    best = s > best ? s : best;
  }
  float new_max = std::max(max, reduce_max(best));
  vf total = {};
  for (int t = 0; t < kBlock; t += kLanes) {
    vf s = load(scores + t);
    vf weight = s <= kMasked ? splat(0.0f) : exp2_vector(s - new_max);
    store(scores + t, weight);
    total += weight;
  }
  vf shrink = exp2_vector(splat(max - new_max));
  max = new_max;
  sum = sum * shrink[0] + reduce_sum(total);
  return shrink[0];
}

template <class T>
void begin_rows(const Problem& p, const Item& item, Scratch& s) {
  const int64_t group = p.group(), num_dwords = DotFormat<T>::num_dwords(p.qk_dim);
  const int64_t num_rows = (item.q_end - item.q_begin) * group;
  if (static_cast<int64_t>(s.heads.size()) < item.head_end - item.head_begin)
    s.heads.resize(item.head_end - item.head_begin);
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    Rows& rows = s.heads[head - item.head_begin];
    rows.reset(num_rows, num_dwords, p.v_pad());
    for (int64_t r = 0; r < num_rows; ++r) {
      int64_t token = p.q_starts[item.req] + item.q_begin + r / group;
      const T* q = static_cast<const T*>(p.q) + token * p.q_stride + (head * group + r % group) * p.qk_dim;
      pack_query(q, p.qk_dim, rows.q.data() + r * num_dwords);
    }
  }
  s.first.resize(num_rows);
  s.last.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    int64_t position = p.position(item.req, item.q_begin + r / group);
    s.first[r] = p.first_key(position);
    s.last[r] = p.last_key(item.req, position);
  }
  s.k.resize(num_dwords * kBlock);
  s.k_wide.resize(kBlock * p.qk_dim);
  s.v.resize(kBlock * p.v_pad());
  s.scores.resize(num_rows * kBlock);
  s.rescale.resize(num_rows);
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// One block of keys [begin, begin + num_tokens) for one KV head.
template <class T>
void attend_block(const Problem& p, const int32_t* slots, int64_t begin, int num_tokens, int num_ahead, int64_t head,
                  Rows& rows, Scratch& s) {
  const int64_t num_dwords = DotFormat<T>::num_dwords(p.qk_dim), v_pad = p.v_pad();
  const T* k = static_cast<const T*>(p.k) + head * p.qk_dim;
  const T* v = static_cast<const T*>(p.v) + head * p.v_dim;
  const T* k_rows[kBlock];
  for (int t = 0; t < kBlock; ++t) {  // beyond the end: the last token again, its weight is zero
    k_rows[t] = k + slots[begin + std::min(t, num_tokens - 1)] * p.k_stride;
    if (t < num_ahead) {
      prefetch_row(k + slots[begin + kBlock + t] * p.k_stride, p.qk_dim * sizeof(T));
      prefetch_row(v + slots[begin + kBlock + t] * p.v_stride, p.v_dim * sizeof(T));
    }
  }
  pack_keys(k_rows, p.qk_dim, s.k_wide.data(), s.k.data());
  for (int t = 0; t < num_tokens; ++t)
    widen_row(v + slots[begin + t] * p.v_stride, p.v_dim, v_pad, s.v.data() + t * v_pad);

  const int64_t num_rows = static_cast<int64_t>(rows.max.size());
  for_tiles(0, num_rows, [&](int64_t r, auto size) {
    dot_tile<T, size>(rows.q.data() + r * num_dwords, num_dwords, s.k.data(), s.scores.data() + r * kBlock);
  });
  for (int64_t r = 0; r < num_rows; ++r) {
    int64_t last = std::min<int64_t>(s.last[r] - begin, num_tokens);
    s.rescale[r] = soften_row(p, s.scores.data() + r * kBlock, s.first[r] - begin, last, rows.max[r], rows.sum[r]);
  }
  for_tiles(0, num_rows, [&](int64_t r, auto size) {
    accumulate_tile<size>(s.scores.data() + r * kBlock, num_tokens, s.v.data(), v_pad, s.rescale.data() + r,
                          rows.out.data() + r * v_pad);
  });
}

template <class T>
void write_row(const Problem& p, int64_t token, int64_t head, const float* row, float sum) {
  T* out = static_cast<T*>(p.out) + token * p.out_stride + head * p.v_dim;
  float inverse = sum == 0 ? 0.0f : 1.0f / sum;  // no keys: zeros
  for (int64_t d = 0; d < p.v_dim; ++d) narrow(row[d] * inverse, out + d);
}

template <class T>
void finish_rows(const Problem& p, const Item& item, const Scratch& s, Partials& partials) {
  const int64_t group = p.group(), v_pad = p.v_pad();
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    const Rows& rows = s.heads[head - item.head_begin];
    for (size_t r = 0; r < rows.max.size(); ++r) {
      int64_t query = static_cast<int64_t>(r) / group, q_head = head * group + static_cast<int64_t>(r) % group;
      if (item.partial < 0) {
        write_row<T>(p, p.q_starts[item.req] + item.q_begin + query, q_head, rows.out.data() + r * v_pad, rows.sum[r]);
        continue;
      }
      int64_t row = (item.partial + query) * p.num_heads + q_head;
      partials.max[row] = rows.max[r];
      partials.sum[row] = rows.sum[r];
      std::copy_n(rows.out.data() + r * v_pad, v_pad, partials.out.data() + row * v_pad);
    }
  }
}

template <class T>
void run_item(const Problem& p, const Item& item, Scratch& s, Partials& partials) {
  const int32_t* slots = p.req_to_token + p.req_pool_indices[item.req] * p.req_stride;
  begin_rows<T>(p, item, s);
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kBlock) {
    int num_tokens = static_cast<int>(std::min<int64_t>(kBlock, item.kv_end - begin));
    int num_ahead = static_cast<int>(std::clamp<int64_t>(item.kv_end - begin - kBlock, 0, kBlock));
    for (int64_t head = item.head_begin; head < item.head_end; ++head)
      attend_block<T>(p, slots, begin, num_tokens, num_ahead, head, s.heads[head - item.head_begin], s);
  }
  finish_rows<T>(p, item, s, partials);
}

template <class T>
void merge_splits(const Problem& p, const Merge& merge, const Partials& partials, int64_t queries_per_split) {
  const int64_t v_pad = p.v_pad();
  std::vector<float> total(v_pad);
  for (int64_t head = 0; head < p.num_heads; ++head) {
    auto row = [&](int64_t i) { return (merge.partial + i * queries_per_split) * p.num_heads + head; };
    float max = kMasked, sum = 0;
    for (int64_t i = 0; i < merge.num_splits; ++i) max = std::max(max, partials.max[row(i)]);
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t i = 0; i < merge.num_splits; ++i) {
      float weight = exp2_vector(splat(partials.max[row(i)] - max))[0];
      sum += partials.sum[row(i)] * weight;
      for (int64_t d = 0; d < v_pad; ++d) total[d] += partials.out[row(i) * v_pad + d] * weight;
    }
    write_row<T>(p, merge.token, head, total.data(), sum);
  }
}

// ---- the plan -----------------------------------------------------------------------------------------------

struct Plan {
  std::vector<Item> items;
  std::vector<Merge> merges;
  std::vector<int64_t> merge_strides;
  int64_t num_partials = 0;

  void add(const Item& item, int64_t num_kv_heads, int64_t heads_per_item) {
    for (int64_t head = 0; head < num_kv_heads; head += heads_per_item) {
      items.push_back(item);
      items.back().head_begin = head;
      items.back().head_end = std::min(num_kv_heads, head + heads_per_item);
    }
  }
};

void plan_request(const Problem& p, int64_t req, int64_t heads_per_item, Plan& plan) {
  const int64_t num_queries = p.q_starts[req + 1] - p.q_starts[req];
  const int64_t block = std::max<int64_t>(1, kTargetRows / p.group());
  for (int64_t q = 0; q < num_queries; q += block) {
    int64_t q_end = std::min(num_queries, q + block);
    int64_t kv_begin = p.first_key(p.position(req, q)) / kBlock * kBlock;
    int64_t kv_end = p.last_key(req, p.position(req, q_end - 1));
    bool split = num_queries <= block && kv_end - kv_begin > kSplit;
    Item item{req, q, q_end, kv_begin, kv_end, 0, 0, -1};
    if (!split) {
      plan.add(item, p.num_kv_heads, num_queries == 1 ? heads_per_item : 1);
      continue;
    }
    int64_t first_partial = plan.num_partials;
    for (; item.kv_begin < kv_end; item.kv_begin += kSplit) {
      item.kv_end = std::min(kv_end, item.kv_begin + kSplit);
      item.partial = plan.num_partials;
      plan.num_partials += num_queries;
      plan.add(item, p.num_kv_heads, heads_per_item);
    }
    for (int64_t i = 0; i < num_queries; ++i) {
      plan.merges.push_back({p.q_starts[req] + i, first_partial + i, (plan.num_partials - first_partial) / num_queries});
      plan.merge_strides.push_back(num_queries);
    }
  }
}

Plan make_plan(const Problem& p, int num_threads) {
  Plan plan;
  // few requests: spread the heads over the threads; many: all heads of a token together
  int64_t heads_per_item = p.num_reqs < 2 * num_threads ? 1 : p.num_kv_heads;
  for (int64_t req = 0; req < p.num_reqs; ++req) plan_request(p, req, heads_per_item, plan);
  return plan;
}

template <class T>
void run(const Problem& p, int num_threads) {
  const Plan plan = make_plan(p, num_threads);
  Partials partials;
  partials.max.resize(plan.num_partials * p.num_heads);
  partials.sum.resize(plan.num_partials * p.num_heads);
  partials.out.resize(plan.num_partials * p.num_heads * p.v_pad());
  const int64_t num_items = static_cast<int64_t>(plan.items.size());
  const int64_t num_merges = static_cast<int64_t>(plan.merges.size());
#pragma omp parallel num_threads(num_threads) if (num_items > 1)
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; ++i) run_item<T>(p, plan.items[i], scratch, partials);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < num_merges; ++i) merge_splits<T>(p, plan.merges[i], partials, plan.merge_strides[i]);
  }
}

}  // namespace

extern "C" void lenvm_paged_attention(const Problem* problem, int32_t is_bf16, int32_t num_threads) {
  if (is_bf16)
    run<bf16>(*problem, num_threads);
  else
    run<float>(*problem, num_threads);
}
