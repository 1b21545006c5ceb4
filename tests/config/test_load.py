from pathlib import Path

import pytest
import yaml

from nft_megatron.base.errors import UserError
from nft_megatron.config.load import config_from, config_help, dump_config, load_config
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
        (
            "algorithm.clip_low=0.1",
            "algorithm.clip_low = 0.1: no such key; it belongs to algorithm.name = gspo, grpo, dr_grpo, dapo",
        ),
        ("algorithm.name=nff", "algorithm.name = nff: no such algorithm; one of cispo, gspo, infonca, nft, rft, grpo, "),
        ("verify.mode=strickt", "verify.mode = strickt: is not allowed; the type is strict | math-verify | dapo | "),
        ("verify.mode='a b:c'", "simplerl | program | module:name"),
        (
            "verify.url=127.0.0.1:8000",
            "verify.url = 127.0.0.1:8000: is not the address of a service; write http://127.0.0.1:PORT",
        ),
        ("optimizer.decay_updates=5", "optimizer.decay_updates = 5: has no effect with optimizer.schedule = constant"),
        ("optimizer.schedule=cosine", "optimizer.decay_updates = None: must be above optimizer.warmup_updates = 10"),
        ("checkpoint.keep_best=1", "checkpoint.keep_best = 1: goes by held-out accuracy, but evaluate.data is empty"),
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
        ("slurm.plan=no", "slurm.plan = no: Input should be a valid boolean; the type is true | false"),
        ("rollout=null", "rollout = (nothing): is a section without keys; give it one, or remove its line"),
        (
            "fleet.urls=[http://127.0.0.1:8000, http://node7:8000]",
            "fleet.urls = http://node7:8000: would send the servers' key unencrypted over the network; use https://",
        ),
        ("fleet.urls=http://10.0.0.7:8000", "fleet.urls = http://10.0.0.7:8000: would send the servers' key unencrypted"),
        ("fleet.urls=http://127.0.0.1.evil.org", "fleet.urls = http://127.0.0.1.evil.org: would send the servers' key"),
        ("fleet.urls=http://key@127.0.0.1:8000", "fleet.urls = http://key@127.0.0.1:8000: is not the address of a server"),
        ("fleet.urls=node7:8000", "fleet.urls = node7:8000: is not the address of a server; write http://127.0.0.1:PORT"),
        ("fleet.urls=https://", "fleet.urls = https://: is not the address of a server"),
        ("fleet.urls=https://h:0", "fleet.urls = https://h:0: is not the address of a server"),
        ("fleet.urls=https://h:99999", "fleet.urls = https://h:99999: is not the address of a server"),
        ("fleet.urls=file:///etc/passwd", "fleet.urls = file:///etc/passwd: is not the address of a server"),
        ("train.num_steps=[", "train.num_steps = [: not readable as a YAML value: line 1, column 2: expected the node content"),
    ],
)
def test_mistakes_name_field_value_and_remedy(minimal, override, message):
    if override == "seed.x=3":
        minimal.write_text(yaml.safe_dump(MINIMAL | {"seed": 1}))
    with pytest.raises(UserError) as error:
        load_config(minimal, [override])
    assert str(error.value).startswith(message) or message in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://node7:8443", "https://h/prefix", "http://localhost:1", "http://127.0.0.2:80", "http://[::1]:8000"]
)
def test_an_address_that_keeps_the_key_secret(minimal, url):
    assert load_config(minimal, ["rollout.engine=vllm", f"fleet.urls=['{url}']"]).fleet.urls == (url,)


def test_importance_weights_need_recomputed_log_probs(minimal):
    message = (
        r"train\.importance_cap = 2\.0: weights tokens by π / π_engine, but train\.old_logprobs = engine takes π_engine for π"
    )
    with pytest.raises(UserError, match=message):
        load_config(minimal, ["train.importance_cap=2", "train.old_logprobs=engine"])


def test_missing_field(tmp_path):
    (tmp_path / "c.yaml").write_text("run_dir: r\nmodel: {path: m}\ndata: {train: a}\ntrain: {}\n")
    with pytest.raises(
        UserError, match=r"train\.num_steps = \(nothing\): is required; add it to the file or as train\.num_steps=…"
    ):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not readable as YAML: line 1, column 5: expected the node content, but found '<stream end>'; correct"),
        (
            "seed: 1\nseed: 2\n",
            'line 2, column 1: found duplicate key "seed" with value "2" (original value: "1"); correct that',
        ),
        ("train: {\n  num_steps: 1, num_steps: 1}", 'line 2, column 17: found duplicate key "num_steps" with value "1"'),
        ("seed: 1\r\nseed: 2\r\n", 'line 2, column 1: found duplicate key "seed"'),
        ("train:\n\tnum_steps: 1\n", "line 2, column 1: found character '\\t' that cannot start any token"),
        ("train: *missing", "line 1, column 8: found undefined alias 'missing'"),
        ("seed: !!python/object:os.system x", "line 1, column 7: could not determine a constructor for the tag"),
        ("seed: 1\n---\nseed: 2", "line 2, column 1: but found another document"),
        ("%YAML 3.0\n---\nseed: 1", "line 1, column 1: found incompatible YAML document (version 1.* is required)"),
        ("seed: 1\n? {a: 1}\n: 2", "line 2, column 3: found unhashable key"),
        ("a: 1\nb: \0", "line 2: character U+0000 is not allowed"),
        ("a: " + "[" * 5000, "the values are nested too deeply"),
        ("a: é".encode("latin-1"), "is not UTF-8: line 1 has the byte 0xe9; save the file as UTF-8"),
        ("a: 1".encode("utf-16"), "is not UTF-8: line 1 has the byte 0xff"),
        ("- 1\n", "contains no sections; start from a file in examples/"),
        ("seed=1", "contains no sections"),
        ("", "contains no sections"),
    ],
)
def test_unreadable_file(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"CONFIG = {path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer: {learning_rate: 1,5}",
            "optimizer.5 = 5: is no text, as a key must be; check the line for a stray comma or",
        ),
        ("3: 4", "3 = 3: is no text, as a key must be"),
        ("~: 4", "None = None: is no text, as a key must be"),
        ("? [a, b]\n: 3", "('a', 'b') = ('a', 'b'): is no text, as a key must be"),
        ("größe: 3", "größe = 3: no such key; did you mean 'slurm.gres'?"),
        ("rollout: {foo: {bar: 1}}", "rollout.foo = {'bar': 1}: no such key; known keys: engine, questions_per_step"),
        (
            "rollout.group_size: 8",
            "rollout.group_size = 8: no such key; in a file, write 'group_size' indented under 'rollout:'",
        ),
        ("rollout:\n# group_size: 8", "rollout = (nothing): is a section without keys; give it one, or remove its line"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate = inf: Input should be a finite number; the type is"),
        (
            "slurm: {job_name: 2026-01-02}",
            "slurm.job_name = 2026-01-02: Input should be a valid string; the type is text | null",
        ),
        ("shared: &a {beta1: 0.8}\noptimizer: *a", "shared = {'beta1': 0.8}: no such key; did you mean 'seed'?"),
    ],
)
def test_wrong_content_of_a_file(minimal, text, message):
    minimal.write_text(f"{minimal.read_text()}{text}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(minimal)
    assert str(error.value).startswith(message)


def test_a_file_is_yaml_1_2(minimal):
    """``1e-6`` is a number; ``on``, ``yes``, ``no`` and ``24:00:00`` are text, as they look; anchors and merge keys work."""
    minimal.write_text(
        f"\ufeff{minimal.read_text()}optimizer: {{<<: {{beta1: 0.75, beta2: 0.25}}, learning_rate: 1e-6, beta1: 0.5}}\n"
        "slurm: {account: on, partition: no, job_name: yes, time: 1:30:00, plan: false, sbatch: &a [x], setup: *a}\n",
        encoding="utf-8",
    )
    config = load_config(minimal)
    assert (config.optimizer.learning_rate, config.optimizer.beta1, config.optimizer.beta2) == (0.000001, 0.5, 0.25)
    assert (config.slurm.account, config.slurm.partition, config.slurm.job_name) == ("on", "no", "yes")
    assert (config.slurm.time, config.slurm.plan, config.slurm.setup) == ("1:30:00", False, ("x",))


@pytest.mark.parametrize(
    "text", ["on", "24:00:00", "1e3", "0895", "0o17", "null", "~", "é😀", "a\nb ", " #x", "2026-01-02", "y: z", "="]
)
def test_a_text_that_looks_like_something_else_is_dumped_as_a_text(minimal, tmp_path, text):
    tree = MINIMAL | {"slurm": {"preflight_command": text}, "rollout": {"stop": [text, "b"]}}
    config = config_from(tree)
    (tmp_path / "dumped.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "dumped.yaml").slurm.preflight_command == text
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize("text", ["on", "24:00:00", "0777", "null", "é😀", "a\nb ", " #x", "2026-01-02", "y: z", "="])
def test_a_record_that_pyyaml_wrote_reads_back_equal(minimal, tmp_path, text):
    """As every run folder's was, before ruamel.yaml wrote them."""
    config = config_from(
        MINIMAL | {"slurm": {"preflight_command": text}, "optimizer": {"learning_rate": 1e-6}, "rollout": {"stop": [text]}}
    )
    written = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (tmp_path / "config.yaml").write_text(written, encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


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
