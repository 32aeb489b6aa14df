#include "read/read_rates.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <utility>

#include "base/fork_generation.h"
#include "base/of_this_process.h"

namespace weightload {
namespace {

// Ranges each way before the comparison counts: on a small machine twice as many as a load's threads have in hand at
// once. With more threads all are tried at once, and the second chances tell.
constexpr uint64_t kTrials = 8;

// One in this many reads goes the way that is the slower so far. At half the other's speed that costs under two
// percent.
constexpr uint64_t kSecondChance = 64;

// Smaller reads say more about system calls than about the disk.
constexpr uint64_t kLeastBytes = 256 << 10;

// How much of the average a new reading is, once there are some.
constexpr double kWeight = 0.1;

struct FileSystems {
  const uint32_t generation = fork_generation();
  std::mutex mutex;
  std::map<std::pair<uint64_t, ReadInto>, std::unique_ptr<ReadRates>> rates;
};

}  // namespace

ReadRates& ReadRates::of(const File& file, ReadInto memory) {
  auto& all = of_this_process<FileSystems>();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto& found = all.rates[{file.device(), memory}];
  if (!found) found = std::make_unique<ReadRates>();
  return *found;
}

bool ReadRates::choose_direct() {
  std::lock_guard<std::mutex> lock(mutex_);
  bool direct;
  if (direct_.chosen < kTrials) {
    direct = true;
  } else if (buffered_.chosen < kTrials || buffered_.recorded == 0) {
    direct = false;
  } else {
    direct = direct_.ns_per_byte <= buffered_.ns_per_byte;
    if ((direct_.chosen + buffered_.chosen) % kSecondChance == 0) direct = !direct;
  }
  ++(direct ? direct_ : buffered_).chosen;
  return direct;
}

void ReadRates::record(bool direct, uint64_t bytes, uint64_t nanoseconds) {
  if (bytes < kLeastBytes) return;
  const double now = static_cast<double>(nanoseconds) / static_cast<double>(bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  Way& way = direct ? direct_ : buffered_;
  ++way.recorded;
  const double weight = std::max(kWeight, 1.0 / static_cast<double>(way.recorded));
  way.ns_per_byte += (now - way.ns_per_byte) * weight;
}

}  // namespace weightload
