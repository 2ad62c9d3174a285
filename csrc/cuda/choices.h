// Written by benchmarks/choose.py from benchmarks/results: run it, do not edit.
#pragma once

#include <array>

#include "route.h"

namespace megalora::cuda {

// Behind each row: the overheads over the frozen linear that decided, and their run.
// clang-format off
constexpr std::array<Choice, 20> kChoices{{
    {"NVIDIA H200", 90, "backward", false, 1, Route::kernels},  // gemm 31.3 %, kernels 28.1 %: 2026-11-26-4
    {"NVIDIA H200", 90, "backward", false, 16, Route::kernels},  // gemm 36.7 %, kernels 34.6 %: 2026-11-26-4
    {"NVIDIA H200", 90, "backward", false, 32, Route::gemm},  // gemm 36.4 %, kernels 38.3 %: 2026-11-26-4
    {"NVIDIA H200", 90, "backward", false, 64, Route::gemm},  // gemm 36.2 %, kernels 36.2 %: 2026-11-26-4
    {"NVIDIA H200", 90, "backward", true, 16, Route::kernels},  // gemm 22.9 %, kernels 18.4 %: 2026-11-26-4
    {"NVIDIA H200", 90, "outer", false, 1, Route::gemm},  // gemm 27.6 %, kernels 30.2 %: 2026-11-26-4
    {"NVIDIA H200", 90, "outer", false, 16, Route::gemm},  // gemm 34.5 %, kernels 36.3 %: 2026-11-26-4
    {"NVIDIA H200", 90, "outer", false, 32, Route::gemm},  // gemm 36.5 %, kernels 42.9 %: 2026-11-26-4
    {"NVIDIA H200", 90, "outer", false, 64, Route::gemm},  // gemm 36.2 %, kernels 45.7 %: 2026-11-26-4
    {"NVIDIA H200", 90, "outer", true, 16, Route::gemm},  // gemm 18.5 %, kernels 20.2 %: 2026-11-26-4
    {"NVIDIA H200", 90, "project", false, 1, Route::gemm},  // gemm 17.3 %, kernels 19.0 %: 2026-11-26-4
    {"NVIDIA H200", 90, "project", false, 16, Route::gemm},  // gemm 21.4 %, kernels 24.3 %: 2026-11-26-4
    {"NVIDIA H200", 90, "project", false, 32, Route::gemm},  // gemm 21.6 %, kernels 25.7 %: 2026-11-26-4
    {"NVIDIA H200", 90, "project", false, 64, Route::gemm},  // gemm 21.8 %, kernels 27.6 %: 2026-11-26-4
    {"NVIDIA H200", 90, "project", true, 16, Route::gemm},  // gemm 13.6 %, kernels 15.3 %: 2026-11-26-4
    {"NVIDIA H200", 90, "update", false, 1, Route::kernels},  // gemm 29.0 %, kernels 17.5 %: 2026-11-26-4
    {"NVIDIA H200", 90, "update", false, 16, Route::kernels},  // gemm 22.3 %, kernels 17.8 %: 2026-11-26-4
    {"NVIDIA H200", 90, "update", false, 32, Route::kernels},  // gemm 22.0 %, kernels 19.6 %: 2026-11-26-4
    {"NVIDIA H200", 90, "update", false, 64, Route::gemm},  // gemm 22.5 %, kernels 26.4 %: 2026-11-26-4
    {"NVIDIA H200", 90, "update", true, 16, Route::kernels},  // gemm 16.8 %, kernels 13.5 %: 2026-11-26-4
}};
// clang-format on

}  // namespace megalora::cuda
