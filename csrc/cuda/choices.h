// Written by benchmarks/choose.py from benchmarks/results: run it, do not edit.
#pragma once

#include <array>

#include "route.h"

namespace megalora::cuda {

// Behind each row: the overheads over the frozen linear that decided, and their run.
// clang-format off
constexpr std::array<Choice, 20> kChoices{{
    {"NVIDIA H200", 90, "backward", false, 1, Route::kernels},  // gemm 41.3 %, kernels 39.2 %: 2026-11-26-2
    {"NVIDIA H200", 90, "backward", false, 16, Route::kernels},  // gemm 35.3 %, kernels 33.3 %: 2026-11-26-2
    {"NVIDIA H200", 90, "backward", false, 32, Route::gemm},  // gemm 35.4 %, kernels 37.0 %: 2026-11-26-2
    {"NVIDIA H200", 90, "backward", false, 64, Route::gemm},  // gemm 34.8 %, kernels 34.9 %: 2026-11-26-2
    {"NVIDIA H200", 90, "backward", true, 16, Route::kernels},  // gemm 22.5 %, kernels 18.1 %: 2026-11-26-2
    {"NVIDIA H200", 90, "outer", false, 1, Route::gemm},  // gemm 39.2 %, kernels 40.5 %: 2026-11-26-2
    {"NVIDIA H200", 90, "outer", false, 16, Route::gemm},  // gemm 33.3 %, kernels 34.6 %: 2026-11-26-2
    {"NVIDIA H200", 90, "outer", false, 32, Route::gemm},  // gemm 37.0 %, kernels 40.0 %: 2026-11-26-2
    {"NVIDIA H200", 90, "outer", false, 64, Route::gemm},  // gemm 34.9 %, kernels 44.8 %: 2026-11-26-2
    {"NVIDIA H200", 90, "outer", true, 16, Route::gemm},  // gemm 18.1 %, kernels 19.8 %: 2026-11-26-2
    {"NVIDIA H200", 90, "project", false, 1, Route::gemm},  // gemm 28.8 %, kernels 29.2 %: 2026-11-26-2
    {"NVIDIA H200", 90, "project", false, 16, Route::gemm},  // gemm 21.8 %, kernels 22.6 %: 2026-11-26-2
    {"NVIDIA H200", 90, "project", false, 32, Route::gemm},  // gemm 21.9 %, kernels 24.5 %: 2026-11-26-2
    {"NVIDIA H200", 90, "project", false, 64, Route::gemm},  // gemm 22.0 %, kernels 26.4 %: 2026-11-26-2
    {"NVIDIA H200", 90, "project", true, 16, Route::gemm},  // gemm 17.9 %, kernels 19.5 %: 2026-11-26-2
    {"NVIDIA H200", 90, "update", false, 1, Route::kernels},  // gemm 28.8 %, kernels 22.2 %: 2026-11-26-2
    {"NVIDIA H200", 90, "update", false, 16, Route::gemm},  // gemm 21.8 %, kernels 21.2 %: 2026-11-26-2
    {"NVIDIA H200", 90, "update", false, 32, Route::gemm},  // gemm 21.9 %, kernels 23.8 %: 2026-11-26-2
    {"NVIDIA H200", 90, "update", false, 64, Route::gemm},  // gemm 22.0 %, kernels 28.9 %: 2026-11-26-2
    {"NVIDIA H200", 90, "update", true, 16, Route::kernels},  // gemm 17.9 %, kernels 15.9 %: 2026-11-26-2
}};
// clang-format on

}  // namespace megalora::cuda
