"""``ftlab from-torchtune``: nothing of a configuration is lost on the way, and what cannot come along is said.

The configurations that torchtune 0.6.1 ships are read by the slow test, from an unpacked wheel:
``pip download torchtune==0.6.1 --no-deps && unzip torchtune-*.whl -d X && FTLAB_TORCHTUNE=X pytest -m slow ...``.
"""

from __future__ import annotations

import ast
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ftlab.cli import main as ftlab
from ftlab.errors import ConfigError
from ftlab.lab.from_torchtune import Translation, as_script, from_torchtune
from ftlab.lab.plan import Given, plan

SINGLE, DISTRIBUTED = "full_finetune_single_device", "full_finetune_distributed"


def recipe(**changes: Any) -> dict[str, Any]:
    """A configuration in torchtune's schema; ``None`` as a change takes a key out."""
    tree = {
        "output_dir": "/tmp/torchtune/run",
        "tokenizer": {
            "_component_": "torchtune.models.llama3.llama3_tokenizer",
            "path": "/weights/original/tokenizer.model",
            "max_seq_len": None,
        },
        "dataset": {"_component_": "torchtune.datasets.alpaca_dataset", "packed": False},
        "seed": None,
        "shuffle": True,
        "model": {"_component_": "torchtune.models.llama3_2.llama3_2_1b"},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": "/weights/",
            "checkpoint_files": ["model.safetensors"],
            "recipe_checkpoint": None,
            "output_dir": "${output_dir}",
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False,
        "batch_size": 4,
        "epochs": 1,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": "2e-5", "fused": True},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 8,
        "device": "cuda",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "clip_grad_norm": None,
        "compile": False,
        "optimizer_in_bwd": False,
        "dtype": "bf16",
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": True,
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False, "cpu": True},
    } | changes  # fmt: skip
    return {key: value for key, value in tree.items() if key not in changes or changes[key] is not None}


@pytest.fixture
def translate(tmp_path: Path):
    def one(*overrides: str, comment: str = "", nproc_per_node: int | None = None, **changes: Any) -> Translation:
        file = tmp_path / "config.yaml"
        file.write_text(f"# {comment}\n" + yaml.safe_dump(recipe(**changes)), encoding="utf-8")
        return from_torchtune(file, overrides, nproc_per_node=nproc_per_node)

    return one


def keys(done: Translation, kind: str) -> list[str]:
    return [note.key for note in done.notes if note.kind == kind]


def test_what_the_configuration_says_the_command_says(translate):
    done = translate(seed=7, clip_grad_norm=0.5, max_steps_per_epoch=11, enable_activation_checkpointing=True)
    config = done.config
    assert "model=llama3_2_1b" in done.overrides
    assert "model.checkpoint=/weights" in done.overrides
    trainer = config["trainer"]
    assert (trainer["batch_size"], trainer["gradient_accumulation_steps"], trainer["epochs"]) == (4, 8, 1)
    assert (trainer["max_steps_per_epoch"], trainer["max_grad_norm"], config["seed"]) == (11, 0.5, 7)
    adamw = config["optimizer"]
    assert (adamw["lr"], adamw["betas"], adamw["eps"], adamw["weight_decay"]) == (2e-5, [0.9, 0.999], 1e-8, 0.01)
    assert config["scheduler"]["warmup_steps"] == 0
    assert (config["precision"]["param_dtype"], config["dataset"]["val_fraction"]) == ("bfloat16", 0)
    assert config["parallelism"]["activation_checkpointing"] == "full"
    assert config["paths"]["output_dir"] == "/tmp/torchtune/run"
    assert keys(done, "absent") == []


@pytest.mark.parametrize(
    ("overrides", "changes", "key", "value"),
    [
        (["optimizer=torch.optim.SGD", "optimizer.momentum=0.9"], {}, "optimizer.momentum", 0.9),
        (["optimizer.weight_decay=0.1", "optimizer.betas=[0.8,0.9]"], {}, "optimizer.betas", [0.8, 0.9]),
        (["tokenizer.max_seq_len=512"], {}, "seq_len", 512),
        (["tokenizer.max_seq_len=512"], {}, "dataset.too_long", "truncate_keep_eos"),
        (["dataset.packed=True"], {}, "dataset.packing", "greedy"),
        (["dataset.train_on_input=False"], {}, "dataset.train_on_input", False),
        (["shuffle=False"], {}, "dataset.shuffle", False),
        (["dtype=fp32"], {}, "precision.param_dtype", "float32"),
        (["device=cpu"], {}, "device", "cpu"),
        (["log_every_n_steps=5"], {}, "trainer.log_every_steps", 5),
        ([], {"ac_mode": "selective", "ac_option": "op"}, "parallelism.activation_checkpointing", "selective"),
        (
            ["enable_activation_checkpointing=True", "enable_activation_offloading=True"],
            {},
            "parallelism.activation_checkpointing",
            "offload",
        ),
        (["compile=True"], {}, "compile", True),
        (
            ["loss=torchtune.modules.loss.LinearCrossEntropyLoss"],
            {},
            "loss._target_",
            "ftlab.losses.ChunkedCrossEntropy",
        ),
        (["loss=torch.nn.CrossEntropyLoss"], {}, "loss._target_", "ftlab.losses.CrossEntropy"),
        (["fsdp_cpu_offload=True"], {}, "parallelism.cpu_offload", True),
        (["optimizer_in_bwd=True", "gradient_accumulation_steps=1"], {}, "trainer.optimizer_in_backward", True),
        (["optimizer=bitsandbytes.optim.PagedAdamW8bit"], {}, "optimizer.moment_bits", 8),
        (["profiler.enabled=True", "profiler.wait_steps=1"], {}, "trainer.profile_steps", [5, 6]),
        (["enable_async_checkpointing=True"], {}, "checkpoint.async", True),
        (
            [],
            {"metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "mine"}},
            "logger.wandb.project",
            "mine",
        ),
        (
            ["lr_scheduler.num_warmup_steps=30"],
            {"lr_scheduler": {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"}},
            "scheduler.warmup_steps",
            30,
        ),
        (
            ["dataset.source=Rows/Set", "dataset.conversation_column=talk", "dataset.conversation_style=sharegpt"],
            {"dataset": {"_component_": "torchtune.datasets.chat_dataset"}},
            "dataset.template._target_",
            "ftlab.data.templates.Llama3Template",
        ),
        (
            ["dataset.source=Rows/Set", "dataset.column_map.input=q", "dataset.column_map.output=a"],
            {"dataset": {"_component_": "torchtune.datasets.instruct_dataset"}},
            "dataset.column_map.instruction",
            "q",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_each_key_goes_where_it_belongs(translate, overrides, changes, key, value):
    node: Any = translate(*overrides, **changes).config
    for name in key.split("."):
        node = node[name]
    assert node == value


def test_tune_runs_way_of_taking_a_key_out(translate):
    assert translate("~dataset.packed", clip_grad_norm=1.0).config["trainer"]["max_grad_norm"] == 1.0
    with pytest.raises(ConfigError, match="not there"):
        translate("~dataset.packt")
    with pytest.raises(ConfigError, match="not an override"):
        translate("batch_size")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, SINGLE),
        ({"comment": f"tune run {SINGLE} --config mine"}, SINGLE),
        ({"comment": f"tune run --nproc_per_node 4 {DISTRIBUTED} --config mine"}, DISTRIBUTED),
        ({"nproc_per_node": 4}, DISTRIBUTED),
        ({"fsdp_cpu_offload": False}, DISTRIBUTED),
    ],
)
def test_the_recipe_is_told_from_comments_and_keys(translate, given, expected):
    done = translate(**given)
    assert done.recipe == expected
    assert ("parallelism=fsdp" in done.overrides) == (expected == DISTRIBUTED)
    assert ("parallelism.nproc_per_node=4" in done.overrides) == ("nproc_per_node" in given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"_component_": "torchtune.models.llama2.lora_llama2_7b", "lora_rank": 8}}, "low-rank"),
        ({"model": {"_component_": "torchtune.models.llama2.qlora_llama2_7b"}}, "low-rank"),
        ({"quantizer": {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"}}, "integer"),
        ({"teacher_model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}}, "distillation"),
        ({"ppo_epochs": 2}, "PPO"),
        ({"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}}, "DPO"),
        ({"model": {"_component_": "torchtune.models.llama3_2_vision.llama3_2_vision_11b"}}, "images"),
        ({"optimizer": None}, "nothing is trained"),
        ({"comment": "tune run knowledge_distillation_distributed"}, "knowledge_distillation_distributed"),
        ({"optimizer": {"_component_": "torch.optim.Adagrad", "lr": 1}}, "Adagrad"),
        ({"dataset": [{"_component_": "torchtune.datasets.alpaca_dataset"}]}, "several"),
        ({"checkpointer": {"_component_": "torchtune.training.FullModelTorchTuneCheckpointer"}}, "of torchtune's own"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_another_kind_of_training_is_refused_in_words(translate, changes, words):
    with pytest.raises(ConfigError, match=words):
        translate(**changes)


def test_what_has_no_equivalent_is_said_key_by_key(translate):
    done = translate(
        ac_mode="selective",
        enable_activation_offloading=True,
        no_such_key=3,
        tensor_parallel_dim=2,
        resume_from_checkpoint=True,
    )
    said = " ".join(keys(done, "absent"))
    for key in ("tensor_parallel_dim=2", "no_such_key=3", "resume_from_checkpoint", "enable_activation_offloading"):
        assert key in said
    assert {"seed", "batch_size"} <= set(keys(done, "fixed"))


def test_what_a_logger_is_told_goes_to_wandb_or_into_a_comment(translate):
    logger = {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "mine", "name": "foo"}
    logger |= {"tags": ["a", "b"], "job_type": "sft", "group": None, "log_dir": "/elsewhere", "notes": "hi"}
    done = translate(metric_logger=logger)
    wandb = done.config["logger"]["wandb"]
    assert done.config["run_name"] == "foo"
    assert (wandb["project"], wandb["tags"], wandb["job_type"]) == ("mine", ["a", "b"], "sft")
    assert keys(done, "absent") == ["metric_logger.log_dir=/elsewhere", "metric_logger.notes=hi"]
    comet = {"_component_": "torchtune.training.metric_logging.CometLogger", "api_key": "0123456789abcdef"}
    said = keys(translate(metric_logger=comet), "absent")
    assert said == ["metric_logger=CometLogger", "metric_logger.api_key=***"]


def test_the_script_is_a_shell_script_whose_command_is_the_translation(translate, tmp_path, capsys):
    done = translate(dataset={"_component_": "torchtune.datasets.alpaca_dataset", "data_files": "/my rows/a b.json"})
    script = as_script(done, Path("config.yaml"))
    shell = subprocess.run(
        ["bash", "-e"], input=f"python() {{ printf '%s\\0' \"$@\"; }}\n{script}", text=True, stdout=-1
    )
    assert shell.stdout.split("\0")[:-1] == ["train.py", *done.overrides]
    assert max(map(len, script.splitlines())) <= 120
    assert ftlab(["from-torchtune", str(tmp_path / "config.yaml"), "batch_size=3"]) == 0
    assert "trainer.batch_size=3" in capsys.readouterr().out


def test_a_file_that_is_none_is_told(tmp_path, capsys):
    assert ftlab(["from-torchtune", str(tmp_path / "absent.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert ftlab(["from-torchtune", str(tmp_path / "list.yaml")]) == 2
    assert "no mapping" in capsys.readouterr().err
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    assert ftlab(["from-torchtune", str(tmp_path / "torn.yaml")]) == 2
    assert "not valid YAML" in capsys.readouterr().err


# ---- the configurations that torchtune ships

SHIPPED = [
    f"{model}_{kind}"
    for model, kinds in {
        "llama2/7B": ("full", "full_low_memory"),
        "llama2/13B": ("full",),
        "llama3/8B": ("full", "full_single_device"),
        "llama3_1/8B": ("full", "full_single_device"),
        "llama3_2/1B": ("full", "full_single_device"),
        "llama3_2/3B": ("full", "full_single_device"),
        "llama3_3/70B": ("full",),
        "mistral/7B": ("full", "full_low_memory"),
        "qwen2_5/0.5B": ("full", "full_single_device"),
        "qwen2_5/1.5B": ("full_single_device",),
        "qwen2_5/3B": ("full",),
        "qwen2_5/7B": ("full", "full_single_device"),
    }.items()
    for kind in kinds
]


@pytest.fixture(scope="module")
def torchtune() -> Path:
    folder = Path(os.environ.get("FTLAB_TORCHTUNE", "/nowhere"))
    if not (folder / "recipes" / "configs").is_dir():
        pytest.skip("FTLAB_TORCHTUNE names no unpacked wheel of torchtune 0.6.1")
    return folder


def parameters(torchtune: Path, component: str) -> int:
    """Parameters of the model that torchtune's builder makes, counted from the arguments in its source."""
    module, _, name = component.rpartition(".")
    family = module.rpartition(".")[2]
    source = (torchtune / module.replace(".", "/") / "_model_builders.py").read_text()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return parameters(torchtune, f"torchtune.models.llama3_1.{node.value.id}")
        if not isinstance(node, ast.FunctionDef) or node.name != name:
            continue
        [call] = [one.value for one in node.body if isinstance(one, ast.Return)]
        given = {one.arg: one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}
        dim, layers, heads = (given[key] for key in ("embed_dim", "num_layers", "num_heads"))
        hidden = given.get("intermediate_dim") or 256 * math.ceil(4 * int(2 * dim / 3) / 256)
        kv = dim // heads * given["num_kv_heads"]
        biases = dim + 2 * kv if family.startswith("qwen") else 0
        tied = family == "llama3_2" or given.get("tie_word_embeddings", False)
        block = 2 * dim * dim + 2 * dim * kv + 3 * dim * hidden + 2 * dim + biases
        return layers * block + dim + given["vocab_size"] * dim * (1 if tied else 2)
    # Names for what an earlier family builds: llama3_3 is llama3_1's.
    init = (torchtune / module.replace(".", "/") / "_model_builders.py").read_text()
    raise AssertionError(f"{component} is not built in {len(init)} characters of its module")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_plan_of_a_shipped_configuration_is_that_of_torchtune(name, torchtune):
    file = torchtune / "recipes" / "configs" / f"{name}.yaml"
    theirs = yaml.safe_load(file.read_text())
    several = name.endswith("full")
    done = from_torchtune(file, [], nproc_per_node=2 if several else None)
    assert done.recipe == (DISTRIBUTED if several else SINGLE)
    assert [note for note in done.notes if "does not read it" in note.why] == []
    # The option's own weights, which plan does not fetch; short rows: the largest is rehearsed in seconds.
    replaced = ("model.checkpoint=", "seq_len=")
    overrides = [text for text in done.overrides if not text.startswith(replaced)]
    found = plan([*overrides, "seq_len=64"], Given(memory_gib=1e6))
    assert found["model"]["parameters"] == parameters(torchtune, theirs["model"]["_component_"])
    accumulation = theirs["gradient_accumulation_steps"]
    assert found["batch"] == {
        "ranks": 2 if several else 1,
        "batch_size": theirs["batch_size"],
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": theirs["batch_size"] * accumulation * (2 if several else 1),
    }
    ours = done.config["optimizer"]
    assert (ours["lr"], ours["weight_decay"]) == (float(theirs["optimizer"]["lr"]), 0.01)
    assert "adam" in ours["_target_"].lower()
