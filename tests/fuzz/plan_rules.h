// What must hold of the plans of every load of an accepted file. All in terms of ranges, not of bytes: files may be as
// large as the kernel lets them be.
#pragma once
#include <vector>

#include "format/header.h"
#include "input.h"
#include "plan/layout.h"
#include "plan/read_plan.h"
#include "plan/slot_plan.h"

// Plans the load that `choices` ask for, on every rank, as the loaders do, and checks each plan.
void check_plans(const weightload::Header& header, const Choices& choices);

void check_layout(const std::vector<weightload::TensorExtent>& tensors, const weightload::LayoutOptions& options,
                  const weightload::Layout& layout);

// `plans` has each rank's; `options` may be any rank's.
void check_reads(const weightload::Layout& layout, const weightload::ReadPlanOptions& options,
                 const std::vector<weightload::ReadPlan>& plans);

void check_slots(const weightload::Layout& layout, const std::vector<weightload::ReadTask>& reads, uint64_t slot_bytes,
                 const weightload::SlotPlan& plan);
