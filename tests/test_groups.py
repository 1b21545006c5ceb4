"""The suite's own promise: with ``-n 2 --dist loadgroup`` tests that share what is dear to build stay in one process."""


def test_the_group_of_a_test_reaches_the_scheduler(request, worker_id):
    """pytest-xdist marks it in the node id; where that is lost, two processes start vLLM and Slurm twice without a word."""
    assert worker_id == "master" or request.node.nodeid.endswith("@tests/test_groups.py")
