// Attention over a paged KV cache on CPUs: decode, extend and candidates with one algorithm.
//
// A work item is (request, block of queries, split of the keys, range of KV heads). It walks its keys in
// blocks of 64 tokens. A block of K is transposed so that tokens lie in vector lanes, which makes the scores
// of all query heads of a group plain multiply-adds without horizontal sums, and V is packed once for all of
// them: every byte of K and V is read once per block of queries. The softmax is online, in fp32.
//
// A request with one query (decode) has a path of its own where there are matrix tiles (AMX): see "one query" below.
//
// Both products are C += A B with 32-bit elements: fp32 numbers, or pairs of bf16 where the CPU multiplies
// those (AVX-512 BF16, AMX); there the softmax weights are rounded to bf16, sums stay fp32.
//
// The split of the keys and the choice of instructions depend on the request's own lengths only: a row's
// result does not depend on its neighbours in the batch or on the number of threads.
//
// Candidates (k_new set): row 0 of a request sees its cached keys, every other row those and its own new key. The
// online softmax of such a row starts from its own key instead of from nothing.
//
// Plain C interface, no torch headers: compiles in seconds and is called through ctypes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "matrix_tiles.h"
#include "paged_attention.h"

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
constexpr int kBlock = 64;           // tokens of K and V handled at once
constexpr int kStep = 32;            // a last block is rounded up to this many tokens
constexpr int64_t kSplit = 512;      // keys of one split
constexpr int64_t kTargetRows = 192; // query rows (queries x heads of a group) of one item
constexpr int64_t kStripRows = 16;   // of these, the scores of so many are computed at once
constexpr int64_t kMatrixRows = 8;   // from this many rows on, AMX is used
constexpr float kMasked = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;

typedef float vf __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint16_t bf16;

#if defined(__AVX512BF16__)
constexpr bool kPairDot = true;
#else
constexpr bool kPairDot = false;
#endif

// Cache-line aligned storage: a tile row that crosses a line costs two loads.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

// Whether values of type T are multiplied as pairs of bf16, else as fp32; and how many 32-bit elements they make.
template <class T>
constexpr bool kPairs = kPairDot && sizeof(T) == 2;
template <class T>
constexpr int64_t num_elements(int64_t n) {
  return kPairs<T> ? n / 2 : n;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
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

inline vi widen_bits(const bf16* p) { return __builtin_convertvector(*reinterpret_cast<const vh*>(p), vi); }
inline vf widen_vector(const bf16* p) {
  vi wide = widen_bits(p) << 16;
  return reinterpret_cast<vf&>(wide);
}
inline vf widen_vector(const float* p) { return load(p); }

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(float x, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *out = x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0, zero below 2^-126. Relative error below 2e-7, or 1.1e-4 if the result is rounded to bf16 anyway.
template <class Rounded = float>
inline vf exp2_vector(vf x) {
  x = x < -126.0f ? splat(-127.0f) : x;
  const vf magic = splat(12582912.0f);
  vf shifted = x + magic;
  vf f = x - (shifted - magic);  // [-0.5, 0.5]
  vf p;
  if constexpr (sizeof(Rounded) == 2) {
    p = splat(5.5171630e-2f);
    p = p * f + 2.4261112e-1f;
    p = p * f + 6.9326098e-1f;
    p = p * f + 9.9992807e-1f;
  } else {
    p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
  }
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
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = std::max(m, v[i]);
  return m;
#endif
}
inline float reduce_sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
#endif
}

struct Item {
  int64_t req, q_begin, q_end;    // queries, relative to the request's first new token
  int64_t kv_begin, kv_end;       // keys of this item
  int64_t head_begin, head_end;   // KV heads
  int64_t partial;                // row of the partial results of this split; -1: the only split
  bool first_split;
};

struct Merge {  // one query whose keys were split
  int64_t token, partial, num_splits;
};

struct Partials {  // per row (split, query head): max, sum, unnormalised output
  std::vector<float> max, sum, out;
};

// ---- packing ------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// 16 rows of 16 dwords -> 16 columns; `out` rows are `stride` dwords apart.
inline void transpose_16x16(const __m512i* rows, uint32_t* out, int64_t stride) {
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
  for (int c = 0; c < 16; ++c) _mm512_storeu_si512(out + c * stride, columns[c]);
}
#endif

// `num_rows` rows of `width` elements -> out[round_up(width, kPad)][kBlock], zeros beyond `width`
inline void transpose(const uint32_t* const* rows, int num_rows, int64_t width, uint32_t* out) {
#if defined(__AVX512F__)
  for (int t = 0; t < num_rows; t += 16) {
    for (int64_t d = 0; d < width; d += 16) {
      __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, width - d)) - 1);
      __m512i block[16];
      for (int i = 0; i < 16; ++i) block[i] = _mm512_maskz_loadu_epi32(mask, rows[t + i] + d);
      transpose_16x16(block, out + d * kBlock + t, kBlock);
    }
  }
#else
  for (int64_t d = 0; d < round_up(width, kPad); ++d)
    for (int t = 0; t < num_rows; ++t) {
      out[d * kBlock + t] = 0;
      if (d < width) std::memcpy(out + d * kBlock + t, rows[t] + d, 4);
    }
#endif
}

template <class T>
inline void widen_row(const T* in, int64_t n, int64_t padded, uint32_t* elements) {
  float* out = reinterpret_cast<float*>(elements);
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(out + d, widen_vector(in + d));
  for (; d < n; ++d) out[d] = widen(in[d]);
  for (; d < padded; ++d) out[d] = 0;
}

template <class T>
inline void pack_query(const T* in, int64_t dim, int64_t padded, uint32_t* out) {
  if constexpr (kPairs<T>) {
    std::memcpy(out, in, dim * sizeof(T));
    std::fill(out + dim / 2, out + padded, 0);
  } else {
    widen_row(in, dim, padded, out);
  }
}

// K rows -> out[elements of a row][kBlock tokens]
template <class T>
inline void pack_keys(const T* const* rows, int num_tokens, int64_t dim, uint32_t* widened, uint32_t* out) {
  const uint32_t* elements[kBlock];
  for (int t = 0; t < num_tokens; ++t) {
    if constexpr (kPairs<T> || sizeof(T) == 4) {
      elements[t] = reinterpret_cast<const uint32_t*>(rows[t]);
    } else {
      widen_row(rows[t], dim, dim, widened + t * dim);
      elements[t] = widened + t * dim;
    }
  }
  transpose(elements, num_tokens, num_elements<T>(dim), out);
}

// two rows -> out[padded] pairs (a[d], b[d])
inline void interleave_rows(const bf16* a, const bf16* b, int64_t n, int64_t padded, uint32_t* out) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) *reinterpret_cast<vi*>(out + d) = widen_bits(a + d) | (widen_bits(b + d) << 16);
  for (; d < n; ++d) out[d] = a[d] | static_cast<uint32_t>(b[d]) << 16;
  for (; d < padded; ++d) out[d] = 0;
}

// V rows -> out[elements of the tokens][padded]
template <class T>
inline void pack_values(const T* const* rows, int num_tokens, int64_t dim, int64_t padded, uint32_t* out) {
  if constexpr (kPairs<T>)
    for (int t = 0; t < num_tokens; t += 2) interleave_rows(rows[t], rows[t + 1], dim, padded, out + t / 2 * padded);
  else
    for (int t = 0; t < num_tokens; ++t) widen_row(rows[t], dim, padded, out + t * padded);
}

// ---- the product -----------------------------------------------------------------------------------------

// C[m, n] = C * rescale[row] + A[m, k] B[k, n]; rescale null: C = A B. k, n multiples of 16.
struct Product {
  const uint32_t *a, *b;
  float* c;
  const float* rescale;
  int64_t m, n, k, a_stride, b_stride, c_stride;
};

template <class T>
inline vf multiply_add(uint32_t a, const uint32_t* b, vf acc) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>)
    return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc),
                                                 reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
                                                 reinterpret_cast<__m512bh>(_mm512_loadu_si512(b))));
#endif
  float x;
  std::memcpy(&x, &a, 4);
  return acc + x * load(reinterpret_cast<const float*>(b));
}

template <class T, int R, int N>
inline void multiply_tile(const Product& p, int64_t row, int64_t column) {
  const uint32_t *a = p.a + row * p.a_stride, *b = p.b + column;
  float* c = p.c + row * p.c_stride + column;
  vf acc[R][N] = {};
  if (p.rescale)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i) acc[r][i] = load(c + r * p.c_stride + i * kLanes) * p.rescale[row + r];
  for (int64_t k = 0; k < p.k; ++k)
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < N; ++i)
        acc[r][i] = multiply_add<T>(a[r * p.a_stride + k], b + k * p.b_stride + i * kLanes, acc[r][i]);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) store(c + r * p.c_stride + i * kLanes, acc[r][i]);
}

// Rows from `row` on, R at a time, then fewer.
template <class T, int R = kTileRows>
void multiply_rows(const Product& p, int64_t row = 0) {
  for (; row + R <= p.m; row += R) {
    int64_t n = 0;
    for (; n + kTileVectors * kLanes <= p.n; n += kTileVectors * kLanes) multiply_tile<T, R, kTileVectors>(p, row, n);
    for (; n < p.n; n += kLanes) multiply_tile<T, R, 1>(p, row, n);
  }
  if constexpr (R > 1) multiply_rows<T, R - 1>(p, row);
}

#if defined(LENVM_AMX)
// 16 rows and 16 or 64 columns of C in tiles 0 to 3
template <int N>
inline void multiply_matrix_tile(const Product& p, const uint32_t* a, const uint32_t* b, float* c) {
  const int64_t stride = p.c_stride * 4;
  if (p.rescale) {
    _tile_loadd(0, c, stride);
    if constexpr (N == 4) {
      _tile_loadd(1, c + 16, stride);
      _tile_loadd(2, c + 32, stride);
      _tile_loadd(3, c + 48, stride);
    }
  } else {
    _tile_zero(0);
    if constexpr (N == 4) {
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < p.k; k += 16) {
    const uint32_t* rows = b + k * p.b_stride;
    _tile_loadd(4, a + k, p.a_stride * 4);
    _tile_loadd(5, rows, p.b_stride * 4);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N == 4) {
      _tile_loadd(6, rows + 16, p.b_stride * 4);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(7, rows + 32, p.b_stride * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, rows + 48, p.b_stride * 4);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, c, stride);
  if constexpr (N == 4) {
    _tile_stored(1, c + 16, stride);
    _tile_stored(2, c + 32, stride);
    _tile_stored(3, c + 48, stride);
  }
}

// Reads and writes rows up to a multiple of 16.
void multiply_matrix(const Product& p) {
  for (int64_t row = 0; row < p.m; row += 16) {
    const uint32_t* a = p.a + row * p.a_stride;
    float* c = p.c + row * p.c_stride;
    if (p.rescale)
      for (int64_t r = 0; r < std::min<int64_t>(16, p.m - row); ++r)
        for (int64_t n = 0; n < p.n; n += kLanes)
          store(c + r * p.c_stride + n, load(c + r * p.c_stride + n) * p.rescale[row + r]);
    int64_t n = 0;
    for (; n + 64 <= p.n; n += 64) multiply_matrix_tile<4>(p, a, p.b + n, c + n);
    for (; n < p.n; n += 16) multiply_matrix_tile<1>(p, a, p.b + n, c + n);
  }
}
#endif

template <class T>
inline void multiply(const Product& p, [[maybe_unused]] const TileScope& tiles) {
#if defined(LENVM_AMX)
  if (kPairs<T> && p.m >= kMatrixRows && tiles.active) return multiply_matrix(p);
#endif
  multiply_rows<T>(p);
}

// ---- one work item ---------------------------------------------------------------------------------------

struct Rows {  // the queries and the state of the online softmax of one KV head; padded to 16 rows
  Buffer<uint32_t> q;
  Buffer<float> max, sum, out;

  void reset(int64_t num_rows, int64_t q_width, int64_t v_pad) {
    q.resize(round_up(num_rows, 16) * q_width);
    max.assign(num_rows, kMasked);
    sum.assign(num_rows, 0.0f);
    out.assign(round_up(num_rows, 16) * v_pad, 0.0f);
  }
};

struct Scratch {  // reused by one thread
  std::vector<Rows> heads;
  Buffer<uint32_t> k, k_widened, v;
  Buffer<uint32_t> query_tiles, key_rows, weights, spread;  // of one query
  Buffer<float> scores, sums;
  std::vector<int64_t> first, last;  // keys each row sees, [first, last)
};

#if defined(__AVX512BF16__)
inline void store_weights(vf weights, int t, bf16* out) {
  __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(weights));
  std::memcpy(out + t, &narrow, sizeof(narrow));
}
#endif
inline void store_weights(vf weights, int t, float* out) { store(out + t, weights); }

// scores -> weights 2^(score - max) of one row, updating max and sum; returns what old results are scaled by
template <class W>
inline float soften_row(const Problem& p, float* scores, int width, int64_t first, int64_t last, W* weights,
                        float& max, float& sum) {
  if (first >= last) {  // the row sees none of these keys
    std::fill_n(weights, width, W{});
    return 1.0f;
  }
  const bool capped = p.logit_cap > 0, partial = first > 0 || last < width;
  const float factor = (capped ? p.logit_cap : p.scale) * kLog2e;
  vf best = splat(kMasked);
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int t = 0; t < width; t += kLanes) {
    vf s = load(scores + t);
    if (capped) s = tanh_vector(s * (p.scale / p.logit_cap));
    if (partial) {
      vi index = lane + t;
      s = (index >= static_cast<int32_t>(first)) & (index < static_cast<int32_t>(last)) ? s : splat(kMasked);
    }
    if (capped || partial) store(scores + t, s);
    best = s > best ? s : best;
  }
  const float new_max = std::max(max, reduce_max(best) * factor);
  vf total = {};
  for (int t = 0; t < width; t += kLanes) {
    vf weight = exp2_vector<W>(load(scores + t) * factor - new_max);
    store_weights(weight, t, weights);
    total += weight;
  }
  const float rescale = exp2_vector(splat(max - new_max))[0];
  max = new_max;
  sum = sum * rescale + reduce_sum(total);
  return rescale;
}

// Row `r` of one KV head starts from the key and value that its token brings.
template <class T>
void start_from_new_key(const Problem& p, int64_t token, const T* q, int64_t head, int64_t r, Rows& rows) {
  const T* k = static_cast<const T*>(p.k_new) + token * p.k_new_stride + head * p.qk_dim;
  const T* v = static_cast<const T*>(p.v_new) + token * p.v_new_stride + head * p.v_dim;
  float score = 0;
  for (int64_t d = 0; d < p.qk_dim; ++d) score += widen(q[d]) * widen(k[d]);
  score *= p.scale;
  if (p.logit_cap > 0) score = p.logit_cap * tanh_vector(splat(score / p.logit_cap))[0];
  rows.max[r] = score * kLog2e;
  rows.sum[r] = 1.0f;
  for (int64_t d = 0; d < p.v_dim; ++d) rows.out[r * p.v_pad() + d] = widen(v[d]);
}

template <class T>
void begin_rows(const Problem& p, const Item& item, Scratch& s) {
  const int64_t group = p.group(), q_width = round_up(num_elements<T>(p.qk_dim), kPad);
  const int64_t num_rows = (item.q_end - item.q_begin) * group;
  s.heads.resize(std::max<size_t>(s.heads.size(), item.head_end - item.head_begin));
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    Rows& rows = s.heads[head - item.head_begin];
    rows.reset(num_rows, q_width, p.v_pad());
    for (int64_t r = 0; r < num_rows; ++r) {
      int64_t token = p.q_starts[item.req] + item.q_begin + r / group;
      const T* q = static_cast<const T*>(p.q) + token * p.q_stride + (head * group + r % group) * p.qk_dim;
      pack_query(q, p.qk_dim, q_width, rows.q.data() + r * q_width);
      if (item.first_split && p.has_new_key(item.q_begin + r / group)) start_from_new_key(p, token, q, head, r, rows);
    }
  }
  s.first.resize(num_rows);
  s.last.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    int64_t position = p.position(item.req, item.q_begin + r / group);
    s.first[r] = p.first_key(position);
    s.last[r] = p.last_key(item.req, position);
  }
  s.k.resize(q_width * kBlock);
  s.k_widened.resize(kBlock * p.qk_dim);
  s.v.resize(kBlock * p.v_pad());
}

inline void prefetch_row(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// Rows [row, row + num_rows) of the queries against the packed block of keys and values.
template <class T>
inline void attend_strip(const Problem& p, int64_t begin, int num_tokens, int64_t row, int64_t num_rows, Rows& rows,
                         Scratch& s, const TileScope& tiles) {
  using W = std::conditional_t<kPairs<T>, bf16, float>;
  const int64_t v_pad = p.v_pad(), q_width = round_up(num_elements<T>(p.qk_dim), kPad);
  const int width = static_cast<int>(round_up(num_tokens, kStep));
  alignas(64) float scores[kStripRows * kBlock], rescale[kStripRows];
  alignas(64) W weights[kStripRows * kBlock];
  multiply<T>({rows.q.data() + row * q_width, s.k.data(), scores, nullptr, num_rows, width, q_width, q_width, kBlock,
               kBlock},
              tiles);
  for (int64_t r = 0; r < num_rows; ++r) {
    int64_t last = std::min<int64_t>(s.last[row + r] - begin, num_tokens);
    rescale[r] = soften_row(p, scores + r * kBlock, width, s.first[row + r] - begin, last, weights + r * kBlock,
                            rows.max[row + r], rows.sum[row + r]);
  }
  multiply<T>({reinterpret_cast<const uint32_t*>(weights), s.v.data(), rows.out.data() + row * v_pad, rescale, num_rows,
               v_pad, num_elements<T>(width), num_elements<T>(kBlock), v_pad, v_pad},
              tiles);
}

// Keys [begin, begin + num_tokens) for one KV head; the `num_ahead` keys after the block are prefetched.
template <class T>
void attend_block(const Problem& p, const int32_t* slots, int64_t begin, int num_tokens, int num_ahead, int64_t head,
                  Rows& rows, Scratch& s, const TileScope& tiles) {
  const int64_t num_rows = static_cast<int64_t>(rows.max.size());
  const T* k = static_cast<const T*>(p.k) + head * p.qk_dim;
  const T* v = static_cast<const T*>(p.v) + head * p.v_dim;
  const T *k_rows[kBlock], *v_rows[kBlock];
  const int width = static_cast<int>(round_up(num_tokens, kStep));
  for (int t = 0; t < width; ++t) {  // beyond the end: the last token again, its weight is zero
    int64_t slot = slots[begin + std::min(t, num_tokens - 1)];
    k_rows[t] = k + slot * p.k_stride;
    v_rows[t] = v + slot * p.v_stride;
  }
  for (int t = 0; t < num_ahead; ++t) {
    prefetch_row(k + slots[begin + kBlock + t] * p.k_stride, p.qk_dim * sizeof(T));
    prefetch_row(v + slots[begin + kBlock + t] * p.v_stride, p.v_dim * sizeof(T));
  }
  pack_keys(k_rows, width, p.qk_dim, s.k_widened.data(), s.k.data());
  pack_values(v_rows, width, p.v_dim, p.v_pad(), s.v.data());
  for (int64_t row = 0; row < num_rows; row += kStripRows)
    attend_strip<T>(p, begin, num_tokens, row, std::min(kStripRows, num_rows - row), rows, s, tiles);
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

// ---- one query -----------------------------------------------------------------------------------------------

#if defined(LENVM_AMX)
// One query a request on matrix tiles. Scores are [tokens, query heads]: a tile of K is the left operand as it lies in
// memory, nothing is transposed, and all query heads of up to 16 share the columns (the columns of another KV head's
// queries are zero, which adds nothing). The softmax runs over 16 heads at once. Then the weights are the left operand
// and pairs of rows of V the right one; of the 16 rows of the result those of V's own KV head count.
constexpr int64_t kTile = 16, kHalfTile = 8, kMaxDim = 256, kTileWords = kTile * kTile;

bool fits_one_query(const Problem& p, const Item& item, const TileScope& tiles) {
  return tiles.active && !p.k_new && p.q_starts[item.req + 1] - p.q_starts[item.req] == 1 && p.group() <= kHalfTile &&
         p.qk_dim % 32 == 0 && p.v_dim % 32 == 0 && p.v_dim <= kMaxDim && p.logit_cap <= 0;
}

// The KV heads [begin, end) of an item whose query heads share the 16 columns, and the item's keys.
struct OneQuery {
  const Problem& p;
  const int32_t* slots;  // of the item's keys
  int64_t num_keys, token, begin, end;

  int64_t column(int64_t head) const { return (head - begin) * p.group(); }
  int64_t steps() const { return p.qk_dim / 32; }
  const bf16* key(int64_t t) const { return static_cast<const bf16*>(p.k) + slots[t] * p.k_stride + begin * p.qk_dim; }
  const bf16* value(int64_t t, int64_t head) const {
    return static_cast<const bf16*>(p.v) + slots[t] * p.v_stride + head * p.v_dim;
  }
};

// A tile per (KV head, 32 elements of a row): [pairs of elements][query heads], zero for the other heads' queries.
void pack_query_tiles(const OneQuery& x, Scratch& s) {
  s.query_tiles.assign((x.end - x.begin) * x.steps() * kTileWords, 0);
  const bf16* q = static_cast<const bf16*>(x.p.q) + x.token * x.p.q_stride;
  for (int64_t head = x.begin; head < x.end; ++head)
    for (int64_t j = 0; j < x.p.group(); ++j) {
      const bf16* row = q + (head * x.p.group() + j) * x.p.qk_dim;
      uint32_t* to = s.query_tiles.data() + (head - x.begin) * x.steps() * kTileWords + x.column(head) + j;
      for (int64_t pair = 0; pair < x.p.qk_dim / 2; ++pair) std::memcpy(to + pair * kTile, row + 2 * pair, 4);
    }
}

inline bool is_run(const int32_t* slots) {
  alignas(64) static constexpr int32_t kAscending[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  __m512i expected = _mm512_add_epi32(_mm512_set1_epi32(slots[0]), _mm512_load_si512(kAscending));
  return _mm512_cmpneq_epi32_mask(expected, _mm512_loadu_si512(slots)) == 0;
}

struct TileSource {
  const bf16* rows;
  int64_t stride;  // in bytes
};

// Rows t to t + 15 of K or V, in place if they follow one another, else copied; beyond the end the last one again.
template <class Row>
inline TileSource row_tile(const OneQuery& x, int64_t t, Row row, int64_t stride, int64_t width, bf16* copy) {
  if (t + kTile <= x.num_keys && is_run(x.slots + t)) return {row(t), stride * 2};
  for (int64_t i = 0; i < kTile; ++i) {
    const bf16* from = row(std::min(t + i, x.num_keys - 1));
    for (int64_t d = 0; d < width; d += 32) _mm512_storeu_si512(copy + i * width + d, _mm512_loadu_si512(from + d));
  }
  return {copy, width * 2};
}

// scores[keys, to a multiple of 64][16]
void score_keys(const OneQuery& x, Scratch& s) {
  const int64_t width = (x.end - x.begin) * x.p.qk_dim;
  s.key_rows.resize(4 * kTile * width / 2);
  s.scores.resize(round_up(x.num_keys, kBlock) * kTile);
  for (int64_t t = 0; t < x.num_keys; t += kBlock) {
    TileSource keys[4];
    for (int64_t i = 0; i < 4; ++i)
      keys[i] = row_tile(x, t + i * kTile, [&](int64_t at) { return x.key(at); }, x.p.k_stride, width,
                         reinterpret_cast<bf16*>(s.key_rows.data()) + i * kTile * width);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < (x.end - x.begin) * x.steps(); ++step) {
      _tile_loadd(4, s.query_tiles.data() + step * kTileWords, 64);
      _tile_loadd(5, keys[0].rows + step * 32, keys[0].stride);
      _tile_dpbf16ps(0, 5, 4);
      _tile_loadd(6, keys[1].rows + step * 32, keys[1].stride);
      _tile_dpbf16ps(1, 6, 4);
      _tile_loadd(7, keys[2].rows + step * 32, keys[2].stride);
      _tile_dpbf16ps(2, 7, 4);
      _tile_loadd(5, keys[3].rows + step * 32, keys[3].stride);
      _tile_dpbf16ps(3, 5, 4);
    }
    float* out = s.scores.data() + t * kTile;
    _tile_stored(0, out, 64);
    _tile_stored(1, out + kTileWords, 64);
    _tile_stored(2, out + 2 * kTileWords, 64);
    _tile_stored(3, out + 3 * kTileWords, 64);
  }
}

// scores -> weights 2^(score - max) as bf16 in 32-bit words, [tile of 16 keys][query heads][16 keys]; keys before
// `first` and beyond the end weigh nothing.
void soften_scores(const OneQuery& x, int64_t first, Scratch& s, vf& max, vf& sum) {
  const float factor = x.p.scale * kLog2e;
  const float* scores = s.scores.data();
  vf best = splat(kMasked);
  for (int64_t t = first; t < x.num_keys; ++t) {
    vf score = load(scores + t * kTile);
    best = score > best ? score : best;
  }
  max = best * factor;
  sum = vf{};
  s.weights.resize(round_up(x.num_keys, kTile) * kTile);
  for (int64_t t = 0; t < x.num_keys; t += kTile) {
    __m512i words[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      vf weight = exp2_vector<bf16>(load(scores + (t + i) * kTile) * factor - max);
      if (t + i < first || t + i >= x.num_keys) weight = vf{};
      sum += weight;
      words[i] = _mm512_cvtepu16_epi32(
          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(weight))));
    }
    transpose_16x16(words, s.weights.data() + t * kTile, kTile);
  }
}

// The weights of one KV head as left operands, a tile each 16 keys: row j holds those of its query head j as the first
// of each pair, row 8 + j as the second. The rows of V, whose pairs are neighbours in one row, need no packing: the
// product's row j is the even columns of the result, its row 8 + j the odd ones.
void spread_weights(const OneQuery& x, int64_t head, Scratch& s) {
  const int64_t num_words = round_up(x.num_keys, kTile) * kTile;
  s.spread.resize(num_words);
  for (int64_t at = 0; at < num_words; at += kTileWords)
    for (int64_t j = 0; j < x.p.group(); ++j) {
      __m512i words = _mm512_loadu_si512(s.weights.data() + at + (x.column(head) + j) * kTile);
      _mm512_storeu_si512(s.spread.data() + at + j * kTile, words);
      _mm512_storeu_si512(s.spread.data() + at + (kHalfTile + j) * kTile, _mm512_slli_epi32(words, 16));
    }
}

// out[16][v_dim / 2]: `spread` times N tiles of columns of V, from column `d` on
template <int N>
void weigh_values(const OneQuery& x, int64_t head, int64_t d, Scratch& s, float* out) {
  alignas(64) bf16 copy[kTile * 32 * N];
  _tile_zero(0);
  if constexpr (N > 1) _tile_zero(1);
  if constexpr (N > 2) _tile_zero(2);
  if constexpr (N > 3) _tile_zero(3);
  for (int64_t t = 0; t < x.num_keys; t += kTile) {
    TileSource v = row_tile(x, t, [&](int64_t i) { return x.value(i, head) + d; }, x.p.v_stride, 32 * N, copy);
    _tile_loadd(4, s.spread.data() + t * kTile, 64);
    _tile_loadd(5, v.rows, v.stride);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (N > 1) {
      _tile_loadd(6, v.rows + 32, v.stride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (N > 2) {
      _tile_loadd(7, v.rows + 64, v.stride);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (N > 3) {
      _tile_loadd(5, v.rows + 96, v.stride);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  const int64_t stride = x.p.v_dim * 2;
  _tile_stored(0, out + d / 2, stride);
  if constexpr (N > 1) _tile_stored(1, out + d / 2 + 16, stride);
  if constexpr (N > 2) _tile_stored(2, out + d / 2 + 32, stride);
  if constexpr (N > 3) _tile_stored(3, out + d / 2 + 48, stride);
}

void weigh_values(const OneQuery& x, int64_t head, Scratch& s) {
  spread_weights(x, head, s);
  s.sums.resize(kTile * x.p.v_dim / 2);
  int64_t d = 0;
  for (; d + 128 <= x.p.v_dim; d += 128) weigh_values<4>(x, head, d, s, s.sums.data());
  for (; d + 64 <= x.p.v_dim; d += 64) weigh_values<2>(x, head, d, s, s.sums.data());
  for (; d < x.p.v_dim; d += 32) weigh_values<1>(x, head, d, s, s.sums.data());
}

// Query head j of a KV head: its columns in order, to the output or to the partial results.
void finish_head(const OneQuery& x, const Item& item, int64_t q_head, int64_t j, const float* max, const float* sum,
                 Scratch& s, Partials& partials) {
  const int64_t half = x.p.v_dim / 2, column = q_head - x.begin * x.p.group();
  const float *even = s.sums.data() + j * half, *odd = even + kHalfTile * half;
  float row[kMaxDim];
  for (int64_t d = 0; d < half; ++d) {
    row[2 * d] = even[d];
    row[2 * d + 1] = odd[d];
  }
  if (item.partial < 0) return write_row<bf16>(x.p, x.token, q_head, row, sum[column]);
  const int64_t at = item.partial * x.p.num_heads + q_head;
  partials.max[at] = max[column];
  partials.sum[at] = sum[column];
  std::copy_n(row, x.p.v_dim, partials.out.data() + at * x.p.v_pad());
}

void run_one_query(const Problem& p, const Item& item, Scratch& s, Partials& partials) {
  const int32_t* slots = p.req_to_token + p.req_pool_indices[item.req] * p.req_stride + item.kv_begin;
  const int64_t num_keys = item.kv_end - item.kv_begin, group = p.group();
  const int64_t first = std::max<int64_t>(0, p.first_key(p.position(item.req, 0)) - item.kv_begin);
  alignas(64) float max[kTile], sum[kTile];
  for (int64_t begin = item.head_begin; begin < item.head_end;) {
    const int64_t end = std::min(item.head_end, begin + kTile / group);
    OneQuery x{p, slots, num_keys, p.q_starts[item.req], begin, end};
    pack_query_tiles(x, s);
    score_keys(x, s);
    soften_scores(x, first, s, reinterpret_cast<vf&>(max), reinterpret_cast<vf&>(sum));
    for (int64_t head = begin; head < end; ++head) {
      weigh_values(x, head, s);
      for (int64_t j = 0; j < group; ++j) finish_head(x, item, head * group + j, j, max, sum, s, partials);
    }
    begin = end;
  }
}
#endif

template <class T>
void run_item(const Problem& p, const Item& item, Scratch& s, Partials& partials, const TileScope& tiles) {
#if defined(LENVM_AMX)
  if constexpr (kPairs<T>)
    if (fits_one_query(p, item, tiles)) return run_one_query(p, item, s, partials);
#endif
  const int32_t* slots = p.req_to_token + p.req_pool_indices[item.req] * p.req_stride;
  begin_rows<T>(p, item, s);
  for (int64_t begin = item.kv_begin; begin < item.kv_end; begin += kBlock) {
    int num_tokens = static_cast<int>(std::min<int64_t>(kBlock, item.kv_end - begin));
    int num_ahead = static_cast<int>(std::clamp<int64_t>(item.kv_end - begin - kBlock, 0, kBlock));
    for (int64_t head = item.head_begin; head < item.head_end; ++head)
      attend_block<T>(p, slots, begin, num_tokens, num_ahead, head, s.heads[head - item.head_begin], s,
                      tiles);
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
  const int64_t block = std::max<int64_t>(1, p.k_new ? num_queries : kTargetRows / p.group());
  for (int64_t q = 0; q < num_queries; q += block) {
    int64_t q_end = std::min(num_queries, q + block);
    int64_t kv_begin = p.first_key(p.position(req, q)) / kBlock * kBlock;
    int64_t kv_end = p.last_key(req, p.position(req, q_end - 1));
    bool split = num_queries <= block && kv_end - kv_begin > kSplit;
    Item item{req, q, q_end, kv_begin, kv_end, 0, 0, -1, true};
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
      item.first_split = false;
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
    const TileScope tiles;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < num_items; ++i) run_item<T>(p, plan.items[i], scratch, partials, tiles);
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
