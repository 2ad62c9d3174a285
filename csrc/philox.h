#pragma once

#include <cstdint>

#include "host_device.h"

namespace megalora {

// low and high words of word * factor. Word is uint32_t, or uint64_t or a vector of them, each
// lane holding one 32-bit word.
template <class Word>
MEGALORA_HOST_DEVICE void multiply_words(Word word, uint32_t factor, Word& low, Word& high) {
  if constexpr (sizeof(Word) == sizeof(uint32_t)) {
#ifdef __CUDA_ARCH__  // one instruction, where nvcc adds zeros to the halves of the product below
    low = word * factor;
    high = __umulhi(word, factor);
#else
    const uint64_t product = static_cast<uint64_t>(word) * factor;
    low = static_cast<uint32_t>(product);
    high = static_cast<uint32_t>(product >> 32);
#endif
  } else {
    const Word product = word * static_cast<uint64_t>(factor);
    low = product & uint64_t{0xFFFFFFFFu};
    high = product >> 32;
  }
}

// Philox4x32-7 (Salmon et al., SC 2011: the fewest rounds that pass BigCrush) of the 64-bit counter
// words[0] + 2^32 words[1], the upper half of its 128 bits being zero. The result replaces it in
// words.
template <class Word>
MEGALORA_HOST_DEVICE void philox(uint64_t seed, Word (&words)[4]) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  words[2] = words[0] ^ words[0];
  words[3] = words[0] ^ words[0];
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
    Word low0, high0, low2, high2;
    multiply_words(words[0], 0xD2511F53u, low0, high0);
    multiply_words(words[2], 0xCD9E8D57u, low2, high2);
    words[0] = high2 ^ words[1] ^ key0;
    words[1] = low2;
    words[2] = high0 ^ words[3] ^ key1;
    words[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace megalora
