#include "group/exchange.h"

#include <algorithm>
#include <utility>

#include "group/rank_status.h"

namespace weightload {
namespace {

using Milliseconds = std::chrono::milliseconds;

class Deadline {
 public:
  explicit Deadline(Milliseconds patience) : end_(std::chrono::steady_clock::now() + patience) {}
  Milliseconds left() const {
    const auto left = std::chrono::duration_cast<Milliseconds>(end_ - std::chrono::steady_clock::now());
    return std::max(left, Milliseconds(0));
  }

 private:
  std::chrono::steady_clock::time_point end_;
};

// Whether so many bytes of them are equal, and say that their rank is ready.
bool are_equal(const Records& records, size_t compared) {
  const std::string& first = records.front();
  return first.front() == GroupExchange::kAgreed &&
         std::all_of(records.begin(), records.end(),
                     [&](const std::string& one) { return one.compare(0, compared, first, 0, compared) == 0; });
}

bool have_agreed(const Records& records, const GroupExchange::Terms& terms) {
  return are_equal(records, terms.parting.empty() ? terms.compared : SIZE_MAX);
}

// Whether the ranks are about to meet once more.
bool meet_again(const Records& records, const GroupExchange::Terms& terms) {
  return !terms.parting.empty() && are_equal(records, terms.compared) && !are_equal(records, SIZE_MAX);
}

}  // namespace

GroupExchange::GroupExchange(std::unique_ptr<Collective> collective, Strategy strategy, std::string load)
    : collective_(std::move(collective)),
      strategy_(strategy),
      load_(std::move(load)),
      rank_(collective_->rank()),
      ranks_(collective_->ranks()),
      parting_(left_status()) {}

GroupExchange::~GroupExchange() { end(); }

// Lets go of the communicator: the backend keeps what is on its way.
void GroupExchange::end() noexcept {
  for (const auto& moving : moving_) {
    try {
      // An accelerator's collective stream then waits for it, and memory that is freed for that stream.
      moving->wait(Milliseconds(0));
    } catch (const std::exception&) {
      // It has failed: nothing moves any more.
    }
  }
  ended_ = true;
  asked_.reset();
  moving_.clear();
  payload_ = {};
  prepare_ = nullptr;
  collective_.reset();
}

std::string GroupExchange::stage_name() const {
  if (stage_ == Stage::idle || stage_ == Stage::agreeing) return "agreement";
  if (concluding_ || done_ == blocks_) return "check of the files";
  const size_t block = moving_.empty() ? next_ : done_;
  return "block " + std::to_string(block + 1) + " of " + std::to_string(blocks_);
}

// The communicator has failed: nothing more can be said to anyone.
void GroupExchange::fail(const Error& error) {
  const Error named =
      error.kind != ErrorKind::group
          ? error
          : Error(ErrorKind::group, load_ + ", " + stage_name() +
                                        ": a rank of the group has died, stopped, or never called: " + error.message);
  next_ = done_;
  failure_ = named;
  end();
  throw named;
}

bool GroupExchange::agree(const std::string& record, bool more, const Terms& terms, Milliseconds patience,
                          Records& records) try {
  if (ended_) throw Error(ErrorKind::usage, load_ + " has ended");
  if (stage_ == Stage::idle) {
    more_ = more || terms.verdict;
    terms_ = terms;
    asked_ = collective_->gather(record);
    stage_ = Stage::agreeing;
  }
  if (!asked_->wait(patience)) return false;
  records = asked_->records();
  asked_.reset();
  if (more_ && have_agreed(records, terms_))
    stage_ = Stage::preparing;
  else
    end();
  return true;
} catch (const Error& error) {
  fail(error);
}

void GroupExchange::begin(size_t blocks, Prepare prepare, std::vector<std::string> paths) {
  blocks_ = blocks;
  prepare_ = std::move(prepare);
  paths_ = std::move(paths);
  begun_ = true;
  if (blocks == 0 && !terms_.verdict) end();
}

bool GroupExchange::complete(size_t block, Milliseconds patience) {
  const Deadline deadline(patience);
  while (block >= done_) {
    if (failure_ && moving_.empty()) throw Error(*failure_);
    if (ended_) throw Error(ErrorKind::usage, load_ + " has been left");
    try {
      // Reading, travelling and consuming overlap: the block after this one travels while this one is consumed.
      if (!failure_ && next_ < std::min(block + 2, blocks_)) {
        if (!step(deadline.left())) return false;
        continue;
      }
      if (!moving_.front()->wait(deadline.left())) return false;
    } catch (const Error& error) {
      fail(error);
    }
    moving_.pop_front();
    ++done_;
    if ((done_ == blocks_ && !terms_.verdict) || (failure_ && moving_.empty())) end();
  }
  return true;
}

bool GroupExchange::conclude(const std::optional<Error>& failure, Milliseconds patience) {
  if (concluded_) return true;
  if (failure_) throw Error(*failure_);
  if (ended_ || !terms_.verdict || done_ != blocks_) throw Error(ErrorKind::usage, load_ + " has been left");
  try {
    if (!concluding_) {
      asked_ = collective_->gather(failure ? failed_status(*failure, paths_) : ready_status());
      stage_ = Stage::asking;
      concluding_ = true;
    }
    if (!ask(patience)) return false;
  } catch (const Error& error) {
    fail(error);
  }
  end();
  if (failure_) throw Error(*failure_);
  return true;
}

// Block next_, as far as it comes within the patience: true once its collective, if all are ready, has been issued.
bool GroupExchange::step(Milliseconds patience) {
  if (stage_ == Stage::preparing) {
    std::string status = ready_status();
    try {
      if (!prepare_(next_, patience, payload_)) return false;
    } catch (const Error& error) {
      status = failed_status(error, paths_);
    } catch (const std::exception& error) {
      // The device's, or memory that could not be had: its first line.
      const std::string text = error.what();
      status = failed_status(Error(ErrorKind::usage, text.substr(0, text.find('\n'))), paths_);
    }
    asked_ = collective_->gather(status);
    stage_ = Stage::asking;
  }
  return ask(patience);
}

bool GroupExchange::ask(Milliseconds patience) {
  if (!asked_->wait(patience)) return false;
  judge(asked_->records());
  return true;
}

void GroupExchange::judge(const Records& records) {
  asked_.reset();
  stage_ = Stage::preparing;
  for (const bool leavers : {false, true}) {  // why somebody left matters less than what failed
    for (uint32_t r = 0; r < records.size() && !failure_; ++r) {
      std::optional<Error> error = error_of_status(records[r], r, paths_);
      if (error && (error->kind == ErrorKind::left) == leavers) failure_ = std::move(error);
    }
  }
  if (failure_) {
    if (failure_->kind == ErrorKind::left)
      failure_ = Error(ErrorKind::left, load_ + ", " + stage_name() + ": " + failure_->message, failure_->context);
    payload_ = {};
    return;
  }
  if (concluding_) {
    concluded_ = true;
    return;
  }
  if (strategy_ == Strategy::broadcast)
    moving_.push_back(collective_->broadcast(payload_, /*root=*/0));
  else
    moving_.push_back(collective_->all_gather(payload_));
  // An accelerator's block is marked now, before the collective stream has more to do.
  moving_.back()->wait(Milliseconds(0));
  payload_ = {};
  ++next_;
}

void GroupExchange::give_reason(const Error& error) { parting_ = failed_status(error, paths_); }

bool GroupExchange::leave(Milliseconds patience) noexcept {
  if (ended_) return true;
  try {
    if (!settle(patience)) return false;
  } catch (const std::exception&) {
    // The communicator has failed: there is nobody to tell.
  }
  end();
  return true;
}

bool GroupExchange::settle(Milliseconds patience) {
  const Deadline deadline(patience);
  if (stage_ == Stage::idle) return true;  // the others wait for an agreement that never comes, up to their timeout
  if (stage_ == Stage::agreeing) {
    if (!more_ && terms_.parting.empty()) return true;
    if (!asked_->wait(deadline.left())) return false;
    if (!leaving_ && meet_again(asked_->records(), terms_)) {
      leaving_ = true;
      asked_ = collective_->gather(terms_.parting);
    }
    if (leaving_) {
      asked_->wait(deadline.left());
      return true;
    }
    if (!more_ || !have_agreed(asked_->records(), terms_)) return true;
    asked_.reset();
    stage_ = Stage::preparing;
  }
  if (concluding_) {  // it has said what it had to say
    asked_->wait(deadline.left());
    return true;
  }
  if (stage_ == Stage::asking && !leaving_ && !ask(deadline.left())) return false;
  if (failure_ || (!terms_.verdict && blocks_ > 0 && next_ == blocks_)) return true;
  if (!leaving_) {
    leaving_ = true;
    asked_ = collective_->gather(parting_);
    stage_ = Stage::asking;
  }
  // Nothing is owed any more. Waiting lets the message out before the process ends.
  asked_->wait(deadline.left());
  return true;
}

}  // namespace weightload
