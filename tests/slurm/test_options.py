"""What ``slurm.sbatch`` may say, in every spelling that sbatch reads."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from slurm.test_render import words as as_sbatch_reads

from nft_megatron.base.errors import UserError
from nft_megatron.slurm.options import _REFUSED, check_own_options, excluded_nodes
from nft_megatron.slurm.quoting import words

OF_SLURM_22_05 = re.findall(
    r"[\w-]+",
    """account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous
    core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
    exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user
    mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks
    ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable
    partition power prefer priority profile propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job
    switches test-only thread-spec threads-per-core time time-min tmp uid usage use-min-nodes verbose version wait
    wait-all-nodes wckey wrap""",
)
"""The long options in the manual of sbatch."""

DANGEROUS = {
    "another user": ["--uid=0", "--uid 0", "--uid=root", "--ui=0", "--gid=0", "--gid wheel", "--gi=0", "--qos=a --uid=0"],
    "another script": ["--wrap=id", "--wrap id", "--wr=id", '--wr"ap"=id', r"--wr\ap=id", "'--wrap'=id", "--wrap='a b'"],
    "a second script": [
        "other.sh",
        "/tmp/other.sh",
        "--contiguous other.sh",
        "-H other.sh",
        "hetjob",
        "-",
        "--",
        "-- other.sh",
    ],
    "another environment": ["--export=NONE", "--export NONE", "--export=A=1,B", "--expo=NONE", "--export=", "--export-file=f"],
    "another folder": ["--chdir=/", "--chdir /", "-D /", "-D/", "-HD/", "-QHD /", "--chd=/", "--c=/", "--workdir=/"],
    "another job": ["--array=1-9", "-a 1-9", "-a1", "--job-name=x", "-J x", "-Jx", "--nodes=9", "-N 9", "-N9", "-QN9"],
    "other restarts": [
        *("--dependency=afterok:7", "-d afterok:7", "-dafterany:7", "--signal=KILL@9", "--sig=9", "--no-requeue", "--no-kill"),
        *("-k", "-Hk", "--no-k"),
    ],
    "no submission": ["--wait", "-W", "-QW", "--test-only", "--help", "-h", "--usage", "--version", "-V", "-vV"],
    "no option": ["", " ", "#", '""', "--comment='a", '--comment="a', "# --qos=high"],
}


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in DANGEROUS.items() for text in texts])
def test_an_option_that_changes_whose_job_it_is_or_what_it_runs_is_refused(kind, text):
    with pytest.raises(UserError, match=r"^slurm\.sbatch = .*: .+; .+") as refused:
        check_own_options(["--qos=high", text])
    assert "\n" not in str(refused.value)


HARMLESS = [
    *(
        "--qos=high",
        "--qos high",
        "-q high",
        "-qhigh",
        "--reservation=tuesday",
        "--mail-type=END --nice=3",
        "-x n1",
        "-w n[1-4]",
    ),
    *(
        "--comment=--uid of mine",
        "--comment='--wrap=id'",
        "--comment=a#b",
        "--constraint=a&b|c",
        "--mem=100G",
        "--exclusive=user",
    ),
    *("--export=ALL", "--export=ALL,A=1", "--export ALL", "--dependency=singleton", "--dependency=afterok:7,singleton"),
    *("--no-kill=off", "--wait-all-nodes=1", "--contiguous", "--hold", "-H", "-HQ", "--gpus-per-node=8", "--licenses=a:1"),
    *("--container-mounts=/a:/b", "--begin=now+1hour", "--nice", "--open-mode=append", "--output=/logs/%j", "--time=5", "-t5"),
]


@pytest.mark.parametrize("text", HARMLESS)
def test_what_a_site_needs_passes(text):
    check_own_options([text])


def test_of_all_that_sbatch_has_only_the_listed_ones_are_refused():
    refused = set()
    for name in OF_SLURM_22_05:
        try:
            check_own_options([f"--{name}=x"])
        except UserError:
            refused.add(name)
    assert refused == set(_REFUSED) - {"workdir"}  # of earlier versions


def test_no_beginning_of_a_refused_option_passes():
    """getopt_long takes any beginning that fits one option alone, which depends on the version and its plugins."""
    for name in _REFUSED:
        for length in range(1, len(name)):
            short = name[:length]
            if short in OF_SLURM_22_05 and short not in _REFUSED:
                continue
            with pytest.raises(UserError):
                check_own_options([f"--{short}=x"])


@given(st.text(alphabet="ab -=#'\"\\\t", max_size=12))
def test_lines_are_read_as_sbatch_reads_them(line):
    try:
        expected = as_sbatch_reads(line)
    except AssertionError:
        with pytest.raises(ValueError, match="not closed"):
            words(line)
    else:
        assert words(line) == expected


@given(st.lists(st.text(alphabet="uidwrap -=\"'\\", max_size=8), max_size=3))
def test_whatever_sbatch_would_read_as_another_user_or_script_is_refused(parts):
    """Quotes and backslashes hide nothing: judged by the reading of sbatch alone."""
    text = "".join(["--", *parts])
    try:
        check_own_options([text])
    except UserError:
        return
    assert not re.search(r"(^| )--(uid|wrap)(=|$)", " ".join(as_sbatch_reads(text)).split(" ")[0])


def test_excluded_nodes_are_found_in_every_spelling():
    own = ["--exclude=n1", "-x n2", "--exclude n[3-4]", "-xn5,n6", "--qos=high", "--comment=--exclude=n9"]
    assert excluded_nodes(own) == ["n1", "n2", "n[3-4]", "n5,n6"]
