"""load_into by ranks that each read for themselves: they begin together, and what fails on one is raised on all."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.ranks.groups import assert_done, run_ranks

# Ranks 0 to 3 load; a fifth makes the default group larger than the mesh, so that they speak in its dimensions' groups.
LOADS = """
from weightload import _C, errors
from weightload._into import together
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor, init_device_mesh

path = sys.argv[4]
with_fifth = size == 5
if with_fifth:
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("r", "c"))
else:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("r", "c"))

four = dist.new_group(range(4))
columns = mesh[mesh.mesh_dim_names[0]] if rank < 4 else None

def target(placements=(Shard(0), Shard(1)), **more):
    deal = lambda tensor: distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return {name: deal(torch.zeros(16, 8)) for name in "abcd"} | more

def load(into=None, path=path, **options):
    try:
        weightload.load_into(target() if into is None else into, path, **options)
    except BaseException as error:
        return error

def is_right(into):
    return all((tensor.full_tensor() == ord(name)).all() for name, tensor in into.items())

def check(error, kind, *words, of=1):
    assert isinstance(error, kind) and error.rank == of, repr(error)
    assert all(word in str(error) for word in words), str(error)

if rank < 4:
    # A read fails.
    if rank == 1:
        _C.arm_fault("error", first=1, count=1 << 30, error_number=5)
    error = load()
    _C.disarm_fault()
    check(error, errors.ReadError)
    assert error.errno == 5 and error.filename == path and error.offset is not None

    # Ranks that were told to load together behave in the same way, without DTensors.
    if rank == 1:
        _C.arm_fault("error", first=1, count=1 << 30, error_number=5)
    error = load({name: torch.zeros(16, 8) for name in "abcd"}, group=four)
    _C.disarm_fault()
    check(error, errors.ReadError)

    # Before it: a file that one rank lacks, a target that one rank cannot fill, arguments.
    check(load(path=path + "x" * (rank == 2)), FileNotFoundError, of=2)
    into = target(**{"e": torch.zeros(3)} if rank == 3 else {})
    check(load(into), errors.StateDictError, "e", of=3)
    assert not any(into[name].to_local().any() for name in "abcd")
    check(load(duplicates="error" if rank else "first"), errors.GroupValueError, of=0)
    check(load(group="four" if rank == 3 else None), errors.GroupValueError, "group", of=3)
    into = target((Shard(0), Shard(1)) if rank else (Shard(0), Replicate()))
    error = load(into)
    assert type(error) is errors.RankDisagreementError and "meshes and placements" in str(error), repr(error)
    assert not any(into[name].to_local().any() for name in "abcd")

    into = target()
    swap = {"a": "b", "b": "a"} if rank == 1 else {}
    error = load(into, rename=swap)
    assert type(error) is errors.RankDisagreementError and "rename" in str(error), repr(error)
    error = load(into, rename={"a": None} if rank == 1 else {}, strict=False)
    assert type(error) is errors.RankDisagreementError, repr(error)

    # Experts of a part of the mesh are other ones on other ranks.
    expert = distribute_tensor(torch.zeros(16, 8), columns, [Shard(0)], src_data_rank=None)
    into = {"a": target()["a"], "bc"[rank % 2]: expert}
    assert load(into, strict=False) is None and is_right(into)

    # The code of one rank's module raises an error that is not ours, and an interrupt.
    class OwnError(Exception):
        pass

    class Net(torch.nn.Module):
        def __init__(self, raises):
            super().__init__()
            for name, tensor in target().items():
                self.register_parameter(name, torch.nn.Parameter(tensor))
            def hook(module, keys):
                if raises:
                    raise raises
            self.register_load_state_dict_post_hook(hook)

    error = load(Net(OwnError("mine") if rank == 1 else None))
    if rank == 1:
        assert type(error) is OwnError
    else:
        check(error, errors.GroupError, "rank 1 failed: OwnError: mine")
    error = load(Net(KeyboardInterrupt() if rank == 1 else None))
    if rank == 1:
        assert type(error) is KeyboardInterrupt
    else:
        check(error, errors.GroupError, "rank 1 failed: KeyboardInterrupt")

    # Another is still busy.
    together.LOOK_SECONDS = 0
    store = dist.distributed_c10d._get_default_store()
    (ranks, number), = together._rounds.items()
    put, copied = weightload._into.filling._put, []
    def slowly(name, tensor, place):
        store.wait([f"weightload/failed/{ranks}/{number + 1}"])
        copied.append(name)
        put(name, tensor, place)
    weightload._into.filling._put = slowly
    into = {"a": target()["a"]} | {name: torch.zeros(8, 16).t() for name in "bcd" if rank == 0}
    if rank == 1:
        _C.arm_fault("error", count=1 << 30, error_number=5)
    error = load(into, strict=False)
    _C.disarm_fault()
    check(error, errors.ReadError)
    assert len(copied) <= 1, copied

    # All of it has left the groups as they were.
    into = target()
    weightload.load_into(into, path)
    assert is_right(into), into
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.parametrize("size", [4, 5])
def test_what_fails_on_one_rank_of_a_mesh_is_raised_on_all(size: int, tmp_path: Path) -> None:
    whole = {name: torch.full((16, 8), float(ord(name))) for name in "abcd"}
    safetensors.torch.save_file(whole, tmp_path / "m.safetensors")
    assert_done(run_ranks(LOADS, size, tmp_path, tmp_path / "m.safetensors"))
