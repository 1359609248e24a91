"""Every option for a known set reads rows of that set's own columns; every text policy keeps what it says."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlab.config.build import build
from ftlab.config.check import compose_config
from ftlab.data.shorten import Piece, shorten
from tests.unit.hf_tokenizers import save_kind

OASST = [  # message_id, parent_id, role, text, rank; two trees
    *(("1", None, "prompter", "How?", None), ("2", "1", "assistant", "badly", 1), ("3", "1", "assistant", "well", 0)),
    *(("4", "3", "prompter", "And then?", 0), ("5", "4", "assistant", "so", None), ("6", "5", "prompter", "?", None)),
]


def oasst_rows():
    rows = []
    for message_id, parent_id, role, text, rank in OASST:
        common = {"user_id": "u", "lang": "en", "deleted": False, "tree_state": "ready_for_export", "labels": None}
        row = {"message_id": message_id, "parent_id": parent_id, "text": text, "role": role, "rank": rank}
        rows.append(common | row | {"message_tree_id": "1"})
    lone = {"message_id": "9", "parent_id": None, "text": "alone?", "role": "prompter", "message_tree_id": "9"}
    return [*rows, common | lone | {"rank": None}]


# The set's own columns, and what the first row's last answer and prompt hold.
SETS = {
    "alpaca": ([{"instruction": "Add.", "input": "1, 2", "output": "3", "text": "all of it"}], "3", "### Input:\n1, 2"),
    "alpaca_cleaned": ([{"instruction": "Add.", "input": "", "output": "3"}], "3", "Add."),
    "dolly": (
        [{"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"}],
        "Ann",
        "### Input:\nAnn came.",
    ),
    "gsm8k": ([{"question": "2+2?", "answer": "It is 4.\n#### 4"}], "It is 4.\n#### 4", "2+2?"),
    "samsum": ([{"id": "1", "dialogue": "A: hi\r\nB: hi", "summary": "They greet."}], "They greet.", "A: hi\r\nB: hi"),
    "grammar": ([{"input": "I goes.", "output": "I go."}], "I go.", "I goes."),
    "slimorca": (
        [
            {
                "conversations": [
                    {"from": "system", "value": "Be kind.", "weight": None},
                    {"from": "human", "value": "Hi", "weight": 0.0},
                    {"from": "gpt", "value": "Hello", "weight": 1.0},
                ]
            }
        ],
        "Hello",
        "Be kind.",
    ),
    "ultrachat": (
        [
            {
                "prompt": "Hi",
                "prompt_id": "x",
                "messages": [
                    {"content": "Hi", "role": "user"},
                    {"content": "Hello", "role": "assistant"},
                    {"content": "Bye", "role": "user"},
                    {"content": "Goodbye", "role": "assistant"},
                ],
            }
        ],
        "Goodbye",
        "Bye",
    ),
    "oasst": (oasst_rows(), "so", "well"),
    # This tokenizer has no BOS: a text goes on from its first token.
    "cnn_dailymail": ([{"article": "It rained.", "highlights": "Rain.", "id": "1"}], "t rained.", "I"),
    "wikitext": ([{"page": " = Rain = \n It falls ."}], " = Rain = \n It falls .", ""),
}


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return save_kind("qwen", tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("name", SETS)
def test_rows_of_the_sets_own_columns_become_samples(name, tmp_path, chat_tokenizer):
    rows, answer, in_prompt = SETS[name]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    local = [f"dataset={name}", "dataset.source=json", f"dataset.data_files={file}", "dataset.val_fraction=0"]
    config = compose_config([*local, "tokenizer=huggingface", f"tokenizer.path={chat_tokenizer}"])
    data = build(
        config["dataset"],
        **{"tokenizer": build(config["tokenizer"]), "seq_len": 512, "seed": 0},
        **{"cache_dir": tmp_path / "cache", "progress": None},
    )
    assert len(data.train) == 1
    assert data.train.answer(0).strip() == answer.strip()
    assert in_prompt in data.tokenizer.decode(data.train.prompt_tokens(0))
    assert data.train.sample(0).trained.any()
    assert [finding.kind for finding in data.findings if finding.stops] == []


def test_of_a_tree_the_best_ranked_path_up_to_its_last_answer_is_read(tmp_path, chat_tokenizer):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(oasst_rows()))
    local = ["dataset=oasst", "dataset.source=json", f"dataset.data_files={file}", "dataset.val_fraction=0"]
    config = compose_config([*local, "tokenizer=huggingface", f"tokenizer.path={chat_tokenizer}"])
    data = build(
        config["dataset"],
        **{"tokenizer": build(config["tokenizer"]), "seq_len": 512, "seed": 0},
        **{"cache_dir": tmp_path / "cache", "progress": None},
    )
    said = data.tokenizer.decode(data.train.tokens(0).tolist())
    assert [word for word in ("How?", "badly", "well", "And then?", "so", "alone?") if word in said] == [
        *("How?", "well", "And then?", "so")
    ]


# ---- too long --------------------------------------------------------------------------------------------


@st.composite
def long_rows(draw):
    n = draw(st.integers(3, 60))
    trained = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    trained[0] = False
    trained[-1] = True
    seq_len = draw(st.integers(2, n - 1))
    return Piece(np.arange(1, n + 1), trained, draw(st.integers(1, n))), seq_len


@settings(max_examples=300, deadline=None)
@given(row=long_rows(), policy=st.sampled_from(["truncate", "truncate_keep_eos", "truncate_left", "split"]))
def test_pieces_fit_keep_the_order_and_train_only_what_was_trained(row, policy):
    whole, seq_len = row
    for piece in shorten(whole, seq_len, policy, end_id=int(whole.tokens[-1]), bos_id=1):
        assert len(piece.tokens) == len(piece.trained) <= seq_len
        assert not piece.trained[0]
        assert piece.trained.any()
        assert 0 <= piece.prompt_len <= len(piece.tokens)
        assert (np.diff(piece.tokens) > 0).all()
        assert set(piece.tokens[piece.trained]) <= set(whole.tokens[whole.trained])


@settings(max_examples=300, deadline=None)
@given(row=long_rows())
def test_split_trains_every_token_exactly_once_after_the_token_before_it(row):
    whole, seq_len = row
    taught = []
    for piece in shorten(whole, seq_len, "split", end_id=-1, bos_id=None):
        taught += [(piece.tokens[i - 1], piece.tokens[i]) for i in np.flatnonzero(piece.trained)]
    wanted = [(whole.tokens[i - 1], whole.tokens[i]) for i in np.flatnonzero(whole.trained)]
    assert taught == wanted


def test_cut_on_the_left_bos_and_end_stay():
    whole = Piece(np.array([1, 5, 6, 7, 8, 2]), np.array([False, False, False, True, True, True]), 3)
    [piece] = shorten(whole, 4, "truncate_left", end_id=2, bos_id=1)
    assert (piece.tokens.tolist(), piece.trained.tolist(), piece.prompt_len) == (
        [1, 7, 8, 2],
        [False, True, True, True],
        1,
    )
    assert shorten(whole, 4, "truncate_keep_eos", end_id=2, bos_id=1) == []  # nothing of the answer is left
    [piece] = shorten(whole, 5, "truncate_keep_eos", end_id=2, bos_id=1)
    assert (piece.tokens.tolist(), piece.trained.tolist()) == ([1, 5, 6, 7, 2], [False, False, False, True, True])


def test_an_end_is_put_back_where_an_answer_was_cut_and_never_into_a_question():
    tokens = np.array([1, 5, 6, 6, 2, 7, 7, 7, 6, 6, 2])  # BOS, question, answer, end, question, answer, end
    whole = Piece(tokens, (tokens == 6) | (tokens == 2), 8)
    for seq_len, left in [
        (4, [1, 5, 6, 2]),
        (6, [1, 5, 6, 6, 2, 7]),
        (7, [1, 5, 6, 6, 2, 7, 7]),
        (9, tokens[:9].tolist()),
    ]:
        [piece] = shorten(whole, seq_len, "truncate_keep_eos", end_id=2, bos_id=1)
        assert piece.tokens.tolist() == left
        assert piece.trained.tolist() == [token in (6, 2) for token in left]
    everything = whole._replace(trained=np.arange(len(tokens)) > 0)
    for seq_len, end in [(7, 7), (8, 7), (9, 6), (10, 2)]:
        [piece] = shorten(everything, seq_len, "truncate_keep_eos", end_id=2, bos_id=1)
        assert piece.tokens.tolist() == [*tokens[: seq_len - 1], end]
