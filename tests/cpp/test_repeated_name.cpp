#include "base/repeated_name.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "check.h"
#include "one_hash.h"

using namespace weightload;

namespace {

size_t comparisons = 0;

std::vector<std::string_view> views(const std::vector<std::string>& names) { return {names.begin(), names.end()}; }

}  // namespace

// In the place of the C library's, with which strings compare their bytes: counts. Not instrumented, because others
// may call it before a sanitizer is ready.
extern "C" __attribute__((no_sanitize("address", "thread", "undefined"))) int memcmp(const void* a, const void* b,
                                                                                     size_t size) {
  ++comparisons;
  const auto* const left = static_cast<const volatile unsigned char*>(a);
  const auto* const right = static_cast<const volatile unsigned char*>(b);
  for (size_t i = 0; i < size; ++i) {
    if (left[i] != right[i]) return left[i] < right[i] ? -1 : 1;
  }
  return 0;
}

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

TEST(all_that_repeat) {
  using Groups = std::vector<std::vector<size_t>>;
  CHECK(all_repeated({}).empty());
  CHECK(all_repeated({"b", "a", "", "ab"}).empty());
  CHECK((all_repeated({"a", "a"}) == Groups{{0, 1}}));
  CHECK((all_repeated({"a", "b", "c", "b", "a", "a", ""}) == Groups{{1, 3}, {0, 4, 5}}));
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
    const auto all = all_repeated(views(names));
    CHECK(all.empty() ? !expected : all[0][1] == expected);
    size_t repeating = 0, found = 0;
    for (const std::string& name : names) repeating += std::count(names.begin(), names.end(), name) > 1;
    for (const std::vector<size_t>& numbers : all) {
      found += numbers.size();
      for (size_t i = 1; i < numbers.size(); ++i)
        CHECK(numbers[i - 1] < numbers[i] && names[numbers[0]] == names[numbers[i]]);
    }
    CHECK(found == repeating);
  }
}

TEST(names_of_one_hash_are_told_apart) {
  std::vector<std::string> names = names_of_one_hash(6);
  CHECK(!first_repeated(views(names)));
  names.push_back(names[17]);
  names.push_back(names[3]);
  CHECK(first_repeated(views(names)) == 64);
}

TEST(names_made_to_have_one_hash_are_compared_no_more_often_than_by_a_sort) {
  const std::vector<std::string> hostile = names_of_one_hash(14);
  const std::hash<std::string> hash;
  const bool collide = std::all_of(hostile.begin(), hostile.end(),
                                   [&](const std::string& name) { return hash(name) == hash(hostile[0]); });
#if defined(__GLIBCXX__) && defined(__x86_64__)
  CHECK(collide);
#endif
  if (!collide) return;
  comparisons = 0;
  CHECK(!first_repeated(views(hostile)));
  const auto count = static_cast<double>(hostile.size());
  CHECK(static_cast<double>(comparisons) >= count - 1);  // each with its neighbour at the least: they are counted
  CHECK(static_cast<double>(comparisons) <= 4 * count * std::log2(count));
}
