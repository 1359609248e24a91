"""A real pretrained model, SmolLM2-135M: its answers and its training are those of transformers.

The model is looked for where FTLAB_SMOLLM2 says, and otherwise built by the script beside the real data.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlab import IGNORE_INDEX
from ftlab.data.batch import Sample
from ftlab.models.auto import AutoModelConfig, find_model
from ftlab.training.generate import generate
from ftlab.training.loop import fit
from tests.conftest import ROOT
from tests.loop.conftest import build_hand_run

pytestmark = pytest.mark.slow
N_PARAMS = 134_515_008
LONGEST = 96  # tokens of a row: this is about equality, and a CPU's time
PROMPTS = [
    "The capital of France is", "Water boils at", "Once upon a time", "def fibonacci(n):",
    "The three primary colours are",
    "My favourite book is", "In 1969, humans", "The opposite of hot is", "To bake bread, you need",
    "The sun rises in the",
    "2 + 2 =", "A synonym of big is", "The largest planet is", "Dear Sir or Madam,", "The quick brown fox",
    "Photosynthesis is", "She opened the door and", "Shakespeare wrote", "The speed of light is", "Good morning! How",
]  # fmt: skip


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("FTLAB_SMOLLM2"):
        return Path(given)
    script = ROOT.parent / "shared/tools/make_smollm2.py"
    if not script.is_file():
        pytest.skip(f"FTLAB_SMOLLM2 names no folder, and {script} is not here to build one")
    folder = tmp_path_factory.mktemp("smollm2")
    built = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"{script.name} failed: {built.stderr.strip().splitlines()[-1]}")
    return folder


def twin(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


class Rows:
    """Real Alpaca rows, cut to ``LONGEST`` tokens, every token but the first trained."""

    def __init__(self, folder: Path, data: Path, rows: slice):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in json.loads(data.read_text())[rows]]
        self.rows = [np.array(tokenizer(text)["input_ids"][:LONGEST], dtype=np.int32) for text in texts]

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        return Sample(tokens=self.rows[index], trained=np.ones(len(self.rows[index]), bool), sample_id=index)


def test_greedy_answers_are_those_of_transformers_token_by_token(smollm2):
    config, folder = find_model(AutoModelConfig(checkpoint=str(smollm2)))
    assert config.n_params() == N_PARAMS
    trial = build_hand_run([], model_config=config, checkpoint=folder, max_steps=1)
    tokenizer, theirs = AutoTokenizer.from_pretrained(smollm2), twin(smollm2)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    eos = tokenizer.eos_token_id
    answers = generate(
        trial.run.state.model, prompts, max_new_tokens=24, end_ids=[eos], temperature=0.0, top_p=1.0, seed=0
    )
    for text, prompt, answer in zip(PROMPTS, prompts, answers, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=eos, pad_token_id=eos,
            repetition_penalty=1.0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == (expected[: expected.index(eos)] if eos in expected else expected), text


def test_losses_are_those_of_a_plain_loop_and_fifty_steps_lower_validation(smollm2, shared_data):
    config, folder = find_model(AutoModelConfig(checkpoint=str(smollm2)))
    data = shared_data / "alpaca_en_demo.json"
    trial = build_hand_run(
        Rows(smollm2, data, slice(0, 100)), model_config=config, checkpoint=folder, batch_size=2, shuffle=False,
        optimizer=torch.optim.AdamW, lr=2e-5, max_grad_norm=None, max_steps=50,
    )  # fmt: skip
    validation = [torch.from_numpy(row.astype(np.int64))[None] for row in Rows(smollm2, data, slice(900, 916)).rows]

    @torch.no_grad()
    def validation_loss() -> float:
        logits = [(trial.run.state.model(row)[0, :-1], row[0, 1:]) for row in validation]
        total = sum(F.cross_entropy(of_row, targets, reduction="sum") for of_row, targets in logits)
        return float(total) / sum(len(targets) for _, targets in logits)

    theirs = twin(smollm2).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-5, weight_decay=0.0)
    expected = []
    for [batch] in list(trial.run.loader.steps(0))[:10]:
        logits = theirs(batch.tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())

    before = validation_loss()
    fit(trial.run)
    after = validation_loss()
    deviations = [abs(ours / loss - 1) for ours, loss in zip(trial.losses[:10], expected, strict=True)]
    print(f"validation {before:.4f} -> {after:.4f}; first ten losses deviate by {max(deviations):.1e} at most")
    assert max(deviations) < 1e-4
    assert after < before
