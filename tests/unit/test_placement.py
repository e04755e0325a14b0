"""Where workers go: each on one node, the workers of a job on as few nodes as will do."""

from hypothesis import given
from hypothesis import strategies as st

from service.placement import Capacity, Room, whole
from tests.fakes.ray_cluster import machine

BIG = Capacity(gpus=1, cpus=4)
SMALL = Capacity(gpus=0, cpus=1)


def test_a_worker_fits_on_one_node_or_not_at_all() -> None:
    nodes = [machine(1, gpus=1, cpus=2), machine(2, gpus=1, cpus=2)]
    assert whole(nodes) == Capacity(2, 4)
    assert Room(nodes).place(BIG, 1) is None
    assert Room([machine(3, gpus=0, cpus=8), machine(4, gpus=2, cpus=1)]).place(BIG, 1) is None


def test_workers_of_a_job_share_the_node_that_just_holds_them() -> None:
    nodes = [machine(1, gpus=4, cpus=16), machine(2, gpus=2, cpus=8), machine(3, gpus=1, cpus=4)]
    assert Room(nodes).place(BIG, 1) == ("node3",)
    assert Room(nodes).place(BIG, 2) == ("node2", "node2")
    assert Room(nodes).place(BIG, 3) == ("node1",) * 3
    assert Room(nodes).place(BIG, 6) == ("node1",) * 4 + ("node2",) * 2
    assert Room(nodes).place(BIG, 8) is None


def test_workers_without_a_gpu_leave_nodes_with_gpus_alone() -> None:
    nodes = [machine(1, gpus=1, cpus=1), machine(2, cpus=8)]
    assert Room(nodes).place(SMALL, 1) == ("node2",)


def test_nothing_goes_to_a_node_that_is_gone_or_about_to_go() -> None:
    nodes = [machine(1, cpus=8, alive=False), machine(2, cpus=8, draining=True)]
    room = Room(nodes)
    assert room.place(SMALL, 1) is None
    room.give(SMALL, ["node1", "node2", "unknown"])
    assert room.place(SMALL, 1) is None
    assert whole(nodes) == Capacity(0, 0)


def test_a_node_on_which_more_is_held_than_there_is_holds_no_more() -> None:
    room = Room([machine(1, cpus=2), machine(2, cpus=1)])
    room.take(SMALL, ["node1"] * 3)
    assert room.free(Capacity(0, 1)) == Capacity(0, 1)
    assert room.place(SMALL, 2) is None
    assert room.copy().place(SMALL, 1) == ("node2",)


nodes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4).map(
    lambda sizes: [machine(n, gpus, cpus) for n, (gpus, cpus) in enumerate(sizes)]
)
workers = st.builds(Capacity, st.integers(0, 2), st.integers(1, 4))


@given(nodes, st.lists(st.tuples(workers, st.integers(1, 6)), max_size=6))
def test_no_node_ever_holds_more_than_it_has(made: list, wanted: list) -> None:
    room = Room(made)
    free = {node.id: node.capacity for node in made}
    for worker, number in wanted:
        placement = room.place(worker, number)
        assert (placement is None) == (room.slots(worker) < number)
        for node in placement or ():
            free[node] = free[node].plus(worker.times(-1))
        room.take(worker, placement or ())
        assert all(left.gpus >= 0 and left.cpus >= 0 for left in free.values())
