from importlib.metadata import requires, version

import pytest
import torch

from nft_megatron.cli import doctor


def test_every_requirement_is_reported_with_the_version_that_is_imported():
    found = {finding.name: finding for finding in doctor.findings()}
    assert found["torch"].state == torch.__version__ == version("torch")
    always = [text for text in requires("nft_megatron") if "extra" not in text]
    assert len(always) > 8
    assert not [finding for finding in found.values() if finding.is_fault]


@pytest.mark.parametrize(
    ("asked", "state", "remedy"),
    [
        ("no-such-package>=1", "missing", "pip install 'no-such-package>=1'"),
        ("torch<1", f"{torch.__version__}, tested with <1", "pip install 'torch<1'"),
    ],
)
def test_what_is_missing_or_of_another_version_is_a_fault(monkeypatch, asked, state, remedy):
    monkeypatch.setattr(doctor, "requires", lambda _: [asked])
    (finding,) = (finding for finding in doctor.findings() if finding.is_fault)
    assert (finding.state, finding.remedy) == (state, remedy)


def test_extras_are_offered_and_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "requires", lambda _: ['no-such-package>=1; extra == "te"', 'nor-this; extra == "dev"'])
    missing = [finding for finding in doctor.findings() if "'nft_megatron[" in finding.remedy]
    assert [finding.name for finding in missing] == ["no-such-package"]
    assert missing[0].remedy == "pip install --no-build-isolation 'nft_megatron[te]'"


def test_the_command_prints_a_line_for_each(command):
    done = command("doctor")
    assert done.returncode == 0
    for finding in doctor.findings():
        assert any(finding.name in line and finding.state in line for line in done.stdout.splitlines())
