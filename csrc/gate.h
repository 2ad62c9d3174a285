#pragma once

#include "factor.h"

// The pass over the wide tensors between the two base products of a gated MLP (gated.h). Forward
// finds in y what the base gives; what it leaves there is found again by the backward pass of the
// same device.
namespace megalora {

// a = silu(gate) up p of [gate, up] = y + scale * s1 · B1ᵀ, and s2 = scale2 * a · A2ᵀ. Rows that no
// expert owns are zero in all results.
struct Gate {
  Factor update;          // its wide is y [tokens, 2 columns], contiguous, its thin s1
  Factor project;         // its wide is a [tokens, columns], contiguous; a and s2 are not there yet
  const void* weights;    // p: [tokens], or null
  bool weights_are_fp32;  // although the tokens are not
};

// dy, a and p's gradient by da + ds2 · A2, and ds1 = scale1 * dy · B1.
struct GateBackward {
  Factor gates;           // as update of the forward pass, which has been over y
  Factor update;          // its wide is da [tokens, columns], contiguous, its thin ds2
  Factor project;         // its wide is dy [tokens, 2 columns], contiguous; neither dy nor ds1 is
                          // there yet
  void* a;                // [tokens, columns], contiguous, made again
  const void* weights;    // p: [tokens], or null
  void* d_weights;        // [tokens], in the dtype of weights, or null
  bool weights_are_fp32;  // although the tokens are not
};

}  // namespace megalora
