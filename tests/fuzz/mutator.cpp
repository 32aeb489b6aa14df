// Changes inputs so that many of them stay files that are accepted, or are refused for one reason only: bytes changed
// at random nearly always break the header's length before anything else.
#include <cstring>
#include <initializer_list>
#include <optional>
#include <random>

#include "base/error.h"
#include "format/header.h"
#include "input.h"

using namespace weightload;

// The engine's own mutations of bytes in place; returns the new size.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

using Random = std::mt19937;

constexpr uint64_t kExtents[] = {0, 1, 2, 3, 4, 7, 8, 16, 63, 64, 255, 256, 257, 1000, 4096, 70'000};
constexpr uint64_t kNumbers[] = {0,          1,          2,          255,        4096,
                                 4097,       1ull << 31, 1ull << 32, 1ull << 61, (1ull << 62) - 1,
                                 1ull << 62, 1ull << 63, ~0ull - 7,  ~0ull};
const char* const kNames[] = {"a", "b", "", "layers.0.weight", "\xC3\xBC", "\xF0\x9F\x98\x80", "q\"\\\n", "a.b"};

uint64_t below(Random& random, uint64_t limit) { return random() % limit; }

template <class T, size_t N>
const T& any_of(Random& random, const T (&values)[N]) {
  return values[below(random, N)];
}

std::string mutate_bytes(std::string text, size_t most) {
  const size_t size = text.size();
  text.resize(std::max(size, most));
  text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), size, most));
  return text;
}

std::string join(const std::string& json, const std::string& data) {
  const uint64_t length = json.size();
  std::string file(kLengthBytes, '\0');
  std::memcpy(file.data(), &length, kLengthBytes);
  return file + json + data;
}

std::string quoted(const std::string& text) {
  static const char* const kDigits = "0123456789abcdef";
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20)
      out += std::string("\\u00") + kDigits[c >> 4] + kDigits[c & 15];
    else
      out += c;
  }
  return out + '"';
}

// A header with the ranges that its shapes call for, one behind the other. Returns the bytes that come after it.
uint64_t write_header(const Header& header, std::string& json) {
  uint64_t position = 0;
  json = "{";
  for (const TensorInfo& tensor : header.tensors) {
    uint64_t bits = dtype_bits(tensor.dtype);
    std::string shape;
    for (const uint64_t extent : tensor.shape) {
      bits *= extent;
      shape += (shape.empty() ? "" : ",") + std::to_string(extent);
    }
    json += json.size() > 1 ? "," : "";
    json += quoted(tensor.name) + ":{\"dtype\":\"" + std::string(dtype_name(tensor.dtype)) + "\",\"shape\":[" + shape +
            "],\"data_offsets\":[" + std::to_string(position) + "," + std::to_string(position + bits / 8) + "]}";
    position += bits / 8;
  }
  json += "}";
  return position;
}

TensorInfo new_tensor(Random& random) {
  TensorInfo tensor;
  tensor.name = below(random, 2) ? any_of(random, kNames) : "t" + std::to_string(below(random, 10'000));
  tensor.dtype = static_cast<Dtype>(below(random, kDtypeCount));
  for (uint64_t rank = below(random, 4); rank > 0; --rank) tensor.shape.push_back(any_of(random, kExtents));
  return tensor;
}

void change_tensors(Header& header, Random& random) {
  auto& tensors = header.tensors;
  const size_t at = tensors.empty() ? 0 : below(random, tensors.size());
  const auto where = tensors.begin() + static_cast<std::ptrdiff_t>(at);
  const uint64_t what = tensors.empty() ? 0 : below(random, 7);
  if (what <= 1) {
    tensors.insert(where, new_tensor(random));
  } else if (what == 2) {
    tensors.erase(where);
  } else if (what == 3) {
    std::swap(*where, tensors[below(random, tensors.size())]);
  } else if (what == 4) {
    where->dtype = static_cast<Dtype>(below(random, kDtypeCount));
  } else if (what == 5) {
    if (where->shape.empty()) where->shape.push_back(1);
    // Rarely huge: most huge files can only be refused.
    where->shape[below(random, where->shape.size())] =
        below(random, 8) ? any_of(random, kExtents) : any_of(random, kNumbers);
  } else {
    for (uint64_t i = below(random, 40); i > 0; --i) tensors.push_back(new_tensor(random));
  }
}

// Only what is accepted has tensors to change.
std::optional<Header> parse(const Input& input) {
  try {
    const uint64_t length = check_header_length(input.file, input.file_bytes(), "");
    if (length > input.file.size() - kLengthBytes) return std::nullopt;
    return parse_header(input.file.substr(kLengthBytes, length), input.file_bytes(), "");
  } catch (const Error&) {
    return std::nullopt;
  }
}

std::string change_header(const Input& input, Random& random, size_t most) {
  Header header = parse(input).value_or(Header());
  for (uint64_t i = 1 + below(random, 4); i > 0; --i) change_tensors(header, random);
  std::string json;
  const uint64_t needed = write_header(header, json);
  Choices choices = input.choices;
  choices.more_bytes = 0;
  // Bytes that do not fit are left out, as in a sparse file.
  const size_t room = most > json.size() + 64 ? std::min<size_t>(most - json.size() - 64, 1024) : 0;
  const size_t present = static_cast<size_t>(std::min<uint64_t>(needed, room));
  choices.more_bytes = needed - present;
  return write_input(choices, join(json, std::string(present, 'x')));
}

// Changes the JSON or the data as bytes, and mends the header's length.
std::string change_text(const Input& input, Random& random, size_t most) {
  const std::string file(input.file);
  uint64_t length = 0;
  if (file.size() >= kLengthBytes) std::memcpy(&length, file.data(), kLengthBytes);
  const size_t present = std::min<uint64_t>(length, file.size() - std::min<size_t>(file.size(), kLengthBytes));
  std::string json = file.size() >= kLengthBytes ? file.substr(kLengthBytes, present) : file;
  std::string data = file.size() >= kLengthBytes ? file.substr(kLengthBytes + present) : "";
  const size_t first = json.find_first_of("0123456789");
  if (below(random, 4) == 0 && first != std::string::npos) {
    size_t from = json.find_first_of("0123456789", below(random, json.size()));
    if (from == std::string::npos) from = first;
    const size_t to = json.find_first_not_of("0123456789", from);
    json.replace(from, to == std::string::npos ? to : to - from, std::to_string(any_of(random, kNumbers)));
  } else if (below(random, 8) == 0) {
    data = mutate_bytes(data, data.size() + 64);
  } else {
    json = mutate_bytes(json, std::max<size_t>(most > data.size() ? most - data.size() : 0, 64));
  }
  return write_input(input.choices, join(json, data));
}

std::string change_choices(const Input& input) {
  std::string bytes = write_input(input.choices, "");
  bytes = mutate_bytes(bytes, kChoicesBytes);
  bytes.resize(kChoicesBytes);
  return bytes.append(input.file);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  Random random(seed);
  const Input input = read_input({reinterpret_cast<const char*>(data), size});
  const uint64_t what = below(random, 16);
  std::string changed;
  if (what < 6) {
    changed = change_header(input, random, max_size);
  } else if (what < 12) {
    changed = change_text(input, random, max_size);
  } else if (what < 15) {
    changed = change_choices(input);
  } else {
    return LLVMFuzzerMutate(data, size, max_size);
  }
  if (changed.size() > max_size) changed.resize(max_size);
  std::memcpy(data, changed.data(), changed.size());
  return changed.size();
}
