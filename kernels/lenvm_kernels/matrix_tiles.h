// AMX: asking the kernel for the tile registers, and their shape. LENVM_AMX says whether this build has them.
#pragma once
#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define LENVM_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace {

#if defined(LENVM_AMX)
// The kernel grants tile registers to a process on request.
bool tiles_granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// All tiles 16 rows of 64 bytes, while in scope.
struct TileScope {
  const bool active = tiles_granted();
  TileScope() {
    if (!active) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileScope() {
    if (active) _tile_release();
  }
};

#else
struct TileScope {
  static constexpr bool active = false;
  ~TileScope() {}
};
#endif

}  // namespace
