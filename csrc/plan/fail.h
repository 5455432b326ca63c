// Errors whose message is put together from parts.
#pragma once

#include <sstream>
#include <stdexcept>

namespace nesterov_pp {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace nesterov_pp
