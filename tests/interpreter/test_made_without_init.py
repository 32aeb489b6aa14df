"""Objects that were made without their initialiser, copied or pickled: a Python exception, never a crash."""

from __future__ import annotations

from pathlib import Path

from conftest import run_script

PROBE = """
    import copy, inspect, pickle, sys
    import torch, weightload
    from weightload import _C
    from weightload._load import progress, start
    from weightload._api import prefetch

    path = sys.argv[1]
    classes = [kind for kind in vars(_C).values() if inspect.isclass(kind) and not hasattr(kind, "__members__")]
    classes += [start.WeightIterator, start.DeviceWeightIterator, prefetch.PrefetchLoader]
    classes += [progress.WeightsWithBar, weightload.safe_open, type(weightload.safe_open(path).get_slice("F32.matrix"))]
    arguments = ["t0"], [0], [], ["t0", True], [0, None], [[]], [b"", False], [object()]


    def use(made):
        for name in dir(type(made)):
            if name in ("__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__", "__dir__"):
                continue
            try:
                found = getattr(made, name)
            except Exception:
                continue
            for given in arguments if callable(found) else ():
                try:
                    found(*given)
                except Exception:
                    pass
        for call in (next, iter, len, bool, hash, repr, copy.copy, copy.deepcopy, pickle.dumps):
            try:
                call(made)
            except Exception:
                pass


    def require_error(what, call):
        try:
            call()
        except Exception as error:
            return
        print("no exception:", what)


    for kind in classes:
        made = kind.__new__(kind)
        use(made)
        del made
    for kind in (start.WeightIterator, start.DeviceWeightIterator, prefetch.PrefetchLoader):
        for call in (next, len, lambda made: made.close()):
            require_error(kind.__name__, lambda: call(kind.__new__(kind)))

    # Such objects as arguments of others.
    file = _C.CheckpointFile.__new__(_C.CheckpointFile)
    require_error("reader of a file", lambda: _C.TensorReader(file))
    options = dict.fromkeys(("map", "must_map", "read_ahead"), True) | dict.fromkeys(
        ("threads", "cold_threads", "threads_at_first", "window_bytes", "task_bytes", "block_bytes"), 4096
    )
    for wrong in (file, None):
        made = lambda: start.WeightIterator([wrong], [[0]], [], None, [], read=_C.ReadMode.auto, **options)
        require_error(f"load of {type(wrong).__name__}", made)
    right = _C.open_files([path.encode()], 1)
    assert next(start.WeightIterator(right, [[0]], [], None, [], read=_C.ReadMode.auto, **options))

    # Those that live.
    handle = weightload.safe_open(path)
    for make in (
        lambda: weightload.safetensors_weights_iterator([path], to_cpu=True),
        lambda: weightload.safetensors_weights_iterator([path], to_cpu=True, show_progress=True),
        lambda: handle.prefetch(),
        lambda: _C.open_files([path.encode()], 1)[0],
    ):
        for copying in (copy.copy, copy.deepcopy, pickle.dumps):
            require_error(copying.__name__, lambda: copying(make()))
    require_error("pickle of a handle", lambda: pickle.dumps(handle))
    assert torch.equal(copy.copy(handle).get_tensor("F32.matrix"), handle.get_tensor("F32.matrix"))
    print("alive")
"""


def test_every_class(all_dtypes: Path) -> None:
    done = run_script(PROBE, all_dtypes)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
