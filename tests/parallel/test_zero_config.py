import json

import pytest

from scale.config.run import DeepSpeedConfig
from scale.errors import UsageError
from scale.parallel.zero_config import deepspeed_json


def merged(tmp_path, theirs, precision="bf16", **options):
    file = tmp_path / "ds.json"
    file.write_text(theirs if isinstance(theirs, str) else json.dumps(theirs))
    return deepspeed_json(DeepSpeedConfig(config=str(file), **options), precision)


def test_the_json_says_what_the_yaml_says():
    made = deepspeed_json(DeepSpeedConfig(stage=2, offload=True), "bf16")
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["bf16"] == {"enabled": True} and made["fp16"] == {"enabled": False}
    assert made["gradient_clipping"] == 0 and made["gradient_accumulation_steps"] == 1
    plain = deepspeed_json(DeepSpeedConfig(), "fp32")
    assert plain["zero_optimization"]["stage"] == 3 and plain["bf16"] == {"enabled": False}
    assert plain["zero_optimization"]["offload_optimizer"] == {"device": "none"}


def test_other_keys_are_merged_in(tmp_path):
    theirs = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7, "offload_param": {"device": "none"}},
        "bf16": {"enabled": "auto", "check_grad_overflow": False},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "communication_data_type": "bf16",
        "log_level": "info",
    }
    made = merged(tmp_path, theirs)
    assert made["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "none"}
    assert made["bf16"] == {"enabled": True, "check_grad_overflow": False} and made["gradient_clipping"] == 0
    assert made["communication_data_type"] == "bf16" and made["log_level"] == "info" and "train_batch_size" not in made


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage = 2, but this run has 3.*compute\.deepspeed\.stage"),
        ({"zero_optimization": 3}, r"zero_optimization = 3: expected a JSON object"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, r'"cpu", but this run has "none".*offload'),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"offload_param .* is not supported"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, r"zenflow .* is not supported"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled = false, but this run has true.*compute\.precision"),
        ({"fp16": {"enabled": True}}, r"fp16\.enabled = true, but this run has false.*compute\.precision"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, r"bf16_optimizer_states .* moments are fp32"),
        ({"gradient_clipping": 1.0}, r"gradient_clipping = 1\.0, but this run has 0\.0.*optim\.clip"),
        ({"train_batch_size": 32}, r"train_batch_size = 32, but batch of the run decides"),
        ({"gradient_accumulation_steps": 4}, r"gradient_accumulation_steps = 4, but this run has 1.*batch"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto"}}}, r"optimizer = .* but optim of the run decides"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler = .* but schedule of the run decides"),
        ({"zero_optimisation": {"stage": 3}}, r"zero_optimisation\.stage = 3 is not supported"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype = \"bf16\", but this run has \"fp32\""),
        ("[1]", "expected a JSON object"),
        ('{"a": ', "not valid JSON"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line_with_file_key_and_fix(tmp_path, theirs, said):
    with pytest.raises(UsageError, match=rf"ds\.json: .*{said}|ds\.json: {said}") as error:
        merged(tmp_path, theirs)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"compute\.deepspeed\.config = '.*none\.json': No such file"):
        deepspeed_json(DeepSpeedConfig(config=str(tmp_path / "none.json")), "fp32")
