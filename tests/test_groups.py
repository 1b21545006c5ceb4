"""The suite's own guarantee: with ``-n 2 --dist loadgroup``, tests that share expensive fixtures stay in one process."""


def test_the_group_of_a_test_reaches_the_scheduler(request, worker_id):
    """pytest-xdist marks it in the node id; if that is lost, two processes silently start vLLM and Slurm twice."""
    assert worker_id == "master" or request.node.nodeid.endswith("@tests/test_groups.py")
