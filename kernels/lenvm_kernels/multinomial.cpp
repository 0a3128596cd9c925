// One draw a row from unnormalised probabilities, with the draws of torch.multinomial(probs, 1) on a CPU.
//
// torch draws u for every token (two words of its mt19937 generator, 53 bits), q = -log(1 - u), and takes the first
// argmax of p / q. Here q is computed only where it can matter: as q >= u, a token with p <= best * u cannot win.
#include <cmath>
#include <cstdint>

namespace {

constexpr int kWords = 624, kMiddle = 397;
constexpr int kChunk = 64;           // tokens tested at once
constexpr float kSlack = 0.999999f;  // rounding of u, of q and of the quotient to fp32

struct Generator {  // at::mt19937: `next` words of `state` are used up
  uint32_t* state;
  int32_t next;
};

inline uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (-(v & 1u) & 0x9908b0dfu);
}

void refill(uint32_t* s) {
  for (int k = 0; k < kWords - kMiddle; ++k) s[k] = s[k + kMiddle] ^ twist(s[k], s[k + 1]);
  for (int k = kWords - kMiddle; k < kWords - 1; ++k) s[k] = s[k + kMiddle - kWords] ^ twist(s[k], s[k + 1]);
  s[kWords - 1] = s[kMiddle - 1] ^ twist(s[kWords - 1], s[0]);
}

inline uint32_t temper(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

void draw(Generator& generator, uint32_t* words, int count) {
  for (int done = 0; done < count;) {
    if (generator.next == kWords) {
      refill(generator.state);
      generator.next = 0;
    }
    const int left = kWords - generator.next, take = count - done < left ? count - done : left;
    const uint32_t* from = generator.state + generator.next;
    for (int i = 0; i < take; ++i) words[done + i] = temper(from[i]);
    generator.next += take;
    done += take;
  }
}

inline float exponential(uint32_t high, uint32_t low) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32 | low) & ((uint64_t{1} << 53) - 1);
  return static_cast<float>(-std::log1p(-static_cast<double>(bits) * 0x1p-53));
}

// The first argmax of p / q, or -1 where p has a NaN, an infinity, a negative number or no positive one.
int64_t draw_row(const float* p, int64_t vocab_size, Generator& generator) {
  uint32_t words[2 * kChunk];
  float best = 0.0f;
  int64_t best_token = -1;
  bool valid = true;
  for (int64_t begin = 0; begin < vocab_size; begin += kChunk) {
    const int count = vocab_size - begin < kChunk ? static_cast<int>(vocab_size - begin) : kChunk;
    draw(generator, words, 2 * count);
    const float* chunk = p + begin;
    int can_win = 0, bad = 0;
    for (int i = 0; i < count; ++i) {
      const float u = static_cast<float>(static_cast<int32_t>(words[2 * i] & 0x1fffffu)) * 0x1p-21f;
      can_win |= chunk[i] > best * u * kSlack;
      bad |= !(chunk[i] >= 0.0f && chunk[i] <= 3.4028234e38f);
    }
    valid &= !bad;
    if (!can_win) continue;
    for (int i = 0; i < count; ++i) {
      if (!(chunk[i] > 0.0f)) continue;
      const float score = chunk[i] / exponential(words[2 * i], words[2 * i + 1]);
      if (score > best) {
        best = score;
        best_token = begin + i;
      }
    }
  }
  return valid ? best_token : -1;
}

}  // namespace

extern "C" void lenvm_multinomial(const float* probs, int64_t num_rows, int64_t vocab_size, int64_t stride,
                                  uint32_t* state, int32_t* next, int64_t* tokens) {
  Generator generator{state, *next};
  for (int64_t r = 0; r < num_rows; ++r) tokens[r] = draw_row(probs + r * stride, vocab_size, generator);
  *next = generator.next;
}
