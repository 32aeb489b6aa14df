#include "file/file_system.h"

#include <linux/magic.h>

namespace weightload {
namespace {

// linux/magic.h has not all of them. Values: statfs(2).
constexpr unsigned kCephMagic = 0x00c36400;
constexpr unsigned kCifsMagic = 0xff534d42;
constexpr unsigned kSmb2Magic = 0xfe534d42;
constexpr unsigned kLustreMagic = 0x0bd00bd0;

}  // namespace

Storage storage_of(const File& file) {
  switch (file.file_system()) {
    case TMPFS_MAGIC:
    case RAMFS_MAGIC:
    case HUGETLBFS_MAGIC: return Storage::memory;
    case 0:  // not known
    case NFS_SUPER_MAGIC:
    case SMB_SUPER_MAGIC:
    case V9FS_MAGIC:
    case AFS_SUPER_MAGIC:
    case OVERLAYFS_SUPER_MAGIC:
    case kCephMagic:
    case kCifsMagic:
    case kSmb2Magic:
    case kLustreMagic: return Storage::shared;
    case FUSE_SUPER_MAGIC: return Storage::user_space;
    default: return Storage::disk;
  }
}

}  // namespace weightload
