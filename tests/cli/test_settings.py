"""Knobs, CPU counting, progress and ranks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from conftest import write_tensors

import weightload
from weightload import settings
from weightload._base.cpus import cgroup_cpu_quota, usable_cpus
from weightload._group.ranks import LOCAL_SIZES, ranks_of_this_node


def test_defaults_environment_and_override(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.current() == settings.Settings()
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "3")
    monkeypatch.setenv("WEIGHTLOAD_WINDOW_BYTES", "123456")
    assert settings.current().thread_count() == 3
    with settings.override(threads=5):
        with settings.override(task_bytes=8192):
            now = settings.current()
            assert (now.threads, now.task_bytes, now.window_bytes) == (5, 8192, 123456)
        assert settings.current().task_bytes == settings.Settings().task_bytes
    assert settings.current().threads == 3


def test_overrides_end_in_any_order() -> None:
    """Overrides may end in any order: a generator's override may end within the block of another."""

    def reading(threads: int) -> Iterator[int | None]:
        with settings.override(threads=threads, task_bytes=4096 * threads):
            yield settings.current().threads

    first = reading(3)
    assert next(first) == 3
    with settings.override(threads=5):
        first.close()
        assert (settings.current().threads, settings.current().task_bytes) == (5, settings.Settings().task_bytes)
    assert settings.current() == settings.Settings()

    one, other, last = reading(3), reading(5), reading(7)
    assert [next(one), next(other), next(last)] == [3, 5, 7]
    del other
    assert settings.current().threads == 7
    del last
    assert settings.current().threads == 3
    del one
    assert settings.current() == settings.Settings()

    # In a context of its own, where the block was begun in this one: that one's copies lose it too.
    elsewhere = reading(3)
    assert next(elsewhere) == 3
    copy = contextvars.copy_context()
    copy.run(elsewhere.close)
    assert settings.current() == copy.run(settings.current) == settings.Settings()
    thread_of = reading(3)
    assert next(thread_of) == 3
    thread = threading.Thread(target=thread_of.close)
    thread.start()
    thread.join()
    assert settings.current() == settings.Settings()


def test_an_override_that_several_use_ends_where_it_was_begun() -> None:
    """One object: in a generator that a third thread lets go of, in another thread, and once more in this one."""
    shared, begun, go_on = settings.override(threads=1), threading.Event(), threading.Event()
    seen = []

    def generator() -> Iterator[None]:
        with shared:
            yield

    def other() -> None:
        with shared:
            begun.set()
            assert go_on.wait(60)
            seen.append(settings.current().threads)

    half = generator()
    next(half)
    thread = threading.Thread(target=other)
    thread.start()
    assert begun.wait(60)
    third = threading.Thread(target=half.close)
    third.start()
    third.join()
    go_on.set()
    thread.join()
    assert seen == [1]
    assert settings.current() == settings.Settings()

    oldest = generator()
    next(oldest)
    with settings.override(threads=2), shared:
        oldest.close()
        assert settings.current().threads == 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(shared)
        stack.enter_context(settings.override(threads=2))
        stack.enter_context(shared)
        assert settings.current().threads == 1
    assert settings.current() == settings.Settings()


def test_blocks_that_ended_elsewhere_leave_nothing() -> None:
    async def generator() -> AsyncIterator[None]:
        with settings.override(threads=2):
            yield

    async def leave_many() -> int:
        for _ in range(200):
            async for _nothing in generator():
                break
            await asyncio.sleep(0)  # lets the event loop end the generator
        return len(settings._overrides.get(()))

    assert asyncio.run(leave_many()) < 5


def test_the_garbage_collector_may_end_a_block_at_any_time() -> None:
    """Python up to 3.11 collects in the middle of a call."""
    script = """
        import gc
        from weightload import settings

        class Stream:
            def __init__(self):
                self.iterator = self.run()
                next(self.iterator)

            def run(self):
                with settings.override(threads=7):
                    yield self

        for junk in range(6):
            gc.set_threshold(11 + junk, 3, 3)
            for i in range(5000):
                if i % 3 == 0:
                    Stream()
                held = [[] for _ in range(junk)]
                with settings.override(task_bytes=4096):
                    pass
            gc.collect()
            assert settings.current() == settings.Settings(), settings.current()
        assert settings._overrides.get() == (), settings._overrides.get()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_a_finaliser_may_begin_blocks_of_the_one_that_ends() -> None:
    class Enters:
        def __del__(self) -> None:
            for _ in range(3):
                shared.__enter__()

    shared = settings.override(threads=3)
    variable: contextvars.ContextVar[object] = contextvars.ContextVar("variable")
    context = contextvars.copy_context()
    context.run(variable.set, Enters())
    context.run(shared.__enter__)
    del context
    shared.__exit__(None, None, None)
    for _ in range(3):
        shared.__exit__(None, None, None)
    assert settings.current() == settings.Settings()


def test_a_collection_while_a_block_ends_may_end_another() -> None:
    """Asking for the frame allocates, and a finaliser ends the only block of the object whose block is ending."""
    script = """
        import gc, sys
        from weightload import settings

        class Ends:
            def __init__(self, shared):
                self.itself, self.shared = self, shared

            def __del__(self):
                try:
                    self.shared.__exit__(None, None, None)
                except RuntimeError:
                    pass

        def end(shared):
            try:
                shared.__exit__(None, None, None)
            except RuntimeError:
                pass

        gc.set_threshold(1, 1, 1)
        for _ in range(3000):
            shared = settings.override(threads=3)
            shared.__enter__()
            Ends(shared)
            end(shared)
        gc.set_threshold(700, 10, 10)
        gc.collect()
        assert settings.current() == settings.Settings()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=300)


def test_an_override_that_is_ended_by_one_function_for_several_tasks() -> None:
    shared = settings.override(threads=1)

    def begin() -> None:
        shared.__enter__()

    def end() -> None:
        shared.__exit__(None, None, None)

    contexts = [contextvars.copy_context() for _ in range(3)]
    for context in contexts:
        context.run(begin)
    for number, context in enumerate(contexts):
        context.run(end)
        threads = [one.run(settings.current).threads for one in contexts]
        assert threads == [settings.Settings().threads] * (number + 1) + [1] * (2 - number)


def test_an_override_as_a_decorator() -> None:
    @settings.override(threads=5)
    def plain() -> int | None:
        return settings.current().threads

    @settings.override(threads=5)
    async def coroutine(told: list[int | None], wait: asyncio.Event) -> int | None:
        told.append(settings.current().threads)
        await wait.wait()
        return settings.current().threads

    async def together() -> list[int | None]:
        told: list[int | None] = []
        wait = asyncio.Event()
        both = [asyncio.create_task(coroutine(told, wait)) for _ in range(2)]
        while len(told) < 2:
            await asyncio.sleep(0)
        told.append(settings.current().threads)
        wait.set()
        return [*told, *await asyncio.gather(*both)]

    outside = settings.Settings().threads
    assert plain() == 5
    assert asyncio.run(together()) == [5, 5, outside, 5, 5]
    assert coroutine.__name__ == "coroutine"

    def generator() -> Iterator[int]:
        yield 0

    async def async_generator() -> AsyncIterator[int]:
        yield 0

    class Callable:
        async def __call__(self) -> int | None:
            return settings.current().threads

    class GeneratorCallable:
        def __call__(self) -> Iterator[int]:
            yield 0

    async def now() -> int | None:
        return settings.current().threads

    for function in (Callable(), staticmethod(now), lambda: now(), functools.partial(now)):
        assert asyncio.run(settings.override(threads=5)(function)()) == 5
    for function in (generator, async_generator, staticmethod(generator), GeneratorCallable()):
        with pytest.raises(TypeError, match=r"with block in it"):
            settings.override(threads=5)(function)
    with pytest.raises(TypeError, match="returns a generator"):
        settings.override(threads=5)(functools.lru_cache(generator))()
    assert settings.current() == settings.Settings()


def test_an_override_counts_where_it_was_begun() -> None:
    """Once more in the same block, in a generator that another task lets go of, and not in threads."""
    seen = []
    twice = settings.override(threads=5)
    with twice, settings.override(threads=6), twice:
        thread = threading.Thread(target=lambda: seen.append(settings.current().threads))
        thread.start()
        thread.join()
        seen.append(settings.current().threads)

    def generator() -> Iterator[int]:
        with settings.override(threads=9):
            yield settings.current().threads

    def abandon(left: Iterator[int]) -> None:
        seen.append(next(left))
        del left

    contextvars.copy_context().run(abandon, generator())
    half = generator()
    contextvars.copy_context().run(next, half)
    del half
    assert seen == [0, 5, 9]

    # One object in two threads: the first to begin is the first to end.
    shared, begun, ended = settings.override(threads=4), threading.Event(), threading.Event()

    def other() -> None:
        with shared:
            begun.set()
            assert ended.wait(60)
            seen.append(settings.current().threads)
        seen.append(settings.current().threads)

    thread = threading.Thread(target=other)
    with shared:
        thread.start()
        assert begun.wait(60)
    seen.append(settings.current().threads)
    ended.set()
    thread.join()
    assert seen[3:] == [0, 4, 0]
    assert settings.current() == settings.Settings()


def test_bad_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="no such setting: colour"), settings.override(colour=1):
        pass
    with settings.override(task_bytes=0), pytest.raises(ValueError, match="task_bytes"):
        settings.current()
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    with pytest.raises(ValueError, match="WEIGHTLOAD_THREADS='many'"):
        settings.current()


def test_values_are_compared_with_their_limits() -> None:
    for bad in (
        {"threads": -1}, {"window_bytes": 4095}, {"read": "fast"}, {"read": 1}, {"threads": 1.5}, {"slot_bytes": 8000},
        {"spare_bytes": -1}, {"window_bytes": 2**64}, {"threads": True}, {"pinned_bytes": 8192, "slot_bytes": 12288},
    ):  # fmt: skip
        with settings.override(**bad), pytest.raises(ValueError, match=next(iter(bad))):  # type: ignore[arg-type]
            settings.current()


def test_spare_memory_is_kept_up_to_its_limit(tmp_path: Path) -> None:
    """By what the process has lent to the kernel: the environment's limit, and at once that of the load begun last."""
    path = write_tensors(tmp_path / "s.safetensors", [("w", "U8", [64 << 20])])
    script = textwrap.dedent("""
        import sys
        from weightload import safetensors_weights_iterator, settings

        def kept():
            lines = open("/proc/self/smaps_rollup").read().splitlines()
            return next((int(line.split()[1]) for line in lines if line.startswith("LazyFree:")), "unknown")

        def load(**limit):
            with settings.override(**limit):
                for _ in safetensors_weights_iterator(sys.argv[1:], to_cpu=True, backend="pread"):
                    pass
            del _
            return kept()

        print(load(), load(spare_bytes=1 << 30), load(spare_bytes=0))
    """)
    for limit in ("0", None):
        environment = {name: value for name, value in os.environ.items() if name != "WEIGHTLOAD_SPARE_BYTES"}
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True,
            env=environment | ({"WEIGHTLOAD_SPARE_BYTES": limit} if limit else {}),
        )  # fmt: skip
        before, raised, none = done.stdout.split()
        if before == "unknown":
            pytest.skip("the kernel does not tell what is lent to it")
        assert (before == "0") == (limit == "0")
        assert int(raised) > 0
        assert none == "0"


def test_where_a_setting_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(settings.origins().values()) == {"default"}
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "3")
    monkeypatch.setenv("WEIGHTLOAD_READ", "direct")
    monkeypatch.setenv("WEIGHTLOAD_TASK_BYTES", "")  # as if it were not there
    with settings.override(read="buffered"):
        origins = settings.origins()
    assert (origins["threads"], origins["read"], origins["task_bytes"]) == ("environment", "override", "default")


@pytest.mark.parametrize(
    ("variable", "value", "ranks"),
    [
        ("LOCAL_WORLD_SIZE", "8", 8),
        ("LOCAL_WORLD_SIZE", "1", 1),
        ("LOCAL_WORLD_SIZE", "", 1),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4", 4),
        ("MPI_LOCALNRANKS", "2", 2),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2),3", 4),
        ("UNKNOWN", "5", 1),
    ],
)
def test_launchers_tell_the_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, ranks: int
) -> None:
    for name in LOCAL_SIZES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert ranks_of_this_node() == ranks


def test_threads_default_to_the_cpus_of_the_process_not_the_machine() -> None:
    script = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from weightload import settings; "
    script += "print(settings.current().thread_count())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000"}, 3.0),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2.0),
        ("0::/../x\n", {"x/cpu.max": "200000 100000"}, 2.0),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {}, None),
        ("4:cpu,cpuacct:/k\n", {"cpu/k/cpu.cfs_quota_us": "250000", "cpu/k/cpu.cfs_period_us": "100000"}, 2.5),
        ("4:cpu:/k\n1:name=systemd:/\n", {"cpu/k/cpu.cfs_quota_us": "-1", "cpu/k/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/k\n", {"cpu/k/cpu.cfs_quota_us": "100", "cpu/k/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership)
    assert cgroup_cpu_quota(tmp_path / "cgroup", tmp_path / "mount") == quota


def test_no_cgroups_no_quota(tmp_path: Path) -> None:
    assert cgroup_cpu_quota(tmp_path / "none", tmp_path) is None


def progress_of(path: Path, asked: bool | None, **environment: str) -> str:
    script = f"""
        import weightload
        weights = weightload.safetensors_weights_iterator([{str(path)!r}], to_cpu=True, show_progress={asked})
        assert sum(1 for _ in weights) == 3
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.stdout == ""
    return done.stderr


def test_progress_counts_bytes_on_rank_0_when_asked(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "p.safetensors", [(f"{i}", "U8", [500_000]) for i in range(3)])
    shown = progress_of(path, True)
    assert "Loading weights: 100%" in shown
    assert "1.50M/1.50M" in shown
    assert progress_of(path, None) == ""  # no terminal
    assert progress_of(path, False) == ""
    assert progress_of(path, True, RANK="1") == ""


def test_leaving_a_load_with_progress_closes_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_tensors(tmp_path / "p.safetensors", [(f"{i}", "U8", [500_000]) for i in range(3)])
    weights = weightload.safetensors_weights_iterator([path], to_cpu=True, show_progress=True)
    next(weights)
    weights.close()  # type: ignore[attr-defined]
    assert "Loading weights" in capfd.readouterr().err


def test_ranks(tmp_path: Path) -> None:
    """Two processes: FastVideo's flags and ours; what must not communicate works on one rank alone."""
    path = write_tensors(tmp_path / "r.safetensors", [("a", "F32", [4])])
    script = tmp_path / "ranks.py"
    script.write_text(
        textwrap.dedent("""
        import sys, pytest, torch.distributed as dist, weightload
        dist.init_process_group("gloo")
        load = weightload.safetensors_weights_iterator
        for options in (dict(to_cpu=True), dict(broadcast=False), dict(strategy="independent"),
                        dict(to_cpu=True, async_broadcast=True)):
            assert len(list(load(sys.argv[1:], **options))) == 1
        if dist.get_rank() == 1:
            assert len(list(load(sys.argv[1:], to_cpu=True, strategy="striped"))) == 1
            assert len(list(load(sys.argv[1:], device="cpu"))) == 1  # auto: the page cache is shared already
        for options in (dict(strategy="broadcast"), dict(strategy="striped", async_broadcast=True)):
            assert len(list(load(sys.argv[1:], **options))) == 1
        with pytest.raises(ValueError, match="strategy 'fastest'"):
            load(sys.argv[1:], strategy="fastest")
        dist.destroy_process_group()
    """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
