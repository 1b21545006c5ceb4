"""Keys that were renamed: an error for a person, a translation for the files of an earlier run."""

import pytest
import yaml

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import load_config
from nft_megatron.config.renamed import RENAMED


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_in_an_override_or_a_file_is_an_error_that_names_the_new_one(run_config, old, new):
    section, _, leaf = old.partition(".")
    with pytest.raises(UserError) as of_override:
        load_config(run_config(), [f"{old}=4"])
    with pytest.raises(UserError) as of_file:
        load_config(run_config(**{section: {leaf: 4}}))
    assert str(of_override.value) == str(of_file.value) == f"{old} = 4: no such key; it is now called '{new}'"


@pytest.mark.parametrize("sign", ["ledger", "metrics.jsonl", "slurm", "job.sh"])  # the last: RUN/slurm/config.yaml
def test_the_configuration_in_the_folder_of_an_earlier_run_is_translated(run_config, tmp_path, sign):
    tree = yaml.safe_load(run_config().read_text())
    tree["rollout"] |= {"answers_per_question": tree["rollout"].pop("group_size") - 3, "gate_questions": 5, "gate_tokens": 7}
    record = tmp_path / "run" / "config.yaml"
    beside = record.parent / sign
    beside.parent.mkdir()
    beside.touch()
    record.write_text(yaml.safe_dump(tree))
    config = load_config(record)
    assert config.train.minibatch_of == "questions"  # the only way there was
    assert (config.rollout.group_size, config.rollout.probe_questions, config.rollout.probe_tokens) == (5, 5, 7)
    with pytest.raises(UserError, match=r"it is now called 'rollout\.group_size'"):
        load_config(record, ["rollout.answers_per_question=5"])
