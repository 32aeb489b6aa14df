// What must hold of every header that is accepted, computed anew from what the parser hands out.
#pragma once
#include <string>

#include "base/error.h"
#include "format/header.h"

void check_header(const weightload::Header& header, uint64_t header_bytes, uint64_t file_bytes);

// Of every refusal: a rule that callers can know, and a message that says which file.
void check_refusal(const weightload::Error& error, const std::string& path);

// Equal but for where the data begins.
void check_same_tensors(const weightload::Header& one, const weightload::Header& other);
