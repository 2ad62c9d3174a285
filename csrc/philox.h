#pragma once

#include <cstdint>

#include "host_device.h"

namespace megalora {

// Philox4x32-10 (Salmon et al., SC 2011) of a 64-bit counter, the upper half of its 128 bits being
// zero. Lane is uint64_t or a vector of them, each lane holding one 32-bit word: words[i] in [0,
// 2^32).
template <class Lane>
MEGALORA_HOST_DEVICE void philox(Lane counter, uint64_t seed, Lane (&words)[4]) {
  constexpr uint64_t kWord = 0xFFFFFFFFu;
  words[0] = counter & kWord;
  words[1] = counter >> 32;
  words[2] = counter ^ counter;
  words[3] = counter ^ counter;
  uint64_t key0 = seed & kWord;
  uint64_t key1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const Lane low = words[0] * uint64_t{0xD2511F53u};
    const Lane high = words[2] * uint64_t{0xCD9E8D57u};
    words[0] = (high >> 32) ^ words[1] ^ key0;
    words[1] = high & kWord;
    words[2] = (low >> 32) ^ words[3] ^ key1;
    words[3] = low & kWord;
    key0 = (key0 + 0x9E3779B9u) & kWord;
    key1 = (key1 + 0xBB67AE85u) & kWord;
  }
}

}  // namespace megalora
