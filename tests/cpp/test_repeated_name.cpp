#include "base/repeated_name.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <string>

#include "check.h"
#include "one_hash.h"

using namespace weightload;

namespace {

std::vector<std::string_view> views(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

std::chrono::nanoseconds least_time(const std::vector<std::string>& names) {
  auto least = std::chrono::nanoseconds::max();
  for (int i = 0; i < 3; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    CHECK(!first_repeated(views(names)));
    least = std::min<std::chrono::nanoseconds>(least, std::chrono::steady_clock::now() - begin);
  }
  return least;
}

}  // namespace

TEST(names_that_differ) {
  CHECK(!first_repeated({}));
  CHECK(!first_repeated({""}));
  CHECK(!first_repeated({"b", "a", "", "ab", std::string_view("a\0", 2)}));
}

TEST(the_first_that_was_there_before) {
  CHECK(first_repeated({"a", "a"}) == 1);
  CHECK(first_repeated({"", "x", ""}) == 2);
  CHECK(first_repeated({"a", "b", "c", "b", "a", "a"}) == 3);
}

TEST(the_same_as_by_comparing_all_with_all) {
  uint64_t state = 1;
  for (int round = 0; round < 500; ++round) {
    std::vector<std::string> names;
    for (int i = 0; i < 12; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      names.push_back(std::to_string((state >> 33) % 60));
    }
    std::optional<size_t> expected;
    for (size_t i = names.size(); i-- > 0;) {
      if (std::find(names.begin(), names.begin() + static_cast<std::ptrdiff_t>(i), names[i]) !=
          names.begin() + static_cast<std::ptrdiff_t>(i))
        expected = i;
    }
    CHECK(first_repeated(views(names)) == expected);
  }
}

TEST(names_of_one_hash_are_told_apart) {
  std::vector<std::string> names = names_of_one_hash(6);
  CHECK(!first_repeated(views(names)));
  names.push_back(names[17]);
  names.push_back(names[3]);
  CHECK(first_repeated(views(names)) == 64);
}

TEST(names_made_to_have_one_hash_take_no_longer_than_a_sort) {
  const std::vector<std::string> hostile = names_of_one_hash(14);
  const std::hash<std::string> hash;
  const bool collide = std::all_of(hostile.begin(), hostile.end(),
                                   [&](const std::string& name) { return hash(name) == hash(hostile[0]); });
#if defined(__GLIBCXX__) && defined(__x86_64__)
  CHECK(collide);
#endif
  if (!collide) return;
  std::vector<std::string> ordinary;
  for (size_t i = 0; i < hostile.size(); ++i) ordinary.push_back(std::string(200, 'x') + std::to_string(i));
  CHECK(least_time(hostile) < 30 * least_time(ordinary));
}
