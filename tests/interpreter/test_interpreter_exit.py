"""Threads that load while the interpreter exits: the process ends well, and no load that was cut off looks complete."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import run_script, write_tensors

LOADS = {
    "iterator": "dict(weightload.safetensors_weights_iterator([path], to_cpu=True))",
    "iterator pread": "dict(weightload.safetensors_weights_iterator([path], to_cpu=True, backend='pread'))",
    "load_file": "weightload.load_file(path, backend='pread')",
    "get_tensor": "(lambda file: {name: file.get_tensor(name) for name in file})(private())",
    "rows": "(lambda file: {name: file.get_slice(name)[:-1] for name in file})(private())",
    "prefetch": "dict(private().prefetch())",
    "load_into": "dict.fromkeys(weightload.load_into(target, path).loaded)",
}
COUNT = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = [(f"t{i}", "F32", [300_000]) for i in range(COUNT)]
    return write_tensors(tmp_path_factory.mktemp("exit") / "m.safetensors", tensors)


@pytest.mark.parametrize("load", LOADS)
def test_a_daemon_thread_that_loads_again_and_again(load: str, path: Path) -> None:
    """The process exits at another moment each time: after one, two or three loads, in the middle of the next."""
    for loads in range(1, 4):
        done = run_script(
            f"""
            import os, sys, threading, torch, weightload
            path, private = sys.argv[1], lambda: weightload.safe_open(sys.argv[1], backend="pread")
            target = {{f"t{{i}}": torch.empty(300_000) for i in range({COUNT})}}
            loaded = threading.Semaphore(0)

            def go():
                try:
                    while True:
                        if len({LOADS[load]}) != {COUNT}:
                            os.write(1, b"a load was cut off, and looks complete")
                        loaded.release()
                except weightload.WeightLoadError as error:
                    os.write(1, str(error).encode())

            threading.Thread(target=go, daemon=True).start()
            for _ in range({loads}):
                loaded.acquire()
            """,
            path,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "" or "the interpreter is exiting" in done.stdout, done.stdout
        assert "terminate" not in done.stderr


@pytest.mark.parametrize("load", ["iterator pread", "load_file", "get_tensor", "rows", "prefetch", "load_into"])
def test_what_is_cut_off_raises(load: str, path: Path) -> None:
    """Every read takes long, so that the exit comes in the middle."""
    done = run_script(
        f"""
        import os, sys, threading, torch, weightload
        from weightload import _C
        path, private = sys.argv[1], lambda: weightload.safe_open(sys.argv[1], backend="pread")
        target = {{f"t{{i}}": torch.empty(300_000) for i in range({COUNT})}}
        _C.arm_fault("delay", first=2, count=10**6, delay_ms=200)

        def go():
            try:
                {LOADS[load]}
                os.write(1, b"complete")
            except weightload.WeightLoadError as error:
                os.write(1, type(error).__name__.encode())

        threading.Thread(target=go, daemon=True).start()
        while _C.reads_since_armed() < 3:
            pass
        """,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "WeightLoadError"), done.stderr


def test_no_load_begins_after_the_exit_hook(path: Path) -> None:
    """Hooks run in reverse order: one from before the import comes last."""
    done = run_script(
        """
        import atexit, sys

        def late():
            for call in (
                lambda: weightload.load_file(path),
                lambda: weightload.safe_open(path),
                lambda: next(weights),
                lambda: weightload.safetensors_weights_iterator([path], to_cpu=True),
                lambda: file.get_slice("t0")[[1, 0]],
            ):
                try:
                    call()
                except weightload.WeightLoadError as error:
                    print("the interpreter is exiting" in str(error))

        atexit.register(late)
        import weightload

        path = sys.argv[1]
        file = weightload.safe_open(path, backend="pread")
        weights = weightload.safetensors_weights_iterator([path], to_cpu=True)
        next(weights)
        """,
        path,
    )
    assert (done.returncode, done.stdout) == (0, "True\n" * 5), done.stderr


def test_a_thread_that_the_kernel_holds_does_not_hold_up_the_exit_for_ever(path: Path) -> None:
    """A read that takes a minute. The exit waits a while, then goes without the thread, and nothing aborts."""
    done = run_script(
        """
        import sys, threading, weightload
        from weightload import _C
        file = weightload.safe_open(sys.argv[1], backend="pread")
        _C.arm_fault("delay", first=0, count=1, delay_ms=60_000)
        threading.Thread(target=lambda: file.get_tensor("t0"), daemon=True).start()
        while _C.reads_since_armed() < 1:
            pass
        """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert "terminate" not in done.stderr


def test_a_forked_child_exits_while_a_thread_of_its_parent_is_in_the_core(path: Path) -> None:
    done = run_script(
        """
        import os, sys, threading, weightload
        from weightload import _C
        file = weightload.safe_open(sys.argv[1], backend="pread")
        _C.arm_fault("delay", first=0, count=1, delay_ms=3_000)
        thread = threading.Thread(target=lambda: file.get_tensor("t0"))
        thread.start()
        while _C.reads_since_armed() < 1:
            pass
        child = os.fork()
        if not child:
            sys.exit(7)  # with all exit hooks
        status = os.waitpid(child, 0)[1]
        assert thread.is_alive()  # the child did not wait for what only its parent has
        thread.join()
        sys.exit(os.waitstatus_to_exitcode(status) != 7)
        """,
        path,
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_child_exits_while_a_thread_of_its_parent_waits_in_an_iterator(path: Path) -> None:
    """The child exits although the parent's thread has the load to itself, which in the child would be for ever."""
    done = run_script(
        """
        import os, signal, sys, threading, weightload
        from weightload import _C
        _C.arm_fault("delay", first=0, count=1, delay_ms=3_000)
        weights = weightload.safetensors_weights_iterator(sys.argv[1], to_cpu=True, backend="pread")
        thread = threading.Thread(target=lambda: dict(weights))
        thread.start()
        while _C.reads_since_armed() < 1:
            pass
        thread.join(0.5)  # until it waits
        child = os.fork()
        if not child:
            signal.alarm(20)
            sys.exit(7)  # with all exit hooks
        status = os.waitpid(child, 0)[1]
        thread.join()
        sys.exit(os.waitstatus_to_exitcode(status) != 7)
        """,
        path,
    )
    assert done.returncode == 0, done.stderr


def test_a_child_that_was_forked_by_python_code_within_a_call_exits_at_once() -> None:
    done = run_script(
        """
        import os, sys, time, weightload
        child = weightload._C.plainly(os.fork, (), {})
        begin = time.monotonic()
        if not child:
            sys.exit(7)  # with all exit hooks
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert time.monotonic() - begin < 8, "the child waited for a call that it had left"
        """,
    )
    assert done.returncode == 0, done.stderr
