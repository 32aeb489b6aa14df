// How an input of the fuzz target is made up: the choices of a load, and then a file, byte by byte.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

// Every value of every byte is a choice that a load could make.
struct Choices {
  uint8_t flags = 0;        // kDevice, ...
  uint8_t ranks = 0;        // one less than there are, modulo 64
  uint8_t root = 0;         // modulo the ranks
  uint8_t strategy = 0;     // modulo the strategies
  uint16_t block = 0;       // bytes of a block, less one
  uint16_t task = 0;        // bytes of a task, less one; of a slot, in kDirectAlignment, modulo 16, less one
  uint8_t files = 0;        // how many files have these tensors, less one, modulo 3
  uint8_t alignment = 0;    // of blocks: 64 (256 on devices) times two to the power of this, modulo 5
  uint16_t reserved = 0;    // keeps what follows at a multiple of 4
  uint32_t selection = 0;   // which tensors; 0 for all
  uint64_t more_bytes = 0;  // of zeros behind the input's own bytes: a sparse file

  static constexpr uint8_t kDevice = 1;
  static constexpr uint8_t kMap = 2;
  static constexpr uint8_t kSomeAlone = 4;      // some tensors are read into memory of the caller's
  static constexpr uint8_t kPad = 8 + 16 + 32;  // see padding_changes_nothing() in target.cpp; slow, so rare

  bool has(uint8_t flag) const { return (flags & flag) == flag; }
};

inline constexpr size_t kChoicesBytes = 24;
static_assert(sizeof(Choices) == kChoicesBytes, "no padding: the bytes of an input are copied into it");

struct Input {
  Choices choices;
  std::string_view file;

  uint64_t file_bytes() const { return file.size() + choices.more_bytes; }
};

// Missing choices are zeros. Files end below 2^63, as the kernel has it.
Input read_input(std::string_view bytes);

std::string write_input(const Choices& choices, std::string_view file);

// A well-mixed number from three.
uint64_t mix(uint64_t a, uint64_t b, uint64_t c);
