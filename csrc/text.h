#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace megalora {

inline std::ostream& operator<<(std::ostream& stream, const std::vector<int64_t>& list) {
  stream << '[';
  for (size_t i = 0; i < list.size(); ++i) {
    stream << (i == 0 ? "" : ", ") << list[i];
  }
  return stream << ']';
}

// Parts of a message, one behind another.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

}  // namespace megalora
