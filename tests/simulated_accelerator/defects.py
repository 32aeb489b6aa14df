"""Shows that the simulated accelerator bites: applies known defects one at a time and checks that tests fail.

    python tests/simulated_accelerator/defects.py [NAME ...]

Works on a copy of the tree in .build/defects. Each defect changes one line of the loader in the way a person might,
and the tests named with it must fail. Exits with 1 if one of them passes.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TREE = ROOT / ".build" / "defects"
ACCELERATOR = "csrc/device/accelerator.cpp"
ANY_LOADER = "csrc/load/loader.cpp"
LOADER = "csrc/load/device_loader.cpp"
ORDER = "tests/accelerator/test_simulated_order.py::test_"
PARITY = "tests/accelerator/test_simulated.py::test_"
INTO = "tests/into/test_load_into.py::test_"
GROUP = "tests/accelerator/test_simulated_group.py::test_"
COLLECTIVE = "csrc/group/process_group.cpp"
EXCHANGE = "csrc/group/exchange.cpp"


@dataclasses.dataclass(frozen=True)
class Defect:
    name: str
    file: str
    right: str
    """One line, or a part of one, that is in the file once."""
    wrong: str
    tests: tuple[str, ...]
    """Each of these fails."""


DEFECTS = (
    Defect(
        "no wait before the first write",
        ACCELERATOR,
        "order(owner_, side_);  // what its last user queued",
        "",
        (ORDER + "fresh_memory_is_not_written_before_its_last_user_is_done",),
    ),
    Defect(
        "slot released before its copy",
        LOADER,
        "slot.release_to_device();",
        "",
        (ORDER + "slots_are_not_filled_again_before_they_were_copied_from",),
    ),
    Defect(
        "slot taken without asking its event",
        ACCELERATOR,
        "return copied_->query();",
        "return true;",
        (ORDER + "slots_are_not_filled_again_before_they_were_copied_from",),
    ),
    Defect(
        "event asked for with another device current",
        ACCELERATOR,
        "const c10::DeviceGuard on_device(device_);  // see Note [The current device]",
        "",
        (ORDER + "a_load_to_one_device_touches_no_other",),
    ),
    Defect(
        "slot's event on the wrong stream",
        ACCELERATOR,
        "static_cast<TorchSlot&>(slot).copied().record(side_);",
        "static_cast<TorchSlot&>(slot).copied().record(owner_);",
        (ORDER + "slots_are_not_filled_again_before_they_were_copied_from",),
    ),
    Defect(
        "block's event recorded by its first task",
        LOADER,
        "fetch_sub(1, std::memory_order_acq_rel) == 1)",
        "fetch_sub(1, std::memory_order_acq_rel) == slots_.tasks_of_block[number])",
        (ORDER + "a_tensor_may_be_used_and_dropped_at_once",),
    ),
    Defect(
        "consumer's stream does not wait",
        ACCELERATOR,
        "awaited.copied().block(current);",
        "",
        (ORDER + "a_tensor_may_be_used_and_dropped_at_once", PARITY + "the_real_checkpoint"),
    ),
    Defect(
        "only the first stream of a block waits",
        ACCELERATOR,
        "if (std::find(streams_.begin(), streams_.end(), stream) != streams_.end()) return false;",
        "if (!streams_.empty()) return false;",
        (ORDER + "the_consumer_may_change_its_stream_at_every_tensor",),
    ),
    Defect(
        "copy on the wrong stream",
        ACCELERATOR,
        "const c10::StreamGuard on_side(side_);",
        "const c10::StreamGuard on_side(owner_);",
        (ORDER + "slots_are_not_filled_again_before_they_were_copied_from",),
    ),
    Defect(
        "memory of the wrong stream",
        ACCELERATOR,
        "const c10::StreamGuard on_owner(owner_);",
        "const c10::StreamGuard on_owner(side_);",
        (ORDER + "a_tensor_may_be_used_and_dropped_at_once",),
    ),
    Defect(
        "allocator not told of the consumer's stream",
        ACCELERATOR,
        "if (current != owner_) backend_",
        "if (false) backend_",
        (ORDER + "a_stream_that_was_not_current_at_the_start_is_known_to_the_allocator",),
    ),
    Defect(
        "block freed before its copies",
        LOADER,
        "device_->abandon(*block.memory);",
        "static_cast<void>(block);",
        (ORDER + "blocks_that_nobody_took_outlive_their_copies",),
    ),
    Defect(
        "parameters written while they are read",
        ACCELERATOR,
        "order(owner_, side_);  // what reads the memory that is loaded into",
        "",
        (INTO + "work_before_and_after_keeps_its_order",),
    ),
    Defect(
        "parameters read while they are written",
        LOADER,
        "device_->await_all();",
        "",
        (INTO + "work_before_and_after_keeps_its_order",),
    ),
    Defect(
        "yielded before the copies are queued",
        ANY_LOADER,
        "return pool_->wait(task, patience);",
        "return pool_->wait(0, patience);",
        (PARITY + "any_cutting_gives_the_same_bytes",),
    ),
    Defect(
        "copied from the wrong place of the slot",
        LOADER,
        "image + copy.image_offset",
        "0 * image + copy.image_offset",
        (PARITY + "every_dtype",),
    ),
    Defect(
        "pieces spread from the first to the last",
        LOADER,
        "for (const SlotPiece* piece = last; piece-- != first;) {",
        "for (const SlotPiece* piece = first; piece != last; ++piece) {",
        (PARITY + "every_way_of_reading",),
    ),
    Defect(
        "reading runs ahead without bound",
        LOADER,
        "options.threads_at_first), window,",
        "options.threads_at_first), UINT64_MAX,",
        (ORDER + "device_memory_beyond_the_tensors_is_a_block_or_two",),
    ),
    Defect(
        "collective before the copies' event",
        ACCELERATOR,
        "static_cast<TorchBlock&>(block).copied().block(collective_stream());",
        "static_cast<void>(block);",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "consumer does not wait for the collective",
        ACCELERATOR,
        "static_cast<TorchBlock&>(block).copied().record(collective_stream());",
        "static_cast<void>(block);",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "collective stream does not wait for the collective",
        COLLECTIVE,
        "device_->on_collective_stream([&] { works_.finish(); });",
        "",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "status read too early",
        COLLECTIVE,
        "while (!copied_->query()) {",
        "while (false) {",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "wrong root",
        EXCHANGE,
        "broadcast(payload_, /*root=*/0)",
        "broadcast(payload_, /*root=*/1)",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "stripes swapped",
        COLLECTIVE,
        "bytes.narrow(0, stripe * group_->getRank(), stripe)",
        "bytes.narrow(0, stripe * (group_->getSize() - 1 - group_->getRank()), stripe)",
        (GROUP + "every_rank_gets_every_byte",),
    ),
    Defect(
        "a failed rank is not believed",
        EXCHANGE,
        "(error->kind == ErrorKind::left) == leavers)",
        "error->kind == ErrorKind::left && leavers)",
        (GROUP + "a_rank_that_cannot_read_fails_all",),
    ),
    Defect(
        "leaving is not told",
        EXCHANGE,
        "collective_->gather(parting_);",
        "collective_->gather(ready_status());",
        (GROUP + "one_may_leave_early_and_the_others_are_told",),
    ),
)


def mirror(source: Path, target: Path) -> None:
    """Make target's files those of source; equal files keep their times, so that a second run builds little."""
    wanted = {path.relative_to(source) for path in source.rglob("*") if path.suffix in (".py", ".pyi", ".cpp", ".h")}
    for path in wanted:
        copy = target / path
        if not copy.exists() or copy.read_bytes() != (source / path).read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, copy)
    for path in list(target.rglob("*.cpp")) + list(target.rglob("*.h")):
        if path.relative_to(target) not in wanted:
            path.unlink()


def apply(defect: Defect, tree: Path) -> str:
    """Put the defect into the tree; returns the file's text before."""
    path = tree / defect.file
    text = path.read_text()
    if text.count(defect.right) != 1:
        raise SystemExit(f"{defect.name}: {defect.file} has {text.count(defect.right)} of {defect.right!r}, not one")
    path.write_text(text.replace(defect.right, defect.wrong))
    return text


def run(command: list[str], timeout: int = 600) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": str(TREE), "WEIGHTLOAD_WERROR": "0"}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=TREE, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return 1, "hangs"
    return done.returncode, done.stdout + done.stderr


def build() -> None:
    code, output = run(["setup.py", "build_ext", "--inplace"])
    if code != 0:
        raise SystemExit(output[-3000:])


def check(defect: Defect) -> list[str]:
    """The defect's tests that passed, though they should not have."""
    before = apply(defect, TREE)
    try:
        build()
        return [test for test in defect.tests if run(["-m", "pytest", "-q", "-x", test], timeout=120)[0] == 0]
    finally:
        (TREE / defect.file).write_text(before)


def main() -> int:
    """Command line."""
    chosen = [defect for defect in DEFECTS if not sys.argv[1:] or defect.name in sys.argv[1:]]
    TREE.mkdir(parents=True, exist_ok=True)
    for folder in ("csrc", "weightload", "tests"):
        mirror(ROOT / folder, TREE / folder)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / file, TREE / file)
    build()
    tests = sorted({test for defect in chosen for test in defect.tests})
    code, output = run(["-m", "pytest", "-q", *tests])
    if code != 0:
        raise SystemExit("the tests fail without any defect:\n" + output[-3000:])
    escaped = 0
    for number, defect in enumerate(chosen, 1):
        passed = check(defect)
        escaped += bool(passed)
        print(f"{number:2} {'ESCAPED' if passed else 'caught ':7} {defect.name} {' '.join(passed)}", flush=True)
    build()
    print(f"{len(chosen) - escaped} of {len(chosen)} defects caught")
    return int(escaped > 0)


if __name__ == "__main__":
    sys.exit(main())
