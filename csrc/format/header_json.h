#pragma once
#include <string>
#include <string_view>

#include "format/header.h"

namespace weightload {

// Raises the header error that `rule_name` names. The sentence begins as safetensors' does, because callers
// match on it.
[[noreturn]] void fail_header(const char* rule_name, const std::string& what, const std::string& path,
                              const std::string& tensor = {});

// Turns the JSON into a Header whose byte ranges are still relative to the data and not yet validated: checks
// JSON syntax, UTF-8, and the type of every field, nothing across fields. Nothing else may look at raw JSON.
Header read_header_json(std::string_view json, const std::string& path);

}  // namespace weightload
