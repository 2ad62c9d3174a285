#ifdef MEGALORA_ARCHITECTURES
#include <cuda.h>
#endif

// What the library is built for, as JSON. megalora/built.py finds it in the file, which a torch
// that is too old need not be able to load.
#define MEGALORA_QUOTE(...) #__VA_ARGS__
#define MEGALORA_TEXT(...) MEGALORA_QUOTE(__VA_ARGS__)

#ifdef MEGALORA_ARCHITECTURES
#define MEGALORA_CUDA                                                               \
  "\"cuda\": " MEGALORA_TEXT(CUDA_VERSION) ", \"architectures\": \"" MEGALORA_TEXT( \
      MEGALORA_ARCHITECTURES) "\""
#else
#define MEGALORA_CUDA "\"cuda\": 0, \"architectures\": \"\""
#endif

extern "C" __attribute__((used, visibility("default"))) const char megalora_built[] =
    "megalora is built {\"oldest_torch\": \"" MEGALORA_TEXT(
        MEGALORA_OLDEST_TORCH) "\", \"compiler\": \"" __VERSION__ "\", " MEGALORA_CUDA "}";
