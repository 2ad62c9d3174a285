#pragma once

#include <cstdint>
#include <string_view>

namespace megalora::cuda {

// Who computes a product of a dense factor, where several can.
enum class Route { automatic, gemm, kernels };

// The fastest route of a product on a device, as measured for one or several projections and a
// class of ranks.
struct Choice {
  std::string_view device;
  int capability;  // 90 for sm_90
  std::string_view product;
  bool several;
  int64_t rank_class;
  Route route;
};

// Small ranks that fill no whole vector of 16 bytes are slow by cuBLAS: a class of their own.
constexpr int64_t rank_class(int64_t rank) { return rank < 16 && rank % 8 != 0 ? 1 : rank; }

// The device whose rows stand for another: for itself, else for one of its compute capability;
// none where no row does.
template <class Table>
constexpr std::string_view measured_as(const Table& table, std::string_view device,
                                       int capability) {
  std::string_view relative;
  for (const Choice& row : table) {
    if (row.device == device) {
      return row.device;
    }
    if (relative.empty() && row.capability == capability) {
      relative = row.device;
    }
  }
  return relative;
}

// The measured choice: that of the first class of ranks, in the table's order, that is not below
// the rank's; automatic where nothing was measured.
template <class Table>
constexpr Route fastest(const Table& table, std::string_view device, std::string_view product,
                        bool several, int64_t rank) {
  for (const Choice& row : table) {
    if (row.device == device && row.product == product && row.several == several &&
        rank_class(rank) <= row.rank_class) {
      return row.route;
    }
  }
  return Route::automatic;
}

}  // namespace megalora::cuda
