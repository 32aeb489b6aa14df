#include "plan_rules.h"

#include <algorithm>

using namespace weightload;

namespace {

constexpr uint64_t kMostPieces = 4096;  // keeps the plans of a huge file small enough to be looked at

std::vector<TensorExtent> select(const Header& header, const Choices& choices) {
  std::vector<TensorExtent> tensors;
  const uint32_t files = 1u + choices.files % 3;
  for (uint32_t file = 0; file < files; ++file) {
    for (uint32_t i = 0; i < header.tensors.size(); ++i) {
      const uint64_t lot = mix(choices.selection, file, i);
      if (choices.selection != 0 && lot % 4 == 0) continue;
      const TensorInfo& info = header.tensors[i];
      TensorExtent tensor{file, info.bytes, 1, false, choices.has(Choices::kSomeAlone) && lot / 4 % 4 == 0};
      if (!choices.has(Choices::kDevice)) {
        tensor.alignment = dtype_alignment(info.dtype);
        tensor.mapped =
            choices.has(Choices::kMap) && !tensor.alone && info.bytes.begin % dtype_alignment(info.dtype) == 0;
      }
      tensors.push_back(tensor);
    }
  }
  return tensors;
}

// A size of blocks or tasks, enlarged until `total` is not too many of them.
uint64_t enlarge(uint64_t bytes, uint64_t total) {
  while (total / bytes > kMostPieces) bytes *= 2;
  return bytes;
}

ReadPlanOptions read_options(const Choices& choices, uint64_t total) {
  ReadPlanOptions options;
  options.ranks = 1u + choices.ranks % 64;
  options.root = choices.root % options.ranks;
  options.strategy = static_cast<Strategy>(choices.strategy % 3);
  options.task_bytes = choices.has(Choices::kDevice) ? kDirectAlignment * (1u + choices.task % 16) : 1u + choices.task;
  options.task_bytes = enlarge(options.task_bytes, total);
  return options;
}

}  // namespace

void check_plans(const Header& header, const Choices& choices) {
  const std::vector<TensorExtent> tensors = select(header, choices);
  uint64_t total = 0;
  for (const TensorExtent& tensor : tensors) total += tensor.bytes.size();
  const bool device = choices.has(Choices::kDevice);

  LayoutOptions layout_options;
  layout_options.align_every_tensor = device;
  layout_options.block_alignment = (device ? 256u : 64u) << choices.alignment % 5;
  layout_options.block_bytes = enlarge(1u + choices.block, total);
  const Layout layout = plan_layout(tensors, layout_options);
  check_layout(tensors, layout_options, layout);

  ReadPlanOptions options = read_options(choices, total);
  std::vector<ReadPlan> plans;
  for (options.rank = 0; options.rank < options.ranks; ++options.rank) {
    plans.push_back(plan_reads(layout, options));
    if (options.rank > 0 && options.strategy == Strategy::independent) {
      plans.pop_back();  // every rank's is the same
      break;
    }
  }
  check_reads(layout, options, plans);
  if (!device) return;
  for (const ReadPlan& plan : plans) {
    const uint64_t slot_bytes = options.task_bytes;
    check_slots(layout, plan.tasks, slot_bytes, plan_slots(plan.tasks, layout.blocks.size(), slot_bytes));
  }
}
