// Pages in the page cache get into the page tables, whatever of them is asked for, and a file that shrank is an error.
#include "page_cache/page_tables.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "base/byte_range.h"
#include "base/unique_fd.h"
#include "check.h"
#include "file/fault_hook.h"
#include "memory/host_memory.h"

using namespace weightload;

namespace {

const size_t kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
constexpr uint64_t kWindow = 2 << 20;
const size_t kSize = (6 << 20) + 777;  // three windows of 2 MiB and a part, at least

// In memory, where no page is ever busy with being written.
struct MappedFile {
  MappedFile() : fd(::memfd_create("pages", MFD_CLOEXEC)) {
    const std::string bytes(kSize, 'x');
    CHECK(::write(fd.get(), bytes.data(), kSize) == static_cast<ssize_t>(kSize));
    memory = map_file(fd.get(), kSize, "pages");
  }

  char* page(size_t number) const { return memory->data() + number * kPage; }

  // By the kernel's own account.
  bool is_mapped(size_t number) const {
    const UniqueFd pagemap(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    uint64_t entry = 0;
    const uint64_t position = reinterpret_cast<uintptr_t>(page(number)) / kPage * sizeof(entry);
    CHECK(::pread(pagemap.get(), &entry, sizeof(entry), static_cast<off_t>(position)) == sizeof(entry));
    return (entry >> 63) != 0;
  }

  UniqueFd fd;
  HostMemoryRef memory;
};

const size_t kPages = (kSize + kPage - 1) / kPage;

void check_mapping_of(size_t first, size_t last, const PageTables& tables) {
  const MappedFile file;
  CHECK(!file.is_mapped(first));
  CHECK(tables.map_cached(file.page(first), file.page(last)) == 0);
  for (size_t page = first; page < last; ++page) CHECK(file.is_mapped(page));
}

}  // namespace

TEST(all_pages_of_a_range_are_mapped) {
  const PageTables tables;
  check_mapping_of(0, kPages, tables);
  check_mapping_of(3, kPages - 1, tables);
  check_mapping_of(17, 18, tables);
  check_mapping_of(15, 17, tables);
  check_mapping_of(500, 530, tables);
}

TEST(a_range_whose_neighbours_are_mapped_already_is_mapped_too) {
  const PageTables tables;
  for (const size_t middle : {size_t{1}, size_t{300}, size_t{601}, size_t{650}, size_t{1000}, kPages - 1}) {
    const MappedFile file;
    CHECK(tables.map_cached(file.page(middle), file.page(kPages)) == 0);
    CHECK(tables.map_cached(file.page(0), file.page(middle)) == 0);
    for (size_t page = 0; page < kPages; ++page) CHECK(file.is_mapped(page));
  }
}

TEST(a_whole_window_whose_last_page_somebody_else_has_mapped_is_mapped_too) {
  const PageTables tables;
  for (size_t windows = 1; windows <= 2; ++windows) {
    const MappedFile file;
    const uint64_t address = reinterpret_cast<uintptr_t>(file.memory->data());
    const size_t begin = static_cast<size_t>(round_up(address, kWindow) - address) / kPage;
    const size_t end = begin + windows * kWindow / kPage;
    CHECK(PageTables::populate(file.page(end - 1), file.page(end)) == 0);
    CHECK(tables.map_cached(file.page(begin), file.page(end)) == 0);
    for (size_t page = begin; page < end; ++page) CHECK(file.is_mapped(page));
  }
}

TEST(an_empty_range_needs_nothing) {
  const MappedFile file;
  CHECK(PageTables().map_cached(file.page(1), file.page(1)) == 0);
}

TEST(without_a_descriptor_they_are_mapped_too) {
  struct rlimit before{};
  CHECK(::getrlimit(RLIMIT_NOFILE, &before) == 0);
  const struct rlimit none{0, before.rlim_max};
  CHECK(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  const PageTables tables;
  CHECK(::setrlimit(RLIMIT_NOFILE, &before) == 0);
  check_mapping_of(0, kPages, tables);
}

TEST(pages_that_are_not_in_the_file_any_more_are_an_error) {
  const PageTables tables;
  for (const size_t kept : {size_t{0}, kPage, size_t{70'000}, size_t{3 << 20}}) {
    const MappedFile file;
    CHECK(::ftruncate(file.fd.get(), static_cast<off_t>(kept)) == 0);
    CHECK(tables.map_cached(file.page(0), file.page(kPages)) == EFAULT);
    CHECK(PageTables::populate(file.page(0), file.page(kPages)) == EFAULT);
  }
}

TEST(a_range_is_one_read_to_the_fault_hook) {
  const MappedFile file;
  const PageTables tables;
  fault_hook::arm({fault_hook::Fault::interrupt, 0, 1});
  CHECK(tables.map_cached(file.page(0), file.page(kPages)) == 0);
  CHECK(fault_hook::calls_since_armed() == 2);  // the one that was interrupted, and it again
  fault_hook::arm({fault_hook::Fault::error, 0, 1, EIO});
  CHECK(tables.map_cached(file.page(0), file.page(kPages)) == EIO);
  fault_hook::disarm();
}
