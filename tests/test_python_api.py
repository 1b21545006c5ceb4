"""The names that the package exports, and the page that documents them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nft_megatron

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "python_api.md"


@pytest.fixture
def folder(run_config, model_folder, question_file, tmp_path) -> Path:
    """The folder in which the page's examples run."""
    (tmp_path / "model").symlink_to(model_folder)
    (tmp_path / "sums.parquet").symlink_to(question_file)
    tree = yaml.safe_load(run_config().read_text())
    tree |= {"run_dir": "run", "model": {"path": "model", "dtype": "float32"}}
    tree["data"]["train"] = tree["evaluate"]["data"] = "sums.parquet"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "qwen2.5-32b-16k.yaml").write_text((ROOT / "examples/qwen2.5-32b-16k/config.yaml").read_text())
    return tmp_path


def test_every_example_of_the_page_holds(folder):
    done = subprocess.run([sys.executable, "-m", "doctest", PAGE], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_and_the_package_name_the_same_functions():
    text = PAGE.read_text()
    assert all(f"`{name}(" in text and f"nft.{name}(" in text for name in nft_megatron.__all__)
    assert set(nft_megatron.__all__) <= set(dir(nft_megatron))


def test_no_exported_name_is_hidden_by_a_module():
    folder = Path(nft_megatron.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert not modules & set(nft_megatron.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = nft_megatron.trian
