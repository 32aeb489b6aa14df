#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"

namespace weightload {

// What a rank tells the others before a block travels: that its part is in place, or why it never will be. Records of
// kStatusBytes, so that it can be gathered; texts that are longer lose their end.
constexpr size_t kStatusBytes = 1024;

std::string ready_status();
std::string failed_status(const Error& error, const std::vector<std::string>& paths);

// The rank takes no further part in the load.
std::string left_status();

// The error in `rank`'s record, as every rank raises it; nothing if the rank is ready. The file is named as that rank
// does, or, where its path is too long to travel, as this one does: `paths` are of the files in order.
std::optional<Error> error_of_status(const std::string& record, uint32_t rank, const std::vector<std::string>& paths);

}  // namespace weightload
