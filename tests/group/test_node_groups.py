"""Which ranks are on one node, and what follows for the loads of a group."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.ranks.groups import run_ranks

# Three ranks on nodes of one and of two, as a launcher describes them: no rank can count the nodes by itself.
UNEVEN = """
    node = (0, 1, 1)[rank]
    os.environ.update(GROUP_RANK=str(node), LOCAL_WORLD_SIZE=str((1, 2, 2)[rank]))
"""


def test_auto_on_nodes_of_different_sizes(checkpoint: list[Path], tmp_path: Path) -> None:
    """All ranks of a group that spans nodes share its reading; a node's group has nothing to share on the CPU."""
    script = (
        UNEVEN
        + """
    both, one = dist.new_group([0, 1, 2]), dist.new_group([1, 2])
    for _ in range(2):
        with weightload.settings.override(block_bytes=65536, task_bytes=16384):
            print(weightload._group.ranks.resolve_group(both, "auto", "cpu", "it")[1])
            if rank:
                print(weightload._group.ranks.resolve_group(one, "auto", "cpu", "it")[1])
    group = weightload.node_group()
    print(dist.get_process_group_ranks(group))
    """
    )
    outputs = run_ranks(script, 3, tmp_path, *checkpoint)
    assert [status for status, _ in outputs] == [0, 0, 0], outputs
    assert outputs[0][1].split("\n")[:-1] == ["striped", "striped", "[0]"]
    for _, output in outputs[1:]:
        assert output.split("\n")[:-1] == ["striped", "independent"] * 2 + ["[1, 2]"]


@pytest.mark.parametrize("odd", ["auto", "broadcast"])
def test_a_rank_with_another_strategy_than_the_others_auto(checkpoint: list[Path], tmp_path: Path, odd: str) -> None:
    """Whatever its strategy, a rank takes part in counting the nodes of a group, so that the agreement can tell."""
    script = (
        UNEVEN
        + """
    group = dist.new_group([0, 1, 2])
    try:
        list(weightload.safetensors_weights_iterator(
            sys.argv[5:], device="cpu", group=group, strategy=sys.argv[4] if rank == 1 else "auto"))
    except weightload.errors.RankDisagreementError as error:
        print(error)
    """
    )
    for status, output in run_ranks(script, 3, tmp_path, odd, *checkpoint):
        assert status == 0, output
        assert ("rank 1 of 3 differs in strategy (broadcast where the others have striped)" in output) == (
            odd != "auto"
        )
