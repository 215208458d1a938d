"""The groups of ranks among which rows travel: one, or two where several ranks share a holder's heads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from flashcp.comm.ending import make_group
from flashcp.sharding.values import shown

_JOIN_S = 30.0  # the least time that ranks get to form a group

_made: dict[tuple[str, tuple[int, ...]], dist.ProcessGroup] = {}  # by the name of what they are parts of, and ranks
_made_in: list[dist.ProcessGroup] = []  # the default group that those of `_made` are parts of


class Level(NamedTuple):
    """A group that this rank is a member of.

    ranks: numbers of its members among all ranks that share a pack. inside: whether they are one holder's.
    """

    group: dist.ProcessGroup | None
    ranks: Sequence[int]
    inside: bool


def make_levels(group: dist.ProcessGroup | DeviceMesh | None, head_ranks: int, timeout_s: float) -> list[Level]:
    """Inside this rank's holder, then between holders; only levels of more than one rank.

    group: as `flashcp.ContextParallel` takes it. head_ranks: ranks of a holder, those that follow each other in the
    group. All ranks of the group call this together. Raises ValueError for a group that this rank is no member of, and
    numbers that do not fit.
    """
    launched = dist.is_available() and dist.is_initialized()
    if not _has_this_rank(group, launched):
        raise ValueError(
            f"group={_said(group)}: expected a torch.distributed group or a mesh of one or two dims that this rank is "
            "a member of, or None"
        )
    if isinstance(group, DeviceMesh) and group.ndim == 2:
        return _of_mesh(group, head_ranks)
    if isinstance(group, DeviceMesh):
        group = group.get_group()
    ranks = dist.get_world_size(group) if launched else 1
    if ranks % head_ranks:
        raise ValueError(f"head_ranks={head_ranks} with {ranks} ranks: expected a number that divides them")
    if ranks == 1:
        return []
    if head_ranks in (1, ranks):
        return [Level(group, range(ranks), head_ranks == ranks)]
    own = dist.get_rank(group)
    first, place = own - own % head_ranks, own % head_ranks
    numbers = range(first, first + head_ranks), range(place, ranks, head_ranks)
    return [
        Level(_part(group, some, timeout_s), some, inside) for some, inside in zip(numbers, (True, False), strict=True)
    ]


def _has_this_rank(group: object, launched: bool) -> bool:
    """Whether it is a group, or a mesh of one or two dims, and this rank is in it."""
    if group is None:
        return True
    if not launched:
        return False
    if isinstance(group, DeviceMesh):
        return group.ndim in (1, 2) and group.get_coordinate() is not None
    if not isinstance(group, dist.ProcessGroup):
        return False
    with suppress(ValueError):  # of a group that was destroyed
        return dist.get_rank(group) >= 0
    return False


def _said(group: object) -> str:
    if isinstance(group, DeviceMesh):
        return f"a mesh of {' x '.join(map(str, group.shape))}"
    return "a ProcessGroup" if isinstance(group, dist.ProcessGroup) else shown(group)


def _of_mesh(mesh: DeviceMesh, head_ranks: int) -> list[Level]:
    holders, members = mesh.shape
    if head_ranks not in (1, members):
        raise ValueError(f"head_ranks={head_ranks} with a mesh of {holders} x {members}: expected {members}, or none")
    holder, place = mesh.get_coordinate()  # type: ignore[misc]  # of a member, who has one
    first = holder * members
    levels = (
        Level(mesh.get_group(1), range(first, first + members), True),
        Level(mesh.get_group(0), range(place, holders * members, members), False),
    )
    return [level for level in levels if len(level.ranks) > 1]


def _part(group: dist.ProcessGroup | None, numbers: Sequence[int], timeout_s: float) -> dist.ProcessGroup:
    """Some ranks of a group as a group of the same backend; made once, for groups hold threads and sockets. Another
    group has parts of its own: those of one that a time-out ended are of no use."""
    default = dist.distributed_c10d._get_default_group()
    if _made_in != [default]:  # groups end with the default one
        _made.clear()
        _made_in[:] = [default]
    every = dist.get_process_group_ranks(group)
    ranks, backend = [every[number] for number in numbers], str(dist.get_backend(group))
    key = (group or default).group_name, tuple(ranks)
    if key not in _made:
        patience = timedelta(seconds=max(timeout_s, _JOIN_S))
        same = backend == str(dist.get_backend())
        _made[key] = make_group(ranks, None if same else backend, patience)
    return _made[key]
