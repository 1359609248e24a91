"""`ftlab check-data`: what a user sees of data before training on it."""

import json

import pytest

from ftlab.cli import main
from tests.unit.hf_tokenizers import save_kind

GOOD = {"instruction": "Say <b>it</b>.", "input": "", "output": "naïve answer"}


def check(tmp_path, rows, *overrides):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    where = ["dataset=instruct", "dataset.source=jsonl", f"dataset.data_files={file}", "dataset.val_fraction=0"]
    return main(["check-data", "--out", str(tmp_path / "out"), *where, *overrides])


def many(n):
    return [GOOD | {"instruction": f"{GOOD['instruction']} {i}"} for i in range(n)]


def test_sound_data_is_shown_and_passes(tmp_path, capsys):
    assert check(tmp_path, many(20)) == 0
    said = capsys.readouterr().out
    assert "nothing wrong was found" in said
    assert "MiB of tokenised rows and packs in" in said
    assert said.count("is trained:") == 3
    assert "⟦naïve answer⟧⟦</s>⟧" in said
    page = (tmp_path / "out" / "data_check.html").read_text(encoding="utf-8")
    assert '<span class="t ">naïve answer</span>' in page
    assert "<b>it</b>" not in page  # a row's own markup is shown, not obeyed
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_what_would_stop_a_run_is_told_with_all_its_rows_and_a_way_on(tmp_path, capsys):
    rows = many(20)
    rows[3] = b'{"instruction": "a", "input": "", "output": }'
    rows[7] = b'{"instruction": "\xff"}'
    rows[9] = GOOD | {"output": ["x"]}
    assert check(tmp_path, rows) == 2
    said = capsys.readouterr().out
    assert "rows.jsonl:4:45: broken JSON" in said
    assert "byte 0xff at byte offset" in said
    assert "field 'output' (output) of row 9" in said
    assert "dataset.allow=[broken_json,invalid_utf8,wrong_type]" in said
    assert check(tmp_path, rows, "dataset.allow=[broken_json,invalid_utf8,wrong_type]") == 0


def test_data_that_cannot_be_read_at_all_is_an_error_of_two_lines(tmp_path, capsys):
    assert check(tmp_path, []) == 2
    assert "holds no rows" in capsys.readouterr().err
    assert check(tmp_path, many(3), "dataset.filter='len(output'") == 2
    assert len(capsys.readouterr().err.splitlines()) <= 3


@pytest.mark.parametrize("packing", ["none", "best_fit"])
def test_conversations_under_the_tokenizers_own_template(tmp_path, capsys, packing):
    folder = save_kind("qwen", tmp_path / "tokenizer")
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a text"}]
    file.write_text("\n".join(json.dumps({"messages": [*chat, *chat], "i": i}) for i in range(5)))
    assert (
        main(
            [
                *("check-data", "--out", str(tmp_path / "out"), "dataset=chat_own_template", "dataset.source=jsonl"),
                *(f"dataset.data_files={file}", "dataset.val_fraction=0", f"dataset.packing={packing}"),
                *("tokenizer=huggingface", f"tokenizer.path={folder}", "seq_len=128", "dataset.max_samples=3"),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "<|im_start|>assistant" in said
    assert ("% full" in said) == (packing == "best_fit")


def test_a_mixture_tells_the_share_of_every_set(tmp_path, capsys):
    assert main(["check-data", "--out", str(tmp_path), "dataset=mixture"]) == 0
    said = capsys.readouterr().out
    assert "75.0% of an epoch" in said
    assert "0.50 times through" in said


def test_what_stops_a_mixture_is_allowed_in_the_set_that_it_is_in(tmp_path, capsys):
    rows = many(8)
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"instruction": "a", "output": }']))
    check = ["check-data", "--out", str(tmp_path), "dataset.sets={tiny:3,instruct:1}"]
    check += ["dataset=mixture", "dataset.sets.instruct.source=jsonl", "dataset.sets.instruct.val_fraction=0"]
    check += [f"dataset.sets.instruct.data_files={tmp_path / 'rows.jsonl'}"]
    assert main(check) == 2
    [offered] = [line for line in capsys.readouterr().out.splitlines() if "to run all the same" in line]
    typed = offered.partition(": ")[2].split()
    assert typed == ["dataset.sets.instruct.allow=[broken_json]"]
    assert main([*check, *typed]) == 0
