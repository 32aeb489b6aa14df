// Small checkpoints whose every byte is known by its place in the file.
#pragma once
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "checkpoint/checkpoint_file.h"

inline unsigned char byte_at(uint64_t file, uint64_t offset) {
  return static_cast<unsigned char>((offset * 31 + offset / 251 + file * 17) & 0xff);
}

// A file of tensors of the given sizes (U8), bytes known by their offset. Deleted with the object.
class TemporaryFile {
 public:
  TemporaryFile(uint64_t number, const std::vector<uint64_t>& sizes) : number_(number) {
    const char* const folder = std::getenv("TMPDIR");
    path = std::string(folder ? folder : "/tmp") + "/weightload-test-XXXXXX";
    const int fd = ::mkstemp(path.data());
    CHECK(fd >= 0);
    ::close(fd);
    std::string json = "{";
    uint64_t position = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (i > 0) json += ",";
      json += "\"" + std::to_string(number) + "." + std::to_string(i) + "\":{\"dtype\":\"U8\",\"shape\":[" +
              std::to_string(sizes[i]) + "],\"data_offsets\":[" + std::to_string(position) + "," +
              std::to_string(position + sizes[i]) + "]}";
      position += sizes[i];
    }
    json += "}";
    std::ofstream out(path, std::ios::binary);
    const uint64_t length = json.size();
    out.write(reinterpret_cast<const char*>(&length), 8);
    out << json;
    const uint64_t begin = 8 + length;
    std::string data(position, '\0');
    for (uint64_t i = 0; i < position; ++i) data[i] = static_cast<char>(byte_at(number, begin + i));
    out << data;
  }
  ~TemporaryFile() { ::unlink(path.c_str()); }

  std::string path;

 private:
  uint64_t number_;
};

struct Checkpoint {
  Checkpoint() {
    files.push_back(std::make_unique<TemporaryFile>(0, std::vector<uint64_t>{1, 5000, 0, 70'000, 3, 1'000'000}));
    files.push_back(std::make_unique<TemporaryFile>(1, std::vector<uint64_t>(300, 777)));
    files.push_back(std::make_unique<TemporaryFile>(2, std::vector<uint64_t>{0, 0, 4'000'000}));
  }
  std::vector<std::string> paths() const {
    std::vector<std::string> list;
    for (const auto& file : files) list.push_back(file->path);
    return list;
  }
  std::vector<std::unique_ptr<TemporaryFile>> files;
};

inline std::vector<std::vector<uint32_t>> everything(const weightload::CheckpointFiles& files) {
  std::vector<std::vector<uint32_t>> selection;
  for (const auto& file : files) {
    selection.emplace_back();
    for (uint32_t i = 0; i < file->header().tensors.size(); ++i) selection.back().push_back(i);
  }
  return selection;
}
