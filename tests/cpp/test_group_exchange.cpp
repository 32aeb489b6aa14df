// Loads that ranks share, with threads as ranks, so that sanitizers see all of it.
#include "group/exchange.h"

#include <functional>
#include <thread>

#include "check.h"
#include "checkpoint.h"
#include "fake_group.h"
#include "file/fault_hook.h"
#include "group/rank_status.h"
#include "group/registry.h"
#include "load/host_loader.h"

using namespace weightload;
using std::chrono::milliseconds;

namespace {

const std::string kRecord(1, GroupExchange::kAgreed);

HostLoaderOptions small_options() {
  HostLoaderOptions options;
  options.threads = 2;
  options.window_bytes = 100'000;
  options.task_bytes = 4096;
  options.block_bytes = 20'000;
  return options;
}

struct Outcome {
  std::vector<std::string> names;  // of the tensors that were yielded
  std::optional<Error> error;
};

// A rank's load. `stop_at`: leaves before that tensor.
class Rank {
 public:
  Rank(FakeGroup& group, uint32_t rank, Strategy strategy, const Checkpoint& checkpoint)
      : exchange_(std::make_shared<GroupExchange>(group.rank(rank), strategy, "load of 3 files")),
        files_(CheckpointFile::open_all(checkpoint.paths(), 1)) {}

  void agree() {
    Records records;
    while (!exchange_->agree(kRecord, true, {}, milliseconds(1000), records)) {
    }
    loader_ = std::make_unique<HostLoader>(files_, everything(files_), std::vector<HostMemoryRef>{},
                                           std::move(exchange_), small_options());
  }

  Outcome run(size_t stop_at = SIZE_MAX) {
    Outcome outcome;
    std::vector<HostTensor> kept;
    try {
      agree();
      HostTensor tensor;
      while (outcome.names.size() < stop_at) {
        const HostLoader::Step step = loader_->next(tensor, milliseconds(1000));
        if (step == HostLoader::Step::end) break;
        if (step == HostLoader::Step::not_ready) continue;
        outcome.names.push_back(tensor.info->name);
        kept.push_back(tensor);
      }
    } catch (const Error& error) {
      outcome.error.emplace(error);
    }
    for (const HostTensor& tensor : kept) check(tensor);
    loader_.reset();
    return outcome;
  }

  HostLoader& loader() { return *loader_; }
  void close() { loader_.reset(); }

 private:
  void check(const HostTensor& tensor) const {
    uint64_t number = 0;
    while (files_[number].get() != tensor.file) ++number;
    const ByteRange bytes = tensor.info->bytes;
    for (uint64_t i = 0; i < bytes.size(); ++i)
      CHECK(static_cast<unsigned char>(tensor.data[i]) == byte_at(number, bytes.begin + i));
  }

  std::shared_ptr<GroupExchange> exchange_;
  CheckpointFiles files_;
  std::unique_ptr<HostLoader> loader_;
};

std::vector<Outcome> on_all(uint32_t ranks, const std::function<Outcome(uint32_t)>& body) {
  std::vector<Outcome> outcomes(ranks);
  std::vector<std::thread> threads;
  for (uint32_t r = 0; r < ranks; ++r) threads.emplace_back([&, r] { outcomes[r] = body(r); });
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

constexpr Strategy kShared[] = {Strategy::broadcast, Strategy::striped};

}  // namespace

TEST(every_rank_gets_every_byte) {
  const Checkpoint checkpoint;
  for (const Strategy strategy : kShared) {
    for (const uint32_t ranks : {2u, 3u, 4u}) {
      FakeGroup group(ranks);
      const auto outcomes = on_all(ranks, [&](uint32_t r) { return Rank(group, r, strategy, checkpoint).run(); });
      for (const Outcome& outcome : outcomes) CHECK(!outcome.error && outcome.names.size() == 309);
      CHECK(group.unmatched() == 0);
    }
  }
}

TEST(a_read_error_of_one_rank_is_every_ranks_and_comes_at_the_same_tensor) {
  const Checkpoint checkpoint;
  for (const Strategy strategy : kShared) {
    for (const uint64_t first : {20u, 90u, 700u}) {
      FakeGroup group(3);
      std::vector<std::unique_ptr<Rank>> ranks;
      for (uint32_t r = 0; r < 3; ++r) ranks.push_back(std::make_unique<Rank>(group, r, strategy, checkpoint));
      fault_hook::Plan plan;
      plan.error_number = 5;
      plan.first = first;
      fault_hook::arm(plan);
      const auto outcomes = on_all(3, [&](uint32_t r) { return ranks[r]->run(); });
      fault_hook::disarm();
      for (const Outcome& outcome : outcomes) {
        CHECK(outcome.error && outcome.error->kind == ErrorKind::read && outcome.error->context.error_number == 5);
        CHECK(outcome.error->context.rank && !outcome.error->context.path.empty() && outcome.error->context.offset);
        CHECK(!outcome.error->context.tensor.empty());
        CHECK(std::string(outcome.error->what()) == outcomes[0].error->what());
        CHECK(outcome.names == outcomes[0].names);
      }
      CHECK(group.unmatched() == 0);
    }
  }
}

TEST(a_rank_that_leaves_ends_the_others) {
  const Checkpoint checkpoint;
  for (const Strategy strategy : kShared) {
    for (const size_t stop_at : {0u, 1u, 4u, 100u, 308u}) {
      FakeGroup group(3);
      const auto outcomes =
          on_all(3, [&](uint32_t r) { return Rank(group, r, strategy, checkpoint).run(r == 1 ? stop_at : SIZE_MAX); });
      CHECK(!outcomes[1].error);
      for (const uint32_t r : {0u, 2u}) {
        // Where everything was on its way already, the others finish.
        CHECK(outcomes[r].error || outcomes[r].names.size() == 309);
        if (outcomes[r].error)
          CHECK(outcomes[r].error->kind == ErrorKind::left && *outcomes[r].error->context.rank == 1);
      }
      CHECK(stop_at == 308 || outcomes[0].error);
      CHECK(group.unmatched() == 0);
    }
  }
}

// Stopped while it waits for a rank that is late: it has said `ready` and must keep its word.
TEST(a_rank_that_is_stopped_while_others_are_late_keeps_its_promise) {
  const Checkpoint checkpoint;
  for (const Strategy strategy : kShared) {
    FakeGroup group(2);
    Rank hasty(group, 0, strategy, checkpoint), late(group, 1, strategy, checkpoint);
    std::thread other([&] { late.agree(); });
    hasty.agree();
    other.join();
    HostTensor tensor;
    while (group.operations() < 2) CHECK(hasty.loader().next(tensor, milliseconds(1)) == HostLoader::Step::not_ready);
    hasty.close();  // hands what it owes to a thread
    Outcome outcome;
    try {
      while (late.loader().next(tensor, milliseconds(1000)) != HostLoader::Step::end) {
      }
    } catch (const Error& error) {
      outcome.error.emplace(error);
    }
    CHECK(outcome.error && outcome.error->kind == ErrorKind::left && *outcome.error->context.rank == 0);
    late.close();
    group_registry::abandon();
    CHECK(group.unmatched() == 0);
  }
}

// Interrupted before it has heard the others, a rank tells them where they come next: to the first block; or, where
// what they want differs, to a second meeting; or nowhere, where they disagree.
TEST(a_rank_that_is_interrupted_says_so_where_the_others_go) {
  const std::string parting = std::string(1, '\0') + "sorry";
  for (const std::string& theirs : {std::string("\1ab++"), std::string("\1ab--"), std::string("\1xy++")}) {
    const std::string ours = "\1ab++";
    const bool again = theirs == "\1ab--";
    FakeGroup group(2);
    auto hasty = std::make_shared<GroupExchange>(group.rank(0), Strategy::striped, "load");
    GroupExchange late(group.rank(1), Strategy::striped, "load");
    const GroupExchange::Terms terms{3, parting};
    Records records;
    CHECK(!hasty->agree(ours, true, terms, milliseconds(0), records));
    CHECK(!hasty->leave(milliseconds(0)));  // not heard yet
    while (!late.agree(theirs, true, terms, milliseconds(1000), records)) {
    }
    CHECK(records.at(0) == ours && records.at(1) == theirs);
    CHECK(late.ended() == (theirs != ours));
    if (again) {
      GroupExchange second(group.rank(1), Strategy::striped, "load");
      const std::string wish = "\1 wish";
      while (!second.agree(wish, true, {1, {}}, milliseconds(1), records)) hasty->leave(milliseconds(1));
      CHECK(records.at(0) == parting);
      CHECK(second.ended());
    }
    std::thread other([&] {
      while (!late.leave(milliseconds(1000))) {
      }
    });
    while (!hasty->leave(milliseconds(1000))) {
    }
    other.join();
    CHECK(group.unmatched() == 0);
  }
}

// What a rank that checks files does when its tensors are there.
enum class Finding { right, wrong, leaves };

std::optional<Error> checked_load(FakeGroup& group, uint32_t rank, Strategy strategy, const Checkpoint* checkpoint,
                                  size_t stop_at, Finding finding) {
  const auto exchange = std::make_shared<GroupExchange>(group.rank(rank), strategy, "load of 3 files");
  try {
    Records records;
    GroupExchange::Terms terms;
    terms.verdict = true;
    while (!exchange->agree(kRecord, checkpoint != nullptr, terms, milliseconds(1000), records)) {
    }
    if (checkpoint) {
      const CheckpointFiles files = CheckpointFile::open_all(checkpoint->paths(), 1);
      HostLoader loader(files, everything(files), {}, exchange, small_options());
      HostTensor tensor;
      for (size_t n = 0; n < stop_at;) {
        const HostLoader::Step step = loader.next(tensor, milliseconds(1000));
        if (step == HostLoader::Step::end) break;
        n += step == HostLoader::Step::tensor;
      }
    }
    if (finding != Finding::leaves) {
      std::optional<Error> failure;
      if (finding == Finding::wrong) failure.emplace(ErrorKind::checksum, "is wrong", ErrorContext{"/a", {}, {}, 0});
      while (!exchange->conclude(failure, milliseconds(1000))) {
      }
      CHECK(exchange->ended() && exchange->conclude(failure, milliseconds(0)));
    }
  } catch (const Error& error) {
    group_registry::leave(exchange);
    return error;
  }
  group_registry::leave(exchange);
  return std::nullopt;
}

TEST(what_one_rank_finds_out_behind_the_load_is_every_ranks_error) {
  const Checkpoint checkpoint;
  for (const Checkpoint* const files : {&checkpoint, static_cast<const Checkpoint*>(nullptr)}) {
    for (const Strategy strategy : kShared) {
      for (const Finding finding : {Finding::right, Finding::wrong, Finding::leaves}) {
        FakeGroup group(3);
        std::vector<std::optional<Error>> errors(3);
        std::vector<std::thread> threads;
        for (uint32_t r = 0; r < 3; ++r) {
          threads.emplace_back([&, r] {
            errors[r] = checked_load(group, r, strategy, files, SIZE_MAX, r == 1 ? finding : Finding::right);
          });
        }
        for (std::thread& thread : threads) thread.join();
        for (uint32_t r = 0; r < 3; ++r) {
          if (finding == Finding::right || (finding == Finding::leaves && r == 1)) {
            CHECK(!errors[r]);
            continue;
          }
          CHECK(errors[r] && *errors[r]->context.rank == 1);
          CHECK(errors[r]->kind == (finding == Finding::wrong ? ErrorKind::checksum : ErrorKind::left));
          const std::string said = errors[r]->what();
          CHECK(said.find(finding == Finding::wrong ? "/a: is wrong" : "check of the files") != std::string::npos);
        }
        CHECK(group.unmatched() == 0);
      }
    }
  }
}

// Two ranks of a load without blocks, begun as a loader does it. One has said that all is well, and leaves before it
// has heard the other: it owes nothing more.
TEST(a_rank_that_has_given_its_verdict_may_go) {
  FakeGroup group(2);
  GroupExchange hasty(group.rank(0), Strategy::striped, "load"), late(group.rank(1), Strategy::striped, "load");
  GroupExchange::Terms terms;
  terms.verdict = true;
  Records records;
  CHECK(!hasty.agree(kRecord, false, terms, milliseconds(0), records));
  CHECK(late.agree(kRecord, false, terms, milliseconds(1000), records));
  CHECK(hasty.agree(kRecord, false, terms, milliseconds(0), records));
  for (GroupExchange* const one : {&hasty, &late}) {
    CHECK(!one->awaits_verdict());
    one->begin(0, {}, {});
    CHECK(one->awaits_verdict() && !one->ended());
  }
  CHECK(!hasty.conclude(std::nullopt, milliseconds(0)));
  CHECK(hasty.leave(milliseconds(0)));
  CHECK_THROWS(hasty.conclude(std::nullopt, milliseconds(0)), Error, error.kind == ErrorKind::usage);
  CHECK(late.conclude(std::nullopt, milliseconds(1000)));
  CHECK(late.leave(milliseconds(0)));
  CHECK(group.unmatched() == 0);
}

TEST(a_rank_that_leaves_a_checked_load_ends_the_others_wherever_it_is) {
  const Checkpoint checkpoint;
  for (const Strategy strategy : kShared) {
    for (const size_t stop_at : {0u, 1u, 100u, 290u, 308u, 309u}) {
      FakeGroup group(2);
      std::optional<Error> stayed;
      std::thread other([&] { stayed = checked_load(group, 0, strategy, &checkpoint, SIZE_MAX, Finding::right); });
      CHECK(!checked_load(group, 1, strategy, &checkpoint, stop_at, Finding::leaves));
      other.join();
      group_registry::abandon();
      CHECK(stayed && stayed->kind == ErrorKind::left && *stayed->context.rank == 1);
      CHECK(group.unmatched() == 0);
    }
  }
}

TEST(a_dead_communicator_is_an_error_with_the_stage) {
  const Checkpoint checkpoint;
  FakeGroup group(2);
  Rank alive(group, 0, Strategy::striped, checkpoint);
  group.fail();
  const Outcome outcome = alive.run();
  CHECK(outcome.error && outcome.error->kind == ErrorKind::group);
  CHECK(std::string(outcome.error->what()).find("load of 3 files, agreement") != std::string::npos);
}

TEST(a_group_has_one_load_at_a_time) {
  FakeGroup group(1);
  auto first = std::make_shared<GroupExchange>(group.rank(0), Strategy::broadcast, "first");
  auto second = std::make_shared<GroupExchange>(group.rank(0), Strategy::broadcast, "second");
  group_registry::claim(&group, first);
  CHECK_THROWS(group_registry::claim(&group, second), Error, error.kind == ErrorKind::usage);
  group_registry::leave(first);
  group_registry::claim(&group, second);
}

TEST(statuses_keep_errors_and_cut_long_texts_between_characters) {
  const std::vector<std::string> files{"/a", "/b", "/c"};
  CHECK(!error_of_status(ready_status(), 0, files));
  CHECK(error_of_status(left_status(), 4, files)->context.rank == 4u);
  std::string name;
  while (name.size() < 400) name += "\xC3\xA4";
  const Error error(ErrorKind::read, "no", {files[1], name, 77, 5});
  const auto same = error_of_status(failed_status(error, files), 3, files);
  CHECK(same->context.path == files[1] && same->context.offset == 77u && same->context.error_number == 5);
  CHECK(error_of_status(failed_status(error, files), 3, {"/x", "/y", "/z"})->context.path == files[1]);
  const std::string far(1000, 'f');
  const Error deep(ErrorKind::read, "no", {far, {}, {}, 5});
  CHECK(error_of_status(failed_status(deep, {"/a", far}), 3, {"/x", "/y"})->context.path == "/y");
  CHECK(name.compare(0, same->context.tensor.size(), same->context.tensor) == 0);
  CHECK(same->context.tensor.size() > 100 && same->context.tensor.size() % 2 == 0);
}
