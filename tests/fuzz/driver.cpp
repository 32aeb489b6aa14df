// Stands in for libFuzzer where there is no clang: replays files, then runs inputs that are made from them by the same
// mutator, in an order that follows from the seed. Understands the options of libFuzzer's that are used here, and
// prints its statistics.
//
//     program [-runs=N] [-max_total_time=SECONDS] [-seed=N] [-dict=FILE] [-artifact_prefix=FOLDER/] files and folders
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed);

namespace {

constexpr size_t kMostBytes = 16 << 10;

std::mt19937_64 generator;
std::vector<std::string> tokens;
std::string artifact;  // where an input that fails is kept
const std::string* running = nullptr;

size_t below(size_t limit) { return static_cast<size_t>(generator() % limit); }

std::string contents(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void keep_input() {
  if (!running) return;
  std::ofstream(artifact, std::ios::binary) << *running;
  std::fprintf(stderr, "the input is in %s\n", artifact.c_str());
  running = nullptr;
}

void aborted(int) {
  keep_input();
  std::_Exit(77);
}

void run(const std::string& input) {
  running = &input;
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
  running = nullptr;
}

// Lines of the form name="text", where \xAB is a byte and \\ and \" are themselves.
void read_dictionary(const std::string& path) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find('"'), last = line.rfind('"');
    if (line.empty() || line[0] == '#' || first == last) continue;
    std::string token;
    for (size_t i = first + 1; i < last; ++i) {
      if (line[i] == '\\' && line[i + 1] == 'x') {
        token += static_cast<char>(std::stoi(line.substr(i + 2, 2), nullptr, 16));
        i += 3;
      } else {
        if (line[i] == '\\') ++i;
        token += line[i];
      }
    }
    tokens.push_back(token);
  }
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  for (size_t i = 1 + below(4); i > 0; --i) {
    const size_t at = below(text.size() + 1), count = 1 + below(8);
    switch (below(6)) {
      case 0: text.insert(at, 1, static_cast<char>(below(256))); break;
      case 1: text.erase(at, count); break;
      case 2: text.insert(at, tokens.empty() ? "" : tokens[below(tokens.size())]); break;
      case 3: text.insert(at, text.substr(below(text.size() + 1), count * 8)); break;
      case 4:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ 1 << below(8));
        break;
      default:
        if (at < text.size()) text[at] = static_cast<char>(below(256));
    }
  }
  text.resize(std::min(text.size(), max_size));
  std::memcpy(data, text.data(), text.size());
  return text.size();
}

int main(int count, char** arguments) {
  std::map<std::string, std::string> options;
  std::vector<std::filesystem::path> paths;
  for (int i = 1; i < count; ++i) {
    const std::string text = arguments[i];
    if (text[0] == '-')
      options[text.substr(1, text.find('=') - 1)] = text.substr(text.find('=') + 1);
    else if (std::filesystem::is_directory(text))
      std::copy(std::filesystem::directory_iterator(text), {}, std::back_inserter(paths));
    else
      paths.emplace_back(text);
  }
  const auto number = [&](const char* name) { return options.count(name) ? std::stoll(options[name]) : 0LL; };
  const long long seconds = number("max_total_time"), seed = number("seed");
  const auto runs = static_cast<uint64_t>(number("runs"));  // -1: without end
  generator.seed(static_cast<uint64_t>(seed));
  artifact = options["artifact_prefix"] + "crash-seed-" + std::to_string(seed);
  if (options.count("dict")) read_dictionary(options["dict"]);
  __sanitizer_set_death_callback(keep_input);
  std::signal(SIGABRT, aborted);

  std::sort(paths.begin(), paths.end());
  std::vector<std::string> inputs;
  for (const auto& path : paths) run(inputs.emplace_back(contents(path)));

  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  uint64_t done = inputs.size();
  while (!inputs.empty() && done < runs && (seconds == 0 || std::chrono::steady_clock::now() < end)) {
    std::string input = inputs[below(inputs.size())];
    for (size_t i = 1 + below(5); i > 0; --i) {
      const size_t size = input.size();
      input.resize(std::max(size, kMostBytes));
      input.resize(LLVMFuzzerCustomMutator(reinterpret_cast<uint8_t*>(input.data()), size, input.size(),
                                           static_cast<unsigned>(generator())));
    }
    run(input);
    ++done;
  }
  std::printf("stat::number_of_executed_units: %llu\n", static_cast<unsigned long long>(done));
}
