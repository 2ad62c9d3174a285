#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
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

template <class Error, class... Parts>
void check_or_throw(bool holds, const Parts&... parts) {
  if (!holds) {
    std::ostringstream message;
    (message << ... << parts);
    throw Error(message.str());
  }
}

// Of what an op is given: Python gets a ValueError, whose message is all parts.
template <class... Parts>
void check_value(bool holds, const Parts&... parts) {
  check_or_throw<std::invalid_argument>(holds, parts...);
}

// Of all else: a RuntimeError.
template <class... Parts>
void check_that(bool holds, const Parts&... parts) {
  check_or_throw<std::runtime_error>(holds, parts...);
}

}  // namespace megalora
