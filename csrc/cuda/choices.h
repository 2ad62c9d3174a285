// Written by benchmarks/choose.py from benchmarks/results: run it, do not edit.
#pragma once

#include <array>

#include "route.h"

namespace megalora::cuda {

// Behind each row: the overheads over the frozen linear that decided, and their run.
// clang-format off
constexpr std::array<Choice, 20> kChoices{{
    {"NVIDIA H200", 90, "backward", false, 1, Route::kernels},  // gemm 31.7 %, kernels 28.3 %: 2026-11-27-1
    {"NVIDIA H200", 90, "backward", false, 16, Route::kernels},  // gemm 33.1 %, kernels 31.7 %: 2026-11-27-1
    {"NVIDIA H200", 90, "backward", false, 32, Route::gemm},  // gemm 34.3 %, kernels 36.3 %: 2026-11-27-1
    {"NVIDIA H200", 90, "backward", false, 64, Route::gemm},  // gemm 36.2 %, kernels 36.4 %: 2026-11-27-1
    {"NVIDIA H200", 90, "backward", true, 16, Route::kernels},  // gemm 22.9 %, kernels 18.6 %: 2026-11-27-1
    {"NVIDIA H200", 90, "outer", false, 1, Route::gemm},  // gemm 27.8 %, kernels 30.6 %: 2026-11-27-1
    {"NVIDIA H200", 90, "outer", false, 16, Route::gemm},  // gemm 31.4 %, kernels 33.4 %: 2026-11-27-1
    {"NVIDIA H200", 90, "outer", false, 32, Route::gemm},  // gemm 34.1 %, kernels 41.0 %: 2026-11-27-1
    {"NVIDIA H200", 90, "outer", false, 64, Route::gemm},  // gemm 36.6 %, kernels 46.0 %: 2026-11-27-1
    {"NVIDIA H200", 90, "outer", true, 16, Route::gemm},  // gemm 18.4 %, kernels 20.2 %: 2026-11-27-1
    {"NVIDIA H200", 90, "project", false, 1, Route::gemm},  // gemm 17.1 %, kernels 18.9 %: 2026-11-27-1
    {"NVIDIA H200", 90, "project", false, 16, Route::gemm},  // gemm 17.7 %, kernels 20.0 %: 2026-11-27-1
    {"NVIDIA H200", 90, "project", false, 32, Route::gemm},  // gemm 19.1 %, kernels 22.9 %: 2026-11-27-1
    {"NVIDIA H200", 90, "project", false, 64, Route::gemm},  // gemm 21.8 %, kernels 27.7 %: 2026-11-27-1
    {"NVIDIA H200", 90, "project", true, 16, Route::gemm},  // gemm 13.6 %, kernels 15.3 %: 2026-11-27-1
    {"NVIDIA H200", 90, "update", false, 1, Route::kernels},  // gemm 29.2 %, kernels 17.7 %: 2026-11-27-1
    {"NVIDIA H200", 90, "update", false, 16, Route::kernels},  // gemm 21.8 %, kernels 17.8 %: 2026-11-27-1
    {"NVIDIA H200", 90, "update", false, 32, Route::kernels},  // gemm 21.9 %, kernels 19.4 %: 2026-11-27-1
    {"NVIDIA H200", 90, "update", false, 64, Route::gemm},  // gemm 22.5 %, kernels 26.7 %: 2026-11-27-1
    {"NVIDIA H200", 90, "update", true, 16, Route::kernels},  // gemm 16.8 %, kernels 13.5 %: 2026-11-27-1
}};
// clang-format on

}  // namespace megalora::cuda
