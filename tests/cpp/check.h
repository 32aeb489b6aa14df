// Just enough to write the core's unit tests in: CHECK, and a main that runs the TESTs of one program.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK(%s) failed\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

#define CHECK_THROWS(expression, type, condition) \
  do {                                            \
    bool thrown = false;                          \
    try {                                         \
      expression;                                 \
    } catch (const type& error) {                 \
      thrown = true;                              \
      CHECK(condition);                           \
    }                                             \
    CHECK(thrown);                                \
  } while (false)

using Tests = std::vector<std::pair<std::string, std::function<void()>>>;

inline Tests& all_tests() {
  static Tests tests;
  return tests;
}

struct AddTest {
  AddTest(const char* name, std::function<void()> body) { all_tests().emplace_back(name, std::move(body)); }
};

#define TEST(name)                              \
  static void name();                           \
  static const AddTest add_##name(#name, name); \
  static void name()

int main() {
  for (const auto& [name, body] : all_tests()) {
    std::printf("%s\n", name.c_str());
    body();
  }
  std::printf("%zu tests passed\n", all_tests().size());
}
