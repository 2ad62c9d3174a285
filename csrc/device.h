#pragma once

#include <cstdint>
#include <ostream>

namespace megalora {

struct Device {
  enum class Type : int8_t { cpu, cuda, other };

  Type type = Type::cpu;
  int8_t index = -1;

  bool is_cpu() const { return type == Type::cpu; }
  bool operator==(const Device&) const = default;
};

inline std::ostream& operator<<(std::ostream& stream, Device::Type type) {
  return stream << (type == Device::Type::cpu    ? "cpu"
                    : type == Device::Type::cuda ? "cuda"
                                                 : "another device");
}

inline std::ostream& operator<<(std::ostream& stream, const Device& device) {
  stream << device.type;
  return device.type == Device::Type::cuda ? stream << ':' << static_cast<int>(device.index)
                                           : stream;
}

}  // namespace megalora
