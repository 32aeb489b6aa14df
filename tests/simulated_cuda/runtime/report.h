#pragma once
#include <cstddef>
#include <string>

namespace simulated {

// Something that a test must know of: a race, a source that changed. Appended, a line each, to the file that
// WEIGHTLOAD_SIMULATED_CUDA_REPORTS names (processes share it), else told on stderr. Any thread.
void add_report(const std::string& line);
size_t reports();  // of this process

// Something that the simulation lacks was called: told on stderr, by name.
void say_unprovided(const char* name);

}  // namespace simulated
