// The whole CPU pipeline without Python or torch, so that sanitizers see all of it.
#include "load/host_loader.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "base/error.h"
#include "check.h"
#include "checkpoint.h"
#include "file/fault_hook.h"
#include "page_cache/free_page_reporting.h"
#include "read/direct_file.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

HostLoaderOptions small_options(bool map) {
  HostLoaderOptions options;
  options.map = map;
  options.threads = 3;
  options.window_bytes = 100'000;
  options.task_bytes = 4096;
  options.block_bytes = 20'000;
  return options;
}

// Says so where it cannot: what is then not tested.
bool can_read_directly(const File& file) {
  const bool can = DirectFile::suits_private_memory() && DirectFile::open(file, true);
  if (!can) std::puts("  cannot read directly here");
  return can;
}

// Memory that is not ours, at any place of a block.
struct CallersMemory final : HostMemory {
  CallersMemory(HostMemoryRef whole, uint64_t begin, size_t size) : block(std::move(whole)) {
    data_ = block->data() + begin;
    size_ = size;
  }
  HostMemoryRef block;
};

void check_bytes(const CheckpointFiles& files, const HostTensor& tensor) {
  uint64_t number = 0;
  while (files[number].get() != tensor.file) ++number;
  const ByteRange bytes = tensor.info->bytes;
  for (uint64_t i = 0; i < bytes.size(); ++i)
    CHECK(static_cast<unsigned char>(tensor.data[i]) == byte_at(number, bytes.begin + i));
}

HostLoader::Step take(HostLoader& loader, HostTensor& tensor) {
  HostLoader::Step step;
  do {
    step = loader.next(tensor, milliseconds(1000));
  } while (step == HostLoader::Step::not_ready);
  return step;
}

// Loads everything and keeps all of it to the end, so that memory that is reused too early shows.
void load_and_check(const CheckpointFiles& files, const std::vector<std::vector<uint32_t>>& selection,
                    const HostLoaderOptions& options) {
  std::vector<HostTensor> kept;
  {
    HostLoader loader(files, selection, {}, nullptr, options);
    HostTensor tensor;
    while (take(loader, tensor) == HostLoader::Step::tensor) kept.push_back(tensor);
    CHECK(kept.size() == loader.tensor_count());
  }
  for (const HostTensor& tensor : kept) check_bytes(files, tensor);
}

}  // namespace

TEST(both_backends_give_the_files_bytes) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 2);
  for (bool map : {true, false}) {
    for (bool read_ahead : {true, false}) {
      HostLoaderOptions options = small_options(map);
      options.read_ahead = read_ahead;
      load_and_check(files, everything(files), options);
    }
  }
}

// Where free memory is reported to a host, and where it is not: whatever pages the cold files come in.
TEST(cold_files_give_their_bytes) {
  for (const bool reported : {false, true}) {
    pretend_free_pages_are_reported(reported);
    TemporaryFile file(0, {12 << 20, 3, 5 << 20});
    const CheckpointFiles files{CheckpointFile::open(file.path)};
    CHECK(::fsync(files[0]->file()->descriptor().get()) == 0);
    CHECK(::posix_fadvise(files[0]->file()->descriptor().get(), 0, 0, POSIX_FADV_DONTNEED) == 0);
    load_and_check(files, {{0, 1, 2}}, HostLoaderOptions{});
  }
  pretend_free_pages_are_reported(std::nullopt);
}

TEST(more_files_than_mappings_get_private_memory) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 2);
  for (const size_t most : {0u, 1u, 2u}) {
    HostLoaderOptions options = small_options(true);
    options.most_maps = most;
    load_and_check(files, everything(files), options);
    HostLoader loader(files, everything(files), {}, nullptr, options);
    HostTensor tensor;
    while (take(loader, tensor) == HostLoader::Step::tensor) {
    }
    for (size_t f = 0; f < files.size(); ++f) CHECK((loader.counts().files[f].mapped_bytes > 0) == (f < most));
  }
}

TEST(direct_reads_give_the_files_bytes) {
  const TemporaryFile one(0, {1, 5000, 3'000'001, 0, 70'000, 2'500'000});
  const TemporaryFile other(1, {4'000'000, 777, 4096, 2'100'000, 3});
  const auto files = CheckpointFile::open_all({one.path, other.path}, 2);
  for (const uint64_t task_bytes : {uint64_t{4096}, uint64_t{100'000}, uint64_t{1} << 20}) {
    for (const uint64_t block_bytes : {uint64_t{20'000}, uint64_t{64} << 20}) {
      HostLoaderOptions options = small_options(false);
      options.read = ReadMode::direct;
      options.window_bytes = 3 << 20;
      options.task_bytes = task_bytes;
      options.block_bytes = block_bytes;
      load_and_check(files, everything(files), options);
      load_and_check(files, {{1, 2, 5}, {0, 2, 3}}, options);
    }
  }
}

TEST(what_can_be_read_directly_is) {
  const TemporaryFile temporary(0, {3'000'001, 10, 2'500'000});
  const auto files = CheckpointFile::open_all({temporary.path}, 1);
  if (!can_read_directly(*files[0]->file())) return;
  HostLoaderOptions options = small_options(false);
  options.block_bytes = 64 << 20;
  options.task_bytes = 1 << 20;
  options.read = ReadMode::direct;
  HostLoader loader(files, everything(files), {}, nullptr, options);
  HostTensor tensor;
  while (take(loader, tensor) == HostLoader::Step::tensor) check_bytes(files, tensor);
  CHECK(loader.counts().files[0].direct_bytes == 5'500'011);
  CHECK(loader.counts().files[0].wanted_bytes == 5'500'011);
  CHECK(loader.counts().files[0].rounded_bytes > 0);
  CHECK(loader.counts().files[0].buffered_bytes == 0);
}

TEST(memory_of_the_callers_is_read_directly_by_way_of_a_bounce_buffer) {
  constexpr uint64_t kSize = 9'000'001;
  const TemporaryFile temporary(0, {5, kSize});
  const auto files = CheckpointFile::open_all({temporary.path}, 1);
  HostLoaderOptions options = small_options(false);
  options.task_bytes = 4 << 20;
  options.read = ReadMode::direct;
  const uint64_t phase = files[0]->header().tensors[1].bytes.begin % kDirectAlignment;
  for (const uint64_t lead : {uint64_t{0}, phase}) {           // the second lies as the file does
    const HostMemoryRef block = allocate_block(kSize + 8192);  // its end does not fill the last disk block either
    std::memset(block->data(), 'x', kSize + 8192);
    const auto memory = HostMemoryRef::adopt(new CallersMemory(block, lead, kSize));
    HostLoader loader(files, {{1}}, {memory}, nullptr, options);
    HostTensor tensor;
    CHECK(take(loader, tensor) == HostLoader::Step::tensor);
    CHECK(tensor.in_place);
    for (uint64_t i = 0; i < kSize; ++i)
      CHECK(static_cast<unsigned char>(memory->data()[i]) == byte_at(0, tensor.info->bytes.begin + i));
    for (uint64_t i = 0; i < lead; ++i) CHECK(block->data()[i] == 'x');
    for (uint64_t i = lead + kSize; i < kSize + 8192; ++i) CHECK(block->data()[i] == 'x');
    if (can_read_directly(*files[0]->file())) CHECK(loader.counts().files[0].direct_bytes >= 8'000'000);
  }
}

TEST(a_selection_gives_those_tensors_only) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  for (bool map : {true, false}) {
    load_and_check(files, {{1, 3, 5}, {}, {2}}, small_options(map));
    load_and_check(files, {{}, {0, 7, 8, 299}, {0, 1}}, small_options(map));
    load_and_check(files, {{}, {}, {}}, small_options(map));
  }
}

TEST(unselected_bytes_are_not_read) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  fault_hook::arm({fault_hook::Fault::delay, 0, 0, 0, milliseconds(0)});
  load_and_check(files, {{1}, {}, {}}, small_options(false));
  CHECK(fault_hook::calls_since_armed() <= 3);  // 5,000 bytes in tasks cut at multiples of 4,096
  fault_hook::disarm();
}

TEST(short_reads_and_interrupts_are_continued) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  for (auto fault : {fault_hook::Fault::short_read, fault_hook::Fault::interrupt}) {
    fault_hook::arm({fault, 0, 40, 0, {}});
    load_and_check(files, everything(files), small_options(false));
    fault_hook::arm({fault, 0, 40, 0, {}});
    CheckpointFile::open_all(checkpoint.paths(), 1);
  }
  fault_hook::disarm();
}

TEST(an_error_at_any_call_is_thrown_with_its_place) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  for (uint64_t first = 0; first < 60; first += 7) {
    fault_hook::arm({fault_hook::Fault::error, first, 1'000'000, EIO, {}});
    HostLoader loader(files, everything(files), {}, nullptr, small_options(false));
    HostTensor tensor;
    const auto all = [&] {
      while (take(loader, tensor) == HostLoader::Step::tensor) check_bytes(files, tensor);
    };
    CHECK_THROWS(all(), Error,
                 error.kind == ErrorKind::read && error.context.error_number == EIO && error.context.offset &&
                     !error.context.path.empty());
    fault_hook::disarm();
  }
}

TEST(leaving_early_joins_and_keeps_what_was_taken) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  for (size_t count = 0; count < 40; count += 3) {
    std::vector<HostTensor> kept;
    {
      HostLoader loader(files, everything(files), {}, nullptr, small_options(count % 2 == 0));
      for (size_t i = 0; i < count; ++i) {
        HostTensor tensor;
        CHECK(take(loader, tensor) == HostLoader::Step::tensor);
        kept.push_back(tensor);
      }
    }
    for (const HostTensor& tensor : kept) check_bytes(files, tensor);
  }
}

// It has none of the threads: whoever waits for them, or for what they wait on, waits for ever.
TEST(a_forked_child_is_told_and_lets_go) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  auto loader = std::make_unique<HostLoader>(files, everything(files), std::vector<HostMemoryRef>{}, nullptr,
                                             small_options(false));
  HostTensor tensor;
  CHECK(take(*loader, tensor) == HostLoader::Step::tensor);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    CHECK_THROWS(loader->next(tensor, milliseconds(0)), Error, error.kind == ErrorKind::usage);
    loader.reset();
    ::_exit(0);
  }
  int status = -1;
  CHECK(::waitpid(child, &status, 0) == child && status == 0);
  while (take(*loader, tensor) == HostLoader::Step::tensor) check_bytes(files, tensor);
}

TEST(two_loads_at_once) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  std::thread other([&] { load_and_check(files, everything(files), small_options(true)); });
  load_and_check(files, everything(files), small_options(false));
  other.join();
}

TEST(an_interrupt_from_another_thread_ends_a_wait) {
  const Checkpoint checkpoint;
  const auto files = CheckpointFile::open_all(checkpoint.paths(), 1);
  fault_hook::arm({fault_hook::Fault::delay, 0, 1'000'000, 0, milliseconds(20)});
  HostLoader loader(files, everything(files), {}, nullptr, small_options(false));
  std::thread stopper([&] { loader.interrupt(); });
  HostTensor tensor;
  while (loader.next(tensor, milliseconds(60'000)) != HostLoader::Step::end) {
  }
  stopper.join();
  loader.close();
  fault_hook::disarm();
}
