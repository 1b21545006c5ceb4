from pathlib import Path

import pytest
import yaml

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import config_help, dump_config, load_config
from nft_megatron.config.schema import Config

MINIMAL = {"run_dir": "runs/a", "model": {"path": "m"}, "data": {"train": "a.parquet"}, "train": {"num_steps": 3}}


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_are_the_papers_7b_settings(minimal):
    config = load_config(minimal)
    assert config.rollout.questions_per_step == 512
    assert config.rollout.group_size == 16
    assert config.train.updates_per_step == 16
    assert config.max_sequence_tokens == 4096
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay, config.optimizer.beta2) == (1e-6, 0.1, 0.999)
    assert (config.algorithm.name, config.algorithm.epsilon, config.algorithm.prompt_weight) == ("nft", 1.0, "one_minus_rate")


def test_overrides_apply_in_order_and_are_yaml(minimal):
    config = load_config(
        minimal,
        [
            "optimizer.learning_rate=1e-3",
            "train.num_steps=5",
            "train.num_steps=7",
            "data.train=[a, b]",
            "rollout.processes=null",
        ],
    )
    assert config.optimizer.learning_rate == 1e-3
    assert config.train.num_steps == 7
    assert config.data.train == (Path("a"), Path("b"))
    assert config.rollout.processes is None


def test_dump_reads_back_equal(minimal, tmp_path):
    config = load_config(minimal, ["algorithm.name=rft", "train.denominator=32000.0", 'data.plain_format="Q: {question}\\n"'])
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    assert config.data.plain_format == "Q: {question}\n"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.num_steps=3", "trian = {'num_steps': 3}: no such key; did you mean 'train'?"),
        ("train.num_stps=3", "train.num_stps = 3: no such key; did you mean 'train.num_steps'?"),
        ("learning_rate=1", "learning_rate = 1: no such key; did you mean 'optimizer.learning_rate'?"),
        ("algorithm.epsilom=1", "algorithm.epsilom = 1: no such key; did you mean 'algorithm.epsilon'?"),
        ("algorithm.clip_low=0.1", "algorithm.clip_low = 0.1: no such key; it belongs to algorithm.name = grpo, dr_grpo, dapo"),
        ("algorithm.name=nff", "algorithm.name = nff: no such algorithm; one of infonca, nft, rft, grpo, dr_grpo, dapo"),
        ("train.num_steps=many", "train.num_steps = many: Input should be a valid integer; the type is integer"),
        ("train.num_steps=1.5", "train.num_steps = 1.5: Input should be a valid integer"),
        ("train.num_steps='3'", "train.num_steps = 3: Input should be a valid integer"),
        ("train.num_steps=0", "train.num_steps = 0: Input should be greater than 0"),
        ("train.denominator=foo", "train.denominator = foo: is not allowed; the type is tokens | sequences | number > 0"),
        ("model.path=null", "model.path = None: Input is not a valid path"),
        ("model=3", "model = 3: Input should be a valid dictionary"),
        ("seed.x=3", "seed.x = 3: 'seed' is a value, not a section"),
        ("rollout.top_p=0.9", "rollout.top_p = 0.9: training answers must come from the policy itself"),
        ("train.updates_per_step=3", "does not divide rollout.questions_per_step = 512"),
        ("rollout.max_answer_tokens=16000", "train.micro_batch_tokens = 16384: a sequence may have"),
        ("verify.hard_seconds=0.5", "verify.hard_seconds = 0.5: below verify.soft_seconds = 1.0"),
        ("no-equals", "override = no-equals: is not of the form section.key=value"),
    ],
)
def test_mistakes_name_field_value_and_remedy(minimal, override, message):
    if override == "seed.x=3":
        minimal.write_text(yaml.safe_dump(MINIMAL | {"seed": 1}))
    with pytest.raises(UserError) as error:
        load_config(minimal, [override])
    assert str(error.value).startswith(message) or message in str(error.value)


def test_missing_field(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {train: a}\ntrain: {}\n")
    with pytest.raises(
        UserError, match=r"train\.num_steps = \(nothing\): is required; add it to the file or as train\.num_steps=…"
    ):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not readable as YAML"), ("seed: 1\nseed: 2\n", "key 'seed' appears twice"), ("- 1\n", "contains no sections")],
)
def test_unreadable_file(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(tmp_path / "c.yaml")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_config_is_frozen(minimal):
    config = load_config(minimal)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_help_explains_every_field():
    text = config_help()
    for section_name, section in Config.model_fields.items():
        for model in getattr(section.annotation, "__args__", (section.annotation,)):
            for name, field in getattr(model, "model_fields", {}).items():
                assert field.description, f"{section_name}.{name} has no docstring"
                assert f"  {name}  (" in text
                assert field.description.splitlines()[0] in text
